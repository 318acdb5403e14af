"""Tensors are made on the device of their images, whatever ``torch.set_default_device`` says.

The default device of these tests is ``meta``, where nothing can be computed: a tensor that is made there by mistake
stops most computations. A GPU as the default device of images on the CPU would meet the same places.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
import torchdiffeq  # noqa: F401  (makes constants on the default device, when it is first imported)
from torch import Tensor, nn
from torch.utils._device import _device_constructors

import neuralsde_ito as ito
from neuralsde_ito.attacks.pgd import PGD
from neuralsde_ito.data import load_data
from neuralsde_ito.models.ensemble import ItoEnsemble
from neuralsde_ito.runs.build import load_dataset
from neuralsde_ito.runs.run import Run
from neuralsde_ito.studies.problems import geometric_brownian_motion


class Noisy(nn.Module):
    """A stranger's random module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.1 * torch.randn_like(x))


ROOT = Path(__file__).resolve().parents[1]
NET = ito.load_resnet("resnet8", num_classes=10, in_channels=1).eval()
NOISY = Noisy(NET)
X, Y = next(load_data("digits").test.batches(6))[1:]
LOGITS = torch.randn(20, 6, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def meta_is_the_default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def itos(**settings: object) -> ItoEnsemble:
    return ItoEnsemble([ito.recast(NET, **({"omega": 0.3, "image_shape": (1, 8, 8)} | settings))], inferences=5)


def suite_of(model: nn.Module, norm: str, eps: float) -> object:
    return ito.run_suite(model, None, load_data("digits").test.first(3), ito.SuiteSettings(norm, (eps,), effort=0.1))


def verified(folder: Path) -> ito.Verification:
    test, settings = load_data("digits").test, ito.SuiteSettings("linf", (0.1,), effort=0.1)
    run = ito.run_suite(itos(), NET, test.first(3), settings).ito
    ito.save_bundle(folder, ito.evidence_of(run, test))
    return ito.verify_bundle(ito.load_bundle(folder), itos(), test, settings.suite(itos(), NET))


def trained(folder: Path) -> Run:
    robust = {"resnet.adversary.method": "n-fgsm", "resnet.held_out": 10, "finetune.average": 0.9}
    small = {"data.train_limit": 64, "data.test_limit": 10, "resnet.epochs": 1, "finetune.epochs": 1}
    run = Run.create(folder, ito.load_config("digits", overrides={**robust, **small, "ensemble.members": 1}))
    run.train(load_dataset(run.config), torch.device("cpu"))
    return run


def called(check: ito.ModelCheck) -> None:
    """A check of a module, without its word that it does not apply."""
    with suppress(SkipTest):
        check()


EVERYTHING: dict[str, Callable[[], object]] = {
    **{f"solver {name}": lambda name=name: itos(solver=name, steps=2).predict(X) for name in ("euler", "milstein")},
    **{f"solver {name}": lambda name=name: itos(solver=name, steps=2).predict(X) for name in ("srk", "torchsde:euler")},
    **{f"solver ode:{n}": lambda n=n: itos(solver=f"ode:{n}", omega=0.0).predict(X) for n in ("rk4", "dopri5")},
    "multiplicative noise": lambda: itos(schedule="multiplicative", solver="milstein").predict(X),
    "a random module": lambda: ito.Vote(NOISY, 5).predict(X),
    **{f"check: {check}": partial(called, check) for check in ito.check_model(NET, X)},
    **{f"PGD, {norm}": lambda norm=norm: PGD(norm, 0.1, 2).run(itos(), X, Y) for norm in ("linf", "l2", "l1")},
    "the suite, L-inf": lambda: suite_of(itos(), "linf", 0.1),
    "the suite, L2, a random module": lambda: suite_of(NOISY, "l2", 0.5),
    "the least norm": lambda: ito.least_norm(itos(), X, Y, lambda eps: PGD("l2", eps, 2), 1.0, 2),
    "an audit": lambda: ito.audit(itos(), X, Y, "linf", 0.1),
    "a certificate": lambda: ito.certify(NET, X, sigma=0.25, n=200),
    "solvers compared": lambda: ito.compare_solvers(itos().members[0], X, solvers=["euler", "heun"], steps=(1, 2)),
    "an order": lambda: geometric_brownian_motion(paths=64).solve("milstein", 4),
    "epochs of images": lambda: list(load_data("digits").train.first(20).batches(8, epoch=(0, 1))),
}


def test_laws_are_compared_as_everywhere() -> None:
    found = ito.density_shift(LOGITS[:10], LOGITS[10:])
    torch.set_default_device(None)
    assert torch.equal(found.mmd, ito.density_shift(LOGITS[:10], LOGITS[10:]).mmd)


@pytest.mark.parametrize("name", EVERYTHING)
def test_nothing_is_made_on_the_default_device(name: str) -> None:
    EVERYTHING[name]()


def test_whatever_makes_a_tensor_names_its_device() -> None:
    makers, found = {function.__name__ for function in _device_constructors()}, []
    for file in sorted(path for package in ("neuralsde_ito", "cli") for path in (ROOT / package).rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            of_torch = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
            if of_torch and call.func.attr in makers and "device" not in [word.arg for word in call.keywords]:
                found.append(f"{file.relative_to(ROOT)}: {ast.unparse(call)}")
    # As a layer's weights, these buffers are where a user wants new modules to be.
    assert found == [f"neuralsde_ito/models/resnets.py: torch.tensor({name})" for name in ("mean", "std")]


def test_a_bundle_is_verified(tmp_path: Path) -> None:
    assert verified(tmp_path / "bundle").stands


def test_a_run_has_the_weights_that_it_has_everywhere(tmp_path: Path) -> None:
    run = trained(tmp_path / "here")
    torch.set_default_device(None)
    there = trained(tmp_path / "there")
    for one, other in ((run.resnet(), there.resnet()), (run.ensemble(), there.ensemble())):
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
