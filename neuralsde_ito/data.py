"""Images: digits, CIFAR and folders of pictures. Small sets are held in memory, large ones are streamed.

Images are floats in [0, 1], ``(N, C, H, W)``. Their order and augmentation are pure functions of ``(seed, epoch)``: a
run that is resumed in the middle of an epoch gets the same batches as one that was not interrupted.

`DATASETS` is the table of data sets, and shows how to add one.
"""

from __future__ import annotations

import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, cast
from urllib.error import URLError

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from .names import AUGMENTATIONS
from .validation import ItoError, one_of, shown

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
_IN_MEMORY = 64  # pixels: images up to this size are held in memory

Batch = tuple[Tensor, Tensor, Tensor]  # index (N,) int64, images (N, C, H, W) in [0, 1], labels (N,) int64


class Split(Protocol):
    """One split of a data set: an indexed collection of images that yields batches."""

    @property
    def labels(self) -> Tensor:
        """True labels, int64 ``(N,)``."""
        ...

    @property
    def names(self) -> Tensor | None:
        """The images' numbers in the whole split, int64 ``(N,)``; None: their positions in this one."""
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
        """Yield batches.

        Args:
            size: images a batch.
            device: where the batches are put.
            epoch: ``(seed, number)``, for training: the images are shuffled and augmented, and `batch_bounds` cuts
                the batches. None: the images as they are, in order.
            skip: number of batches at the beginning that are left out, without the work of making them.
        """
        ...

    def first(self, count: int | None) -> Split:
        """``count`` images, a fixed random choice in the split's order; None or a large count: all of them.

        Raises:
            ItoError: ``count`` is below 1.
        """
        ...

    def without(self, count: int) -> Split:
        """The images that ``first(count)`` leaves out; they keep their names.

        Raises:
            ItoError: ``count`` is below 1, or none is left.
        """
        ...

    def part(self, first: int, stop: int) -> Split:
        """The images at positions ``first`` to ``stop - 1``; they keep their names."""
        ...


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, with what a network must know about them.

    Attributes:
        name: for messages and tables.
        classes: names of the classes; a label is a position in it.
        image_shape: ``(C, H, W)``.
        train, test: the splits.
    """

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    train: Split
    test: Split


def _epoch_order(n: int, epoch: tuple[int, int] | None) -> tuple[Tensor, torch.Generator]:
    """The order of the images in an epoch, int64 ``(n,)``, and a generator for whatever else is random in it."""
    generator = torch.Generator()
    if epoch is None:
        return torch.arange(n, device="cpu"), generator
    # A 64-bit state from two numbers: neighbouring seeds and epochs do not share a stream.
    state = np.random.SeedSequence([abs(int(epoch[0])), epoch[1]]).generate_state(1, np.uint64)[0]
    generator.manual_seed(int(state >> np.uint64(1)))
    return torch.randperm(n, generator=generator, device="cpu"), generator


def batch_bounds(n: int, size: int, training: bool = False) -> list[tuple[int, int]]:
    """Begin and end of each batch, for ``n`` images in batches of ``size``.

    In training, a last batch of one image joins the batch before it: BatchNorm has no variance of a single value, and
    a step on one image would weigh as much as a step on a whole batch.
    """
    starts = list(range(0, n, size))
    if training and size > 1 and n % size == 1:
        starts = starts[:-1] or starts
    return list(itertools.pairwise([*starts, n]))


def _fixed_choice(n: int, count: int | None) -> Tensor:
    """``count`` of the numbers below ``n``: a fixed random choice, in order, in which every class is likely to be."""
    if count is None or count >= n:
        return torch.arange(n, device="cpu")
    if count < 1:
        raise ItoError(f"A limit on images must be at least 1, got {count}.")
    return torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu")[:count].sort().values


def _other_choice(n: int, count: int) -> Tensor:
    """The numbers below ``n`` that `_fixed_choice` leaves out, in order."""
    if count >= n:
        raise ItoError(f"{count} of {n} images cannot be held out: none would be left.")
    left = torch.ones(n, dtype=torch.bool, device="cpu")
    left[_fixed_choice(n, count)] = False
    return left.nonzero()[:, 0]


@dataclass(frozen=True)
class InMemory:
    """A split whose images are held as uint8, and augmented in batches on the device.

    Attributes:
        pixels: uint8 ``(N, C, H, W)``.
        labels: int64 ``(N,)``.
        augment: ``none``; ``shift``, by up to one pixel; or ``flip-crop``, CIFAR's usual flip, and crop after 4 pixels
            of padding (He et al. 2015, section 4.2, https://arxiv.org/abs/1512.03385).
        names: int64 ``(N,)``, the images' numbers in the whole split, which name them in the noise's address; None:
            their positions.
    """

    pixels: Tensor
    labels: Tensor
    augment: str = "none"
    names: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> InMemory:
        """See `Split`."""
        return self._rows(_fixed_choice(len(self), count))

    def without(self, count: int) -> InMemory:
        """See `Split`."""
        return self._rows(_other_choice(len(self), count))

    def _rows(self, keep: Tensor) -> InMemory:
        names = torch.arange(len(self), device="cpu") if self.names is None else self.names
        return replace(self, pixels=self.pixels[keep], labels=self.labels[keep], names=names[keep])

    def part(self, first: int, stop: int) -> InMemory:
        """See `Split`."""
        names = torch.arange(len(self), device="cpu") if self.names is None else self.names
        rows = slice(first, stop)
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows], names=names[rows])

    def batches(
        self,
        size: int,
        device: torch.device | str = "cpu",
        epoch: tuple[int, int] | None = None,
        skip: int = 0,
    ) -> Iterator[Batch]:
        """See `Split`."""
        order, generator = _epoch_order(len(self), epoch)
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
    """Shift each image by its own offset, and maybe mirror it: ``(N, C, H, W)``, draws ``(N, 3)`` in [0, 1)."""
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
    """A split whose image files are read by workers when a batch needs them, with ImageNet's standard crops.

    Attributes:
        files: the images' paths.
        labels: int64 ``(N,)``.
        size: height and width of the crop in pixels; before it, the shorter edge is scaled to ``size * 256 / 224``.
        augment: ``imagenet`` (in training, a random resized crop and a flip) or ``none``.
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
        return self._rows(_fixed_choice(len(self), count))

    def without(self, count: int) -> Streamed:
        """See `Split`."""
        return self._rows(_other_choice(len(self), count))

    def _rows(self, keep: Tensor) -> Streamed:
        names = torch.arange(len(self), device="cpu") if self.names is None else self.names
        files = tuple(self.files[i] for i in keep.tolist())
        return replace(self, files=files, labels=self.labels[keep], names=names[keep])

    def part(self, first: int, stop: int) -> Streamed:
        """See `Split`."""
        names = torch.arange(len(self), device="cpu") if self.names is None else self.names
        rows = slice(first, stop)
        return replace(self, files=self.files[rows], labels=self.labels[rows], names=names[rows])

    def batches(
        self,
        size: int,
        device: torch.device | str = "cpu",
        epoch: tuple[int, int] | None = None,
        skip: int = 0,
    ) -> Iterator[Batch]:
        """See `Split`."""
        order, _ = _epoch_order(len(self), epoch)
        names = torch.arange(len(self), device="cpu") if self.names is None else self.names
        loader = torch.utils.data.DataLoader(
            _ImageFiles(self, epoch),
            batch_sampler=[order[a:b].tolist() for a, b in batch_bounds(len(self), size, epoch is not None)[skip:]],
            num_workers=min(8, os.cpu_count() or 1),
            pin_memory=torch.device(device).type == "cuda",
        )
        warned = False
        try:
            for rows, pixels, transparent in loader:
                if bool(transparent.any()) and not warned:
                    warned = True
                    _warn_transparent(f"Pictures of {str(self.files[0].parent.parent)!r} are")
                x = pixels.to(device, non_blocking=True).float() / 255
                yield names[rows].to(device), x, self.labels[rows].to(device)
        except ItoError as error:  # a worker's message is its whole traceback; the last line has ours
            raise ItoError(str(error).strip().splitlines()[-1].partition("Error: ")[2]) from None


class _ImageFiles(torch.utils.data.Dataset):
    """From a row to (row, uint8 pixels, whether the picture is transparent). Workers pickle it, so it is not nested."""

    def __init__(self, split: Streamed, epoch: tuple[int, int] | None) -> None:
        self.split, self.epoch = split, epoch

    def __getitem__(self, row: int) -> tuple[int, Tensor, bool]:
        image, transparent = _read_image(self.split.files[row], "RGB")
        size = self.split.size
        if self.epoch is None or self.split.augment != "imagenet":
            return row, _pixels(_centre_crop(image, size)), transparent
        # The crop is a function of (seed, epoch, image), whichever worker makes it.
        seed = np.random.SeedSequence([abs(int(self.epoch[0])), self.epoch[1], row]).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed >> np.uint64(1)))
            top, left, height, width = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
            flip = bool(torch.rand((), device="cpu") < 0.5)
        image = TF.resized_crop(image, top, left, height, width, [size, size])
        return row, _pixels(TF.hflip(image) if flip else image), transparent


def open_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """Read one image file with 8 bits a channel, upright as its EXIF data say, and on a white ground.

    Sixteen bits of grey and floats in [0, 1] are scaled. Other colours are converted as Pillow does. Of a file with
    several pictures, the first is read.

    Args:
        path: the file.
        mode: Pillow's name for the colours, ``RGB`` or ``L``.

    Raises:
        ItoError: the file is missing or cannot be read, or its values do not say what is white; the message names it.
    """
    return _read_image(path, mode)[0]


def _read_image(path: str | Path, mode: str) -> tuple[Image.Image, bool]:
    """`open_image`, and whether the picture is transparent anywhere."""
    try:
        # From memory: with a damaged TIFF, Pillow closed a file descriptor that something else already used.
        with Image.open(io.BytesIO(Path(path).read_bytes())) as opened:
            # Pillow turns a TIFF upright by itself while it loads.
            upright = opened if opened.format == "TIFF" else ImageOps.exif_transpose(opened)
            image = _to_eight_bits(upright, opened.format, path)
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


def _to_eight_bits(image: Image.Image, kind: str | None, path: str | Path) -> Image.Image:
    """Scale values that Pillow would clip to 8 bits; ``kind`` is the file's format, and messages name ``path``."""
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
    if image.mode == "I" and kind not in ("PNG", "PPM"):  # these two formats hold 16 bits at most
        raise ItoError(
            f"The image file {str(path)!r} holds whole numbers of 32 bits, and their white level is unknown; "
            "save it with 8 or 16 bits."
        )
    values = np.asarray(image)
    grey = Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:  # this grey means transparent
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _warn_transparent(what: str) -> None:
    warnings.warn(f"{what} transparent in places: read on a white ground.", UserWarning, stacklevel=3)


def load_image(path: str | Path, image_shape: tuple[int, int, int]) -> Tensor:
    """Read a picture for a network, ``(C, H, W)`` in [0, 1]; a picture of another size is scaled and cropped.

    `open_image` says how the file is read. A warning says if the picture is transparent.

    Args:
        path: the file.
        image_shape: ``(C, H, W)``; with one channel the picture becomes grey.

    Raises:
        ItoError: see `open_image`.
    """
    channels, height, width = image_shape
    image, transparent = _read_image(path, "L" if channels == 1 else "RGB")
    if transparent:
        _warn_transparent(f"The picture {str(path)!r} is")
    if image.size != (width, height):
        image = _centre_crop(image, height)
    return _pixels(image).float() / 255


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre of the picture, ``size`` square; before it, the shorter edge is scaled to ``size``.

    For images that are not small, to ``size * 256 / 224``, as usual for ImageNet.
    """
    if image.size == (size, size):
        return image
    edge = size if size <= _IN_MEMORY else round(size * 256 / 224)
    return TF.center_crop(TF.resize(image, [edge], antialias=True), [size, size])


def _pixels(image: Image.Image) -> Tensor:
    """uint8 ``(C, H, W)``."""
    array = np.asarray(image)
    return torch.from_numpy(np.array(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)))


@dataclass(frozen=True)
class Source:
    """Where a data set comes from: a row of `DATASETS`.

    Attributes:
        load: from ``data.path`` and ``data.size`` (None: not given) to the data set, not augmented and not limited.
        size: height and width of its images in pixels; None: they are chosen.
        augment: the default augmentation in training; None: ``flip-crop``, or ``imagenet`` for large image files.
    """

    load: Callable[[str | Path | None, int | None], Dataset]
    size: int | None = None
    augment: str | None = None


def load_data(
    name: str,
    path: str | Path | None = None,
    size: int | None = None,
    augment: str | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> Dataset:
    """Load a data set by name.

    Args:
        name: ``digits`` (scikit-learn's 1,797 real 8x8 scans, no download), ``cifar10``, ``cifar100``
            (torchvision downloads them on first use) or ``imagefolder``.
        path: for ``imagefolder`` the folder that holds ``train/CLASS/*`` and ``test/CLASS/*`` (or ``val``); for
            CIFAR the folder of the download, default ``~/.cache/ito-sde``. `open_image` says how pictures are read;
            if some are transparent, one warning says that they stand on white.
        size: height and width of the images in pixels, for ``imagefolder``; default: those of the first test image
            if it is square and at most 64 pixels wide, else 224.
        augment: a name in `AUGMENTATIONS`; the default suits the data.
        train_limit, test_limit: use so many images, a fixed choice.

    Raises:
        ItoError: a name is unknown, a folder is missing or empty, an image is corrupt, or there is no network.
    """
    source = DATASETS[one_of("data set", name, DATASETS)]
    if augment is not None:
        one_of("augmentation", augment, AUGMENTATIONS)
    for limit in (train_limit, test_limit):
        _fixed_choice(1, limit)  # refuse limits below 1 before anything is read
    if source.size is not None and size not in (None, source.size):
        raise ItoError(
            f"data.size is for image folders: {name} has {source.size} pixels, got {size}; set data.size=null."
        )
    data = source.load(path, size)
    pixels, streamed = data.image_shape[1], isinstance(data.train, Streamed)
    large = streamed and pixels > _IN_MEMORY
    style = augment or source.augment or ("imagenet" if large else "flip-crop")
    if style == "imagenet" and not streamed:
        raise ItoError(f"The augmentation 'imagenet' is for image folders larger than {_IN_MEMORY} pixels.")
    if streamed and style != "none" and (style == "imagenet") != large:
        raise ItoError(f"The augmentation {style!r} does not fit images of {pixels} pixels.")
    train = _ready(replace(cast("InMemory | Streamed", data.train), augment=style).first(train_limit))
    return replace(data, train=train, test=_ready(data.test.first(test_limit)))


def _ready(split: Split) -> Split:
    """The split itself; if it is of files with small images, these are read into memory."""
    if not isinstance(split, Streamed) or split.size > _IN_MEMORY:
        return split
    pixels = torch.empty(len(split), 3, split.size, split.size, dtype=torch.uint8, device="cpu")
    count = 0
    for row, file in enumerate(split.files):
        image, transparent = _read_image(file, "RGB")
        pixels[row] = _pixels(_centre_crop(image, split.size))
        count += transparent
    if count:
        _warn_transparent(f"{count} of {len(split)} pictures of {str(split.files[0].parent.parent)!r} are")
    return InMemory(pixels, split.labels, split.augment, split.names)


def _digits(path: str | Path | None, size: int | None) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if path is not None:
        raise ItoError("data.path is for CIFAR and image folders, digits come with scikit-learn; set data.path=null.")
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 1, 8, 8) * (255 / 16)).round().astype("uint8")  # 17 grey levels
    rows = train_test_split(np.arange(len(labels)), test_size=500, stratify=labels, random_state=0)
    train, test = (InMemory(torch.from_numpy(pixels[r]), torch.from_numpy(labels[r]).long()) for r in rows)
    return Dataset("digits", tuple("0123456789"), (1, 8, 8), train, test)


def _cifar(name: str, path: str | Path | None, size: int | None) -> Dataset:
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


def _image_folder(path: str | Path | None, size: int | None) -> Dataset:
    if path is None:
        raise ItoError("The data set 'imagefolder' needs data.path: a folder with train/CLASS/* and test/CLASS/*.")
    root = Path(path)
    if not os.path.isdir(root):
        raise ItoError(f"There is no folder {shown(str(root))}.")
    held_out = next((root / part for part in ("test", "val") if (root / part).is_dir()), root / "test")
    classes, train_files, train_labels = _list_images(root / "train")
    test_classes, test_files, test_labels = _list_images(held_out)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise ItoError(f"{str(root)!r} has other classes in train than in {held_out.name}: {', '.join(odd[:5])}.")
    if size is None:
        width, height = open_image(test_files[0]).size
        size = width if width == height and width <= _IN_MEMORY else 224
    train, test = (
        Streamed(tuple(files), torch.tensor(labels, device="cpu"), size)
        for files, labels in ((train_files, train_labels), (test_files, test_labels))
    )
    return Dataset(root.resolve().name, tuple(classes), (3, size, size), train, test)


def _list_images(folder: Path) -> tuple[list[str], list[Path], list[int]]:
    """Classes in alphabetical order, image files, and a label for each file."""
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


# To add a data set, write a loader and give it a row below; the command line and the configuration follow. SVHN, say:
#
#     def _svhn(path: str | Path | None, size: int | None) -> Dataset:
#         splits = [torchvision.datasets.SVHN(str(path), part, download=True) for part in ("train", "test")]
#         train, test = (InMemory(torch.from_numpy(s.data), torch.from_numpy(s.labels).long()) for s in splits)
#         return Dataset("svhn", tuple("0123456789"), (3, 32, 32), train, test)
#
#     "svhn": Source(_svhn, size=32, augment="shift"),
DATASETS: dict[str, Source] = {
    "digits": Source(_digits, size=8, augment="shift"),
    "cifar10": Source(partial(_cifar, "cifar10"), size=32, augment="flip-crop"),
    "cifar100": Source(partial(_cifar, "cifar100"), size=32, augment="flip-crop"),
    "imagefolder": Source(_image_folder),
}
IMAGE_SIZES = {name: source.size for name, source in DATASETS.items() if source.size is not None}
