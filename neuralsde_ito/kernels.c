/* What a network does between its convolutions, in one pass over the state: the noise of noise/normals.py (the same
 * words; the same normals within float32's rounding), and ReLUs that remember which numbers they let through.
 *
 * The inner loops have no branches, so that a compiler can vectorise them. On x86-64 they are compiled three times,
 * for three kinds of processors; the right one is chosen when the program runs. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { TILE = 256 }; /* pairs of numbers at a time: they fit the innermost cache */

union halves {
    uint64_t words[TILE / 2 + 1];
    int32_t halves[TILE + 2];
};

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* u = 2^e (1 + m), 1 + m in [1/sqrt 2, sqrt 2); log(1 + m) = m + m^2 R(m). R, like the polynomials below, is a weighted
 * minimax fit; its relative error is 6e-8. */
INLINE float logarithm(float u) {
    int32_t bits;
    float m;
    memcpy(&bits, &u, sizeof bits);
    const int32_t e = (bits - 0x3f3504f3) >> 23;
    bits -= (int32_t)((uint32_t)e << 23);
    memcpy(&m, &bits, sizeof m);
    m -= 1.0f;
    float r = 0.0873661637f;
    r = r * m - 0.143076017f;
    r = r * m + 0.149173543f;
    r = r * m - 0.165704697f;
    r = r * m + 0.199621335f;
    r = r * m - 0.250017583f;
    r = r * m + 0.333339483f;
    r = r * m - 0.499999911f;
    return (float)e * 0.693147181f + (m + m * m * r);
}

/* Numbers of a state: float32, or bfloat16, the upper half of a float32. They are widened before any arithmetic and rounded
 * once, to the nearest even, at the end. `brief` is a constant wherever these are inlined. */
INLINE float get(const void *x, int64_t i, int brief) {
    if (!brief)
        return ((const float *)x)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void put(void *x, int64_t i, float value, int brief) {
    uint32_t bits;
    if (!brief) {
        ((float *)x)[i] = value;
        return;
    }
    memcpy(&bits, &value, sizeof bits);
    bits += value == value ? 0x7fffu + (bits >> 16 & 1) : 0; /* a NaN that torch makes stays one without its lower half */
    ((uint16_t *)x)[i] = (uint16_t)(bits >> 16);
}

INLINE void mix(union halves *out, const int64_t *elements, int64_t key, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint64_t word = (uint64_t)(key ^ elements[i]) * 0xBF58476D1CE4E5B9u;
        word ^= (uint64_t)((int64_t)word >> 32);
        out->words[i] = word * 0x94D049BB133111EBu;
    }
}

/* A key with an address mixed in, as noise/keys.py absorbs it. */
INLINE int64_t absorb(int64_t key, int64_t address) {
    uint64_t z = (uint64_t)key * 0xBF58476D1CE4E5B9u + (uint64_t)address;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (int64_t)(z ^ z >> 31);
}

/* Pairs first to first + n - 1 of a row. The halves of the row's first words give the radii, those of the others the
 * angles. */
INLINE void box_muller(float *cosines, float *sines, const int64_t *elements, int64_t key, int64_t half, int64_t first,
                       int64_t n, float scale) {
    union halves low, high;
    const int64_t second = half + first;
    mix(&low, elements + first / 2, key, (first % 2 + n + 1) / 2);
    mix(&high, elements + second / 2, key, (second % 2 + n + 1) / 2);
    for (int64_t i = 0; i < n; i++) {
        const float u = fabsf((float)low.halves[first % 2 + i]) * (1.0f / 2147483649.0f) + 0.5f / 2147483649.0f;
        const float radius = scale * sqrtf(-2.0f * logarithm(u));
        /* The angle is pi / 2^31 of the integer: its quadrant, and v in [-1/2, 1/2) quarter turns from there. */
        const uint32_t angle = (uint32_t)high.halves[second % 2 + i];
        const int32_t quadrant = (int32_t)(angle + 0x20000000u) >> 30;
        const float v = (float)((int32_t)(angle << 2) >> 2) * 0x1p-30f, z = v * v;
        const float s = v * (1.57079637f + z * (-0.64596349f + z * (0.0796802267f + z * -0.00460217707f)));
        const float c = 1.0f + z * (-1.23370051f + z * (0.253669202f + z * (-0.0208600722f + z * 0.000903631677f)));
        const float sine = quadrant & 1 ? c : s, cosine = quadrant & 1 ? s : c;
        sines[i] = radius * (quadrant & 2 ? -sine : sine);
        cosines[i] = radius * ((quadrant + 1) & 2 ? -cosine : cosine);
    }
}

/* A word gives two pairs: one belongs to a pixel, the other to the next pixel. */
INLINE void by_pixels(float *noise, const float *cosines, const float *sines, int64_t n, int64_t pairs) {
    for (int64_t i = 0; i < n; i += 2 * pairs, noise += 4 * pairs)
        for (int64_t c = 0; c < pairs; c++) {
            noise[c] = cosines[i + 2 * c];
            noise[pairs + c] = sines[i + 2 * c];
            noise[2 * pairs + c] = cosines[i + 2 * c + 1];
            noise[3 * pairs + c] = sines[i + 2 * c + 1];
        }
}

/* relu(x + skip), or relu(x) without a skip. `passed`, if it is given, receives whether the number went through; NaN
 * goes through. The compiler tests `skip` and `passed` once, before the loop. */
INLINE float relu(const void *x, const void *skip, uint8_t *passed, int64_t i, int brief) {
    float sum = get(x, i, brief);
    if (skip)
        sum += get(skip, i, brief);
    if (passed)
        passed[i] = !(sum <= 0.0f);
    return sum <= 0.0f ? 0.0f : sum;
}

INLINE void add_one(void *out, const void *x, const void *skip, uint8_t *passed, int64_t i, float noise, int rectified,
                    int brief) {
    put(out, i, (rectified ? relu(x, skip, passed, i, brief) : get(x, i, brief)) + noise, brief);
}

/* out = x + scale * normals, or relu(x + skip) + scale * normals if `rectified`, for states of `rows` images with
 * 2 * half numbers each. They are contiguous (channels = 1), or channels_last with an even number of channels (at most
 * 256) and of pixels. `elements` are in the order of the state. `address` is mixed into the keys, unless it is NULL. `x`
 * and `out` may be the same. */
INLINE void add(void *out, const void *x, const void *skip, uint8_t *passed, const int64_t *keys, const int64_t *address,
                int64_t rows, const int64_t *elements, int64_t half, int64_t channels, float scale, int rectified,
                int brief) {
    float cosines[TILE], sines[TILE], noise[2 * TILE];
    const int64_t pairs = channels / 2, most = TILE / channels * channels;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t key = address ? absorb(keys[row], *address) : keys[row];
        for (int64_t from = 0; from < half; from += most) {
            const int64_t first = 2 * half * row + from, second = first + half, pixels = 2 * half * row + 2 * from;
            const int64_t n = half - from < most ? half - from : most;
            box_muller(cosines, sines, elements, key, half, from, n, scale);
            if (channels == 1) { /* two loops, as a compiler compares only so many pointers before one */
                for (int64_t i = 0; i < n; i++)
                    add_one(out, x, skip, passed, first + i, cosines[i], rectified, brief);
                for (int64_t i = 0; i < n; i++)
                    add_one(out, x, skip, passed, second + i, sines[i], rectified, brief);
            } else {
                if (pairs == 8) /* a constant lets the compiler unroll the short loop */
                    by_pixels(noise, cosines, sines, n, 8);
                else
                    by_pixels(noise, cosines, sines, n, pairs);
                for (int64_t i = 0; i < 2 * n; i++)
                    add_one(out, x, skip, passed, pixels + i, noise[i], rectified, brief);
            }
        }
    }
}

INLINE void add_normals(void *out, const void *x, const void *skip, uint8_t *passed, const int64_t *keys,
                        const int64_t *address, int64_t rows, const int64_t *elements, int64_t half, int64_t channels,
                        float scale, int rectified, int brief) {
    if (rectified && brief)
        add(out, x, skip, passed, keys, address, rows, elements, half, channels, scale, 1, 1);
    else if (rectified)
        add(out, x, skip, passed, keys, address, rows, elements, half, channels, scale, 1, 0);
    else if (brief)
        add(out, x, skip, passed, keys, address, rows, elements, half, channels, scale, 0, 1);
    else
        add(out, x, skip, passed, keys, address, rows, elements, half, channels, scale, 0, 0);
}

INLINE void rectify_all(void *x, const void *skip, uint8_t *passed, int64_t n, int brief) {
    for (int64_t i = 0; i < n; i++)
        put(x, i, relu(x, skip, passed, i, brief), brief);
}

INLINE void rectify(void *x, const void *skip, uint8_t *passed, int64_t n, int brief) {
    if (brief)
        rectify_all(x, skip, passed, n, 1);
    else
        rectify_all(x, skip, passed, n, 0);
}

/* x = x + skip (or x without a skip) where the number went through, otherwise 0. */
INLINE void gate_all(void *x, const void *skip, const uint8_t *passed, int64_t n, int brief) {
    for (int64_t i = 0; i < n; i++) {
        float sum = get(x, i, brief);
        if (skip)
            sum += get(skip, i, brief);
        put(x, i, passed[i] ? sum : 0.0f, brief);
    }
}

INLINE void gate(void *x, const void *skip, const uint8_t *passed, int64_t n, int brief) {
    if (brief)
        gate_all(x, skip, passed, n, 1);
    else
        gate_all(x, skip, passed, n, 0);
}

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#define WIDE "avx2,fma,avx512f,avx512dq,avx512bw,avx512vl"
#else
#define WIDE "avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512" /* a third faster than 256 */
#endif
#define PUBLIC(name, function, parameters, arguments)                                                        \
    __attribute__((target("avx2,fma"))) static void function##_avx2 parameters { function arguments; }       \
    __attribute__((target(WIDE))) static void function##_wide parameters { function arguments; }             \
    static void function##_anywhere parameters { function arguments; }                                       \
    void name parameters {                                                                                   \
        if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&                      \
            __builtin_cpu_supports("avx512vl"))                                                              \
            function##_wide arguments;                                                                       \
        else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))                            \
            function##_avx2 arguments;                                                                       \
        else                                                                                                 \
            function##_anywhere arguments;                                                                   \
    }
#else
#define PUBLIC(name, function, parameters, arguments) \
    void name parameters { function arguments; }
#endif

/* If the parameters or their meaning change, change the name: then a library that was built earlier is not used. */
PUBLIC(ito_add_normals_5, add_normals,
       (void *out, const void *x, const void *skip, uint8_t *passed, const int64_t *keys, const int64_t *address,
        int64_t rows, const int64_t *elements, int64_t half, int64_t channels, float scale, int rectified, int brief),
       (out, x, skip, passed, keys, address, rows, elements, half, channels, scale, rectified, brief))
PUBLIC(ito_rectify_2, rectify, (void *x, const void *skip, uint8_t *passed, int64_t n, int brief),
       (x, skip, passed, n, brief))
PUBLIC(ito_gate_2, gate, (void *x, const void *skip, const uint8_t *passed, int64_t n, int brief),
       (x, skip, passed, n, brief))
