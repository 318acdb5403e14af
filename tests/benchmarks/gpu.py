"""All that wants a GPU, in one call: ``python tests/benchmarks/gpu.py --out FOLDER [--data FOLDER] [--device cuda]``.

Four parts: whether the GPU computes what the CPU does; what an inference costs; what a gradient costs, as a share of
the card's peak in bfloat16; and the suite on a trained ensemble. FOLDER gets ``gpu.json`` and ``gpu.md``, written anew
after each row, so that a call that is cut off leaves what it has measured. With the defaults it takes some minutes on a
large GPU; ``--device cpu --arch resnet8 --batch 32 --images 20 --epochs 1 --members 1 --limit 200`` tries it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

import neuralsde_ito as ito
from neuralsde_ito import kernels
from neuralsde_ito.attacks.objectives import OBJECTIVES
from neuralsde_ito.attacks.targets import EnsembleTarget, in_precision
from neuralsde_ito.benchmarks.costs import bf16_peak, operations
from neuralsde_ito.benchmarks.measuring import interleaved, machine
from neuralsde_ito.models.inference import in_bfloat16, infer, quicken
from neuralsde_ito.noise.keys import PathRange
from neuralsde_ito.noise.normals import add_normals
from neuralsde_ito.runs.build import load_dataset
from neuralsde_ito.runs.run import Run

SHAPES = ((5, 7), (4, 16, 8, 8), (3, 6, 5, 5), (64, 64, 32, 32))


@dataclass
class Report:
    """Rows of a part, what was measured, the figure, and what it ought to be."""

    folder: Path
    head: dict[str, object]
    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, part: str, what: str, figure: str, aim: str = "") -> None:
        """Print a row, and write both files anew."""
        self.rows.append({"part": part, "what": what, "figure": figure, "aim": aim})
        print(f"{part:10}  {what:58}  {figure:>24}  {aim}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {**self.head, "rows": self.rows}
        (self.folder / "gpu.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        lines = ["# Measured on a GPU", "", *(f"- {key}: {value}" for key, value in self.head.items())]
        lines += ["", "| part | what | figure | aim |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row.values())} |" for row in self.rows]
        (self.folder / "gpu.md").write_text("\n".join(lines) + "\n")


def same_as_cpu(report: Report, words: argparse.Namespace, device: torch.device) -> None:
    """Normals, compiled passes and votes of the device beside those of the CPU."""
    largest = rectified = 0.0
    for shape in SHAPES:
        for order in (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 4 else 1]:
            x = torch.zeros(shape).contiguous(memory_format=order)
            keys = ito.make_keys(words.seed, "report", index=torch.arange(len(x)))
            there = add_normals(x.to(device), keys.to(device), 1.0, 2, 0)
            largest = max(largest, float((there.cpu() - add_normals(x, keys, 1.0, 2, 0)).abs().max()))
            x, skip = (0.1 * torch.randn_like(x) for _ in range(2))
            there = x.to(device, copy=True)
            if kernels.takes(there):
                relu = kernels.rectifier(there, skip.to(device))
                add_normals(there, keys.to(device), 1.0, 2, 0, in_place=True, relu=relu)
                wanted = add_normals((x + skip).relu(), keys, 1.0, 2, 0)
                rectified = max(rectified, float((there.cpu() - wanted).abs().max()))
    report.add("same", "normals, largest difference from the CPU's", f"{largest:.1e}", "at most 1e-6")
    report.add("same", "with a ReLU and a skip in the same pass", f"{rectified:.1e}", "at most 2e-6")
    report.add("same", "Triton's passes take its states", str(kernels.takes(torch.zeros(1, 2, device=device))))

    net = load(words).eval()
    x = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(words.seed))
    here = ito.ItoEnsemble([ito.recast(net, omega=0.2)], inferences=20)
    there = ito.ItoEnsemble([ito.recast(net.to(device), omega=0.2)], inferences=20)
    a, b = here.predict(x, full=True), there.predict(x.to(device), full=True)
    moved = int((a.votes - b.votes.cpu()).abs().sum()) // 2
    report.add("same", "votes that differ from the CPU's, of 1,280", str(moved), "few: TF32 rounds")
    keys, y = ito.make_keys(words.seed, "report", index=torch.arange(64)), torch.arange(64) % 10
    paths = PathRange(words.seed, "gradient", torch.arange(64), 0, 4)
    gradients = []
    for model, at in ((here, "cpu"), (there, device)):
        some = replace(paths, index=paths.index.to(at))
        gradients.append(EnsembleTarget(model).ascend(OBJECTIVES["mean-loss"], x.to(at), y.to(at), some).gradient.cpu())
    cosine = nn.functional.cosine_similarity(*(gradient.flatten(1) for gradient in gradients)).min()
    report.add("same", "gradients of 4 paths, least cosine with the CPU's", f"{float(cosine):.5f}", "near 1")
    logits = [model.members[0](x.to(at), keys.to(at)).detach().cpu() for model, at in ((here, "cpu"), (there, device))]
    spread = (logits[0].amax(1) - logits[0].amin(1)).max()
    report.add(
        "same",
        "logits, largest difference / spread of classes",
        f"{float((logits[0] - logits[1]).abs().max() / spread):.1e}",
    )


def load(words: argparse.Namespace) -> nn.Module:
    """The network, with random weights."""
    torch.manual_seed(words.seed)
    return ito.load_resnet(words.arch)


@torch.no_grad()
def inferences(report: Report, words: argparse.Namespace, device: torch.device) -> None:
    """One inference of a batch: plain and Itô, in float32 and in bfloat16."""
    net = load(words).to(device).eval()
    plain16 = load(words).to(device, memory_format=torch.channels_last).eval()
    x = torch.rand(words.batch, 3, 32, 32, device=device)
    rows = torch.arange(words.batch, device=device)
    keys = ito.make_keys(words.seed, "report", index=rows)
    quick = quicken(ito.recast(net, omega=0.2), x)
    brief = in_bfloat16(quick)

    def autocast() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return plain16(x)

    cases: dict[str, Callable[[], object]] = {
        "plain network, bf16 autocast, channels_last": autocast,
        "Itô inference, bf16": lambda: infer(brief, x, rows, keys),
        "plain network, float32": lambda: net(x),
        "Itô inference, float32": lambda: infer(quick, x, rows, keys),
    }
    aims = {"Itô inference, bf16": "at most 1.15"}
    for row in interleaved("inference", cases, words.repeats, device):
        report.add("inference", row.name, f"{row.ratio:.2f} ({1000 * row.seconds:.1f} ms)", aims.get(row.name, ""))


def gradients(report: Report, words: argparse.Namespace, device: torch.device) -> None:
    """The gradient of one path a image: the plain network's, ours in both precisions, and the share of the peak."""
    net = load(words).to(device).eval().requires_grad_(False)
    plain16 = load(words).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    x, y = torch.rand(words.batch, 3, 32, 32, device=device), torch.arange(words.batch, device=device) % 10
    target = EnsembleTarget(ito.ItoEnsemble([ito.recast(net, omega=0.2)], inferences=20))
    brief, numbers = in_precision(target, "bfloat16"), torch.arange(words.batch, device=device)
    paths = PathRange(words.seed, "gradient", numbers, 0, 1)

    def autocast() -> Tensor:
        at = x.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(plain16(at).float(), y)
        return torch.autograd.grad(loss, at)[0]

    cases: dict[str, Callable[[], object]] = {
        "plain network, bf16 autocast, channels_last": autocast,
        "Itô gradient, bf16": lambda: brief.ascend(OBJECTIVES["mean-loss"], x, y, paths),
        "Itô gradient, float32": lambda: target.ascend(OBJECTIVES["mean-loss"], x, y, paths),
    }
    # Forward, and back to the images alone: as many operations again.
    count, peak = 2 * operations(net, x), bf16_peak(device, 8192 if device.type == "cuda" else 512)
    report.add("gradient", "peak of a product of bf16 matrices", f"{peak / 1e12:.2f} TFLOP/s")
    aims = {"Itô gradient, bf16": "25 % or more of the peak"}
    for row in interleaved("gradient", cases, words.repeats, device):
        share = 100 * count / row.seconds / peak
        figure = f"{row.ratio:.2f} ({1000 * row.seconds:.1f} ms, {share:.0f} % of peak)"
        report.add("gradient", row.name, figure, aims.get(row.name, ""))


def suite(report: Report, words: argparse.Namespace, device: torch.device) -> None:
    """Train an ensemble, let it vote on clean images, and attack it by the suite: what each takes, and what is left."""
    settings = {"network.arch": words.arch, "resnet.epochs": words.epochs, "finetune.epochs": 1, "seed": words.seed}
    config = ito.load_config(
        "cifar10-resnet18" if words.data else "digits", overrides={**settings, "ensemble.members": words.members}
    )
    folder = {"name": "imagefolder", "path": words.data} if words.data else {}
    limits = {"train_limit": words.limit, "test_limit": words.limit} if words.limit else {}
    config = config.model_copy(update={"data": config.data.model_copy(update={**folder, **limits})})
    data = load_dataset(config)
    run = Run.create(words.out / "run", config)
    seconds = time.perf_counter()
    run.train(data, device)
    report.add(
        "suite", f"training, {words.epochs} + {words.members} epochs of {len(data.train):,} images", clock(seconds)
    )
    ensemble, resnet, images = run.ensemble().to(device), run.resnet().to(device), data.test.first(words.images)
    for precision in ("bfloat16", "float32"):
        seconds = time.perf_counter()
        found = ito.run_suite(ensemble, resnet, images, ito.SuiteSettings("linf", (words.eps,), precision=precision))
        for name, one in (("Itô ensemble", found.ito), ("its ResNet", found.resnet)):
            assert one is not None
            right = int((one.results[0].denial.labels == one.images.y).sum())
            rate = ito.Rate.of(right, len(one.images.y))
            figure = f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}] %"
            report.add("suite", f"{name}, honest at {255 * words.eps:g}/255, {precision}", figure)
        report.add("suite", f"the suite on {len(images):,} images, both, {precision}", clock(seconds), "minutes")


def clock(begun: float) -> str:
    """Seconds since then."""
    return f"{time.perf_counter() - begun:.1f} s"


PARTS: dict[str, Callable[[Report, argparse.Namespace, torch.device], None]] = {
    "same": same_as_cpu,
    "inference": inferences,
    "gradient": gradients,
    "suite": suite,
}


def main() -> None:
    """Read the words, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be repeated")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arch", default="cifar-resnet18")
    parser.add_argument("--data", help="a folder of images for the suite, such as cifar10-jpeg; default digits")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--images", type=int, default=1000, help="that the suite attacks")
    parser.add_argument("--eps", type=float, default=1 / 255)
    parser.add_argument("--epochs", type=int, default=12, help="of the ResNet")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--limit", type=int, help="of training and test images")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    device = torch.device(words.device)
    head = {
        "command": shlex.join(["python", "tests/benchmarks/gpu.py", *sys.argv[1:]]),
        "device": ", ".join(machine(device)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": words.seed,
    }
    report = Report(words.out, head)
    for part in words.part or PARTS:
        PARTS[part](report, words, device)


if __name__ == "__main__":
    main()
