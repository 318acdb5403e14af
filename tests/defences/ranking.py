"""The ranking of randomised defences, by hand: ``PYTHONPATH=tests python -m defences.ranking --cache DIR``.

Each defence is put into the same residual network and trained for a short time. Five columns judge it on the same
images and radius: no attack, the protocol under which it was published, EOTPGD (torchattacks), AutoAttack and the suite
of this project. Every figure is a vote on noise that the attack has not seen. The last column is the audit's verdict. A
finished cell is kept in ``CACHE/DATA-EPS.jsonl`` and not made again; ``--redo suite,audit`` makes these columns again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuralsde_ito as ito
from neuralsde_ito.attacks import PGD
from neuralsde_ito.attacks.images import Images
from neuralsde_ito.attacks.other_libraries import peer_attack
from neuralsde_ito.attacks.suite_run import SuiteSettings
from neuralsde_ito.models.vote import as_voter
from neuralsde_ito.outcomes import Paired, Rate

from . import enresnet, kwta, neural_sde, ours, plain, pni, resize_pad, rse, sap, smoothing

# Name, file, and whether it is trained on adversarial images.
DEFENCES: dict[str, tuple[ModuleType, bool]] = {
    "none": (plain, False),
    "none, adversarial training": (plain, True),
    "RSE": (rse, False),
    "PNI": (pni, True),
    "Neural SDE (Liu)": (neural_sde, False),
    "EnResNet": (enresnet, True),
    "resize and pad": (resize_pad, False),
    "k-WTA": (kwta, False),
    "SAP": (sap, False),
    "smoothing, 20 votes": (smoothing, False),
    "ours": (ours, False),
    "ours, adversarial training": (ours, True),
}
COLUMNS = ("clean", "claimed", "eotpgd", "autoattack", "suite", "audit")
RADII = {"digits": 0.1, "cifar10-jpeg": 1 / 255}
INFERENCES = 20


# --- models ---------------------------------------------------------------------------------------------------


def base(data: str, weights: Path | None) -> nn.Module:
    """The network that every defence is put into: ResNet-8 at random, or the ResNet-20 of ``weights``."""
    return ito.load_resnet("resnet8", in_channels=1) if weights is None else ito.load_resnet("resnet20", weights)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, eps: float) -> None:
    """Adam on batches of 64 of the images ``(N, C, H, W)`` in [0, 1]; on PGD images of ``eps`` (5 steps) if above 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        images, labels = x[rows], y[rows]
        moved = images + eps * (2 * torch.rand_like(images) - 1)
        for _ in range(5 if eps else 0):
            moved = moved.clamp(0, 1).requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(moved), labels), moved)
            moved = images + (moved.detach() + eps / 2 * gradient.sign() - images).clamp(-eps, eps)
        optimizer.zero_grad()
        F.cross_entropy(model(moved.clamp(0, 1)), labels).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def defended(name: str, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """A defence, trained, and the network that it was put into, trained alike; both in eval mode."""
    module, adversarial = DEFENCES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = base(args.data, args.weights)
        model = module.defend(copy.deepcopy(net))
        eps, steps, lr = RADII[args.data] if adversarial else 0.0, args.steps, args.lr
        x, y = images(args, "train")
        _once(args.cache / f"{args.data}-none.pt", net, lambda: train(net, x, y, steps, lr, 0.0))
        if not getattr(module, "TRAINED", True):
            return module.defend(copy.deepcopy(net)).eval(), net.eval()
        file = args.cache / f"{args.data}-{zlib.crc32(name.encode()):08x}.pt"
        _once(file, model, lambda: train(model, x, y, steps, lr, eps))
    return model.eval(), net.eval()


def _once(file: Path, model: nn.Module, make: Callable[[], None]) -> None:
    if file.exists():
        model.load_state_dict(torch.load(file))
        return
    make()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)


def images(args: argparse.Namespace, part: str) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels: of training, or the first ``n`` of the test."""
    if args.data == "digits":
        data = ito.load_data("digits", augment="none")
    else:
        data = ito.load_data("imagefolder", args.folder, train_limit=4000, test_limit=500)
    split = Images.of(data.train if part == "train" else data.test.first(args.n))
    return split.x, split.y


# --- columns --------------------------------------------------------------------------------------------------


def cell(column: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One cell: which images are right, gradients an image; or the audit's verdict."""
    (model, net), (x, y), eps = defended(name, args), images(args, "test"), args.eps
    voter, module = as_voter(model, INFERENCES), DEFENCES[name][0]
    voter.observe(x)
    gradients, start = 0, time.time()
    if column == "audit":
        found = ito.audit(voter, x[: args.audited], y[: args.audited], eps=eps)
        failed = [check.name for check in found.failed]
        return {"verdict": found.verdict, "failed": failed, "seconds": round(time.time() - start, 1)}
    if column == "suite":
        suite = SuiteSettings("linf", (eps,)).suite(voter)
        (result,) = suite.attack(voter, Images(x, y, torch.arange(len(x))), [eps])
        labels, gradients = result.denial.labels, sum(result.gradients[: len(result.gradients) // 2])
    elif column == "clean":
        labels = voter.predict(x, seed=1).labels
    else:
        if column == "claimed":
            attack = PGD(eps=eps, stop=False, **module.CLAIMED)
            through = net if getattr(module, "UNDEFENDED", False) else voter
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one path a gradient is what was claimed
                result = attack.run(through, x, y)
        else:
            peer = {"eotpgd": "torchattacks", "autoattack": "autoattack"}[column]
            result = peer_attack(peer, voter, x, y, "linf", eps)
        labels, gradients = voter.predict(result.images, seed=1).labels, result.gradients
    right = (labels == y).int().tolist()
    seconds = round(time.time() - start, 1)
    own = {"random": voter.noisy, "remarks": getattr(voter, "remarks", [])}
    return {"right": right, "gradients": round(gradients / len(x)), "seconds": seconds, **own}


def table(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The ranking: the strongest under the suite first."""
    names = [name for name in DEFENCES if (name, "clean") in rows]
    lines = [
        "| defence | without attack | claimed protocol | EOTPGD | AutoAttack | our suite | audit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(names, key=lambda name: -sum(rows.get((name, "suite"), {"right": []})["right"])):
        cells = [_words(column, rows.get((name, column))) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in names:
        for peer in ("eotpgd", "autoattack"):
            if (name, peer) in rows and (name, "suite") in rows:
                theirs, own = (torch.tensor(rows[name, c]["right"]).bool() for c in (peer, "suite"))
                paired = Paired.of(theirs, own)
                lines.append(
                    f"- {name}: suite {int(own.sum())}, {peer} {int(theirs.sum())} left, p = {paired.p:.2g}; gradients "
                    f"{rows[name, 'suite']['gradients']} and {rows[name, peer]['gradients']}"
                )
    return "\n".join(lines)


def _words(column: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if column == "audit":
        return str(row["verdict"])
    rate = Rate.of(sum(row["right"]), len(row["right"]))
    share, low, high = (f"{100 * value:.0f}" for value in (rate.value, rate.low, rate.high))
    return f"{share} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--data", choices=tuple(RADII), default="digits")
    parser.add_argument("--folder", type=Path, help="cifar10-jpeg: the folder of images")
    parser.add_argument("--weights", type=Path, help="cifar10-jpeg: resnet20-12fca82f.th")
    parser.add_argument("--eps", type=float, help="radius of the attacks; default 0.1 (digits), 1/255 (cifar10-jpeg)")
    parser.add_argument("--n", type=int, default=100, help="images")
    parser.add_argument("--audited", type=int, default=50, help="images for the audit")
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--only", default="", help="defences whose name contains this")
    parser.add_argument("--redo", default="", help="columns that are made again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.eps = args.eps or RADII[args.data]  # training keeps its own
    file = args.cache / f"{args.data}-{args.eps:.3g}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = {(row["name"], row["column"]): row for row in map(json.loads, lines)}
    for column in filter(None, args.columns.split(",")):
        for name in DEFENCES:
            if args.only in name and ((name, column) not in rows or column in args.redo.split(",")):
                torch.manual_seed(0)
                row = {"name": name, "column": column, "eps": args.eps, "n": args.n}
                row |= cell(column, name, args)
                rows[name, column] = row
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(f"{name}, {column}: {_words(column, row)}, {row['seconds']} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
