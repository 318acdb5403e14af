/* What a network does between its convolutions, in one pass over the state: the noise of noise.py (its words and
 * normals, within float32's rounding), and ReLUs that remember what they let through.
 *
 * The inner loops are straight lines, so that a compiler makes vectors of them; on x86-64 they are compiled three
 * times, and the processor decides which of them runs. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { TILE = 256 }; /* pairs of numbers at a time, that the innermost cache holds */

union halves {
    uint64_t words[TILE / 2 + 1];
    int32_t halves[TILE + 2];
};

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* u = 2^e (1 + m), 1 + m in [1/sqrt 2, sqrt 2); log(1 + m) = m + m^2 R(m). R, as the polynomials below, is a weighted
 * least-maximum fit; relative error 6e-8. */
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

INLINE void mix(union halves *out, const int64_t *elements, int64_t key, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint64_t word = (uint64_t)(key ^ elements[i]) * 0xBF58476D1CE4E5B9u;
        word ^= (uint64_t)((int64_t)word >> 32);
        out->words[i] = word * 0x94D049BB133111EBu;
    }
}

/* Pairs first to first + n of a row: sizes are the halves of its first words, angles those of the others. */
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

/* One of a word's two pairs is of a pixel, the other of the next. */
INLINE void by_pixels(float *noise, const float *cosines, const float *sines, int64_t n, int64_t pairs) {
    for (int64_t i = 0; i < n; i += 2 * pairs, noise += 4 * pairs)
        for (int64_t c = 0; c < pairs; c++) {
            noise[c] = cosines[i + 2 * c];
            noise[pairs + c] = sines[i + 2 * c];
            noise[2 * pairs + c] = cosines[i + 2 * c + 1];
            noise[3 * pairs + c] = sines[i + 2 * c + 1];
        }
}

/* out = x + scale * normals, for states of `rows` images, 2 * half numbers each: contiguous (channels = 1), or
 * channels_last with an even number of channels, 256 at most, and of pixels; `elements` are in the order in which the
 * state is. `x` and `out` may be one. */
INLINE void add_normals(float *out, const float *x, const int64_t *keys, int64_t rows, const int64_t *elements,
                        int64_t half, int64_t channels, float scale) {
    float cosines[TILE], sines[TILE], noise[2 * TILE];
    const int64_t pairs = channels / 2, most = TILE / channels * channels;
    for (int64_t row = 0; row < rows; row++, out += 2 * half, x += 2 * half)
        for (int64_t from = 0; from < half; from += most) {
            const int64_t n = half - from < most ? half - from : most;
            box_muller(cosines, sines, elements, keys[row], half, from, n, scale);
            if (channels == 1)
                for (int64_t i = 0; i < n; i++) {
                    out[from + i] = x[from + i] + cosines[i];
                    out[half + from + i] = x[half + from + i] + sines[i];
                }
            else {
                if (pairs == 8) /* so few that it pays to tell the compiler */
                    by_pixels(noise, cosines, sines, n, 8);
                else
                    by_pixels(noise, cosines, sines, n, pairs);
                for (int64_t i = 0; i < 2 * n; i++)
                    out[2 * from + i] = x[2 * from + i] + noise[i];
            }
        }
}

/* x = relu(x + skip), where there is a skip; `passed`, where it is asked for, says which numbers went through, NaN
 * among them. */
INLINE void rectify(float *x, const float *skip, uint8_t *passed, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float sum = skip ? x[i] + skip[i] : x[i]; /* the compiler asks once, before the loop */
        if (passed)
            passed[i] = !(sum <= 0.0f);
        x[i] = sum <= 0.0f ? 0.0f : sum;
    }
}

/* x + skip, where there is a skip, of what went through, and 0 of the rest. */
INLINE void gate(float *x, const float *skip, const uint8_t *passed, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float sum = skip ? x[i] + skip[i] : x[i];
        x[i] = passed[i] ? sum : 0.0f;
    }
}

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#define WIDE "avx2,fma,avx512f,avx512dq,avx512bw,avx512vl"
#else
#define WIDE "avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512" /* a third quicker than 256 */
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

/* Whoever changes the parameters or their meaning changes the name: a library that was built before is not found then. */
PUBLIC(ito_add_normals_2, add_normals,
       (float *out, const float *x, const int64_t *keys, int64_t rows, const int64_t *elements, int64_t half,
        int64_t channels, float scale),
       (out, x, keys, rows, elements, half, channels, scale))
PUBLIC(ito_rectify_1, rectify, (float *x, const float *skip, uint8_t *passed, int64_t n), (x, skip, passed, n))
PUBLIC(ito_gate_1, gate, (float *x, const float *skip, const uint8_t *passed, int64_t n),
       (x, skip, passed, n))
