"""What inferences, votes, Brownian paths and training steps cost, relative to the plain network."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torchsde
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..models.ensemble import ItoEnsemble
from ..models.inference import infer, quicken
from ..models.recast import ItoResNet, recast
from ..modules import evaluating
from ..noise.brownian import BrownianPath
from ..noise.keys import make_keys
from .measuring import interleaved
from .record import Row


def torchsde_inference(model: ItoResNet, x: Tensor) -> Tensor:
    """Logits ``(N, classes)`` by torchsde with its defaults: its own Brownian interval, one call a block."""
    state = model.stem(x + model.input_sigma * torch.randn_like(x) if model.input_sigma else x)
    for sde in model.sdes:
        if sde.jump:
            state = sde.block(state)
        t0, t1 = float(sde.t0), float(sde.t1)
        ts = torch.tensor([t0, t1], device=x.device)
        view = sde.view("ito", tuple(state.shape[1:]))
        flat = torchsde.sdeint(view, rearrange(state, "n ... -> n (...)"), ts, method="euler", dt=t1 - t0)
        state = flat[-1].view(state.shape)
    return model.head(state)


@torch.no_grad()
def bench_inference(net: nn.Module, model: ItoResNet, x: Tensor, repeats: int, compiled: bool = False) -> list[Row]:
    """One inference of a batch: the plain network, torchsde's defaults, the reference, and the engine.

    Args:
        net: the plain network.
        model: its recast.
        x: images ``(N, C, H, W)``.
        repeats: see `interleaved`.
        compiled: also the plain network under ``torch.compile``.
    """
    index = torch.arange(len(x), device=x.device)
    keys = make_keys(0, "report", index=index)
    quick = quicken(model, x)
    cases: dict[str, Callable[[], object]] = {
        "plain network, eager": lambda: net(x),
        "Itô, torchsde with its own Brownian interval": lambda: torchsde_inference(model, x),
        "Itô, reference model(x, keys)": lambda: model(x, keys),
        "Itô, engine": lambda: infer(quick, x, index, keys),
    }
    if compiled:
        fast = torch.compile(net)
        cases["plain network, torch.compile"] = lambda: fast(x)
    with evaluating(net), evaluating(model):
        rows = interleaved("inference", cases, repeats, x.device)
        share = operations(net, x) / bf16_peak(x.device) if x.device.type == "cuda" else 0.0
    return [
        replace(
            row,
            cold=row.cold if "compile" in row.name else None,
            note=f"{100 * share / row.seconds:.1f} % of the card's bf16 peak" if share else row.note,
        )
        for row in rows
    ]


@torch.no_grad()
def operations(net: nn.Module, x: Tensor) -> int:
    """Multiplications and additions of the convolutions and matrix products in ``net(x)``."""
    with FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops()


@torch.no_grad()
def bf16_peak(device: torch.device, size: int = 8192) -> float:
    """Operations a second of a product of two bf16 matrices of ``size``: measured here, not the data sheet's."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    (row,) = interleaved("peak", {"product": lambda: a @ b}, 9, device)
    return 2 * size**3 / row.seconds


@torch.no_grad()
def bench_votes(net: nn.Module, ensemble: ItoEnsemble, x: Tensor, repeats: int) -> list[Row]:
    """A decision of the whole ensemble by each rule, relative to one pass of the plain network.

    The notes say how many inferences were drawn, and whether the labels are those of the full vote.
    """
    cases: dict[str, Callable[[], object]] = {"plain network, eager": lambda: net(x)}
    notes = [""]
    for rule in ("hierarchical", "flat"):
        voting = ItoEnsemble(ensemble.members, ensemble.inferences, rule)
        early, full = voting.predict(x), voting.predict(x, full=True)
        total, members = len(voting.members) * voting.inferences, len(voting.members)
        least = (members // 2 + 1) * (voting.inferences // 2 + 1) if rule == "hierarchical" else total // 2 + 1
        same = "same labels" if torch.equal(early.labels, full.labels) else "LABELS DIFFER"
        notes.append(f"{float(early.drawn.float().mean()):.1f} of {total} drawn, at least {least}; {same}")
        cases[f"decision, {rule}"] = partial(voting.predict, x)
    with evaluating(net):
        rows = interleaved("vote", cases, repeats, x.device)
    return [replace(row, cold=None, note=note or row.note) for row, note in zip(rows, notes, strict=True)]


@torch.no_grad()
def bench_path(x: Tensor, repeats: int) -> list[Row]:
    """Brownian paths alone, read from left to right: torchsde's `BrownianInterval` and ours, for states like ``x``.

    At one step a block ``W`` is read, at 16 steps ``W`` and its integral ``U``, as SRK does.
    """
    n, size = len(x), x[0].numel()
    keys = make_keys(0, "report", index=torch.arange(n, device=x.device))
    draws = itertools.count()

    def read(path: torchsde.BaseBrownian, steps: int) -> None:
        for k in range(steps):
            path(k / steps, (k + 1) / steps, return_U=steps > 1)

    def theirs(steps: int) -> None:
        area = "space-time" if steps > 1 else "none"
        path = torchsde.BrownianInterval(
            0.0, 1.0, (n, size), x.dtype, x.device, entropy=next(draws), levy_area_approximation=area
        )
        read(path, steps)

    def ours(steps: int) -> None:
        read(BrownianPath(keys, size, next(draws), 0.0, 1.0, dtype=x.dtype), steps)

    rows = []
    for steps, what in ((1, "1 step, W"), (16, "16 steps, W and U")):
        cases: dict[str, Callable[[], object]] = {
            f"torchsde's interval, {what}": partial(theirs, steps),
            f"BrownianPath, {what}": partial(ours, steps),
        }
        rows += interleaved("path", cases, repeats, x.device)
    return [replace(row, cold=None) for row in rows]


def bench_training(net: nn.Module, omega: float, x: Tensor, y: Tensor, repeats: int) -> list[Row]:
    """One step of Adam on a batch: the plain network and its recast, in the same memory format.

    Args:
        net: the plain network; copies of it are trained.
        omega: the recast's noise.
        x: images ``(N, C, H, W)``.
        y: labels ``(N,)``.
        repeats: see `interleaved`.
    """
    index = torch.arange(len(x), device=x.device)

    def step(model: nn.Module) -> Callable[[], object]:
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-4)
        epoch = itertools.count()

        def run() -> None:
            keyed = (x, make_keys(0, "train", 0, next(epoch), index)) if isinstance(model, ItoResNet) else (x,)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
                loss = F.cross_entropy(model(*keyed).float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return run

    channels, height, width = x.shape[1:]
    model = recast(net, omega, image_shape=(channels, height, width))
    plain = recast(net, 0, image_shape=(channels, height, width)).base
    rows = interleaved("training", {"plain step": step(plain), "Itô step": step(model)}, repeats, x.device)
    return [replace(row, cold=None) for row in rows]
