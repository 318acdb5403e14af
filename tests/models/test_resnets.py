"""Networks have the published sizes, take published files in every layout, and refuse the rest in one sentence."""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from problems import random_images, random_resnet
from safetensors.torch import save_file
from torch import nn

from neuralsde_ito.models.recast import recast
from neuralsde_ito.models.resnets import (
    ARCHITECTURES,
    MEAN,
    STD,
    Normalize,
    PadShortcut,
    canonical_keys,
    load_resnet,
    load_weights,
)
from neuralsde_ito.noise.keys import make_keys

# --- the networks ---------------------------------------------------------------------------------------

# resnet20 .. resnet110: akamaster/pytorch_resnet_cifar10, which has option A, 10 classes, as He et al.'s table 6
# (0.27M, 0.46M, 0.66M, 0.85M, 1.7M). cifar-resnet: kuangliu/pytorch-cifar (11.17M, 21.28M, 23.52M).
# The others: torchvision's documentation, `num_params`, at 1,000 classes.
PARAMETERS = {
    "resnet20": (10, 269_722),
    "resnet32": (10, 464_154),
    "resnet44": (10, 658_586),
    "resnet56": (10, 853_018),
    "resnet110": (10, 1_727_962),
    "cifar-resnet18": (10, 11_173_962),
    "cifar-resnet34": (10, 21_282_122),
    "cifar-resnet50": (10, 23_520_842),
    "resnet18": (1000, 11_689_512),
    "resnet34": (1000, 21_797_672),
    "resnet50": (1000, 25_557_032),
    "resnet101": (1000, 44_549_160),
    "resnet152": (1000, 60_192_808),
}


@pytest.mark.parametrize("arch", list(PARAMETERS))
def test_parameter_counts_are_the_published_ones(arch):
    classes, count = PARAMETERS[arch]
    assert sum(p.numel() for p in load_resnet(arch, num_classes=classes).parameters()) == count


def test_every_architecture_is_counted_or_of_our_own():
    assert set(ARCHITECTURES) - set(PARAMETERS) == {"resnet8", "resnet14"}


@pytest.mark.parametrize(("arch", "size"), [("resnet8", 32), ("cifar-resnet18", 32), ("resnet18", 64)])
@pytest.mark.parametrize(("classes", "channels"), [(10, 3), (7, 1), (2, 4)])
@torch.no_grad()
def test_classes_and_channels(arch, size, classes, channels):
    net = load_resnet(arch, num_classes=classes, in_channels=channels)
    assert not net.training
    assert net(random_images(2, size, channels)).shape == (2, classes)


def test_the_depth_is_in_the_name():
    # He et al.: 6 n + 2 layers with weights; a projection is not counted.
    for depth in (8, 14, 20, 32, 44, 56, 110):
        layers = [m for m in load_resnet(f"resnet{depth}").modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == depth


def test_option_a_takes_every_second_pixel_and_pads_both_sides():
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    y = PadShortcut(7)(x)
    assert y.shape == (2, 7, 2, 2)
    assert torch.equal(y[:, 2:5], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 5:].any()


def test_normalisation_comes_first_and_is_no_weight():
    net = load_resnet("resnet8")
    x = random_images(2, 4)
    expected = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(net[0](x), expected)
    assert not any("normalize" in key for key in net.state_dict())
    assert (load_resnet("resnet8", in_channels=1)[0](torch.full((1, 1, 2, 2), 0.5)) == 0).all()
    custom = load_resnet("resnet8", mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.25))
    torch.testing.assert_close(custom[0](torch.ones(1, 3, 1, 1)).flatten(), torch.tensor([1.8, 1.6, 2.8]))


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((0.5,), (-1.0,))])
def test_normalisations_that_make_no_sense_are_refused(mean, std):
    with pytest.raises(ValueError, match="std positive"):
        Normalize(mean, std)


def test_a_normalisation_for_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"one number a channel \(3\), got 1"):
        load_resnet("resnet8", mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize(("classes", "channels"), [(1, 3), (0, 3), (10, 0)])
def test_networks_that_make_no_sense_are_refused(classes, channels):
    with pytest.raises(ValueError, match=f"got {classes} and {channels}"):
        load_resnet("resnet8", num_classes=classes, in_channels=channels)


def test_unknown_architectures_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"Unknown architecture 'resnet21'; did you mean 'resnet20'\?"):
        load_resnet("resnet21")
    with pytest.raises(ValueError, match=r"Unknown architecture 'VGG'\. Known: resnet8, .*resnet152"):
        load_resnet("VGG")


# --- published layouts ----------------------------------------------------------------------------------


def pytorch_cifar(state):
    """kuangliu/pytorch-cifar: a dict of the network, the accuracy and the epoch; trained under DataParallel."""
    keys = {k: k.replace(".downsample.", ".shortcut.").replace("fc.", "linear.") for k in state}
    return {"net": {f"module.{keys[k]}": v for k, v in state.items()}, "acc": 95.1, "epoch": 199}


def option_a(state):
    """akamaster/pytorch_resnet_cifar10: ``state_dict`` and ``best_prec1``."""
    keys = {k: k.replace("fc.", "linear.") for k in state}
    return {"state_dict": OrderedDict((f"module.{keys[k]}", v) for k, v in state.items()), "best_prec1": 91.73}


LAYOUTS = {
    "torchvision": lambda state: state,
    "torchvision in a DataParallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "pytorch-cifar": pytorch_cifar,
    "option A": option_a,
    "a training checkpoint": lambda state: {"model": state, "epoch": 3, "optimizer": {"lr": 0.1}},
    "our own network": lambda state: {f"resnet.{k}": v for k, v in state.items()},
    "without num_batches_tracked": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("arch", ["resnet8", "cifar-resnet18", "resnet18"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@torch.no_grad()
def test_published_layouts_are_loaded(arch, layout, tmp_path):
    net = random_resnet(arch)
    torch.save(LAYOUTS[layout](net.resnet.state_dict()), tmp_path / "net.pth")
    x = random_images(2)
    loaded = load_resnet(arch, weights=tmp_path / "net.pth")
    assert torch.equal(loaded(x), net(x))
    assert torch.equal(load_resnet(arch, weights=str(tmp_path / "net.pth"))(x), net(x))


@pytest.mark.parametrize("suffix", [".pt", ".th", ".pth", ".tar", ""])
@torch.no_grad()
def test_the_name_of_a_pickled_file_does_not_matter(suffix, tmp_path):
    net, path = random_resnet("resnet8"), tmp_path / f"net{suffix}"
    torch.save(net.resnet.state_dict(), path)
    assert torch.equal(load_resnet("resnet8", weights=path)(random_images(1)), net(random_images(1)))


@torch.no_grad()
def test_legacy_pickles_and_safetensors_are_loaded(tmp_path):
    net, x = random_resnet("resnet8"), random_images(2)
    torch.save(net.resnet.state_dict(), tmp_path / "old.th", _use_new_zipfile_serialization=False)
    assert torch.equal(load_resnet("resnet8", weights=tmp_path / "old.th")(x), net(x))
    for layout in ("torchvision", "torchvision in a DataParallel", "our own network"):
        save_file(LAYOUTS[layout](net.resnet.state_dict()), tmp_path / "net.safetensors")
        assert torch.equal(load_resnet("resnet8", weights=tmp_path / "net.safetensors")(x), net(x))


def test_canonical_keys():
    keys = {
        "module.layer2.0.shortcut.0.weight": "layer2.0.downsample.0.weight",
        "linear.bias": "fc.bias",
        "module.linear.weight": "fc.weight",
        "resnet.fc.bias": "fc.bias",
        "conv1.weight": "conv1.weight",
    }
    for published, ours in keys.items():
        assert list(canonical_keys({published: torch.zeros(1)})) == [ours]


# --- files that are refused, in one sentence each -------------------------------------------------------


def refusal(arch: str, weights, **options) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is looked at by the caller
        load_resnet(arch, weights=weights, **options)
    message = str(error.value)
    assert "\n" not in message, message
    assert len(message) < 450 + len(str(weights)), message
    assert str(weights) in message
    return message


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "resnet8.pth"
    torch.save(load_resnet("resnet8").resnet.state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors", "folder/none.th"])
def test_a_missing_file(name, tmp_path):
    assert "There is no weights file" in refusal("resnet8", tmp_path / name)
    assert "There is no weights file" in refusal("resnet18", tmp_path / name)


def test_a_folder(tmp_path):
    assert "There is no weights file" in refusal("resnet8", tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_truncated_file(form, share, tmp_path):
    state = load_resnet("resnet8").resnet.state_dict()
    path = tmp_path / ("net.safetensors" if form == "safetensors" else "net.pth")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "truncated" in refusal("resnet8", path)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_file_cut_or_damaged_anywhere_in_its_pickle(form, tmp_path):
    # torch's restricted unpickler trips over what is missing in many ways: IndexError, KeyError, struct.error, ...
    path = tmp_path / "net.pth"
    torch.save({"a": torch.zeros(3), "b": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    for cut in range(1, min(len(content), 900), 7):
        damaged = bytearray(content)
        damaged[cut] ^= 0x55
        for what in (content[:cut], bytes(damaged)):
            path.write_bytes(what)
            refusal("resnet8", path)  # cut short, or a's and b's: no weights of a ResNet either way


CONTENTS = {
    "a page of a web server": b"<!DOCTYPE html><html><body>404</body></html>",
    "a pointer of git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1099231\n",
    "zeros": bytes(4096),
    "noise": bytes((i * 7919 + i // 256 * 104729) % 256 for i in range(4096)),
    "a pickled string": pickle.dumps("weights"),
    "a pickled set": pickle.dumps({1, 2}),
    "an array of numpy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }" + bytes(60),
}


@pytest.mark.parametrize("content", list(CONTENTS))
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_weights_file(content, suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(CONTENTS[content])
    refusal("resnet8", path)


def test_a_zip_file_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        archive.writestr("readme.txt", "not weights")
    refusal("resnet8", tmp_path / "net.pth")


@pytest.mark.parametrize("value", [torch.zeros(3), [torch.zeros(3)], {}, {"state_dict": {}}, {"epoch": 3}])
def test_a_file_without_tensors_by_name(value, tmp_path):
    torch.save(value, tmp_path / "net.pth")
    assert "holds no tensors by name" in refusal("resnet8", tmp_path / "net.pth")


def test_weights_of_another_architecture(saved):
    message = refusal("resnet14", saved)
    assert "do not fit 'resnet14'" in message
    assert "layer1.1.conv1.weight: not in the file" in message
    assert "more" in message
    message = refusal("resnet18", saved)
    assert "(16, 3, 3, 3) in the file, (64, 3, 7, 7) in the network" in message
    deeper = saved.with_name("deeper.pth")
    torch.save(load_resnet("resnet14").resnet.state_dict(), deeper)
    assert "layer1.1.conv1.weight: not in the network" in refusal("resnet8", deeper)


def test_weights_for_another_number_of_classes_or_channels(saved):
    message = refusal("resnet8", saved, num_classes=100)
    assert "fc.weight: (10, 64) in the file, (100, 64) in the network" in message
    assert "fc.bias: (10,) in the file, (100,) in the network" in message
    assert "more" not in message
    message = refusal("resnet8", saved, in_channels=1)
    assert "conv1.weight: (16, 3, 3, 3) in the file, (16, 1, 3, 3) in the network" in message


def test_weights_that_do_not_fit_change_nothing(saved):
    net = load_resnet("resnet14")
    before = {k: v.clone() for k, v in net.resnet.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit"):
        load_weights(net.resnet, saved, "resnet14")
    assert all(torch.equal(v, before[k]) for k, v in net.resnet.state_dict().items())


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize("place", ["alone", "beside tensors"])
def test_code_in_a_file_is_not_run(form, place, tmp_path):
    target, path = tmp_path / "made-by-the-file", tmp_path / "net.pth"
    payload: object = Malicious(target)
    if place == "beside tensors":
        payload = load_resnet("resnet8").resnet.state_dict() | {"extra": payload}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    refusal("resnet8", path)
    assert not target.exists()
    if form == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.is_dir(), "the file was harmless: the test shows nothing"


def test_a_name_that_is_no_file_and_not_torchvisions():
    message = refusal("resnet18", "IMAGENET1K_V9")
    assert "Unknown weights 'IMAGENET1K_V9'; did you mean 'IMAGENET1K_V1'?" in message
    message = refusal("resnet20", "IMAGENET1K_V1")
    assert "torchvision has no weights for 'resnet20'" in message


def test_weights_that_cannot_be_downloaded(monkeypatch):
    # No network here: the download is made to fail as it does without one.
    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", os.devnull + "-none")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    message = refusal("resnet18", "IMAGENET1K_V1")
    assert "no route to host" in message
    assert "https://download.pytorch.org/models/resnet18-" in message


# --- a network that somebody else trained ---------------------------------------------------------------


@torch.no_grad()
def count_correct(model, images, labels, keys=None) -> int:
    correct = 0
    for start in range(0, len(images), 250):
        part = slice(start, start + 250)
        logits = model(images[part]) if keys is None else model(images[part], keys[part])
        correct += int((logits.argmax(1) == labels[part]).sum())
    return correct


def test_the_published_resnet20_has_its_accuracy(shared_weights, cifar10_test):
    images, labels = cifar10_test
    assert images.shape == (10000, 3, 32, 32)
    assert torch.equal(labels.bincount(), torch.full((10,), 1000))
    net = load_resnet("resnet20", weights=shared_weights)
    assert count_correct(net, images, labels) == 8103  # 81.03 %


def test_a_recast_network_classifies_nearly_as_well_under_noise(shared_weights, cifar10_test):
    # Single inferences of every fourth image; the standard error of a rate near 79 % is 0.8 points.
    images, labels = (tensor[::4] for tensor in cifar10_test)
    model = recast(load_resnet("resnet20", weights=shared_weights), omega=0.2)
    correct = count_correct(model, images, labels, make_keys(0, "report", index=torch.arange(0, 10000, 4)))
    assert 0.75 < correct / len(images) < 0.81
