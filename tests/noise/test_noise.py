"""The generator is held against plain integers and the normal law; the path against Brownian motion's law."""

import itertools
import math

import pytest
import torch
import torchsde
from problems import random_images, smooth_chain
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from neuralsde_ito import kernels
from neuralsde_ito.models.recast import recast
from neuralsde_ito.noise import keys as keys_
from neuralsde_ito.noise import normals as noise
from neuralsde_ito.noise.brownian import BrownianPath
from neuralsde_ito.noise.keys import PURPOSES, fresh_keys, make_keys
from neuralsde_ito.noise.normals import normals
from neuralsde_ito.validation import ItoError

# Seeds are fixed, so a test passes for good or fails for good. What the thresholds mean: a correct generator
# exceeds |z| = 4.9 with probability 1e-6 in one comparison; there are about a thousand in this file.
Z = 4.9

MASK = (1 << 64) - 1
M1, M2, GOLDEN = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15  # as published


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * M1) & MASK
    z = ((z ^ (z >> 27)) * M2) & MASK
    return z ^ (z >> 31)


def absorb(state: int, field: int) -> int:
    return mix((state * M1 + mix((field + GOLDEN) & MASK)) & MASK)


def signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def z_of_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm())) * math.sqrt(a.numel())


def assert_unrelated(a: torch.Tensor, b: torch.Tensor, what: object) -> None:
    """Neither the values nor their sizes are correlated."""
    assert abs(z_of_correlation(a, b)) < Z, what
    assert abs(z_of_correlation(a.double() ** 2, b.double() ** 2)) < Z, what


# --- the generator against plain integers ---------------------------------------------------------------


def test_the_finaliser_is_splitmix64s():
    gen = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**63), 2**63 - 1, (2000,), generator=gen).tolist()
    words += [0, 1, -1, 2**63 - 1, -(2**63), 2**31, -(2**31)]
    assert keys_.mix_(torch.tensor(words)).tolist() == [signed(mix(w & MASK)) for w in words]


def test_the_elements_are_the_published_first_outputs_of_splitmix64():
    # Seed 0 of the reference implementation by Vigna, https://prng.di.unimi.it/splitmix64.c
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert noise.mixed_elements(4, torch.device("cpu"))[0].tolist() == [signed(w) for w in published]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_keys_and_normals_against_plain_python(size):
    # Written out with Python's integers, it also pins the law: keys in a report must replay in every version.
    fields = (-5, 3, 2, 2**40 + 1)  # seed, member, inference, image
    state = PURPOSES.index("selection") + 1
    for field in fields:
        state = absorb(state, field & MASK)
    seed, member, inference, image = fields
    keys = make_keys(seed, "selection", member, inference, torch.tensor([image]))
    assert keys.tolist() == [signed(state)]

    address = (4, 2, 3, 1)
    folded = len(address)
    for field in address:
        folded = absorb(folded, field)
    state = absorb(state, folded)
    half = (size + 1) // 2
    lanes = []  # two signed 32-bit integers a word, the lower one first
    for i in range(1, half + 1):
        word = ((state ^ mix((i * GOLDEN) & MASK)) * M1) & MASK
        word = ((word ^ ((signed(word) >> 32) & MASK)) * M2) & MASK
        lanes += [low - (1 << 32) if low >> 31 else low for low in (word & 0xFFFFFFFF, word >> 32)]
    radius = [math.sqrt(-2 * math.log((abs(lane) + 0.5) / (2**31 + 1))) for lane in lanes[:half]]
    angle = [lane * math.pi / 2**31 for lane in lanes[half:]]
    expected = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    expected += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    got = normals(keys, size, *address, dtype=torch.float64)[0].tolist()
    assert got == pytest.approx(expected[:size], rel=1e-13, abs=1e-13)


def test_fields_of_a_key_broadcast():
    keys = make_keys(7, "train", torch.arange(2)[:, None, None], torch.arange(3)[:, None], torch.arange(4))
    assert keys.shape == (2, 3, 4)
    assert keys[1, 2, 3] == make_keys(7, "train", 1, 2, 3)


@pytest.mark.parametrize("seed", [2**64 - 1, 2**63, -(2**63), 2**63 - 1])
def test_any_seed_of_64_bits_names_a_key(seed):
    assert make_keys(seed, "report", index=torch.arange(1)).tolist() == [
        signed(absorb(absorb(absorb(absorb(PURPOSES.index("report") + 1, seed & MASK), 0), 0), 0))
    ]


def test_errors_of_keys():
    with pytest.raises(ValueError, match=r"Unknown purpose 'reprot'.*report"):
        make_keys(0, "reprot")
    with pytest.raises(ValueError, match="int64 of shape"):
        normals(torch.zeros(3), 4)
    with pytest.raises(ValueError, match="int64 of shape"):
        normals(torch.zeros((), dtype=torch.int64), 4)


@pytest.fixture(params=["one pass", "tensors"])
def way(request, monkeypatch):
    """Either way to draw float32 on a CPU."""
    if request.param == "tensors":
        monkeypatch.setattr(kernels, "library", None)
    elif kernels.library is None:
        pytest.skip("the package was built without a C compiler: there is no noise in one pass")


def test_fresh_keys_cannot_be_reseeded():
    torch.manual_seed(0)
    first = fresh_keys(5)
    torch.manual_seed(0)
    assert first.unique().numel() == 5
    assert not (first == fresh_keys(5)).any()


# --- the normal law -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_and_tails(dtype):
    keys = make_keys(0, "report", index=torch.arange(512))
    x = normals(keys, 4096, 0, 0, 0, 0, dtype=dtype).double().flatten()
    n = x.numel()  # 2 million: a variance that is wrong by 0.5 % shows
    assert x.isfinite().all()
    assert abs(float(x.mean())) * math.sqrt(n) < Z
    # Variances of the estimators under the normal law: x^2 has 2, x^3 has 15, x^4 has 96.
    for power, moment, variance in ((2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) / math.sqrt(variance / n) < Z, f"moment {power}"
    for sigmas in (1.0, 2.0, 3.0, 3.5, 4.0):
        p = stats.norm.sf(sigmas)
        for tail in (x > sigmas, x < -sigmas):
            assert abs(int(tail.sum()) - n * p) / math.sqrt(n * p) < Z, f"beyond {sigmas} sigma"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kolmogorov_smirnov_overall_by_key_and_by_element(dtype):
    x = normals(make_keys(1, "train", index=torch.arange(200)), 250, 3, 0, 0, 0, dtype=dtype).double().numpy()
    assert stats.kstest(x.ravel(), "norm").pvalue > 1e-5
    # 450 more tests, of single rows and columns: their p-values are uniform, so the least is about 1/450.
    for lines in (x, x.T):
        p = [stats.kstest(line, "norm", method="asymp").pvalue for line in lines]
        assert min(p) > 1e-5 / 450
        assert stats.kstest(p, "uniform").pvalue > 1e-5


def test_elements_of_one_key_are_unrelated():
    size = 40001
    x = normals(make_keys(2, "report", index=torch.arange(8)), size, 0, 0, 0, 0)
    half = (size + 1) // 2
    # Lag `half` compares the two normals of one word (a radius in common); half +- 1 those of neighbours.
    for lag in (1, 2, 3, 4, 8, 16, 64, 256, 1024, 4096, half - 1, half, half + 1):
        assert_unrelated(x[:, :-lag], x[:, lag:], f"lag {lag}")


FIELDS = ("seed", "purpose", "member", "inference", "image", "block", "level", "index", "component")


def draw(**changed):
    values = {"purpose": "report"} | changed
    seed, purpose, member, inference, image, *address = (values.get(field, 0) for field in FIELDS)
    keys = make_keys(seed, purpose, member, inference, image + 1000 * torch.arange(8))
    return normals(keys, 16384, *address)


CHANGES = [(field, change) for field in FIELDS if field != "purpose" for change in (1, 2, 3, 10, 2**16, -1)]
CHANGES += [("purpose", purpose) for purpose in PURPOSES if purpose != "report"]


@pytest.mark.parametrize(("field", "change"), CHANGES, ids=lambda v: str(v))
def test_a_change_of_any_field_gives_unrelated_noise(field, change):
    a, b = draw(), draw(**{field: change})
    # The lags would show a stream that is only shifted, as when a field is an offset of the counter.
    for lag in (0, 1, 2):
        assert_unrelated(a[:, lag:], b[:, : b.shape[1] - lag], f"{field} {change}, lag {lag}")
        assert_unrelated(b[:, lag:], a[:, : a.shape[1] - lag], f"{field} {change}, lag -{lag}")


def test_changes_of_two_fields_are_unrelated():
    # A field that were added, not mixed, would make (1, 0) and (0, 1) the same stream.
    for one, other in itertools.combinations([f for f in FIELDS if f != "purpose"], 2):
        assert_unrelated(draw(**{one: 1}), draw(**{other: 1}), (one, other))


def test_no_normal_is_drawn_twice_under_any_two_names():
    seeds, members, inferences = torch.meshgrid(*map(torch.arange, (4, 3, 3)), indexing="ij")
    keys = make_keys(seeds[..., None], "report", members[..., None], inferences[..., None], torch.arange(6)).flatten()
    keys = torch.cat(
        [keys, *(make_keys(0, purpose, index=torch.arange(6)) for purpose in PURPOSES if purpose != "report")]
    )
    assert keys.unique().numel() == keys.numel()
    values = [
        normals(keys, 40, *address, dtype=torch.float64)
        for address in itertools.product(range(3), range(3), range(4), range(2))
    ]
    x = torch.cat(values).flatten()
    # 700 thousand doubles of about 50 random bits: the chance of a coincidence is 2e-4.
    assert x.unique().numel() == x.numel()


def test_keys_of_a_large_evaluation_are_distinct():
    # 3 members, 20 inferences, 20,000 images: 1.2 million of 2^64, chance of a coincidence 4e-8.
    members, inferences, images = (
        torch.arange(3)[:, None, None],
        torch.arange(20)[:, None],
        torch.arange(20000),
    )
    keys = make_keys(0, "report", members, inferences, images)
    assert keys.unique().numel() == keys.numel()
    ones = sum(int(((keys >> bit) & 1).sum()) for bit in range(64))
    assert abs(ones - 32 * keys.numel()) / math.sqrt(16 * keys.numel()) < Z


# --- the noise of an image is its own -------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 17, 1001, 3072, 16385])
def test_noise_does_not_depend_on_the_batch(size, dtype):
    keys = make_keys(3, "report", index=torch.arange(256))
    whole = normals(keys, size, 1, 0, 0, 0, dtype=dtype)
    assert whole.shape == (256, size)
    assert whole.dtype == dtype
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    for part in ([0], [255], list(range(7)), list(range(100, 107)), [9, 3, 200], order.tolist()):
        assert torch.equal(normals(keys[part], size, 1, 0, 0, 0, dtype=dtype), whole[part])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_depends_neither_on_threads_nor_on_the_global_random_state(dtype):
    keys = make_keys(4, "report", index=torch.arange(64))
    threads = torch.get_num_threads()
    outcomes = []
    try:
        for count, seed in ((1, 0), (2, 0), (1, 1), (2, 2)):
            torch.set_num_threads(count)
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            outcomes.append(normals(keys, 16385, 0, 0, 0, 0, dtype=dtype))
            assert torch.equal(state, torch.get_rng_state()), "it drew from the global generator"
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


@pytest.mark.usefixtures("way")
def test_a_longer_state_does_not_reuse_a_shorter_ones_words_wrongly():
    # Odd and even sizes share words, and the last normal of an odd size is cut off, not invented.
    keys = make_keys(5, "report", index=torch.arange(4))
    assert torch.equal(normals(keys, 1001, 0), normals(keys, 1002, 0)[:, :1001])


@pytest.mark.usefixtures("way")
def test_float32_and_float64_are_the_same_normals():
    keys = make_keys(6, "report", index=torch.arange(64))
    half = 8192
    single = normals(keys, 2 * half, 0).double()
    double = normals(keys, 2 * half, 0, dtype=torch.float64)
    # float32 rounds u by 2^-24; sqrt(-2 log u) makes that 2^-24 / radius. Only normals next to 0 notice.
    radius = torch.hypot(double[:, :half], double[:, half:]).repeat(1, 2)
    error = (single - double).abs()
    assert (error <= 2.0**-21 * (radius + 1 / radius)).all()
    assert float(error.mean()) < 1e-7


# --- the path -------------------------------------------------------------------------------------------


def brownian(n=4, size=5, block=2, t0=2.0, t1=3.0, dtype=torch.float64, seed=0) -> BrownianPath:
    return BrownianPath(make_keys(seed, "report", index=torch.arange(n)), size, block, t0, t1, dtype=dtype)


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (2.0, 3.0), (0.75, 1.125)])
def test_coarse_cells_are_the_sums_of_fine_ones(t0, t1):
    path = brownian(t0=t0, t1=t1)
    for level in range(7):
        h = (t1 - t0) / 2**level
        for index in range(2**level):
            w, area = path.cell(level, index)
            u = h * (w / 2 + area)
            for below in range(level + 1, 7):
                count = 2 ** (below - level)
                fine = [path.cell(below, index * count + k) for k in range(count)]
                fine_w = sum(f[0] for f in fine)
                # U of the whole: each piece's own, and for its length what W had reached before it.
                fine_u, before = torch.zeros_like(w), torch.zeros_like(w)
                for piece, piece_area in fine:
                    fine_u = fine_u + h / count * (piece / 2 + piece_area + before)
                    before = before + piece
                assert float((fine_w - w).abs().max()) < 1e-12
                assert float((fine_u - u).abs().max()) < 1e-12
            if level >= 5:
                break  # one cell is enough where cells are many


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_w_and_h_on_cells_have_brownian_motions_law(level):
    # 250,000 paths. W ~ N(0, h) and H ~ N(0, h / 12), all independent: of each other and between cells.
    t0, t1 = 1.0, 1.5
    path = brownian(n=250, size=1000, t0=t0, t1=t1, seed=11)
    h = (t1 - t0) / 2**level
    w, area = zip(*(path.cell(level, k) for k in range(2**level)), strict=True)
    x = torch.cat([torch.stack(w) / math.sqrt(h), torch.stack(area) / math.sqrt(h / 12)]).flatten(1)
    n = x.shape[1]
    z = (x @ x.T / n - torch.eye(len(x), dtype=x.dtype)) * math.sqrt(n)
    z.diagonal().div_(math.sqrt(2))
    assert float(z.abs().max()) < Z  # 136 entries at most: 1e-4 altogether
    assert float((x.mean(1) * math.sqrt(n)).abs().max()) < Z
    # Independent, not only uncorrelated: the squares are uncorrelated too (their variance is 2).
    q = x.square() - 1
    z = (q @ q.T / (2 * n)).fill_diagonal_(0) * math.sqrt(n)
    assert float(z.abs().max()) < Z
    for row in x[:: max(1, len(x) // 4)]:
        assert stats.kstest(row[:20000].numpy(), "norm").pvalue > 1e-5


def test_the_bridge_is_the_one_that_is_written_down():
    keys, t0, t1 = make_keys(3, "report", index=torch.arange(4)), 1.0, 1.5

    def normal(variance: float, *address: int) -> torch.Tensor:
        return math.sqrt(variance) * normals(keys, 6, 2, *address, dtype=torch.float64)

    h = t1 - t0
    W, H = normal(h, 0, 0, 0), normal(h / 12, 0, 0, 1)
    z, n = normal(h / 4, 1, 0, 0), normal(h / 48, 1, 0, 1)
    W_left = W / 2 + 3 * H / 2 + z / 2
    expected = {0: (W_left, (H - z) / 4 + n), 1: (W - W_left, (H - z) / 4 - n)}
    for index, (w, area) in expected.items():
        path = BrownianPath(keys, 6, 2, t0, t1, dtype=torch.float64)
        for found, wanted in zip(path.cell(1, index), (w, area), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
        u = path(t0 + index * h / 2, t0 + (index + 1) * h / 2, return_U=True)[1]
        torch.testing.assert_close(u, h / 2 * (w / 2 + area), rtol=0, atol=1e-14)


def by_recursion(keys: torch.Tensor, size: int, dtype: torch.dtype, level: int, index: int) -> list[torch.Tensor]:
    """``[W, H]`` of a cell of block 2 on [0, 1]: the bridge as it is written down, from the root, with no memory."""

    def normal(variance: float, *address: int) -> torch.Tensor:
        addressed = keys_.absorb(keys, keys_.fold_address((2, *address)))
        return noise.scaled_normals(addressed, size, dtype, math.sqrt(variance))

    if level == 0:
        return [normal(1, 0, 0, 0), normal(1 / 12, 0, 0, 1)]
    parent, h = index // 2, 2.0 ** (1 - level)
    W, H = by_recursion(keys, size, dtype, level - 1, parent)
    z, n = normal(h / 4, level, parent, 0), normal(h / 48, level, parent, 1)
    W_left, H_left = torch.add(W, H, alpha=3).lerp(z, 0.5), torch.add(n, H - z, alpha=0.25)
    return [W - W_left, torch.sub(H_left, n, alpha=2)] if index % 2 else [W_left, H_left]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [3, 4, 5, 10, 12])
def test_a_path_read_from_left_to_right_is_the_recursion_bit_for_bit(level, dtype):
    keys = make_keys(3, "report", index=torch.arange(4))
    path = BrownianPath(keys, 6, 2, 0.0, 1.0, dtype=dtype)
    looked_at = {0, 1, 2**level // 2 - 1, 2**level // 2, 2**level - 1, *range(3, 2**level, 2**level // 4)}
    for index in range(2**level):
        w = path.increment(level, index)
        if index in looked_at:
            assert torch.equal(w, by_recursion(keys, 6, dtype, level, index)[0])
    for index in looked_at:  # in no order
        for found, wanted in zip(path.cell(level, index), by_recursion(keys, 6, dtype, level, index), strict=True):
            assert torch.equal(found, wanted)


def test_a_fine_path_leaves_the_kept_addresses_of_others_alone():
    keys_.fold_address.cache_clear()
    path = BrownianPath(make_keys(3, "report", index=torch.arange(2)), 2, 2, 0.0, 1.0)
    for index in range(4096):
        path.increment(12, index)
    assert keys_.fold_address.cache_info().currsize < 64


def test_addresses_are_folded_together_as_one_by_one():
    fields, last = torch.tensor([0, 1, 15, 2**40]), torch.tensor([0, 1, 7])
    folded = keys_.fold_addresses((3, 12), fields, last)
    for row, a in enumerate(fields.tolist()):
        for column, b in enumerate(last.tolist()):
            assert int(folded[row, column]) == keys_.fold_address((3, 12, a, b))


def test_blocks_and_neighbouring_elements_have_independent_paths():
    a = torch.stack([brownian(n=100, size=1000, block=b, seed=5).increment(2, 1) for b in range(4)])
    a = torch.cat([a.flatten(1), a.roll(1, 2).flatten(1)])
    z = torch.corrcoef(a).fill_diagonal_(0) * math.sqrt(a.shape[1])
    assert float(z.abs().max()) < Z


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_increment_is_the_cells_w_bit_for_bit(dtype):
    for level in range(6):
        for index in range(2**level):
            fresh, other = brownian(dtype=dtype), brownian(dtype=dtype)
            assert torch.equal(fresh.increment(level, index), other.cell(level, index)[0])
            assert fresh.increment(level, index).dtype == dtype


def test_the_order_of_queries_does_not_matter():
    cells = [(level, index) for level in range(6) for index in range(2**level)]
    fresh = {c: brownian().cell(*c) for c in cells}
    gen = torch.Generator().manual_seed(0)
    for _ in range(3):
        path = brownian()
        for place in torch.randperm(len(cells), generator=gen).tolist():
            level, index = cells[place]
            if place % 3 == 0:
                assert torch.equal(path.increment(level, index), fresh[level, index][0])
            else:
                w, area = path.cell(level, index)
                assert torch.equal(w, fresh[level, index][0])
                assert torch.equal(area, fresh[level, index][1])


def test_a_path_is_the_same_in_every_batch():
    keys = make_keys(0, "report", index=torch.arange(9))
    whole = BrownianPath(keys, 33, 1, 1.0, 2.0).cell(4, 11)
    for part in ([4], [8, 0], [2, 3, 4]):
        w, area = BrownianPath(keys[part], 33, 1, 1.0, 2.0).cell(4, 11)
        assert torch.equal(w, whole[0][part])
        assert torch.equal(area, whole[1][part])


def test_the_clock_scales_the_path():
    # Brownian scaling: the same words on an interval four times as long, twice as large.
    one, four = brownian(t0=0.0, t1=1.0), brownian(t0=0.0, t1=4.0)
    for a, b in zip(one.cell(3, 5), four.cell(3, 5), strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-14, atol=1e-14)


UNIONS = [(0, 16), (0, 5), (3, 16), (5, 11), (7, 9), (1, 15), (8, 12), (15, 16)]  # of sixteenths


@pytest.mark.parametrize(("first", "last"), UNIONS)
def test_queries_over_unions_of_cells(first, last):
    t0, t1 = 2.0, 2.5
    path, h = brownian(t0=t0, t1=t1), 0.5 / 16
    ta, tb = t0 + first * h, t0 + last * h
    w, u = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)
    for k in range(first, last):
        piece, area = path.cell(4, k)
        u = u + h * (piece / 2 + area) + h * w
        w = w + piece
    got_w, got_u = path(ta, tb, return_U=True)
    torch.testing.assert_close(got_w, w, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_u, u, rtol=0, atol=1e-12)
    torch.testing.assert_close(path(ta, tb), w, rtol=0, atol=1e-12)
    torch.testing.assert_close(path(torch.tensor(ta), torch.tensor(tb)), w, rtol=0, atol=1e-12)


def test_a_query_of_one_time_starts_at_the_left_end():
    path = brownian()
    assert torch.equal(path(2.25), path(2.0, 2.25))


@pytest.mark.parametrize(("ta", "tb"), [(2.0, 2.3), (2.1, 3.0), (1.5, 2.5), (2.5, 3.5)])
def test_times_off_the_grid_are_refused(ta, tb):
    with pytest.raises(ValueError, match="not on the dyadic grid"):
        brownian()(ta, tb)


def test_other_errors_of_the_path():
    path = brownian()
    with pytest.raises(ValueError, match="must not end before it begins"):
        path(2.5, 2.25)
    with pytest.raises(ValueError, match="Lévy area"):
        path(2.0, 3.0, return_A=True)


def test_what_torchsde_asks_of_a_path():
    path = brownian(dtype=torch.float32)
    assert path.dtype == torch.float32
    assert path.device == torch.device("cpu")
    assert path.shape == (4, 5)
    assert path.levy_area_approximation == "space-time"
    assert "block=2" in repr(path)


# --- added in place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (300, 16, 8, 8), (2, 3, 1, 1)])
def test_added_normals_are_the_normals(shape, layout):
    keys = make_keys(1, "report", index=torch.arange(shape[0]))
    x = torch.rand(shape, dtype=torch.float64).contiguous(memory_format=layout)
    wanted = x + 0.3 * normals(keys, x[0].numel(), 2, 0, 0, 0, dtype=torch.float64).view(shape)
    before = x.clone()
    assert torch.allclose(noise.add_normals(x, keys, 0.3, 2, 0, 0, 0), wanted, rtol=0, atol=1e-14)
    assert torch.equal(x, before)
    assert torch.allclose(noise.add_normals(x, keys, 0.3, 2, 0, 0, 0, in_place=True), wanted, rtol=0, atol=1e-14)
    assert not torch.equal(x, before)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize(
    ("shape", "layout", "fits"),
    [
        ((3, 4, 5, 7), torch.contiguous_format, True),
        ((2, 40002), torch.contiguous_format, True),  # an odd number of words, in several pieces
        ((3, 2, 1, 3), torch.contiguous_format, True),
        ((3, 5, 5, 3), torch.contiguous_format, False),  # an odd number of normals
        ((40, 16, 32, 32), torch.channels_last, True),
        ((3, 6, 5, 4), torch.channels_last, True),
        ((3, 6, 5, 5), torch.channels_last, False),  # words shared by two channels
        ((2, 100, 17, 6), torch.channels_last, True),  # a piece ends inside of a row of pixels
        ((2, 256, 2, 3), torch.channels_last, True),
        ((2, 258, 2, 2), torch.channels_last, False),
        ((3, 5, 4, 4), torch.channels_last, False),
        ((0, 4, 4, 4), torch.contiguous_format, True),
    ],
)
def test_one_pass_adds_what_tensors_add(shape, layout, fits, scale, monkeypatch):
    if kernels.library is None:
        pytest.skip("the package was built without a C compiler: there is no noise in one pass")
    keys = make_keys(7, "report", index=torch.arange(shape[0]))
    x = torch.rand(shape)
    x = x.contiguous(memory_format=layout) if len(shape) == 4 else x
    assert bool(kernels.layout(x, x)) == fits
    found = noise.add_normals(x, keys, scale, 2, 0, 0, 1)
    changed = noise.add_normals(x.clone(), keys, scale, 2, 0, 0, 1, in_place=True)
    monkeypatch.setattr(kernels, "library", None)
    wanted = noise.add_normals(x, keys, scale, 2, 0, 0, 1)
    assert found.stride() == x.stride()
    assert torch.allclose(found, wanted, rtol=0, atol=2e-6)
    assert torch.equal(changed, found)


@pytest.mark.skipif(kernels.library is None, reason="the package was built without a C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remember", [False, True])
@pytest.mark.parametrize("skipped", [None, "same order", "other order"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 4, 5, 7), torch.contiguous_format),
        ((3, 5, 5, 3), torch.contiguous_format),  # an odd number of normals: tensors draw them
        ((40, 16, 32, 32), torch.channels_last),  # several pieces
        ((3, 32, 6, 4), torch.channels_last),
        ((2, 100, 17, 6), torch.channels_last),
    ],
)
def test_a_relu_in_the_pass_of_the_noise_is_one_before_it(shape, layout, skipped, remember, dtype):
    keys = make_keys(7, "report", index=torch.arange(shape[0]))
    generator = torch.Generator().manual_seed(0)
    x, skip = (torch.randn(shape, generator=generator).to(dtype, memory_format=layout) for _ in range(2))
    x[0, 0, 0, :3] = torch.tensor([0.0, -0.0, torch.nan])
    if skipped == "other order":
        orders = torch.contiguous_format, torch.channels_last
        skip = skip.contiguous(memory_format=orders[layout == orders[0]])
    skip = skip if skipped else torch.zeros_like(x)
    # A skip in the other order is added, and rounded, beforehand; else all is made in float32 and rounded once.
    total = (x + skip).float() if skipped == "other order" else x.float() + skip.float()
    once = kernels.layout(x, x) or dtype == torch.float32
    wanted = noise.add_normals(total.relu() if once else total.relu().to(dtype).float(), keys, 0.3, 2, 0, 0, 1)
    relu = kernels.rectifier(x, skip if skipped else None, remember)
    assert noise.add_normals(x, keys, 0.3, 2, 0, 0, 1, in_place=True, relu=relu) is x
    assert torch.equal(x.nan_to_num(-7), wanted.to(dtype).nan_to_num(-7))
    if remember:
        assert torch.equal(relu.passed, ~(total <= 0))
        assert relu.passed.stride() == x.stride()


@pytest.mark.usefixtures("way")
def test_keys_that_lie_apart_in_memory_draw_the_same():
    keys = make_keys(0, "report", inference=torch.arange(2), index=torch.arange(3)[:, None])
    x = torch.rand(3, 4, 2, 2)
    for apart in (keys[:, 1], keys[:1, 0].expand(3), keys[:, 0].flip(0)):
        assert torch.equal(noise.add_normals(x, apart, 0.3, 2), noise.add_normals(x, apart.clone(), 0.3, 2))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("keys", [make_keys(0, "report", index=torch.arange(n)) for n in (1, 4)])
def test_a_state_without_a_key_is_refused(keys):
    with pytest.raises(ValueError, match=rf"3 states on cpu, {len(keys)} keys on cpu"):
        noise.add_normals(torch.rand(3, 2, 4, 4), keys, 0.3, 2)
    with pytest.raises(ValueError, match="3 states on meta, 3 keys on cpu"):
        noise.add_normals(torch.rand(3, 4, device="meta"), make_keys(0, "report", index=torch.arange(3)), 0.3, 2)


@pytest.mark.usefixtures("way")
def test_a_graph_that_holds_a_state_notices_that_it_was_changed():
    x, weight = torch.rand(3, 4), torch.rand(3, 4, requires_grad=True)
    y = (weight * x).sum()
    noise.add_normals(x, make_keys(0, "report", index=torch.arange(3)), 0.3, 2, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_recorded_state_is_not_changed_and_its_gradient_passes():
    keys = make_keys(1, "report", index=torch.arange(3))
    x = torch.rand(3, 2, 4, 4).requires_grad_()
    before = x.detach().clone()
    y = noise.add_normals(x, keys, 0.3, 2)
    assert torch.equal(x, before)
    assert not torch.equal(y, before)
    weights = torch.rand_like(before)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    assert torch.equal(gradient, weights)


def test_one_thread_and_two_draw_the_same():
    keys = make_keys(3, "report", index=torch.arange(64))
    before = torch.get_num_threads()
    draws = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            draws.append(normals(keys, 16384, 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*draws)


@pytest.mark.parametrize("cells", [[(0.0, 1.0)], [(0.0, 0.25), (0.25, 0.5), (0.5, 1.0)]])
def test_torchsdes_brownian_interval_has_the_same_law(cells):
    n, size = 64, 256
    ours = BrownianPath(make_keys(1, "report", index=torch.arange(n)), size, 0, 0.0, 1.0, dtype=torch.float64)
    theirs = torchsde.BrownianInterval(
        0.0, 1.0, (n, size), torch.float64, entropy=1, levy_area_approximation="space-time"
    )
    columns, covariance = [], torch.zeros(2 * len(cells), 2 * len(cells), dtype=torch.float64)
    for path in (ours, theirs):
        answers = [path(a, b, return_U=True) for a, b in cells]
        columns.append(torch.stack([part.flatten() for answer in answers for part in answer]))
    for i, (a, b) in enumerate(cells):
        h = b - a
        block = torch.tensor([[h, h**2 / 2], [h**2 / 2, h**3 / 3]], dtype=torch.float64)
        covariance[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block
        for j in (2 * i, 2 * i + 1):  # W, then U
            assert stats.ks_2samp(columns[0][j].numpy(), columns[1][j].numpy()).pvalue > 1e-4
    scale = covariance.diagonal().sqrt()
    for found in columns:
        distance = (found.cov() - covariance) / (scale[:, None] * scale)
        assert float(distance.abs().max()) < 5 * math.sqrt(2 / (n * size))


# --- transforms -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smooth():
    return recast(smooth_chain(), omega=0.7, image_shape=(2, 6, 6)).eval().requires_grad_(False)


@pytest.mark.parametrize("schedule", ["inverse-time", "multiplicative"])
@pytest.mark.parametrize("solver", ["euler", "milstein", "srk", "heun"])
@pytest.mark.parametrize("recorded", [True, False])
def test_forward_mode_derivatives_pass_through_the_noise(schedule, solver, recorded):
    # They were lost without a word: the noise's shift had no forward derivative.
    model = recast(smooth_chain(), 0.7, schedule, solver, image_shape=(2, 6, 6)).eval().requires_grad_(False)
    x, keys = random_images(2, 6, channels=2, dtype=torch.float64), torch.arange(2)
    if solver == "milstein":
        with pytest.raises(ItoError, match="Milstein's correction is computed by autograd"):
            torch.func.jvp(lambda x: model(x, keys), (x,), (x,))
        return
    v, h = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype), 1e-6
    wanted = (model(x + h * v, keys) - model(x - h * v, keys)) / (2 * h)
    with torch.set_grad_enabled(recorded):
        value, slope = torch.func.jvp(lambda x: model(x, keys), (x,), (v,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v), keys))
    assert torch.allclose(value, model(x, keys), atol=1e-12)
    for found in (slope, dual.tangent):
        assert torch.allclose(found, wanted, atol=1e-7)


def test_transforms_of_images_and_keys(smooth):
    x, keys = random_images(3, 6, channels=2, dtype=torch.float64), torch.arange(3)
    wanted = smooth(x, keys)
    assert torch.allclose(torch.func.vmap(lambda x: smooth(x, keys))(torch.stack([x, x.flip(0)]))[0], wanted)
    one = torch.func.vmap(lambda x, key: smooth(x[None], key[None])[0])(x, keys)
    assert torch.allclose(one, wanted)
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(smooth(at, keys).sum(), at)
    assert torch.allclose(torch.func.grad(lambda x: smooth(x, keys).sum())(x), gradient)
    rows = torch.func.jacrev(lambda x: smooth(x, keys).sum(0))(x)
    assert torch.allclose(rows.sum(0), gradient)
    assert torch.allclose(torch.func.jacfwd(lambda x: smooth(x, keys).sum(0))(x), rows)


@pytest.mark.parametrize("size", [1, 2, 7, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_transformable_noise_is_the_noise(size, dtype):
    keys = make_keys(4, "report", index=torch.arange(5))
    found = noise.transformable_normals(keys_.absorb(keys, keys_.fold_address((3, 0, 0, 0))), size, dtype)
    torch.testing.assert_close(found, normals(keys, size, 3, 0, 0, 0, dtype=dtype), rtol=2e-6, atol=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_follows_its_keys_and_fresh_noise_is_refused(smooth):
    x, keys = random_images(2, 6, channels=2, dtype=torch.float64), torch.arange(2)
    traced = torch.jit.trace(lambda x, keys: smooth(x, keys), (x, keys), check_trace=False)
    other, names = x.flip(0), torch.tensor([7, 9])
    assert torch.allclose(traced(other, names), smooth(other, names))
    with pytest.raises(ItoError, match="Fresh noise cannot be traced"):
        torch.jit.trace(smooth, x, check_trace=False)
    fine = recast(smooth_chain(), 0.7, steps=2, image_shape=(2, 6, 6)).eval().requires_grad_(False)
    with pytest.raises(ItoError, match="Only Euler with one step"):
        torch.jit.trace(lambda x, keys: fine(x, keys), (x, keys), check_trace=False)


def test_nothing_made_inside_a_fake_mode_is_kept(smooth):
    keys = make_keys(4, "report", index=torch.arange(5))
    with FakeTensorMode() as mode:
        assert normals(mode.from_tensor(keys), 1234).shape == (5, 1234)
    assert normals(keys, 1234).isfinite().all()
    assert smooth(random_images(5, 6, channels=2, dtype=torch.float64), keys).isfinite().all()


def test_inference_with_srk_leaves_the_global_generator_alone():
    model = recast(smooth_chain(), 0.7, solver="srk", image_shape=(2, 6, 6)).eval()
    before = torch.get_rng_state()
    model(random_images(2, 6, channels=2, dtype=torch.float64), torch.arange(2))
    assert torch.equal(torch.get_rng_state(), before)
