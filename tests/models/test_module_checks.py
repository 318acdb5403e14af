"""`check_model` on sound networks, which pass, and on one broken network for each check, which must fail it alone."""

import random
import re
from unittest import SkipTest

import numpy as np
import pytest
import torch
from problems import digits_resnet
from torch import Tensor, nn
from torch.nn import functional as F

import neuralsde_ito as ito

X = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A sound network; broken ones change one thing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + 0.1 * torch.randn_like(x))


class Dropping(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.dropout(x, 0.2, training=True))


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.relu(self.norm(x)))


def ensemble(tmp_path) -> nn.Module:
    return ito.ItoEnsemble([ito.recast(digits_resnet(tmp_path, epochs=1), omega=0.3, image_shape=(1, 8, 8))] * 2, 5)


def outcomes(model: nn.Module, *arguments) -> dict[str, str]:
    """pass, skip, or the sentence of the failure, by check."""
    found = {}
    for check in ito.check_model(model, *(arguments or (X,))):
        try:
            check()
            found[check.name] = "pass"
        except SkipTest:
            found[check.name] = "skip"
        except AssertionError as error:
            found[check.name] = str(error)
    return found


def failures(model: nn.Module, *arguments) -> dict[str, str]:
    return {name: said for name, said in outcomes(model, *arguments).items() if said not in ("pass", "skip")}


@pytest.mark.parametrize("make", [Net, Noisy, Dropping, Normed, lambda: ito.Vote(Noisy(), 5)])
def test_sound_networks_pass(make):
    model = make()
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    assert failures(model) == {}
    assert torch.equal(torch.get_rng_state(), state)  # nothing is left changed
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_an_ito_resnet_passes(tmp_path):
    assert failures(ensemble(tmp_path).members[0], torch.rand(4, 1, 8, 8)) == {}


def test_an_ensemble_passes(tmp_path):
    digits = ito.load_data("digits").test
    _, x, y = next(digits.batches(40, torch.device("cpu")))
    found = outcomes(ensemble(tmp_path), x, y)
    assert {name: said for name, said in found.items() if said not in ("pass", "skip")} == {}
    assert found["the_range_is_from_0_to_1"] == "pass"


@pytest.mark.parametrize("check", ito.check_model(Noisy(), (1, 6, 6)))
def test_as_a_user_would_write_it(check):
    check()


def test_names_are_shown_by_pytest():
    names = [check.__name__ for check in ito.check_model(Net(), X)]
    assert len(names) == len(set(names)) == 18
    assert all(name.isidentifier() and not name.startswith("_") for name in names)
    assert names == [str(check) for check in ito.check_model(Net(), X)]


# --- a broken network for each check ----------------------------------------------------------------------


class Rows(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[:, :, None]


class Labels(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).argmax(1)


class Overflowing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) / 0


class Probabilities(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).softmax(1)


class Squeezed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).squeeze()


class Contrast(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body((x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True))


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sub_(0.01) if not x.requires_grad else x - 0.01)


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x)


class Switching(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.train(not self.training)
        return self.body(x)


class Centred(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x - x.mean(0))


class Gated(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + 0.1 * torch.randn_like(x) if self.training else x)


class FromNumpy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + 0.1 * torch.as_tensor(np.random.randn(*x.shape), dtype=x.dtype))


class FromPython(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * (1 + 0.1 * random.random()))


class OwnSource(Net):
    def __init__(self) -> None:
        super().__init__()
        self.source = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + 0.1 * torch.as_tensor(self.source.normal(size=x.shape), dtype=x.dtype))


class Detached(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.detach())


class Rounded(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body((8 * x).round() / 8)


class HalfDetached(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(0.5 * x + 0.5 * x.detach())


class Single(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x @ torch.eye(6))


class Constant(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.tensor(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x - self.mean)


class Elsewhere(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).to("meta")


class Forgetting(Net):
    """Its state dict leaves something out, and loading one does not complain."""

    def state_dict(self, *arguments, **settings):
        return {k: v for k, v in super().state_dict(*arguments, **settings).items() if k != "body.1.bias"}

    def load_state_dict(self, state, strict=True):
        return super().load_state_dict(state, strict=False)


class Unpicklable(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.act(x))


class Purifying(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            clean = x.detach().requires_grad_()
            loss = (clean - 0.5).square().sum()
            (gradient,) = torch.autograd.grad(loss, clean)
        return self.body(x - 0.1 * gradient.detach())


class Scaled(Net):
    """It expects grey levels from 0 to 255."""

    def forward(self, x: Tensor) -> Tensor:
        dark = x.mean((1, 2, 3)) - 100
        return torch.stack([-dark, dark], 1)


BROKEN = {
    "a third dimension": (Rows, "logits_of_every_image", r"8 images give \(8, 4, 1\)"),
    "labels": (Labels, "logits_of_every_image", r"8 images give \(8,\)"),
    "overflow": (Overflowing, "logits_of_every_image", "not finite"),
    "probabilities": (Probabilities, "logits_and_not_probabilities", "let it return logits"),
    "squeeze": (Squeezed, "a_single_image", r"A single image gives \(4,\)"),
    "division by the contrast": (Contrast, "black_and_white_images", "Of black images some logits"),
    "in place": (InPlace, "the_input_stays_as_it_is", "x.sub_"),
    "a counter": (Counting, "calls_leave_the_weights_alone", "changes calls"),
    "changes of mode": (Switching, "calls_leave_the_weights_alone", "train or eval mode"),
    "the batch's mean": (Centred, "images_do_not_depend_on_their_batch", "depends on the others"),
    "BatchNorm in train mode": (lambda: Normed().train(), "images_do_not_depend_on_their_batch", "BatchNorm2d is in"),
    "gated noise": (Gated, "noise_does_not_depend_on_train_mode", r"not after eval\(\)"),
    "numpy": (FromNumpy, "noise_is_torchs_and_replays", "numpy's global generator"),
    "random": (FromPython, "noise_is_torchs_and_replays", "Python's random"),
    "a generator of its own": (OwnSource, "one_seed_gives_one_vote", "Two votes with the same seed differ"),
    "detach": (Detached, "a_gradient_reaches_every_image", "The gradient does not reach the images"),
    "rounding": (Rounded, "a_gradient_reaches_every_image", "zero at 8 of 8"),
    "half a gradient": (HalfDetached, "the_gradient_is_that_of_the_function", "differ by 0.5"),
    "float32 inside": (Single, "float64_works", "keep constants as buffers"),
    "a constant": (Constant, "constants_are_buffers", "no buffers: mean"),
    "another device": (Elsewhere, "logits_stay_on_the_device", "give logits on meta"),
    "half a state": (Forgetting, "copies_answer_alike", "through state_dict its logits differ"),
    "a lambda": (Unpicklable, "copies_answer_alike", "pickle fails"),
    "purification": (Purifying, "it_does_not_optimise_at_test_time", "calls torch.autograd.grad in forward"),
}


@pytest.mark.parametrize(("make", "name", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_each_check_fails_on_its_broken_network(make, name, said):
    [check] = [check for check in ito.check_model(make(), X) if check.name == name]
    with pytest.raises(AssertionError) as caught:
        check()
    assert re.search(said, str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [Probabilities, Constant, HalfDetached, Forgetting, Gated])
def test_a_fault_fails_its_own_check_and_no_other(make):
    assert len(failures(make())) == 1


def test_labels_show_a_wrong_range():
    x = torch.cat([0.2 * X, 0.8 + 0.2 * X])
    y = torch.tensor([0] * 8 + [1] * 8)
    assert "another range than [0, 1]" in outcomes(Scaled(), x, y)["the_range_is_from_0_to_1"]
    assert outcomes(Net(), X)["the_range_is_from_0_to_1"] == "skip"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("net", X), "must be an nn.Module, got str"),
        ((Net(), X[:1]), "takes two images or more, got 1"),
        ((Net(), (36,)), r"\(channels, height, width\), got \(36,\)"),
        ((Net(), 3 * X), r"finite and in \[0, 1\]"),
        ((Net(), X, torch.zeros(3)), "Labels must be a tensor of whole numbers"),
    ],
)
def test_what_is_no_model_is_refused(arguments, message):
    with pytest.raises(ito.ItoError, match=message):
        list(ito.check_model(*arguments))
