"""The quick copy that an ensemble keeps between calls is never one of what the ensemble was before."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import neuralsde_ito as ito
from neuralsde_ito.models import ensemble as ensemble_module
from neuralsde_ito.models import kept

Change = Callable[[ito.ItoEnsemble], object]


def network(seed: int = 0, **settings: object) -> ito.ItoResNet:
    torch.manual_seed(seed)
    net = ito.load_resnet("resnet8", in_channels=1)
    nn.init.normal_(next(m for m in net.modules() if isinstance(m, nn.Linear)).weight)
    return ito.recast(net.eval(), **{"omega": 1.0, "image_shape": (1, 8, 8)} | settings)


def ensemble() -> ito.ItoEnsemble:
    return ito.ItoEnsemble([network(0), network(1)], 20).eval()


def votes(model: ito.ItoEnsemble, x: Tensor) -> Tensor:
    x = x.to(next(model.parameters()).dtype)
    return model.predict(x, seed=3, full=True).votes


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each copy of a member."""
    calls: list[int] = []
    quicken = ensemble_module.quicken
    monkeypatch.setattr(ensemble_module, "quicken", lambda *args: (calls.append(1), quicken(*args))[1])
    return calls


def test_a_copy_is_kept_while_nothing_changes(x: Tensor, made: list[int]) -> None:
    model = ensemble()
    first = votes(model, x)
    for seed in range(3):
        model.predict(x[: seed + 1], seed)
    assert torch.equal(votes(model, x), first)
    assert len(made) == 2  # its members
    other = copy.deepcopy(model)
    assert torch.equal(votes(other, x), first)
    assert len(made) == 4


def linear(model: ito.ItoEnsemble) -> nn.Linear:
    return next(m for m in model.members[0].modules() if isinstance(m, nn.Linear))


def conv(model: ito.ItoEnsemble) -> nn.Conv2d:
    return [m for m in model.members[0].modules() if isinstance(m, nn.Conv2d)][-1]


def norm(model: ito.ItoEnsemble) -> nn.BatchNorm2d:
    return [m for m in model.members[0].modules() if isinstance(m, nn.BatchNorm2d)][-1]


def step_of_training(model: ito.ItoEnsemble) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 10.0)
    model.members[0](torch.rand(4, 1, 8, 8)).square().sum().backward()
    optimizer.step()


def in_data(change: Callable[[Tensor], Tensor]) -> Change:
    def act(model: ito.ItoEnsemble) -> None:
        weight = linear(model).weight
        weight.data.copy_(change(weight.data.clone()))  # autograd does not notice

    return act


def without_grad(model: ito.ItoEnsemble) -> None:
    with torch.no_grad():
        linear(model).weight.mul_(-1)


def load(model: ito.ItoEnsemble) -> None:
    model.load_state_dict(ito.ItoEnsemble([network(5), network(6)]).state_dict())


def swap_a_block(model: ito.ItoEnsemble) -> None:
    sdes = model.members[0].sdes
    sdes[0].block = copy.deepcopy(sdes[0].block)
    with torch.no_grad():
        sdes[0].block.conv1.weight.neg_()


def set_running_mean(model: ito.ItoEnsemble) -> None:
    norm(model).running_mean = torch.full_like(norm(model).running_mean, 3.0)


def another_schedule(model: ito.ItoEnsemble) -> None:
    for sde in model.members[0].sdes:
        sde.schedule = ito.Schedule(20.0)


CHANGES: dict[str, Change] = {
    "a weight, without grad": without_grad,
    "a weight's data": in_data(torch.neg),
    "the order of a weight's data": in_data(lambda w: w.flip(0)),
    "the storage of a weight": lambda model: setattr(linear(model).weight, "data", -linear(model).weight.data),
    "another parameter": lambda model: setattr(linear(model), "weight", nn.Parameter(-linear(model).weight.detach())),
    "a step of training": step_of_training,
    "load_state_dict": load,
    "a buffer in place": lambda model: norm(model).running_var.mul_(100),
    "another buffer": set_running_mean,
    "eps of a BatchNorm": lambda model: setattr(norm(model), "eps", 100.0),
    "dilation of a convolution": lambda model: (
        setattr(conv(model), "dilation", (2, 2)),
        setattr(conv(model), "padding", (2, 2)),
    ),
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "a hook": lambda model: linear(model).register_forward_hook(lambda module, args, out: -out),
    "a hook before": lambda model: linear(model).register_forward_pre_hook(lambda module, args: (-args[0],)),
    "a method": lambda model: setattr(
        linear(model), "forward", lambda x: -nn.functional.linear(x, linear(model).weight)
    ),
    "another module": lambda model: setattr(model.members[0], "head", network(9).head),
    "another block": swap_a_block,
    "another member": lambda model: model.members.__setitem__(0, network(7)),
    "one member less": lambda model: model.members.__delitem__(1),
    "steps": lambda model: setattr(model.members[0], "steps", 4),
    "solver": lambda model: setattr(model.members[0], "solver", "milstein"),
    "schedule": another_schedule,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_model_is_copied_again(change: Change, x: Tensor) -> None:
    model = ensemble()
    votes(model, x)
    torch.manual_seed(0)
    change(model)
    assert torch.equal(votes(model, x), votes(copy.deepcopy(model), x))
    assert torch.equal(votes(model, x), votes(model, x))


def test_changes_are_seen_in_the_votes(x: Tensor) -> None:
    """Else the test above could not fail."""
    moved = {}
    for name, change in CHANGES.items():
        model = ensemble()
        before = votes(model, x)
        torch.manual_seed(0)
        change(model)
        after = votes(model, x)
        moved[name] = after.shape != before.shape or not torch.equal(before, after)
    rounding = {"float64", "bfloat16", "channels_last", "solver"}  # with additive noise Milstein is Euler
    assert [name for name in moved if not moved[name] and name not in rounding] == []


def test_train_mode_of_one_norm_is_seen(x: Tensor) -> None:
    """A copy is in eval mode whatever the modes are; without statistics there is none."""
    model = ensemble()
    first = votes(model, x)
    model.train()
    assert torch.equal(votes(model, x), first)
    norm(model).running_mean = norm(model).running_var = None
    with pytest.raises(ito.ItoError, match="running statistics"):
        votes(model, x)


def test_code_of_somebody_else_is_copied_every_time(x: Tensor, made: list[int]) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sign = [1.0]

        def forward(self, x: Tensor) -> Tensor:
            return x * self.sign[0]

    model = ito.ItoEnsemble([network()], 20).eval()
    model.members[0].head = nn.Sequential(model.members[0].head, own := Own())
    before = votes(model, x)
    own.sign[0] = -1.0
    assert not torch.equal(votes(model, x), before)
    assert len(made) == 2


def test_images_of_another_kind_get_a_copy_of_their_own(made: list[int]) -> None:
    model = ensemble()
    for size in (8, 16, 8):
        model.predict(torch.rand(2, 1, size, size))
    assert len(made) == 6


def test_inference_mode_leaves_no_trace(x: Tensor) -> None:
    model = ensemble()
    with torch.inference_mode():
        first = votes(model, x.clone())
    assert torch.equal(votes(model, x), first)
    assert model.predict(x.clone().requires_grad_(), seed=3).labels.shape == (5,)


def test_threads_see_a_copy_of_what_they_asked(x: Tensor) -> None:
    models = [ensemble() for _ in range(2)]
    load(models[1])
    expected = [votes(copy.deepcopy(model), x) for model in models]
    shared, wrong = ensemble(), []
    states = [model.state_dict() for model in models]
    lock = threading.Lock()

    def work(which: int) -> None:
        for _ in range(4):
            with lock:  # whoever changes a model while others use it gets what he asked for
                shared.load_state_dict(states[which])
                if not torch.equal(votes(shared, x), expected[which]):
                    wrong.append(which)
            if not torch.equal(votes(models[which], x), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_copy_ends_with_its_ensemble(x: Tensor) -> None:
    model = ensemble()
    votes(model, x)
    quick = weakref.ref(kept._KEPT[model][1][0])
    assert torch.equal(votes(pickle.loads(pickle.dumps(model)), x), votes(model, x))
    del model
    gc.collect()
    assert quick() is None
