"""What inferences, votes, gradients and training steps cost beside the plain network: ratios, measured side by side."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torchsde
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from .. import kernels
from ..attacks.base import AttackResult
from ..attacks.images import Images
from ..attacks.objectives import Objective
from ..attacks.other_libraries import peer_attack
from ..attacks.pgd import PGD
from ..attacks.suite_run import SuiteSettings
from ..attacks.targets import Ascent, EnsembleTarget
from ..models.ensemble import ItoEnsemble
from ..models.inference import infer, quicken
from ..models.recast import ItoResNet, recast
from ..models.resnets import load_resnet
from ..modules import evaluating
from ..noise.brownian import BrownianPath
from ..noise.keys import PathRange, make_keys
from .turns import Pause, in_turns


@dataclass(frozen=True)
class Row:
    """One line of a benchmark.

    Attributes:
        part: ``inference``, ``vote``, ``path``, ``attack``, ``suite``, ``training`` or ``memory``.
        name: what was measured.
        seconds: median; MiB where the part is ``memory``.
        ratio: to the part's first row, the median of the ratios of each repeat.
        cold: seconds of the first call, with whatever it compiles.
        note: what else is to be known.
    """

    part: str
    name: str
    seconds: float
    ratio: float
    cold: float | None = None
    note: str = ""


def interleaved(part: str, cases: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> list[Row]:
    """Measure cases in turn, ``repeats`` times, so that all of them meet the same disturbances."""

    def clock(case: Callable[[], object]) -> float:
        start = time.perf_counter()
        case()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    cold = {name: clock(case) for name, case in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            times[name].append(clock(case))
    first = next(iter(times.values()))
    return [
        Row(
            part,
            name,
            statistics.median(found),
            statistics.median(a / b for a, b in zip(found, first, strict=True)),
            cold[name],
        )
        for name, found in times.items()
    ]


def torchsde_inference(model: ItoResNet, x: Tensor) -> Tensor:
    """Logits as torchsde gives them with its defaults: its own Brownian interval, one call a block."""
    state = model.stem(x)
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
    """One inference of a batch: the plain network, torchsde's defaults, the reference, and the engine."""
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
        Row(
            r.part,
            r.name,
            r.seconds,
            r.ratio,
            r.cold if "compile" in r.name else None,
            f"{100 * share / r.seconds:.1f} % of the card's bf16 peak" if share else "",
        )
        for r in rows
    ]


@torch.no_grad()
def operations(net: nn.Module, x: Tensor) -> int:
    """Multiplications and additions of convolutions and matrix products in ``net(x)``."""
    with FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops()


@torch.no_grad()
def bf16_peak(device: torch.device, size: int = 8192) -> float:
    """Operations a second that a product of two large bf16 matrices reaches here: measured, not the data sheet's."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    (row,) = interleaved("peak", {"product": lambda: a @ b}, 9, device)
    return 2 * size**3 / row.seconds


@torch.no_grad()
def bench_votes(net: nn.Module, ensemble: ItoEnsemble, x: Tensor, repeats: int) -> list[Row]:
    """A decision of the whole ensemble, in plain forwards, by both rules; labels held against the full vote's."""
    cases: dict[str, Callable[[], object]] = {"plain network, eager": lambda: net(x)}
    notes = [""]
    for rule in ("hierarchical", "flat"):
        one = ItoEnsemble(ensemble.members, ensemble.inferences, rule)
        early, full = one.predict(x), one.predict(x, full=True)
        total, members = len(one.members) * one.inferences, len(one.members)
        least = (members // 2 + 1) * (one.inferences // 2 + 1) if rule == "hierarchical" else total // 2 + 1
        same = "same labels" if torch.equal(early.labels, full.labels) else "LABELS DIFFER"
        notes.append(f"{float(early.drawn.double().mean()):.1f} of {total} drawn, at least {least}; {same}")
        cases[f"decision, {rule}"] = lambda one=one: one.predict(x)  # type: ignore[misc]
    with evaluating(net):
        rows = interleaved("vote", cases, repeats, x.device)
    return [Row(r.part, r.name, r.seconds, r.ratio, note=note) for r, note in zip(rows, notes, strict=True)]


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
    return [Row(r.part, r.name, r.seconds, r.ratio) for r in rows]


def bench_attack(ensemble: ItoEnsemble, x: Tensor, y: Tensor, radii: list[float], steps: int, eot: int) -> list[Row]:
    """PGD on the first member, L-inf: ours, and torchattacks' EOTPGD on the reference and on our engine's forward.

    Raises:
        ImportError: torchattacks is not installed.
    """
    import torchattacks

    member: ItoResNet = ensemble.members[0]
    one = ItoEnsemble([member], ensemble.inferences)
    rows = []

    def peer(model: nn.Module, eps: float, pause: Pause) -> Tensor:
        paused = _PausedModule(model, pause, eot)
        return torchattacks.EOTPGD(paused, eps=eps, alpha=2.5 * eps / steps, steps=steps, eot_iter=eot)(x, y).detach()

    def ours(eps: float, pause: Pause, **settings) -> AttackResult:
        target = _PausedTarget(EnsembleTarget(one), pause)
        return PGD(eps=eps, steps=steps, eot=eot, **settings).run(target, x, y)

    for eps in radii:
        cases: dict[str, Callable[[Pause], Tensor | AttackResult]] = {
            "torchattacks EOTPGD, reference": partial(peer, member, eps),
            "torchattacks EOTPGD, our engine": partial(peer, quicken(member, x), eps),
            "ours, every image to the end": partial(ours, eps, stop=False, keep="last"),
            "ours": partial(ours, eps),
        }
        rows += _attacked("attack", cases, eps, lambda images: int((one.predict(images).labels == y).sum()), x.device)
    return rows


class _PausedModule(nn.Module):
    """A model that pauses before every ``every``-th forward."""

    def __init__(self, model: nn.Module, pause: Pause, every: int) -> None:
        super().__init__()
        self.model, self.pause, self.every, self.calls = model, pause, every, 0
        self.training = model.training  # what torchattacks goes back to

    def forward(self, x: Tensor) -> Tensor:
        if self.calls % self.every == 0:
            self.pause()
        self.calls += 1
        return self.model(x)


class _PausedTarget:
    """A target that pauses before every gradient."""

    def __init__(self, target: EnsembleTarget, pause: Pause) -> None:
        self.path_logits, self.distinct = target.path_logits, target.distinct
        self._ascend, self._pause = target.ascend, pause

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        self._pause()
        return self._ascend(objective, x, y, paths)


def _attacked(
    part: str,
    cases: dict[str, Callable[[Pause], Tensor | AttackResult]],
    eps: float,
    right: Callable[[Tensor], int],
    device: torch.device,
) -> list[Row]:
    """Attacks, by turns where they pause: their time, the images that stay right, and the gradients."""
    rows: list[Row] = []
    for name, (found, spent) in in_turns(cases, device).items():
        note = f"{right(found.images if isinstance(found, AttackResult) else found)} correct"
        if isinstance(found, AttackResult):
            note += f"; {found.gradients:,} gradients, {found.queries:,} queries"
        rows.append(
            Row(part, f"{255 * eps:g}/255: {name}", spent, spent / (rows[0].seconds if rows else spent), note=note)
        )
    return rows


def bench_suite(net: nn.Module, ensemble: ItoEnsemble, x: Tensor, y: Tensor, radii: list[float]) -> list[Row]:
    """The whole ensemble, L-inf: AutoAttack (its ``rand`` where there is noise) and our suite ``standard``.

    Both meet the images that are right without attack, and both are judged by the same fresh vote.

    Raises:
        ItoError: pyautoattack is not installed.
    """
    index = torch.arange(len(x), device=x.device)
    right = ensemble.predict(x, 0, index).labels == y
    x, y, index = x[right], y[right], index[right]
    if not len(x):
        return []

    def peer(eps: float, pause: Pause) -> AttackResult:
        return peer_attack("autoattack", ensemble, x, y, "linf", eps)

    def ours(eps: float, pause: Pause) -> AttackResult:
        [found] = SuiteSettings("linf", (eps,)).suite(ensemble, net).attack(ensemble, Images(x, y, index), [eps])
        fooled = found.denial.labels != y
        costs = sum(found.queries), sum(found.gradients)
        return AttackResult(found.denial.images, fooled, *costs, torch.zeros_like(fooled))

    rows = []
    for eps in radii:
        cases: dict[str, Callable[[Pause], Tensor | AttackResult]] = {
            "AutoAttack": partial(peer, eps),
            "ours, standard": partial(ours, eps),
        }
        rows += _attacked(
            "suite", cases, eps, lambda images: int((ensemble.predict(images, 0, index).labels == y).sum()), x.device
        )
    return rows


def bench_training(net: nn.Module, omega: float, x: Tensor, y: Tensor, repeats: int) -> list[Row]:
    """One step of Adam on a batch: the plain network, and its recast, in the same memory format."""

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

    index = torch.arange(len(x), device=x.device)
    model = recast(net, omega, image_shape=tuple(x.shape[1:]))  # type: ignore[arg-type]
    plain = recast(net, 0, image_shape=tuple(x.shape[1:])).base  # type: ignore[arg-type]
    rows = interleaved("training", {"plain step": step(plain), "Itô step": step(model)}, repeats, x.device)
    return [Row(r.part, r.name, r.seconds, r.ratio) for r in rows]


_PEAK = """
import sys
import torch
from ..noise.keys import PathRange
from neuralsde_ito.benchmarks.costs import gradient_peak
print(gradient_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True", sys.argv[5]))
"""


def gradient_peak(arch: str, batch: int, steps: int, checkpoint: bool, device: str) -> float:
    """MiB that one gradient of the input adds to this process, which should be a fresh one."""
    model = recast(load_resnet(arch), omega=0.2, steps=steps, checkpoint=checkpoint).eval().to(device)
    model.requires_grad_(False)

    def gradient(n: int) -> None:
        x = torch.rand(n, 3, 32, 32, device=device).requires_grad_()
        keys = make_keys(0, "gradient", index=torch.arange(n, device=device))
        torch.autograd.grad(model(x, keys).sum(), x)

    gradient(2)  # libraries that load at first use
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        gradient(batch)
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    base = _peak_of_process()
    gradient(batch)
    return _peak_of_process() - base


def _peak_of_process() -> float:
    """MiB. Not Linux's ru_maxrss, which a process inherits from the one that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        return (
            next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**10
        )
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bench_memory(arch: str, batch: int, device: torch.device, steps: tuple[int, ...] = (1, 16, 64)) -> list[Row]:
    """Peak memory of a gradient, each in a fresh process: plain, and checkpointed at several numbers of steps."""
    settings = [(1, False), *((n, True) for n in steps)]
    rows: list[Row] = []
    for n, checkpoint in settings:
        command = [sys.executable, "-c", _PEAK, arch, str(batch), str(n), str(checkpoint), str(device)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise RuntimeError(f"The measurement of memory failed: {done.stderr.strip().splitlines()[-1]}")
        peak = float(done.stdout)
        name = f"gradient, {n} step{'s' * (n > 1)} a block, {'checkpointed' if checkpoint else 'plain'}"
        rows.append(Row("memory", name, peak, peak / (rows[0].seconds if rows else peak)))
    return rows


def machine(device: torch.device) -> Iterator[str]:
    """What the figures were measured on."""
    if device.type == "cuda":
        yield torch.cuda.get_device_name(device)
    else:
        yield f"{torch.get_num_threads()} CPU threads ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
        if kernels.library is None:
            yield "noise without the compiled pass"
    yield f"PyTorch {torch.__version__}"
