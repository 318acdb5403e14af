"""Splits, augmentation against loops over single images, pictures made on the spot, and what is refused."""

import os
import re
import urllib.request
import warnings
from contextlib import nullcontext
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from neuralsde_ito import load_data
from neuralsde_ito.data import (
    DATASETS,
    Dataset,
    InMemory,
    Source,
    Split,
    Streamed,
    _ImageFiles,
    load_image,
    open_image,
)
from neuralsde_ito.validation import ItoError


def everything(split: Split, size: int = 100, **how) -> tuple[Tensor, Tensor, Tensor]:
    index, x, y = zip(*split.batches(size, **how), strict=True)
    return torch.cat(index), torch.cat(x), torch.cat(y)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits")


# --- digits ---------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns(digits):
    from sklearn.datasets import load_digits

    assert digits.image_shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    assert (len(digits.train), len(digits.test)) == (1297, 500)
    _, train, y_train = everything(digits.train)
    _, test, y_test = everything(digits.test)
    assert train.shape == (1297, 1, 8, 8)
    assert train.dtype == torch.float32
    assert y_train.dtype == torch.int64
    assert train.min() == test.min() == 0
    assert train.max() == test.max() == 1
    # Both splits together are the whole set, each image once: disjoint, with the right labels.
    images, labels = load_digits(return_X_y=True)
    wanted = sorted((*np.round(image * 255 / 16).tolist(), label) for image, label in zip(images, labels, strict=True))
    pixels = torch.cat([train, test]).flatten(1).mul(255).round().tolist()
    result = sorted((*row, y) for row, y in zip(pixels, torch.cat([y_train, y_test]).tolist(), strict=True))
    assert result == wanted
    for y in (y_train, y_test):  # stratified
        share = torch.bincount(y, minlength=10) / len(y)
        assert (share - 0.1).abs().max() < 0.01


def test_the_test_split_is_always_the_same_and_plain(digits):
    index, x, y = everything(digits.test)
    assert torch.equal(index, torch.arange(500))
    again = everything(load_data("digits").test, size=7)
    assert torch.equal(again[1], x)
    assert torch.equal(again[2], y)
    # Whatever the training split does to its images, without an epoch it does nothing.
    assert torch.equal(everything(load_data("digits", augment="none").train)[1], everything(digits.train)[1])


# --- order and augmentation -----------------------------------------------------------------------------


def test_order_and_augmentation_are_functions_of_seed_and_epoch(digits):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = everything(digits.train, epoch=(3, 5))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    torch.manual_seed(2)
    again = everything(load_data("digits").train, epoch=(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in ((4, 5), (3, 6), (5, 3)):
        index, x, _ = everything(digits.train, epoch=other)
        assert sorted(index.tolist()) == list(range(1297))  # each image once
        assert (index != first[0]).float().mean() > 0.99
        same = index.argsort()
        assert not torch.equal(x[same], first[1][first[0].argsort()])  # other shifts, too


def test_images_and_labels_stay_together_in_any_order(digits):
    index, x, y = everything(load_data("digits", augment="none").train, epoch=(0, 0))
    _, plain, labels = everything(digits.train)
    assert torch.equal(x, plain[index])
    assert torch.equal(y, labels[index])


@pytest.mark.parametrize("size", [64, 100, 1297])
@pytest.mark.parametrize("epoch", [None, (0, 1)])
def test_skip_leaves_out_exactly_the_first_batches(digits, size, epoch):
    whole = list(digits.train.batches(size, epoch=epoch))
    assert len(whole) == -(-1297 // size)
    for skip in {0, 1, len(whole) // 2, len(whole) - 1, len(whole)}:
        rest = list(digits.train.batches(size, epoch=epoch, skip=skip))
        assert len(rest) == len(whole) - skip
        for one, two in zip(rest, whole[skip:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_is_held_out_and_the_rest_make_the_whole(digits):
    labels = torch.arange(50) % 10
    for split in (digits.train, Streamed(tuple(Path(f"{i}.png") for i in range(50)), labels, 8)):
        held, rest = split.first(20), split.without(20)
        names = torch.cat([held.names, rest.names])
        assert torch.equal(names.sort().values, torch.arange(len(split)))
        assert torch.equal(torch.cat([held.labels, rest.labels]), split.labels[names])
    assert [file.stem for file in rest.files] == [str(name) for name in rest.names.tolist()]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_batch_size_changes_neither_order_nor_augmentation(digits, size):
    split = digits.train.first(150)
    wanted = everything(split, size=150, epoch=(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(everything(split, size, epoch=(1, 2)), wanted, strict=True))


def candidates(image: Tensor, pad: int, flip: bool) -> dict[tuple[int, int, bool], Tensor]:
    """One image ``(C, H, W)`` under every shift and maybe mirrored, by slices of a padded copy."""
    _, h, w = image.shape
    padded = F.pad(image, (pad,) * 4)
    out = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + h, left : left + w]
            out[top, left, False] = crop
            if flip:
                out[top, left, True] = crop.flip(-1)
    return out


@pytest.mark.parametrize(("augment", "pad", "flip"), [("shift", 1, False), ("flip-crop", 4, True)])
def test_every_image_is_shifted_on_its_own(augment, pad, flip):
    # Noise images, so that every shift gives another picture, and rectangular, so that axes cannot be swapped.
    pixels = torch.randint(1, 256, (400, 2, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = InMemory(pixels, torch.zeros(400, dtype=torch.int64), augment)
    index, x, _ = everything(split, epoch=(0, 0))
    chosen = []
    for i, augmented in zip(index.tolist(), x, strict=True):
        fits = [way for way, crop in candidates(pixels[i] / 255, pad, flip).items() if torch.equal(crop, augmented)]
        assert len(fits) == 1
        chosen.append(fits[0])
    tops, lefts, flips = (torch.tensor(column) for column in zip(*chosen, strict=True))
    sizes = 2 * pad + 1
    for offsets in (tops, lefts):  # uniform: chi-square with 2 or 8 degrees of freedom stays below its 1 - 1e-4
        counts = torch.bincount(offsets, minlength=sizes)
        assert ((counts - 400 / sizes) ** 2 / (400 / sizes)).sum() < (18.5 if pad == 1 else 31.9)
    assert abs(torch.corrcoef(torch.stack([tops.float(), lefts.float()]))[0, 1]) < 0.2  # drawn apart
    assert flips.float().mean() == (pytest.approx(0.5, abs=0.1) if flip else 0)


def test_a_shift_moves_in_zeros(digits):
    _, x, _ = everything(InMemory(torch.full((50, 1, 5, 5), 255, dtype=torch.uint8), torch.zeros(50), "shift"))
    assert (x == 1).all()
    bright = InMemory(torch.full((50, 1, 5, 5), 255, dtype=torch.uint8), torch.zeros(50), "shift")
    _, x, _ = everything(bright, epoch=(0, 0))
    assert set(x.sum((1, 2, 3)).tolist()) == {25.0, 20.0, 16.0}  # none, one side, a corner


@pytest.mark.parametrize("kind", ["in memory", "streamed"])
@pytest.mark.parametrize("n", [1, 4, 5, 6, 9])
def test_in_training_a_last_batch_of_one_image_joins_the_one_before_it(digits, tmp_path, kind, n):
    if kind == "streamed":
        make_folder(tmp_path, size=(80, 70), per_class=3)
        split = load_data("imagefolder", tmp_path, size=72, train_limit=n).train
    else:
        split = digits.train.first(n)
    sizes = {1: [1], 4: [4], 5: [5], 6: [4, 2], 9: [4, 5]}[n]
    assert [len(y) for _, _, y in split.batches(4, epoch=(0, 0))] == sizes
    whole = everything(split, 4, epoch=(0, 0))
    assert all(torch.equal(a, b) for a, b in zip(whole, everything(split, 100, epoch=(0, 0)), strict=True))
    for skip in range(1, len(sizes)):
        assert [len(y) for _, _, y in split.batches(4, epoch=(0, 0), skip=skip)] == sizes[skip:]
    # Elsewhere nothing joins: batches of one image are whole batches there, and no figure depends on them.
    assert [len(y) for _, _, y in split.batches(4)] == {5: [4, 1], 9: [4, 4, 1]}.get(n, sizes)
    assert [len(y) for _, _, y in split.batches(1, epoch=(0, 0))] == [1] * n


# --- limits ---------------------------------------------------------------------------------------------


def test_limits_are_a_fixed_choice_that_keeps_the_names(digits):
    limited = load_data("digits", train_limit=90, test_limit=60)
    assert (len(limited.train), len(limited.test)) == (90, 60)
    for part, full in ((limited.train, digits.train), (limited.test, digits.test)):
        index, x, y = everything(part)
        _, every, labels = everything(full)
        assert (index.diff() > 0).all()  # each once, in the split's order
        assert torch.equal(x, every[index])  # the name is the place in the whole split
        assert torch.equal(y, labels[index])
        assert len(y.unique()) == 10
        assert index.max() - index.min() > 0.8 * len(full)  # from everywhere
    again = load_data("digits", train_limit=90, test_limit=60)
    assert torch.equal(everything(again.test)[0], everything(limited.test)[0])


def test_a_limit_of_a_limit_still_names_the_whole_split(digits):
    once = digits.test.first(60)
    index, x, _ = everything(once.first(10))
    assert set(index.tolist()) <= set(everything(once)[0].tolist())
    assert torch.equal(x, everything(digits.test)[1][index])


def test_large_limits_and_none_are_the_whole_split(digits):
    for limit in (None, 500, 10_000):
        assert torch.equal(everything(digits.test.first(limit))[0], torch.arange(500))


def test_a_limited_split_is_shuffled_and_augmented_with_its_names(digits):
    split = InMemory(digits.train.pixels, digits.train.labels, "none").first(40)
    index, x, y = everything(split, epoch=(0, 0))
    _, plain, labels = everything(digits.train)
    assert not torch.equal(index, index.sort().values)
    assert torch.equal(x, plain[index])
    assert torch.equal(y, labels[index])


@pytest.mark.parametrize("limit", [0, -5])
def test_limits_below_one_are_refused_before_anything_is_read(limit, monkeypatch):
    monkeypatch.setitem(DATASETS, "digits", Source(lambda path, size: pytest.fail("was read"), size=8))
    for name in ("train_limit", "test_limit"):
        with pytest.raises(ValueError, match=f"at least 1, got {limit}"):
            load_data("digits", **{name: limit})


def test_a_data_set_is_added_by_one_row_of_the_table(monkeypatch):
    def load(path, size):
        train, test = (InMemory(torch.full((n, 1, 6, 6), 255, dtype=torch.uint8), torch.arange(n) % 2) for n in (8, 4))
        return Dataset("white", ("a", "b"), (1, 6, 6), train, test)

    monkeypatch.setitem(DATASETS, "white", Source(load, size=6))
    data = load_data("white", train_limit=5, test_limit=3)
    assert (len(data.train), len(data.test)) == (5, 3)
    assert (data.train.augment, data.test.augment) == ("flip-crop", "none")
    with pytest.raises(ItoError, match="white has 6 pixels, got 7"):
        load_data("white", size=7)


# --- folders of pictures --------------------------------------------------------------------------------


def picture(seed: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    bands = len(mode)
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    )  # the shape says the mode


def make_folder(root: Path, size=(16, 16), held_out="test", per_class=5, classes=("cat", "dog", "eel")) -> Path:
    seed = 0
    for part in ("train", held_out):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                seed += 1
                picture(seed, size).save(root / part / name / f"{i}.png")
    return root


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_small_pictures_are_held_in_memory_pixel_for_pixel(tmp_path, held_out):
    root = make_folder(tmp_path / "pets", held_out=held_out)
    (root / "train" / "notes.txt").write_text("not a class")
    (root / "train" / "cat" / "notes.txt").write_text("not a picture")
    data = load_data("imagefolder", root)
    assert (data.name, data.classes, data.image_shape) == ("pets", ("cat", "dog", "eel"), (3, 16, 16))
    assert isinstance(data.train, InMemory)
    assert data.train.augment == "flip-crop"
    index, x, y = everything(data.test)
    assert torch.equal(index, torch.arange(15))
    assert y.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    for i, file in enumerate(sorted((root / held_out).rglob("*.png"))):
        result = (x[i] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(result, np.asarray(Image.open(file)))


def test_a_given_size_scales_small_pictures(tmp_path):
    data = load_data("imagefolder", make_folder(tmp_path, size=(20, 16)), size=8)
    assert data.image_shape == (3, 8, 8)
    file = next(iter(sorted((tmp_path / "test").rglob("*.png"))))
    # The shorter edge becomes 8, the other is cut to its middle.
    wanted = np.asarray(Image.open(file).resize((10, 8), Image.Resampling.BILINEAR))[:, 1:9]
    result = everything(data.test)[1][0].permute(1, 2, 0) * 255
    assert np.abs(result.numpy() - wanted).max() <= 1


def test_large_pictures_are_streamed_with_imagenets_crops(tmp_path):
    data = load_data("imagefolder", make_folder(tmp_path, size=(90, 70), per_class=2))
    assert isinstance(data.train, Streamed)
    assert isinstance(data.test, Streamed)
    assert data.image_shape == (3, 224, 224)
    assert data.train.augment == "imagenet"
    index, x, y = everything(data.test, size=4)
    assert x.shape == (6, 3, 224, 224)
    assert 0 <= x.min() < x.max() <= 1
    assert torch.equal(index, torch.arange(6))
    assert y.tolist() == [0, 0, 1, 1, 2, 2]
    # The standard evaluation: shorter edge 256, centre 224.
    resized = Image.open(data.test.files[0]).resize((256 * 90 // 70, 256), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 224) / 2), 16
    wanted = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    assert np.abs((x[0] * 255).permute(1, 2, 0).numpy() - wanted).max() <= 1


def test_streamed_crops_are_functions_of_seed_epoch_and_image(tmp_path, monkeypatch):
    split = load_data("imagefolder", make_folder(tmp_path, size=(80, 70), per_class=2), size=72).train
    assert isinstance(split, Streamed)
    wanted = everything(split, size=2, epoch=(0, 0))
    assert sorted(wanted[0].tolist()) == list(range(6))
    assert torch.equal(wanted[2], split.labels[wanted[0]])
    torch.manual_seed(123)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # one worker instead of two, other batches
    again = everything(split, size=3, epoch=(0, 0))
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))
    rest = list(split.batches(2, epoch=(0, 0), skip=2))
    assert len(rest) == 1
    assert torch.equal(rest[0][1], wanted[1][4:])
    other = everything(split, size=6, epoch=(0, 1))
    order = other[0].argsort()
    assert (other[1][order] != wanted[1][wanted[0].argsort()]).flatten(1).any(1).all()  # every crop is another
    # Without an epoch there is no chance in it.
    assert torch.equal(everything(split, size=6)[1], everything(split, size=2)[1])


def test_the_crops_differ_between_images_and_leave_the_global_generator(tmp_path):
    # Six copies of one picture: whatever differs is the crop. Asked for in this process, without workers.
    root = make_folder(tmp_path, size=(80, 70), per_class=2)
    for file in root.rglob("*.png"):
        picture(0, (80, 70)).save(file)
    split = load_data("imagefolder", root, size=72).train
    assert isinstance(split, Streamed)
    state = torch.get_rng_state()
    files = _ImageFiles(split, (0, 0))
    crops = [files[row][1] for row in range(6)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(crop.shape == (3, 72, 72) for crop in crops)
    assert not any(torch.equal(crops[i], crops[j]) for i in range(6) for j in range(i))


def test_limits_of_streamed_folders_keep_the_names(tmp_path):
    make_folder(tmp_path, size=(80, 70), per_class=3)
    whole = load_data("imagefolder", tmp_path, size=72).test
    part = load_data("imagefolder", tmp_path, size=72, test_limit=4).test
    index, x, y = everything(part, size=3)
    assert len(index) == len(part) == 4
    _, every, labels = everything(whole, size=9)
    assert torch.equal(x, every[index])
    assert torch.equal(y, labels[index])


def test_no_augmentation_can_be_asked_for(tmp_path):
    make_folder(tmp_path, size=(80, 70), per_class=1)
    split = load_data("imagefolder", tmp_path, size=72, augment="none").train
    index, x, _ = everything(split, epoch=(0, 0))
    assert torch.equal(x, everything(split)[1][index])


# --- pictures of every kind -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 224, 224)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("size", [(8, 8), (40, 25), (300, 400)])
def test_pictures_fit_the_network(tmp_path, shape, mode, size):
    file = tmp_path / "picture.png"
    picture(0, size, mode if mode in ("L", "RGB", "RGBA") else "RGB").convert(mode).save(file)
    assert Image.open(file).mode == mode
    with pytest.warns(UserWarning, match="white") if mode == "RGBA" else nullcontext():
        x = load_image(file, shape)
    assert x.shape == shape
    assert x.dtype == torch.float32
    assert 0 <= x.min() < x.max() <= 1
    if size == shape[1:]:  # nothing to scale: the values of the picture
        plain = Image.open(file)
        if mode == "RGBA":  # what is transparent shows the white ground
            plain = Image.alpha_composite(Image.new("RGBA", size, "white"), plain)
        wanted = np.asarray(plain.convert("L" if shape[0] == 1 else "RGB")) / 255
        assert np.allclose(x.permute(1, 2, 0).squeeze(-1).numpy(), wanted, atol=1e-6)


def test_the_middle_of_a_picture_is_shown(tmp_path):
    # A white square in the middle of a wide black picture stays the middle.
    pixels = np.zeros((64, 128, 3), dtype=np.uint8)
    pixels[16:48, 48:80] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    x = load_image(tmp_path / "wide.png", (3, 32, 32))
    assert (x[:, 10:22, 10:22] == 1).all()
    assert (x[:, :6] == 0).all()
    assert (x[:, :, :6] == 0).all()
    assert torch.equal(x, x.flip(-1))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path, shape):
    grey = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)  # 0 .. 65,520
    Image.fromarray(grey).save(tmp_path / "scan.png")
    assert Image.open(tmp_path / "scan.png").mode.startswith("I")
    assert np.allclose(load_image(tmp_path / "scan.png", shape).numpy(), grey / 65535, atol=1 / 255)


INK = np.zeros((8, 8), dtype=bool)
INK[2:6, 3:5] = True  # a stroke


def drawn(how: str) -> tuple[Image.Image, dict[str, object]]:
    """Black ink on a transparent ground, in every way in which a PNG can say so."""
    alpha = (INK * 255).astype(np.uint8)
    zeros = np.zeros_like(alpha)
    if how == "RGBA":
        return Image.fromarray(np.stack([zeros, zeros, zeros, alpha], -1)), {}
    if how == "LA":
        return Image.merge("LA", [Image.fromarray(zeros), Image.fromarray(alpha)]), {}
    if how.startswith("P"):
        image = Image.fromarray(INK.astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0] * 2)  # ground and ink are one colour
        return image, {"transparency": 0 if how == "P, one colour" else bytes([0, 255])}
    if how == "L, one grey":
        return Image.fromarray(np.where(INK, 0, 7).astype(np.uint8)), {"transparency": 7}
    if how == "RGB, one colour":
        pixels = np.where(INK[..., None], 0, np.array([1, 2, 3])).astype(np.uint8)
        return Image.fromarray(pixels), {"transparency": (1, 2, 3)}
    assert how == "16 bits, one grey"
    return Image.fromarray(np.where(INK, 0, 300).astype(np.uint16)), {"transparency": 300}


TRANSPARENT = ["RGBA", "LA", "P, one colour", "P, a table", "L, one grey", "RGB, one colour", "16 bits, one grey"]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
@pytest.mark.parametrize("how", TRANSPARENT)
def test_ink_on_a_transparent_ground_is_seen_on_white(tmp_path, shape, how):
    image, options = drawn(how)
    image.save(tmp_path / "ink.png", **options)
    with pytest.warns(UserWarning, match=r"ink\.png.*transparent.*white") as caught:
        x = load_image(tmp_path / "ink.png", shape)
    assert len(caught) == 1
    assert torch.equal(x, torch.from_numpy(~INK).float().expand(shape))


def test_half_transparent_ink_is_mixed_and_opaque_pictures_are_not_touched(tmp_path):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[..., 3] = 51  # a fifth
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    with pytest.warns(UserWarning, match="white"):
        assert torch.allclose(load_image(tmp_path / "grey.png", (3, 8, 8)), torch.tensor(0.8), atol=1 / 255)
    opaque = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    opaque[..., 3] = 255
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = load_image(tmp_path / "opaque.png", (3, 8, 8))
    assert torch.equal(x, torch.from_numpy(opaque[..., :3]).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("size", [(8, 8), (80, 70)])
def test_a_data_set_says_once_that_pictures_are_transparent(tmp_path, size):
    make_folder(tmp_path, size=size, per_class=2)
    for file in (tmp_path / "test").rglob("*.png"):
        Image.new("RGBA", size, (0, 0, 0, 0)).save(file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split = load_data("imagefolder", tmp_path, size=None if size == (8, 8) else 72).test
        _, x, _ = everything(split, size=2)
    (warning,) = caught
    assert re.search("transparent.*white", str(warning.message))
    assert (x == 1).all()


# What each orientation does to a picture is written down in EXIF's standard; here by the place of its top left corner.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_pictures_stand_as_the_camera_was_held(tmp_path, orientation, suffix):
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:8, :8] = 255  # the top left corner
    pixels[:8, 8:] = 128  # and the rest of the first row
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"turned.{suffix}", exif=exif)
    x = load_image(tmp_path / f"turned.{suffix}", (1, 16, 16))[0]
    white = CORNERS[orientation]
    # Orientations from 5 on exchange rows and columns: the grey corner is then below or above, not beside.
    grey = (white[0], -1 - white[1]) if orientation < 5 else (-1 - white[0], white[1])
    assert float(x[white]) == pytest.approx(1, abs=0.05)
    assert float(x[grey]) == pytest.approx(0.5, abs=0.05)
    assert float(x.mean()) == pytest.approx(3 / 8, abs=0.02)


def test_a_data_set_reads_a_turned_picture_as_it_stands(tmp_path):
    make_folder(tmp_path, size=(16, 16), per_class=1)
    file = next(iter(sorted((tmp_path / "test").rglob("*.png"))))
    pixels, exif = np.asarray(Image.open(file)), Image.Exif()
    exif[0x0112] = 3
    Image.open(file).save(file, exif=exif)
    _, x, _ = everything(load_data("imagefolder", tmp_path).test)
    assert np.array_equal((x[0] * 255).round().byte().permute(1, 2, 0).numpy(), pixels[::-1, ::-1])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_values_are_scaled_by_their_type(tmp_path, shape):
    ramp = np.arange(64).reshape(8, 8) / 63
    as_kept = {
        "bool.png": Image.fromarray(ramp > 0.5),
        "bool.tif": Image.fromarray(ramp > 0.5),
        "uint8.tif": Image.fromarray((ramp * 255).round().astype(np.uint8)),
        "uint16.png": Image.fromarray((ramp * 65535).round().astype(np.uint16)),
        "uint16.tif": Image.fromarray((ramp * 65535).round().astype(np.uint16)),
        "uint16.pgm": Image.fromarray((ramp * 65535).round().astype(np.uint16)),
        "float32.tif": Image.fromarray(ramp.astype(np.float32)),
    }
    for name, image in as_kept.items():
        image.save(tmp_path / name)
        wanted = torch.from_numpy(ramp > 0.5 if name.startswith("bool") else ramp).float().expand(shape)
        assert torch.allclose(load_image(tmp_path / name, shape), wanted, atol=0.5 / 255 + 1e-6), name


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L", "RGB"])
def test_other_colours_are_pillows(tmp_path, mode):
    picture(0, (8, 8)).convert(mode).save(tmp_path / "picture.tif")
    opened = Image.open(tmp_path / "picture.tif")
    assert opened.mode == mode
    wanted = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1) / 255
    assert torch.equal(load_image(tmp_path / "picture.tif", (3, 8, 8)), wanted)


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (np.full((8, 8), 200, dtype=np.int32), "whole numbers of 32 bits"),
        (np.full((8, 8), 1.5, dtype=np.float32), r"1.5 to 1.5.*\[0, 1\]"),
        (np.full((8, 8), -0.1, dtype=np.float32), r"-0.1.*\[0, 1\]"),
        (np.full((8, 8), np.nan, dtype=np.float32), r"nan.*\[0, 1\]"),
    ],
)
def test_values_whose_white_is_unknown_are_refused(tmp_path, pixels, said):
    Image.fromarray(pixels).save(tmp_path / "scan.tif")
    with pytest.raises(ItoError, match=rf"scan\.tif.*{said}.*8 or 16 bits") as caught:
        load_image(tmp_path / "scan.tif", (1, 8, 8))
    assert "\n" not in str(caught.value)


def test_a_size_that_no_data_set_obeys_is_refused():
    with pytest.raises(ItoError, match=r"data\.size.*digits.*8"):
        load_data("digits", size=16)


@pytest.mark.parametrize("seed", range(2))
def test_no_damaged_picture_is_more_than_a_sentence(tmp_path, seed):
    """Bytes changed at random in files of many kinds: read, or refused by an ItoError in one line."""
    draw = np.random.default_rng(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "tif", "bmp", "webp", "ppm"):
        file = tmp_path / f"torn.{suffix}"
        picture(seed, (12, 12)).save(file, **({} if suffix in ("bmp", "ppm") else {"exif": exif}))
        content = file.read_bytes()
        for _ in range(60):
            torn = bytearray(content[: draw.integers(1, len(content) + 1)] if draw.random() < 0.3 else content)
            for place in draw.integers(0, min(len(torn), 200), draw.integers(1, 6)):
                torn[place] = draw.integers(0, 256)
            file.write_bytes(torn)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    x, said = load_image(file, (3, 8, 8)), ""
                except ItoError as error:
                    x, said = torch.zeros(1), str(error)
            assert 0 <= x.min() <= x.max() <= 1
            assert "\n" not in said


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "digit"}, "Unknown data set 'digit'; did you mean 'digits'"),
        ({"name": "cifar-10"}, "did you mean 'cifar10'"),
        ({"name": "digits", "augment": "flipcrop"}, "Unknown augmentation 'flipcrop'; did you mean 'flip-crop'"),
        ({"name": "digits", "augment": "imagenet"}, "'imagenet' is for image folders larger than 64"),
        ({"name": "imagefolder"}, r"needs data\.path"),
    ],
)
def test_unknown_names_meet_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_data(**arguments)


def test_folders_that_do_not_hold_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder '.*missing'"):
        load_data("imagefolder", tmp_path / "missing")
    with pytest.raises(ValueError, match=r"There is no folder '.*train'"):
        load_data("imagefolder", tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"'.*train' holds no images in class folders"):
        load_data("imagefolder", tmp_path)
    picture(0, (8, 8)).save(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"There is no folder '.*test'"):
        load_data("imagefolder", tmp_path)


def test_splits_of_other_classes_are_refused(tmp_path):
    make_folder(tmp_path, per_class=1)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    with pytest.raises(ValueError, match="other classes in train than in test: dog, wolf"):
        load_data("imagefolder", tmp_path)


@pytest.mark.parametrize(("size", "augment"), [((80, 70), "flip-crop"), ((16, 16), "imagenet")])
def test_augmentations_that_do_not_fit_are_refused(tmp_path, size, augment):
    with pytest.raises(ValueError, match=f"'{augment}' does not fit images of"):
        load_data("imagefolder", make_folder(tmp_path, size=size, per_class=1), augment=augment)


def spoil(file: Path, how: str) -> Path:
    if how == "truncated":
        file.unlink()
        file = file.with_suffix(".jpg")
        picture(0, (60, 60)).save(file)
        file.write_bytes(file.read_bytes()[:600])
    else:
        file.write_bytes({"empty": b"", "text": b"this is no picture"}[how])
    return file


@pytest.mark.parametrize("how", ["empty", "text", "truncated"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, how):
    file = spoil(make_folder(tmp_path) / "train" / "dog" / "3.png", how)
    with pytest.raises(ValueError, match=re.escape(f"image file '{file}' cannot be read")) as caught:
        load_data("imagefolder", tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load_image(file, (3, 32, 32))


def test_a_picture_that_a_worker_cannot_read_is_one_sentence_too(tmp_path):
    split = load_data("imagefolder", make_folder(tmp_path, size=(80, 70), per_class=1), size=72).train
    file = spoil(tmp_path / "train" / "dog" / "0.png", "text")
    with pytest.raises(ValueError, match=re.escape(f"image file '{file}' cannot be read")) as caught:
        everything(split, epoch=(0, 0))
    assert "\n" not in str(caught.value), "a worker's traceback instead of a sentence"


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"There is no image file '.*nowhere\.png'"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=re.escape(f"'{tmp_path}' cannot be read")):
        open_image(tmp_path)


# --- CIFAR, without a network ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_a_network_cifar_says_what_to_do(tmp_path, monkeypatch, capsys, name):
    asked = []

    def unreachable(request, *args, **kwargs):
        asked.append(request)
        raise URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(ValueError, match="could not be downloaded") as caught:
        load_data(name, tmp_path / "cache")
    assert asked, "the test must have stood in for the network"
    message = str(caught.value)
    assert str(tmp_path / "cache") in message  # where to put it
    assert f"{name.replace('cifar', 'cifar-')}-python.tar.gz" in message  # what to put there
    assert "data.path" in message
    assert "\n" not in message
    assert capsys.readouterr().out == ""  # stdout is for results


def test_cifars_pixels_are_turned_to_channels_first(tmp_path, monkeypatch):
    class Stub:
        url, classes = "", ["a", "b", "c"]

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert (root, download) == (str(tmp_path), True)
            n = 12 if train else 6
            self.data = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
            self.targets = [i % 3 for i in range(n)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stub)
    data = load_data("cifar10", tmp_path, test_limit=4)
    assert (data.image_shape, data.classes) == ((3, 32, 32), ("a", "b", "c"))
    assert (len(data.train), len(data.test)) == (12, 4)
    index, x, y = everything(data.test)
    wanted = np.random.default_rng(6).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    assert torch.equal(y, index % 3)
    for i, image in zip(index.tolist(), x, strict=True):
        assert np.array_equal((image * 255).round().numpy().astype(np.uint8), wanted[i].transpose(2, 0, 1))
    assert isinstance(data.train, InMemory)
    assert (data.train.augment, data.test.augment) == ("flip-crop", "none")  # type: ignore[attr-defined]
