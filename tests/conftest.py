"""Fixtures for what lies beside the checkout (trained weights and real images, of which the project holds neither), and
for what tests of pictures share."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# The tensors of most tests are small. A second thread gains nothing on them, and where other work shares the
# cores it costs twentyfold: the threads of one operation wait for one another.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """A ResNet-20 that somebody else trained on CIFAR-10 (option-A shortcuts)."""
    path = SHARED / "weights" / "resnet20-12fca82f.th"
    if not path.is_file():
        pytest.skip("needs shared/weights/resnet20-12fca82f.th beside the checkout")
    return path


@pytest.fixture(scope="session")
def cifar10_jpeg(tmp_path_factory) -> Path:
    """The folder with ``test/<class>/NNNN.jpg`` (and ``train/``, where all of it was unpacked)."""
    unpacked = Path.home() / ".cache" / "cifar10-jpeg"
    if (unpacked / "test").is_dir():
        return unpacked
    archive = SHARED / "data" / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip("needs shared/data/cifar10-jpeg.tar.xz beside the checkout, or ~/.cache/cifar10-jpeg")
    folder = tmp_path_factory.mktemp("cifar10-jpeg")
    with tarfile.open(archive) as tar:
        members = (m for m in tar if m.name.removeprefix("./").startswith("test/"))
        tar.extractall(folder, members=members, filter="data")
    return folder


@pytest.fixture(scope="session")
def cifar10_test(cifar10_jpeg) -> tuple[torch.Tensor, torch.Tensor]:
    """All 10,000 test images, float32 ``(N, 3, 32, 32)`` in [0, 1], and labels; classes alphabetical."""
    classes = sorted(folder for folder in (cifar10_jpeg / "test").iterdir() if folder.is_dir())
    files = [(file, label) for label, folder in enumerate(classes) for file in sorted(folder.glob("*.jpg"))]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
    return images, torch.tensor([label for _, label in files])


@pytest.fixture
def canvas(monkeypatch):
    """A function that gives the figure of matplotlib's that was made last."""
    from matplotlib.figure import Figure

    made, init = [], Figure.__init__

    def noted(self, *arguments, **settings):
        made.append(self)
        init(self, *arguments, **settings)

    monkeypatch.setattr(Figure, "__init__", noted)
    return lambda: made[-1]
