"""Checks of a user's own network, for the user's own pytest: does it behave so that a figure of it means something?

Example:
    ::

        import neuralsde_ito as ito, pytest
        from mymodels import make_net

        @pytest.mark.parametrize("check", ito.check_model(make_net(), (3, 32, 32)))
        def test_my_model(check):
            check()
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import SkipTest
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..noise.keys import PathRange
from ..noise.replay import global_generators
from ..outcomes import Rate
from ..validation import ItoError, check_images, check_labels
from .inspection import alike, answers, as_called
from .vote import Vote, as_voter
from .voting import Voter

_DIRECTIONS, _STEP = 16, 1e-6  # of finite differences, in float64
_NEAR = 1e-3  # of the spread of the logits: other kernels change the last bits, noise changes more


@dataclass(frozen=True)
class ModelCheck:
    """One check: call it. `pytest` shows it by its name.

    Attributes:
        name: what it checks, as a name for `pytest -k`.

    Raises:
        AssertionError: it fails; one sentence says why, and how to mend it.
        unittest.SkipTest: it says nothing of this network. pytest counts that as skipped.
    """

    name: str
    case: _Case = field(repr=False, compare=False)
    run: Callable[[_Case], None] = field(repr=False, compare=False)

    @property
    def __name__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name

    def __call__(self) -> None:
        """Check. All global generators are as before afterwards."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(devices), global_generators():
                self.run(self.case)
        except ItoError as error:
            raise AssertionError(str(error)) from None


def check_model(
    module: nn.Module, images: Tensor | Sequence[int], labels: Tensor | None = None, inferences: int = 20
) -> list[ModelCheck]:
    """Named checks of a network from images in [0, 1] to logits; nothing is computed before a check is called.

    The network is checked in the modes that it has, and is left as it is.

    Args:
        module: the network; a `Vote` or an ensemble as well.
        images: at least two images ``(N, C, H, W)`` in [0, 1], or the shape ``(C, H, W)`` of one.
        labels: the true ones ``(N,)``, for the check that the network takes images in [0, 1] and not in another range.
        inferences: of the vote that is checked.

    Raises:
        ItoError: not a module, or no images.
    """
    if not isinstance(module, nn.Module):
        raise ItoError(f"A model must be an nn.Module, got {type(module).__name__}.")
    x = images if isinstance(images, Tensor) else _random_images(images)
    check_images(x)
    if len(x) < 2:
        raise ItoError("To check a model takes two images or more, got 1.")
    case = _Case(module, x, None if labels is None else check_labels(labels, len(x)), inferences)
    return [ModelCheck(run.__name__.removeprefix("_"), case, run) for run in _CHECKS]


def _random_images(shape: Sequence[int]) -> Tensor:
    if len(shape) != 3:
        raise ItoError(f"The shape of an image is (channels, height, width), got {tuple(shape)}.")
    return torch.rand(8, *shape, generator=torch.Generator().manual_seed(0), device="cpu")


@dataclass
class _Case:
    """The network under test, and what its checks share."""

    module: nn.Module
    x: Tensor
    y: Tensor | None
    inferences: int

    def voter(self, module: nn.Module | None = None, x: Tensor | None = None) -> Voter:
        """The network as a voter that has seen images."""
        module = self.module if module is None else module
        voter = as_voter(module, self.inferences)
        with as_called(voter):
            voter.observe(self.x if x is None else x)
        return voter

    def repeatable(self) -> Voter:
        """As `voter`; only for a network whose paths can be drawn again."""
        voter = self.voter()
        if isinstance(voter, Vote) and voter.remarks:
            raise SkipTest("The noise of this network cannot be drawn again, see noise_is_torchs_and_replays.")
        return voter

    def path(self, voter: Voter, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Logits ``(N, classes)`` along one path."""
        index = torch.arange(len(x), device=x.device) if index is None else index
        with as_called(voter):
            return voter.path_logits(x, PathRange(0, "report", index))[0]

    def copied(self) -> nn.Module:
        """A copy, which a check may change."""
        try:
            return copy.deepcopy(self.module)
        except Exception as error:
            raise SkipTest(f"The network cannot be copied, see copies_answer_alike: {error}") from None

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Run the network as its owner does, without a gradient."""
        with as_called(self.module), torch.no_grad():
            yield


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference of two outputs, as a share of their spread."""
    spread = float((a.amax() - a.amin()).clamp_min(1e-12))
    return float((a - b).abs().amax()) / spread


# --- the checks, in the order in which they run -----------------------------------------------------------


def _logits_of_every_image(case: _Case) -> None:
    with case.untouched():
        logits = case.module(case.x)
        assert isinstance(logits, Tensor), f"It returns {type(logits).__name__}; let it return one tensor of logits."
        shape = tuple(logits.shape)
        assert logits.dim() == 2, f"{len(case.x)} images give {shape}; let it return (N, classes)."
        assert len(logits) == len(case.x), f"{len(case.x)} images give {shape}; let it return (N, classes)."
        assert shape[1] > 1, f"It returns {shape[1]} class; give a class of its own to each answer, also to the second."
        assert logits.is_floating_point(), f"It returns {logits.dtype}; let it return logits, not labels."
        assert bool(logits.isfinite().all()), "Some logits are not finite; an inference with such logits is no vote."


def _logits_and_not_probabilities(case: _Case) -> None:
    with case.untouched():
        logits = case.module(case.x)
        sums = bool(((logits.sum(1) - 1).abs() < 1e-5).all())
    inside = bool(((logits >= 0) & (logits <= 1)).all())
    assert not (sums and inside), (
        "It returns probabilities or votes, whose gradients vanish where it is sure; let it return logits."
    )


def _a_single_image(case: _Case) -> None:
    with case.untouched():
        try:
            shape = tuple(case.module(case.x[:1]).shape)
        except Exception as error:
            raise AssertionError(f"A single image makes it fail ({error}); let it take a batch of one.") from error
    assert len(shape) == 2, f"A single image gives {shape}; a squeeze() without a dimension takes the batch away."
    assert shape[0] == 1, f"A single image gives {shape}; let it return (1, classes)."


def _black_and_white_images(case: _Case) -> None:
    with case.untouched():
        for name, x in (("black", torch.zeros_like(case.x)), ("white", torch.ones_like(case.x))):
            assert bool(case.module(x).isfinite().all()), f"Of {name} images some logits are not finite."


def _the_range_is_from_0_to_1(case: _Case) -> None:
    if case.y is None:
        raise SkipTest("Only labels show in which range the network takes its images: give labels.")
    with case.untouched():
        right = case.voter().predict(case.x).labels.cpu() == case.y.cpu()
        logits = case.module(case.x)
    rate = Rate.of(int(right.sum()), len(right))
    assert rate.high > 1 / logits.shape[1] and rate.value > 1 / logits.shape[1], (  # noqa: PT018 (one statement)
        f"It is right on {int(right.sum())} of {len(right)} images, no more than by chance: does it expect another "
        "range than [0, 1], such as [0, 255] or normalised images? Put the normalisation into it."
    )


def _the_input_stays_as_it_is(case: _Case) -> None:
    with case.untouched():
        x = case.x.clone()
        case.module(x)
    assert alike(x, case.x), "It changes the images that it is given; replace operations in place, such as x.sub_()."


def _calls_leave_the_weights_alone(case: _Case) -> None:
    before = {name: tensor.clone() for name, tensor in case.module.state_dict().items() if isinstance(tensor, Tensor)}
    modes = [module.training for module in case.module.modules()]
    with case.untouched():
        case.module(case.x)
        changed = [name for name, tensor in case.module.state_dict().items() if not alike(tensor, before[name])]
    assert not changed, f"A call changes {', '.join(changed)}; call eval(), or leave the state alone in forward()."
    assert modes == [module.training for module in case.module.modules()], "A call changes train or eval mode."


def _images_do_not_depend_on_their_batch(case: _Case) -> None:
    voter = case.repeatable()
    half = (len(case.x) + 1) // 2
    with torch.no_grad():
        together = case.path(voter, case.x)
        apart = [
            case.path(voter, case.x[rows], rows) for rows in torch.arange(len(case.x), device=case.x.device).split(half)
        ]
        turned = torch.arange(len(case.x), device=case.x.device).flip(0)
        difference = max(
            _apart(together, torch.cat(apart)), _apart(together, case.path(voter, case.x[turned], turned)[turned])
        )
    assert difference <= _NEAR, (
        f"The answer to an image depends on the others in its batch (by {difference:.2g} of the logits' spread), so "
        "that no figure of an image holds: let it answer image by image, with running statistics in BatchNorm."
    )


def _noise_does_not_depend_on_train_mode(case: _Case) -> None:
    if not case.voter().noisy:
        raise SkipTest("The network is not random.")
    forced = case.copied().eval()
    assert case.voter(forced).noisy, (
        "It is random as given, but not after eval(): attack libraries call eval(), and would attack another model. "
        "Draw the noise in both modes, such as by F.dropout(x, p, training=True)."
    )


def _noise_is_torchs_and_replays(case: _Case) -> None:
    voter = case.voter()
    if not voter.noisy:
        raise SkipTest("The network is not random.")
    remarks = voter.remarks if isinstance(voter, Vote) else []
    assert not remarks, f"{' '.join(remarks)} Draw by torch's functions, without a generator."


def _one_seed_gives_one_vote(case: _Case) -> None:
    voter = case.voter()
    index = torch.arange(len(case.x), device=case.x.device)
    first, again = (voter.predict(case.x, seed=1, index=index, full=True).votes for _ in range(2))
    assert torch.equal(first, again), (
        "Two votes with the same seed differ: its noise does not come from torch's generators, or a call changes it."
    )
    if not (isinstance(voter, Vote) and voter.remarks):
        turned = voter.predict(case.x.flip(0), seed=1, index=index.flip(0), full=True).votes.flip(1)
        moved = float((first - turned).abs().sum() / (2 * first.sum()).clamp_min(1))
        assert moved <= 0.01, f"In another order of the images, {100 * moved:.0f} % of the votes are others."


def _a_gradient_reaches_every_image(case: _Case) -> None:
    voter = case.voter()
    x = case.x.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = case.path(voter, x)
        assert logits.requires_grad, "No gradient comes back from the logits: there is a no_grad() or detach() inside."
        loss = F.cross_entropy(logits, logits.detach().argmin(1), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x, allow_unused=True)
    assert gradient is not None, "The gradient does not reach the images: there is a detach() or a rounding inside."
    assert bool(gradient.isfinite().all()), "Some gradients are not finite: it divides by zero or overflows."
    none = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    assert not none, (
        f"The gradient is zero at {none} of {len(x)} images: a white-box attack is blind there. Is there a rounding, a "
        "threshold or a saturated softmax inside?"
    )


def _the_gradient_is_that_of_the_function(case: _Case) -> None:
    voter = case.repeatable()
    _need_float64(case)
    x = 0.01 + 0.98 * case.x.double()  # inside [0, 1], where steps to both sides stay in it
    exact = _in_double(case)
    voter = case.voter(exact, x)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(_DIRECTIONS, *x.shape[1:], generator=generator, dtype=x.dtype, device="cpu")
    directions = (directions / directions.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).to(x.device)
    with torch.enable_grad():
        points = x.clone().requires_grad_()
        logits = case.path(voter, points)
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(logits.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
        if not logits.requires_grad:
            raise SkipTest("No gradient comes back, see a_gradient_reaches_every_image.")
        (gradient,) = torch.autograd.grad((weights * logits).sum(), points)
    errors = []
    with torch.no_grad():
        for direction in directions:
            ahead, behind = (case.path(voter, x + step * direction) for step in (_STEP, -_STEP))
            slope = (weights * (ahead - behind)).sum(1) / (2 * _STEP)
            claimed = (gradient * direction).flatten(1).sum(1)
            errors.append((slope - claimed).abs() / torch.maximum(slope.abs(), claimed.abs()).clamp_min(1e-9))
    error = float(torch.stack(errors).median())
    assert error <= 1e-3, (
        f"Autograd's gradient and finite differences on the same path differ by {error:.2g} (median of relative "
        "errors): something inside is detached, or has a backward that is not its own; if that is on purpose "
        "(straight-through), say so with every figure."
    )


def _in_double(case: _Case) -> nn.Module:
    """A copy in float64."""
    copied = case.copied().double()
    try:
        with torch.no_grad(), as_called(copied):
            answers(copied, case.x.double())
    except ItoError:
        raise
    except Exception as error:
        raise SkipTest(f"It does not compute in float64, see float64_works: {error}") from None
    return copied


def _need_float64(case: _Case) -> None:
    if case.x.device.type == "mps":
        raise SkipTest("Apple's GPUs have no float64: check the module on a CPU.")


def _float64_works(case: _Case) -> None:
    _need_float64(case)
    copied = case.copied().double()
    with torch.no_grad(), as_called(copied):
        try:
            logits = copied(case.x.double())
        except Exception as error:
            raise AssertionError(
                f"After double() it fails on float64 images ({str(error).splitlines()[0]}): keep constants as buffers, "
                "and make new tensors like the images."
            ) from error
    assert logits.dtype == torch.float64, f"After double() it returns {logits.dtype} for float64 images."


def _constants_are_buffers(case: _Case) -> None:
    left = [
        f"{name}.{key}".strip(".")
        for name, module in case.module.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    assert not left, (
        f"Tensors that are no buffers: {', '.join(left)}. to(device) and state_dict() leave them behind; use "
        "register_buffer()."
    )


def _logits_stay_on_the_device(case: _Case) -> None:
    with case.untouched():
        device = case.module(case.x).device
    assert device == case.x.device, f"Images on {case.x.device} give logits on {device}."
    if not torch.cuda.is_available():
        return
    copied = case.copied().cuda()
    with torch.no_grad(), as_called(copied):
        try:
            device = copied(case.x.cuda()).device
        except Exception as error:
            raise AssertionError(f"On a GPU it fails: {str(error).splitlines()[0]}") from error
    assert device.type == "cuda", f"Images on a GPU give logits on {device}."


def _copies_answer_alike(case: _Case) -> None:
    ways: dict[str, Callable[[], Any]] = {
        "copy.deepcopy": lambda: copy.deepcopy(case.module),
        "pickle": lambda: pickle.loads(pickle.dumps(case.module)),
        "state_dict": lambda: _reloaded(case),
    }
    voter = case.voter()
    skip = isinstance(voter, Vote) and not voter.replayable
    with torch.no_grad():
        expected = case.path(voter, case.x)
        for way, make in ways.items():
            try:
                other = case.voter(make())
            except Exception as error:
                raise AssertionError(f"{way} fails on it: {error}.") from error
            difference = 0.0 if skip else _apart(expected, case.path(other, case.x))
            assert difference <= 1e-6, (
                f"After a round trip through {way} its logits differ: part of its state is left behind."
            )


def _reloaded(case: _Case) -> nn.Module:
    """A copy whose weights were lost, and come back from the state dict."""
    copied = copy.deepcopy(case.module)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.state_dict().values()):
            tensor.zero_()
    copied.load_state_dict(case.module.state_dict())
    return copied


def _it_does_not_optimise_at_test_time(case: _Case) -> None:
    calls = []

    def noticed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    autograd = torch.autograd
    with (
        patch.object(autograd, "grad", noticed("torch.autograd.grad", autograd.grad)),
        patch.object(autograd, "backward", noticed("backward()", autograd.backward)),
        case.untouched(),
    ):
        case.module(case.x)
    assert not calls, (
        f"It calls {calls[0]} in forward ({len(calls)} times): it optimises at test time, and an attack that "
        "differentiates the call does not see through that. Attack the optimisation's result, or unroll it."
    )


_CHECKS: tuple[Callable[[_Case], None], ...] = (
    _logits_of_every_image,
    _logits_and_not_probabilities,
    _a_single_image,
    _black_and_white_images,
    _the_range_is_from_0_to_1,
    _the_input_stays_as_it_is,
    _calls_leave_the_weights_alone,
    _images_do_not_depend_on_their_batch,
    _noise_does_not_depend_on_train_mode,
    _noise_is_torchs_and_replays,
    _one_seed_gives_one_vote,
    _a_gradient_reaches_every_image,
    _the_gradient_is_that_of_the_function,
    _float64_works,
    _constants_are_buffers,
    _logits_stay_on_the_device,
    _copies_answer_alike,
    _it_does_not_optimise_at_test_time,
)
