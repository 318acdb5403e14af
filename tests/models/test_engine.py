"""The quick way through a member is the reference's, within rounding; and it lives within the memory that is there."""

import threading

import pytest
import torch
import torchvision
from problems import trained
from torch import nn

import neuralsde_ito as ito
from neuralsde_ito import parallel
from neuralsde_ito.attacks import PGD
from neuralsde_ito.attacks.objectives import mean_loss
from neuralsde_ito.attacks.targets import as_target
from neuralsde_ito.models.inference import infer, quicken
from neuralsde_ito.noise.keys import PathRange
from neuralsde_ito.parallel import in_pieces, spread, workers


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "resnet8": ito.load_resnet("resnet8"),
        "cifar-resnet18": ito.load_resnet("cifar-resnet18"),
        "cifar-resnet50": ito.load_resnet("cifar-resnet50"),
        "torchvision": torchvision.models.resnet18(num_classes=10),
        "chain": ito.Chain(
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
            [nn.Sequential(nn.BatchNorm2d(8), nn.Softplus(), nn.Conv2d(8, 8, 3, padding=1)), nn.Identity()],
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
        ),
    }


@pytest.mark.parametrize("name", ["resnet8", "cifar-resnet18", "cifar-resnet50", "torchvision", "chain"])
@pytest.mark.parametrize("schedule", ["inverse-time", "multiplicative"])
def test_logits_and_gradients_are_the_reference_s(name, schedule):
    model = ito.recast(trained(networks()[name]), omega=0.2, schedule=schedule).eval()
    quick = quicken(model)
    x = torch.rand(6, 3, 32, 32)
    keys = ito.make_keys(0, "report", index=torch.arange(6))
    assert not any(p.requires_grad for p in quick.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in quick.modules()) or name == "chain"
    with torch.no_grad():
        assert (model(x, keys) - quick(x, keys)).abs().max() <= 1e-4
    gradients = []  # in float64: in float32 rounding moves some states across a ReLU's kink
    for one in (model.double(), quicken(model)):
        at = x.double().requires_grad_()
        gradients.append(torch.autograd.grad(one(at, keys).logsumexp(1).sum(), at)[0])
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)


def test_the_copy_leaves_the_model_as_it_was():
    model = ito.recast(ito.load_resnet("resnet8"), omega=0.2).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    quicken(model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_inferences_of_images_in_any_order():
    model = quicken(ito.recast(ito.load_resnet("resnet8"), omega=0.2).double())
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    rows = torch.tensor([3, 0, 0, 2, 3])
    keys = ito.make_keys(0, "report", inference=torch.arange(5), index=rows)
    with torch.no_grad():
        wanted = model(x[rows], keys)
        for size in (None, 1, 2, 3):
            assert torch.allclose(infer(model, x, rows, keys, size), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        ({}, True),
        ({"omega": 0.0}, True),
        ({"schedule": "constant"}, True),
        ({"schedule": "multiplicative"}, False),  # its noise needs the state before the block
        ({"solver": "milstein"}, False),
        ({"steps": 2}, False),
        ({"checkpoint": True}, False),
    ],
)
def test_what_is_before_any_noise_runs_once_an_image(settings, shared):
    model = ito.recast(trained(ito.load_resnet("resnet8")), **({"omega": 0.2} | settings)).eval().double()
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    keys = ito.make_keys(0, "report", inference=torch.arange(3)[:, None], index=torch.arange(4))
    ensemble, seen = ito.ItoEnsemble([model]), []
    with torch.no_grad():
        state = model.stem(x.repeat(3, 1, 1, 1))  # every inference by itself
        for sde in model.sdes:
            state = ito.integrate(sde, state, keys.flatten(), model.solver, model.steps)
        wanted = model.head(state).view(3, 4, -1)
        model.sdes[0].block.register_forward_hook(lambda block, given, y: seen.append(len(y)))
        found = ensemble._logits_of(0, x, keys)
        once = sum(seen)
        at = x.clone().requires_grad_()
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    with torch.enable_grad():
        assert torch.allclose(ensemble._logits_of(0, at, keys), wanted, rtol=0, atol=1e-12)
    assert once == 4 if shared else once >= 12


def test_a_block_that_hands_back_its_input_does_not_see_it_changed():
    model = ito.recast(networks()["chain"], omega=0.5).eval()
    state = torch.rand(3, 8, 30, 30)
    keys = ito.make_keys(0, "report", index=torch.arange(3))
    before = state.clone()
    for one in (model, quicken(model)):
        with torch.no_grad():
            ito.integrate(one.sdes[1], state, keys)
        assert torch.equal(state, before)


def test_what_a_hook_has_seen_is_not_changed_afterwards():
    model = ito.recast(ito.load_resnet("resnet8"), omega=0.5).eval()
    seen = []
    model.sdes[0].block.register_forward_hook(lambda module, given, found: seen.append((found, found.clone())))
    with torch.no_grad():
        model(torch.rand(2, 3, 32, 32))
    assert torch.equal(*seen[0])


# --- memory and threads ---------------------------------------------------------------------------------


def test_out_of_memory_halves_the_pieces():
    tried = []

    def work(part: slice) -> list[int]:
        tried.append(part.stop - part.start)
        if part.stop - part.start > 3:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return list(range(part.start, part.stop))

    done = in_pieces(work, 20, 16, torch.device("cpu"))
    assert [i for piece in done for i in piece] == list(range(20))
    assert max(tried) > 3
    assert all(len(piece) <= 3 for piece in done)


def test_elsewhere_than_on_a_cpu_pieces_run_one_after_another_in_the_caller_s_thread():
    names = in_pieces(lambda part: (threading.current_thread().name, part), 20, 6, torch.device("meta"))
    assert {name for name, _ in names} == {threading.current_thread().name}
    assert [part.stop - part.start for _, part in names] == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("total", "size", "lengths"),
    [
        (20, 7, [5, 5, 5, 5]),
        (21, 20, [10, 11]),
        (20, 20, [20]),
        (3, 7, [3]),
        (5, 2, [1, 2, 2]),
        (1, 1, [1]),
    ],
)
def test_on_a_cpu_every_worker_has_as_many_pieces_but_none_of_one_for_that(total, size, lengths, monkeypatch):
    monkeypatch.setattr(parallel, "workers", lambda: 2)
    parts = in_pieces(lambda part: part, total, size, torch.device("cpu"))
    assert [part.stop - part.start for part in parts] == lengths


def test_out_of_memory_with_one_is_out_of_memory():
    def work(part: slice) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        in_pieces(work, 5, 4, torch.device("cpu"))


def test_an_attack_checkpoints_when_a_single_image_does_not_fit(monkeypatch):
    ensemble = ito.ItoEnsemble([ito.recast(ito.load_resnet("resnet8"), omega=0.2, steps=4)], inferences=3)
    x, y = torch.rand(3, 3, 32, 32), torch.arange(3)
    wanted = PGD(steps=2, eot=2, selection=2, stop=False).run(ensemble, x, y).images
    target = as_target(ensemble, x)
    path_logits = ito.ItoEnsemble.path_logits

    def small(self, x, paths):
        if torch.is_grad_enabled() and not self.members[0].checkpoint:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return path_logits(self, x, paths)

    monkeypatch.setattr(ito.ItoEnsemble, "path_logits", small)
    found = target.ascend(mean_loss, x, y, PathRange(0, "gradient", torch.arange(3), 0, 2))
    assert found.gradient.abs().sum() > 0
    assert target.quick(x).members[0].checkpoint
    assert not ensemble.members[0].checkpoint
    again = PGD(steps=2, eot=2, selection=2, stop=False).run(ensemble, x, y).images
    assert torch.allclose(again, wanted, atol=1e-3)


def test_pieces_run_in_the_gradient_mode_of_their_caller_and_do_not_nest():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            modes = spread(lambda _: (torch.is_grad_enabled(), workers(), torch.get_num_threads()), range(6))
        with torch.inference_mode():
            inference = spread(lambda _: torch.is_inference_mode_enabled(), range(6))
        names = spread(lambda _: spread(lambda _: threading.current_thread().name, range(3)), range(4))
        assert workers() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert modes == [(False, 1, 1)] * 6
    assert all(inference)
    assert all(len(set(inner)) == 1 for inner in names)


def test_a_thread_that_is_started_later_has_all_of_torchs_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    try:
        spread(lambda i: i, range(4))
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [2]


def test_an_error_in_a_piece_is_the_caller_s():
    with pytest.raises(ZeroDivisionError):
        spread(lambda i: 1 / i, [1, 0, 2])
