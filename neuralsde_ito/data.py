"""Images: digits, CIFAR and folders of pictures, small sets in memory, large ones streamed.

Images are floats in [0, 1], ``(N, C, H, W)``. Order and augmentation are pure functions of
``(seed, epoch)``, so that a run which is resumed in the middle of an epoch sees what it would have seen.
"""

from __future__ import annotations

import io
import itertools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from urllib.error import URLError

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from .validation import ItoError, nearest, shown

DATASETS = ("digits", "cifar10", "cifar100", "imagefolder")
IMAGE_SIZES = {"digits": 8, "cifar10": 32, "cifar100": 32}  # in pixels, square; a folder's is chosen
AUGMENTATIONS = ("none", "shift", "flip-crop", "imagenet")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
_IN_MEMORY = 64  # folders of images up to this size are held in memory

Batch = tuple[Tensor, Tensor, Tensor]  # index (N,) int64, images (N, C, H, W) in [0, 1], labels (N,) int64


class Split(Protocol):
    """One split of a data set: an indexed collection of images that yields batches."""

    @property
    def labels(self) -> Tensor:
        """True labels, int64 ``(N,)``."""
        ...

    @property
    def names(self) -> Tensor | None:
        """The images' numbers in the whole split, int64 ``(N,)``; None: their positions."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batches(
        self,
        size: int,
        device: torch.device | str = "cpu",
        epoch: tuple[int, int] | None = None,
        skip: int = 0,
    ) -> Iterator[Batch]:
        """Batches in order; with ``epoch = (seed, number)`` shuffled, augmented and cut (`batch_bounds`) for training.

        ``skip`` leaves out the first batches, without making them.
        """
        ...

    def first(self, count: int | None) -> Split:
        """The split cut down to ``count`` images, spread evenly over the split's fixed order."""
        ...


@dataclass(frozen=True)
class Dataset:
    """Training and test split, and what a network must know of them."""

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    train: Split
    test: Split


def _order(n: int, epoch: tuple[int, int] | None) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator()
    if epoch is None:
        return torch.arange(n, device="cpu"), generator
    # A 64-bit state from two numbers: neighbouring seeds and epochs do not share a stream.
    state = np.random.SeedSequence([abs(int(epoch[0])), epoch[1]]).generate_state(1, np.uint64)[0]
    generator.manual_seed(int(state >> np.uint64(1)))
    return torch.randperm(n, generator=generator, device="cpu"), generator


def batch_bounds(n: int, size: int, training: bool = False) -> list[tuple[int, int]]:
    """Where batches of ``n`` images begin and end.

    In training a last batch of one image joins the one before it: BatchNorm has no variance of a single value, and a
    step on one image would weigh as much as one on a whole batch.
    """
    starts = list(range(0, n, size))
    if training and size > 1 and n % size == 1:
        starts = starts[:-1] or starts
    return list(itertools.pairwise([*starts, n]))


def _spread(n: int, count: int | None) -> Tensor:
    """``count`` of ``n`` places: a fixed random choice, in order, so that every class is met."""
    if count is None or count >= n:
        return torch.arange(n, device="cpu")
    if count < 1:
        raise ItoError(f"A limit on images must be at least 1, got {count}.")
    return torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu")[:count].sort().values


@dataclass(frozen=True)
class InMemory:
    """Images held as uint8, augmented in batches on the device.

    Attributes:
        pixels: uint8 ``(N, C, H, W)``.
        labels: int64 ``(N,)``.
        augment: ``none``; ``shift`` by up to one pixel; ``flip-crop``, CIFAR's flip and crop after 4 pixels of padding.
        names: the images' numbers in the whole split, their index in the noise's address.
    """

    pixels: Tensor
    labels: Tensor
    augment: str = "none"
    names: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> InMemory:
        """See `Split`."""
        keep = _spread(len(self), count)
        names = torch.arange(len(self), device="cpu") if self.names is None else self.names
        return replace(self, pixels=self.pixels[keep], labels=self.labels[keep], names=names[keep])

    def batches(
        self,
        size: int,
        device: torch.device | str = "cpu",
        epoch: tuple[int, int] | None = None,
        skip: int = 0,
    ) -> Iterator[Batch]:
        """See `Split`."""
        order, generator = _order(len(self), epoch)
        # Offsets for the whole epoch at once, so that skipping batches does not change the others.
        draws = torch.rand(len(self), 3, generator=generator, device="cpu")
        names = torch.arange(len(self), device="cpu") if self.names is None else self.names
        for start, stop in batch_bounds(len(self), size, epoch is not None)[skip:]:
            rows = order[start:stop]
            x = self.pixels[rows].to(device, non_blocking=True).float() / 255
            if epoch is not None and self.augment != "none":
                pad = 1 if self.augment == "shift" else 4
                x = _shifted(x, draws[rows].to(device), pad, flip=self.augment != "shift")
            yield names[rows].to(device), x, self.labels[rows].to(device)


def _shifted(x: Tensor, draws: Tensor, pad: int, flip: bool) -> Tensor:
    """Every image shifted by its own offset and maybe mirrored: ``(N, C, H, W)``, draws ``(N, 3)`` in [0, 1)."""
    n, c, h, w = x.shape
    offset = (draws[:, :2] * (2 * pad + 1)).long()
    rows = offset[:, :1] + torch.arange(h, device=x.device)  # (N, H)
    columns = offset[:, 1:] + torch.arange(w, device=x.device)  # (N, W)
    if flip:
        columns = torch.where(draws[:, 2:] < 0.5, columns, columns.flip(1))
    batch = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[None, :, None, None]
    return F.pad(x, (pad,) * 4)[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class Streamed:
    """Image files read by workers, as they are needed, with ImageNet's standard crops.

    Attributes:
        files, labels: the images.
        size: of the crop in pixels; the shorter edge is first brought to ``size * 256 / 224``.
        augment: ``imagenet`` (random resized crop and flip in training) or ``none``.
        names: see `InMemory`.
    """

    files: tuple[Path, ...]
    labels: Tensor
    size: int
    augment: str = "none"
    names: Tensor | None = None

    def __len__(self) -> int:
        return len(self.files)

    def first(self, count: int | None) -> Streamed:
        """See `Split`."""
        keep = _spread(len(self), count)
        names = torch.arange(len(self), device="cpu") if self.names is None else self.names
        files = tuple(self.files[i] for i in keep.tolist())
        return replace(self, files=files, labels=self.labels[keep], names=names[keep])

    def batches(
        self,
        size: int,
        device: torch.device | str = "cpu",
        epoch: tuple[int, int] | None = None,
        skip: int = 0,
    ) -> Iterator[Batch]:
        """See `Split`."""
        order, _ = _order(len(self), epoch)
        names = torch.arange(len(self), device="cpu") if self.names is None else self.names
        loader = torch.utils.data.DataLoader(
            _Files(self, epoch),
            batch_sampler=[order[a:b].tolist() for a, b in batch_bounds(len(self), size, epoch is not None)[skip:]],
            num_workers=min(8, os.cpu_count() or 1),
            pin_memory=torch.device(device).type == "cuda",
        )
        said = False
        try:
            for rows, pixels, transparent in loader:
                if bool(transparent.any()) and not said:
                    said = True
                    _say_white(f"Pictures of {str(self.files[0].parent.parent)!r} are")
                x = pixels.to(device, non_blocking=True).float() / 255
                yield names[rows].to(device), x, self.labels[rows].to(device)
        except ItoError as error:  # a worker sends its whole traceback as the message; its last line says it
            raise ItoError(str(error).strip().splitlines()[-1].partition("Error: ")[2]) from None


class _Files(torch.utils.data.Dataset):
    """Row -> (row, uint8 pixels, was it transparent?); a module-level class, as workers must be able to receive it."""

    def __init__(self, split: Streamed, epoch: tuple[int, int] | None) -> None:
        self.split, self.epoch = split, epoch

    def __getitem__(self, row: int) -> tuple[int, Tensor, bool]:
        image, transparent = _open(self.split.files[row], "RGB")
        size = self.split.size
        if self.epoch is None or self.split.augment != "imagenet":
            return row, _pixels(_centred(image, size)), transparent
        # The crop belongs to (seed, epoch, image), whichever worker makes it.
        seed = np.random.SeedSequence([abs(int(self.epoch[0])), self.epoch[1], row]).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed >> np.uint64(1)))
            top, left, height, width = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
            flip = bool(torch.rand(()) < 0.5)
        image = TF.resized_crop(image, top, left, height, width, [size, size])
        return row, _pixels(TF.hflip(image) if flip else image), transparent


def open_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """One image file with 8 bits a channel, as it stands: turned as its EXIF data say, and on a white ground.

    Sixteen bits of grey and floats in [0, 1] are scaled; other colours are converted as Pillow does; of a file with
    several pictures it is the first.

    Raises:
        ItoError: the file is missing or cannot be read, or its values do not say what is white; its path is named.
    """
    return _open(path, mode)[0]


def _open(path: str | Path, mode: str) -> tuple[Image.Image, bool]:
    """`open_image`, and whether the picture was transparent anywhere."""
    try:
        # From memory: on damaged TIFFs a file descriptor was closed that was already in use elsewhere.
        with Image.open(io.BytesIO(Path(path).read_bytes())) as opened:
            # Pillow turns a TIFF by itself, while it loads.
            upright = opened if opened.format == "TIFF" else ImageOps.exif_transpose(opened)
            image = _eight_bits(upright, opened.format, path)
            if not (image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info):
                return image.convert(mode), False
            layer = image.convert("RGBA")
            if layer.getchannel("A").getextrema()[0] == 255:  # opaque everywhere
                return image.convert(mode), False
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert(mode), True
    except ItoError:
        raise
    except FileNotFoundError:
        raise ItoError(f"There is no image file {str(path)!r}.") from None
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = "its content is no image" if isinstance(error, UnidentifiedImageError) else reason
        raise ItoError(f"The image file {str(path)!r} cannot be read: {reason.rstrip('.')}.") from error


def _eight_bits(image: Image.Image, kind: str | None, path: str | Path) -> Image.Image:
    """Scale what Pillow would clip to 8 bits; ``kind`` is the file's format, ``path`` its place for messages."""
    if image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())  # NaN if any pixel is
        if not (low >= 0 and high <= 1):
            raise ItoError(
                f"The image file {str(path)!r} holds floats from {low:g} to {high:g}, and only in [0, 1] is it known "
                "what is white; save it with 8 or 16 bits."
            )
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if not image.mode.startswith("I"):
        return image
    if image.mode == "I" and kind not in ("PNG", "PPM"):  # which hold 16 bits at most
        raise ItoError(
            f"The image file {str(path)!r} holds whole numbers of 32 bits, of which it is not known what is white; "
            "save it with 8 or 16 bits."
        )
    values = np.asarray(image)
    grey = Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:  # one grey, which stands for the ground
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _say_white(what: str) -> None:
    warnings.warn(f"{what} transparent in places: read on a white ground.", UserWarning, stacklevel=3)


def load_image(path: str | Path, image_shape: tuple[int, int, int]) -> Tensor:
    """A picture as a network of ``image_shape`` wants it: ``(C, H, W)`` in [0, 1], resized and cropped if need be.

    `open_image` says how files are read; it warns where a picture is transparent.
    """
    channels, height, width = image_shape
    image, transparent = _open(path, "L" if channels == 1 else "RGB")
    if transparent:
        _say_white(f"The picture {str(path)!r} is")
    if image.size != (width, height):
        image = _centred(image, height)
    return _pixels(image).float() / 255


def _centred(image: Image.Image, size: int) -> Image.Image:
    """The centre of the picture, ``size`` square. Small images are only scaled; large ones as for ImageNet."""
    if image.size == (size, size):
        return image
    edge = size if size <= _IN_MEMORY else round(size * 256 / 224)
    return TF.center_crop(TF.resize(image, [edge], antialias=True), [size, size])


def _pixels(image: Image.Image) -> Tensor:
    array = np.asarray(image)
    return torch.from_numpy(np.array(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)))


def load_data(
    name: str,
    path: str | Path | None = None,
    size: int | None = None,
    augment: str | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> Dataset:
    """A data set by name.

    Args:
        name: ``digits`` (scikit-learn's 1,797 real 8x8 scans, no download), ``cifar10``, ``cifar100``
            (downloaded by torchvision on first use) or ``imagefolder``.
        path: for ``imagefolder`` the folder that holds ``train/CLASS/*`` and ``test/CLASS/*`` (or ``val``); for
            CIFAR where the download is kept, default ``~/.cache/ito-sde``. Pictures are read as `open_image` says;
            where some are transparent, one warning says that they stand on white.
        size: image size for ``imagefolder``; default: that of the first image if it is square and at most
            64 pixels wide, else 224.
        augment: a name in `AUGMENTATIONS`; the default suits the data.
        train_limit, test_limit: use so many images, a fixed choice.

    Raises:
        ItoError: unknown names, a folder that is missing or empty, a corrupt image, or no network.
    """
    if name not in DATASETS:
        raise ItoError(nearest("data set", name, DATASETS))
    if augment is not None and augment not in AUGMENTATIONS:
        raise ItoError(nearest("augmentation", augment, AUGMENTATIONS))
    for limit in (train_limit, test_limit):
        _spread(1, limit)  # refuse limits below 1 before anything is read
    if name != "imagefolder" and size not in (None, IMAGE_SIZES[name]):
        raise ItoError(
            f"data.size is for image folders: {name} has {IMAGE_SIZES[name]} pixels, got {size}; set data.size=null."
        )
    if name == "digits" and path is not None:
        raise ItoError("data.path is for CIFAR and image folders, digits come with scikit-learn; set data.path=null.")
    if name == "imagefolder":
        return _folder(path, size, augment, train_limit, test_limit)
    data = _digits() if name == "digits" else _cifar(name, path)
    style = augment or ("shift" if name == "digits" else "flip-crop")
    if style == "imagenet":
        raise ItoError(f"The augmentation 'imagenet' is for image folders larger than {_IN_MEMORY} pixels.")
    assert isinstance(data.train, InMemory)
    train = replace(data.train, augment=style).first(train_limit)
    return replace(data, train=train, test=data.test.first(test_limit))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 1, 8, 8) * (255 / 16)).round().astype("uint8")  # 17 grey levels
    rows = train_test_split(np.arange(len(labels)), test_size=500, stratify=labels, random_state=0)
    train, test = (InMemory(torch.from_numpy(pixels[r]), torch.from_numpy(labels[r]).long()) for r in rows)
    return Dataset("digits", tuple("0123456789"), (1, 8, 8), train, test)


def _cifar(name: str, path: str | Path | None) -> Dataset:
    root = Path(path) if path else Path.home() / ".cache" / "ito-sde"
    kind = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    try:
        splits = [kind(str(root), train=train, download=True) for train in (True, False)]
    except (URLError, OSError, RuntimeError) as error:
        raise ItoError(
            f"{name} is not in {str(root)!r} and could not be downloaded ({error}); unpack {kind.url} there, "
            "or name another folder as data.path."
        ) from error
    train, test = (
        InMemory(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets, device="cpu"))
        for s in splits
    )
    return Dataset(name, tuple(splits[0].classes), (3, 32, 32), train, test)


def _folder(
    path: str | Path | None,
    size: int | None,
    augment: str | None,
    train_limit: int | None,
    test_limit: int | None,
) -> Dataset:
    if path is None:
        raise ItoError("The data set 'imagefolder' needs data.path: a folder with train/CLASS/* and test/CLASS/*.")
    root = Path(path)
    if not os.path.isdir(root):
        raise ItoError(f"There is no folder {shown(str(root))}.")
    held_out = next((root / part for part in ("test", "val") if (root / part).is_dir()), root / "test")
    found = [_listing(root / "train"), _listing(held_out)]
    if found[0][0] != found[1][0]:
        odd = sorted(set(found[0][0]) ^ set(found[1][0]))
        raise ItoError(f"{str(root)!r} has other classes in train than in {held_out.name}: {', '.join(odd[:5])}.")
    if size is None:
        wide, high = open_image(found[1][1][0]).size
        size = wide if wide == high and wide <= _IN_MEMORY else 224
    small = size <= _IN_MEMORY
    style = augment or ("flip-crop" if small else "imagenet")
    if (style == "imagenet") == small and style != "none":
        raise ItoError(f"The augmentation {style!r} does not fit images of {size} pixels.")
    splits: list[Split] = []
    for (_, files, labels), limit, way in zip(found, (train_limit, test_limit), (style, "none"), strict=True):
        split = Streamed(tuple(files), torch.tensor(labels, device="cpu"), size, way).first(limit)
        splits.append(_in_memory(split) if small else split)
    return Dataset(root.resolve().name, tuple(found[0][0]), (3, size, size), *splits)


def _in_memory(split: Streamed) -> InMemory:
    pixels = torch.empty(len(split), 3, split.size, split.size, dtype=torch.uint8, device="cpu")
    count = 0
    for row, file in enumerate(split.files):
        image, transparent = _open(file, "RGB")
        pixels[row] = _pixels(_centred(image, split.size))
        count += transparent
    if count:
        _say_white(f"{count} of {len(split)} pictures of {str(split.files[0].parent.parent)!r} are")
    return InMemory(pixels, split.labels, split.augment, split.names)


def _listing(folder: Path) -> tuple[list[str], list[Path], list[int]]:
    """Classes (alphabetical), image files, labels."""
    if not folder.is_dir():
        raise ItoError(f"There is no folder {str(folder)!r}; it should hold one folder of images a class.")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files, labels = [], []
    for label, name in enumerate(classes):
        for file in sorted((folder / name).rglob("*")):
            if file.suffix.lower() in _SUFFIXES:
                files.append(file)
                labels.append(label)
    if not files:
        raise ItoError(
            f"The folder {str(folder)!r} holds no images in class folders ({', '.join(_SUFFIXES[:4])}, ...)."
        )
    return classes, files, labels
