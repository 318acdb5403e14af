"""``--model package.module:factory``: a network of the user's, without a run."""

import json
from pathlib import Path

import pytest
from test_command_lines import complaint, ito_sde

MINE = '''
import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    """Digits by the distance from the mean image of each class."""

    def __init__(self, noise=0.0):
        super().__init__()
        import neuralsde_ito as ito
        data = ito.load_data("digits").train
        _, x, y = next(data.batches(len(data), torch.device("cpu")))
        self.register_buffer("means", torch.stack([x[y == c].mean(0).flatten() for c in range(10)]))
        self.noise = noise

    def forward(self, x):
        x = x.flatten(1)
        x = x + self.noise * torch.randn_like(x) if self.noise else x
        return -4 * (x[:, None] - self.means).square().sum(2)


class FromNumpy(Net):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.as_tensor(np.random.randn(*x.shape), dtype=x.dtype))


def plain():
    return Net().eval()


def noisy():
    return Net(0.2).eval()


def other():
    net = Net(0.2).eval()
    net.means += 0.01
    return net


def from_numpy():
    return FromNumpy().eval()


def in_train_mode():
    return nn.Sequential(nn.Dropout(0.2), Net())


def text():
    return "net"


def fails():
    raise RuntimeError("the weights\\nare not there")


def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


def colours():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 10))


def batchnorm():
    return nn.Sequential(nn.BatchNorm2d(1), Net())


number = 7
network = nn.Flatten()
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module whose name no other test has imported."""
    import sys

    (tmp_path / "mynets.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import neuralsde_ito\nimport nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # as it was, afterwards
    for name in ("mynets", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


REFUSED = {
    "no data": ("--model mynets:plain", "--model needs --data: digits, cifar10, cifar100, or a folder"),
    "data without a model": ("--data digits", "Without --model, --data would do nothing: leave it out"),
    "a run and a model": ("--model mynets:plain --data digits --run mine", "With --model, --run would do nothing"),
    "no function": ("--model mynets --data digits", "written package.module:factory, such as mymodels:make_net"),
    "a path": ("--model ./mynets.py:plain --data digits", "written package.module:factory"),
    "no such module": ("--model mynetz:plain --data digits", "There is no module 'mynetz'"),
    "a module that fails": (
        "--model broken:make --data digits",
        "Importing 'broken' failed: ModuleNotFoundError: No mod",
    ),
    "a typing error": (
        "--model mynets:noisi --data digits",
        "Unknown function of mynets 'noisi'; did you mean 'noisy'?",
    ),
    "no callable": ("--model mynets:number --data digits", "must be a function that returns an nn.Module, it is int 7"),
    "a network": ("--model mynets:network --data digits", "write 'def make(): return network'"),
    "no network": ("--model mynets:text --data digits", "must return an nn.Module, it returned str 'net'"),
    "a function that fails": (
        "--model mynets:fails --data digits",
        "mynets:fails() failed: RuntimeError: the weights.",
    ),
    "fewer classes": ("--model mynets:few --data digits", "knows 5 classes, but the images of digits have 10"),
    "other images": (
        "--model mynets:colours --data digits",
        "mynets:colours fails on images of digits (1 x 8 x 8): Runt",
    ),
    "a batch that mixes": ("--model mynets:batchnorm --data digits", "BatchNorm2d is in train mode"),
    "other data": ("--model mynets:plain --data digitz", "did you mean 'digits'?"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_network_is_told_in_one_sentence(words, said, here, capfd):
    code, out, err = ito_sde(f"evaluate {words}", capfd)
    assert said in complaint(code, err)
    assert code == 2
    assert out == ""


@pytest.mark.parametrize("verb", ["attack", "suite", "audit"])
def test_a_radius_must_be_given(verb, here, capfd):
    code, _, err = ito_sde(f"{verb} --model mynets:plain --data digits --limit 10", capfd)
    assert "A network of yours names no radius for linf: give --eps." in complaint(code, err)


def test_an_option_of_a_run_would_do_nothing(here, capfd):
    code, _, err = ito_sde("evaluate --model mynets:plain --data digits --untrained", capfd)
    assert "With --model, --untrained would do nothing" in complaint(code, err)
    code, _, err = ito_sde("attack --model mynets:plain --data digits --eps 0.1 --surrogate resnet", capfd)
    assert "There is no network for the surrogate 'resnet'" in complaint(code, err)


def test_evaluate(here, capfd):
    code, out, _ = ito_sde("evaluate --model mynets:noisy --data digits --limit 40 --inferences 7", capfd)
    assert code == 0
    assert "mynets:noisy(), in eval mode" in out
    assert "it is random, so a vote was laid over it: 7 inferences an image" in out
    assert "ResNet" not in out
    code, out, _ = ito_sde("evaluate --model mynets:plain --data digits --limit 40", capfd)
    assert "none: it answers every image in one way" in out
    code, out, _ = ito_sde("evaluate --model mynets:in_train_mode --data digits --limit 40", capfd)
    assert "in train mode" in out
    code, out, _ = ito_sde("evaluate --model mynets:from_numpy --data digits --limit 40 --json", capfd)
    content = json.loads(out)
    assert content["model"] == "mynets:from_numpy"
    assert content["noisy"]
    assert "numpy's global generator" in content["remarks"][0]
    assert content["ito"]["counts"]["correct"] >= 30
    assert "run" not in content
    assert "resnet" not in content


def test_attack(here, capfd):
    words = "attack --model mynets:noisy --data digits --limit 12 --steps 3 --eot 2 --inferences 5 --seed 3"
    code, out, _ = ito_sde(f"{words} --norm l2 --eps 0.4 --eps 0.8 --save images --json", capfd)
    assert code == 0
    content = json.loads(out)
    assert [level["written"] for level in content["attacked"]] == ["0.4", "0.8"]
    assert "resnet" not in content["attacked"][0]
    assert list(content["attacked"][0]["through"]) == ["ensemble"]
    assert content["vote"] == {"members": 1, "inferences": 5, "rule": "hierarchical"}
    assert Path("images/l2-0.8.safetensors").is_file()
    [record] = Path("runs/mynets.noisy").glob("attack-l2-*.json")  # beside the runs, as those of a run are in it
    assert json.loads(record.read_text())["attacked"] == content["attacked"]
    assert record.with_suffix(".png").is_file()
    again = json.loads(ito_sde(f"{words} --norm l2 --eps 0.4 --eps 0.8 --batch-size 5 --json", capfd)[1])
    assert again["attacked"] == content["attacked"]  # the noise has an address: neither batch nor process matters
    code, out, _ = ito_sde(f"{words} --norm l1 --eps 2", capfd)
    assert code == 0
    assert "ResNet" not in out
    assert "Itô" not in out


def test_suite_bundle_and_verify(here, capfd):
    words = "--model mynets:noisy --data digits --inferences 5"
    code, out, _ = ito_sde(f"suite {words} --norm linf --eps 0.1 --limit 10 --effort 0.1 --bundle ev", capfd)
    assert code == 0
    assert "ResNet" not in out
    assert f"ito-sde verify ev/linf-0.1 {'--model mynets:noisy --data digits --inferences 5'}" in out
    [record] = Path("runs/mynets.noisy").glob("suite-linf-*.json")
    assert json.loads(record.read_text())["model"] == "mynets:noisy"
    assert not list(Path("runs/mynets.noisy").glob("suite-*/"))  # nothing is left to be resumed
    code, out, err = ito_sde(f"verify ev/linf-0.1 {words} --sample 3 --seed 5", capfd)
    assert code == 0, out + err
    code, out, err = ito_sde("verify ev/linf-0.1 --model mynets:other --data digits --inferences 5 --sample 3", capfd)
    assert code == 1
    assert "mynets:other() made another network. It must make the same one at every call." in err
    code, _, err = ito_sde("verify ev/linf-0.1", capfd)  # code that a bundle names is not run unasked
    assert code == 1
    assert "'mynets:noisy' made it: give --model mynets:noisy --data digits." in err


def test_audit(here, capfd):
    words = "audit --model mynets:plain --data digits --eps 0.1 --limit 10 --steps 3 --queries 5 --draws 50"
    code, out, err = ito_sde(f"{words} --html audit.html --json", capfd)
    assert code == 0, err
    assert json.loads(out)["model"] == "mynets:plain"
    assert "Audit of mynets:plain" in Path("audit.html").read_text()
    code, out, _ = ito_sde(words, capfd)
    assert "mynets:plain(), in eval mode" in out


def test_images_of_a_folder(here, capfd):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in "abc":
            (folder := here / "pictures" / split / name).mkdir(parents=True)
            for k in range(4):
                Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"{k}.png")
    (here / "three.py").write_text(
        "import torch\nfrom torch import nn\ndef make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).eval()\n"
    )
    code, out, err = ito_sde("evaluate --model three:make --data pictures", capfd)
    assert code == 0, err
    assert "12 test images of" in out
