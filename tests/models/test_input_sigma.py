"""Noise of the image before the stem: the same paths everywhere, and nothing changes without it."""

import copy
from pathlib import Path

import pytest
import torch
from problems import random_images, random_resnet, smooth_chain
from torch import Tensor, nn
from torch.nn import functional as F

import neuralsde_ito as ito
from neuralsde_ito.attacks.fingerprints import fingerprint
from neuralsde_ito.attacks.targets import EnsembleTarget
from neuralsde_ito.models.frozen import FrozenResNet
from neuralsde_ito.models.inference import in_bfloat16, infer, quicken
from neuralsde_ito.noise.keys import PathRange
from neuralsde_ito.runs.config import load_config
from neuralsde_ito.sde.integrate import integrate
from neuralsde_ito.studies.subjects import Network

SIGMA = 0.3


def keys_of(n: int, paths: int = 1) -> Tensor:
    """int64 ``(paths, n)``."""
    return ito.make_keys(5, "report", 0, torch.arange(paths)[:, None], torch.arange(n))


def noisy_images(x: Tensor, keys: Tensor) -> Tensor:
    """``x + SIGMA W`` by the public normals, at the image's own address."""
    return x + SIGMA * ito.normals(keys, x[0].numel(), -1, 0, 0, 0, dtype=x.dtype).view(x.shape)


def undecided(images: Tensor) -> nn.Module:
    """A network whose mean logits are zero, so that noise decides its votes."""
    net = random_resnet("resnet8")
    with torch.no_grad():
        noise = torch.randn(20 * len(images), *images.shape[1:], generator=torch.Generator().manual_seed(0))
        net.resnet.fc.bias -= net(images.repeat(20, 1, 1, 1) + noise).mean(0)
    return net


@pytest.fixture
def images() -> Tensor:
    return random_images(5, 16)


@pytest.mark.parametrize("settings", [{}, {"solver": "srk", "steps": 2}, {"schedule": "multiplicative"}, {"omega": 0}])
@torch.no_grad()
def test_the_network_sees_the_noisy_image(settings):
    net, x = smooth_chain(), random_images(4, 6, 2, dtype=torch.float64)
    settings = {"omega": 0.4, "image_shape": (2, 6, 6)} | settings
    plain, model = ito.recast(net, **settings), ito.recast(net, **settings, input_sigma=SIGMA)
    keys = keys_of(4)[0]
    assert torch.allclose(model(x, keys), plain(noisy_images(x, keys), keys), rtol=0, atol=1e-12)
    assert not torch.allclose(model(x, keys), plain(x, keys), rtol=0, atol=1e-2)
    assert torch.equal(model(x, keys), model(x, keys))
    assert torch.allclose(model(x[2:3], keys[2:3]), model(x, keys)[2:3], rtol=0, atol=1e-12)  # in another batch
    assert torch.equal(model.base(x), plain.base(x))


@torch.no_grad()
def test_without_it_nothing_changes(images):
    model, keys = ito.recast(random_resnet("resnet8"), omega=0.3, input_sigma=0), keys_of(5)[0]
    state = model.stem(images)
    for sde in model.sdes:
        state = integrate(sde, state, keys)
    assert torch.equal(model(images, keys), model.head(state))
    assert torch.equal(model.before_noise(images), model.sdes[0].block(model.stem(images)))  # shared as before
    assert model.diffused(images, keys) is images
    assert not ito.ItoEnsemble([ito.recast(model, omega=0)]).noisy


@torch.no_grad()
def test_the_noise_is_normal_and_independent_of_that_of_the_blocks():
    model, x = ito.recast(random_resnet("resnet8"), input_sigma=SIGMA), torch.full((64, 3, 32, 32), 0.5)
    keys = keys_of(64)[0]
    noise = (model.diffused(x, keys) - x).flatten()
    n = len(noise)
    assert abs(float(noise.mean())) < 4 * SIGMA / n**0.5
    assert abs(float(noise.std()) - SIGMA) < 4 * SIGMA / (2 * n) ** 0.5
    for block in range(len(model.sdes)):
        other = ito.normals(keys, 3 * 32 * 32, block, 0, 0, 0).flatten()
        assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 4 / n**0.5


def test_the_quick_copy_has_the_same_paths_and_gradients(images):
    model = ito.recast(random_resnet("resnet8"), omega=0.3, input_sigma=SIGMA)
    quick, keys = quicken(model, images), keys_of(5, paths=3)
    assert type(quick) is FrozenResNet
    assert quick.input_sigma == SIGMA
    found = []
    for one in (model, quick):
        x = images.clone().requires_grad_()
        logits = one.along_paths(one.before_noise(x), keys)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), torch.ones(15).long()), x)
        found.append((logits.detach(), gradient))
    (logits, gradient), (close, slope) = found
    assert logits.shape == (3, 5, 10)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    assert (logits - close).abs().max() < 1e-4 * float(logits.amax() - logits.amin())
    assert (gradient - slope).abs().max() < 1e-4 * float(gradient.abs().max())
    with torch.no_grad():
        rows = torch.arange(5).repeat(3)
        assert torch.allclose(infer(quick, images, rows, keys.flatten()).view(3, 5, 10), close, rtol=0, atol=1e-5)
        brief = in_bfloat16(quick)
        assert brief.input_sigma == SIGMA
        assert (brief(images, keys[0]) - close[0]).abs().max() < 0.1 * float(logits.amax() - logits.amin())


def test_the_gradient_is_that_of_the_plain_network_at_the_noisy_image():
    net, x, keys = smooth_chain(), random_images(4, 6, 2, dtype=torch.float64), keys_of(4)[0]
    plain = ito.recast(net, omega=0.4, image_shape=(2, 6, 6))
    model = ito.recast(net, omega=0.4, image_shape=(2, 6, 6), input_sigma=SIGMA)
    gradients = []
    for one, at in ((model, x), (plain, noisy_images(x, keys))):
        at = at.clone().requires_grad_()
        gradients.append(torch.autograd.grad(one(at, keys).square().sum(), at)[0])
    assert gradients[0].abs().max() > 1e-3
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("omega", [0.0, 0.3])
def test_votes_and_attacks_are_along_the_paths_of_the_model(omega, images):
    model = ito.recast(undecided(images), omega, input_sigma=1.0)
    ensemble = ito.ItoEnsemble([model, copy.deepcopy(model)], inferences=6).eval()
    assert ensemble.noisy
    votes = ensemble.predict(images, seed=2, full=True).votes
    expected = torch.zeros_like(votes)
    with torch.no_grad():
        for member in range(2):
            for inference in range(6):
                keys = ito.make_keys(2, "report", member, inference, torch.arange(5))
                expected[member, torch.arange(5), model(images, keys).argmax(1)] += 1
    assert torch.equal(votes, expected)
    assert (votes > 0).sum() > 10  # the noise decides
    target = EnsembleTarget(ensemble)
    assert target.distinct is None
    paths = PathRange(2, "report", torch.arange(5), 0, 4)
    assert (target.path_logits(images, paths) - ensemble.path_logits(images, paths)).abs().max() < 1e-3
    x_adv = ito.attacks.pgd(ensemble, images, torch.zeros(5).long(), norm="l2", eps=0.5, steps=2, eot=2)
    assert (x_adv - images).flatten(1).norm(dim=1).max() > 0.1


def test_a_change_is_seen_by_the_copy_that_is_kept(images):
    ensemble = ito.ItoEnsemble([ito.recast(undecided(images), 0.0)], inferences=20).eval()
    still = ensemble.predict(images, full=True).votes
    assert bool((still.amax(-1) == 20).all())
    ensemble.members[0].input_sigma = 1.0
    assert not torch.equal(ensemble.predict(images, full=True).votes, still)
    ensemble.members[0].input_sigma = -1.0
    with pytest.raises(ito.ItoError, match="input_sigma must be"):
        ensemble.predict(images)


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf"), True, "0.25", None])
def test_a_sigma_that_is_none_is_refused(sigma):
    with pytest.raises(ito.ItoError, match="input_sigma must be a finite number of at least 0, in pixel units, got"):
        ito.recast(random_resnet("resnet8"), input_sigma=sigma)


def test_a_noise_free_solver_goes_with_it(images):
    model = ito.recast(random_resnet("resnet8"), 0.0, solver="ode:rk4", input_sigma=SIGMA)
    with torch.no_grad():
        one, other = (model(images, keys) for keys in keys_of(5, paths=2))
    assert not torch.allclose(one, other)


def test_a_run_keeps_it(tmp_path: Path):
    config = load_config(assignments=["sde.input_sigma=0.3", "sde.omega=0.1", "ensemble.members=1"])
    assert load_config(base=config).sde.input_sigma == SIGMA
    assert load_config().sde.input_sigma == 0
    with pytest.raises(ito.ItoError, match=r"sde\.input_sigma.*got -1"):
        load_config(assignments=["sde.input_sigma=-1"])
    net = random_resnet("resnet8", in_channels=1)
    model = ito.recast(net, 0.1, image_shape=(1, 8, 8), input_sigma=SIGMA)
    plain = load_config(assignments=["ensemble.members=1"])
    ito.save_ensemble(tmp_path / "run", ito.ItoEnsemble([model]), plain)
    ensemble, stored = ito.load_ensemble(tmp_path / "run")
    assert stored.sde.input_sigma == ensemble.members[0].input_sigma == SIGMA
    x, keys = random_images(3, 8, 1), keys_of(3)[0]
    with torch.no_grad():
        assert torch.equal(ensemble.members[0](x, keys), model(x, keys))


def test_fingerprints_tell_it_apart():
    net = random_resnet("resnet8")
    prints = [fingerprint(ito.ItoEnsemble([ito.recast(net, input_sigma=s)])) for s in (0, 0.0, 0.1, 0.2)]
    assert len(set(prints)) == 3


@torch.no_grad()
def test_solvers_are_compared_on_the_noisy_image(images):
    model, keys = ito.recast(random_resnet("resnet8"), 0.3, input_sigma=SIGMA), keys_of(5)[0]
    assert torch.equal(Network(model, images, None, keys).solve(images, "euler", 1, False)[1], model(images, keys))
