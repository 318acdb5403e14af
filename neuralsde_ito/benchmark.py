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

from .attacks import PGD, Attacked
from .engine import infer, quicken
from .ensemble import ItoEnsemble, evaluating
from .fused import library
from .noise import BrownianPath, make_keys
from .recast import ItoResNet, recast
from .resnets import load_resnet


@dataclass(frozen=True)
class Row:
    """One line of a benchmark.

    Attributes:
        part: ``inference``, ``vote``, ``path``, ``attack``, ``training`` or ``memory``.
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
            torch.cuda.synchronize()
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
            state = sde.block(state)  # type: ignore[operator]
        sde.shape = tuple(state.shape[1:])  # type: ignore[assignment]
        t0, t1 = float(sde.t0), float(sde.t1)  # type: ignore[arg-type]
        ts = torch.tensor([t0, t1], device=x.device)
        flat = torchsde.sdeint(sde, rearrange(state, "n ... -> n (...)"), ts, method="euler", dt=t1 - t0)
        state = flat[-1].view(state.shape)
    return model.head(state)


@torch.no_grad()
def bench_inference(net: nn.Module, model: ItoResNet, x: Tensor, repeats: int, compiled: bool = False) -> list[Row]:
    """One inference of a batch: the plain network, torchsde's defaults, the reference, and the engine."""
    index = torch.arange(len(x), device=x.device)
    keys = make_keys(0, "report", index=index)
    quick = quicken(model)
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
    return [Row(r.part, r.name, r.seconds, r.ratio, r.cold if "compile" in r.name else None) for r in rows]


@torch.no_grad()
def bench_votes(net: nn.Module, ensemble: ItoEnsemble, x: Tensor, repeats: int) -> list[Row]:
    """A decision of the whole ensemble, in plain forwards, by both rules; labels held against the full vote's."""
    cases: dict[str, Callable[[], object]] = {"plain network, eager": lambda: net(x)}
    notes = [""]
    for rule in ("hierarchical", "flat"):
        one = ItoEnsemble(ensemble.members, ensemble.inferences, rule)  # type: ignore[arg-type]
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

    member: ItoResNet = ensemble.members[0]  # type: ignore[assignment]
    one = ItoEnsemble([member], ensemble.inferences)
    rows = []

    def peer(model: nn.Module, eps: float) -> Tensor:
        return torchattacks.EOTPGD(model, eps=eps, alpha=2.5 * eps / steps, steps=steps, eot_iter=eot)(x, y)

    def ours(eps: float, **settings) -> Attacked:
        return PGD(eps=eps, steps=steps, eot=eot, **settings).run(one, x, y)

    for eps in radii:
        cases: dict[str, Callable[[], Tensor | Attacked]] = {
            "torchattacks EOTPGD, reference": partial(peer, member, eps),
            "torchattacks EOTPGD, our engine": partial(peer, quicken(member), eps),
            "ours, every image to the end": partial(ours, eps, stop=False, keep="last"),
            "ours": partial(ours, eps),
        }
        first = None
        for name, case in cases.items():
            start = time.perf_counter()
            found = case()
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            spent = time.perf_counter() - start
            first = first or spent
            images = found.images if isinstance(found, Attacked) else found.detach()
            note = f"{int((one.predict(images).labels == y).sum())} correct"
            if isinstance(found, Attacked):
                note += f"; {found.backwards:,} gradients, {found.forwards:,} queries"
            rows.append(Row("attack", f"{255 * eps:g}/255: {name}", spent, spent / first, note=note))
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
from neuralsde_ito.benchmark import gradient_peak
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
        if library is None:
            yield "noise without the compiled pass"
    yield f"PyTorch {torch.__version__}"
