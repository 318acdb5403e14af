"""Audits over the zoo, by hand: ``python tests/audits/zoo_run.py measure|audit|table --cache DIR``.

``measure`` trains each model, finds a radius of each norm at which a part of the images survives, and what the default
attack claims there and what is true. ``audit`` audits the models at these radii, one JSON line each; what was done with
the same code is not done again. ``table`` counts: masked models caught, sound models condemned.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from zoo import ZOO, digits, load
from zoo_resnet20 import ResNet20
from zoo_truth import Judge

import neuralsde_ito as ito
from neuralsde_ito.outcomes import Paired
from neuralsde_ito.validation import ItoError

Model = tuple[bool, bool, Callable[[], nn.Module]]  # masked, randomised, how to load it
NORMS = ("linf", "l2")


class Digits:
    """The zoo of digits."""

    ranges: ClassVar = {"linf": (0.01, 0.4), "l2": (0.08, 4.0)}  # where radii are looked for

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def models(self) -> dict[str, Model]:
        """By name."""
        return {name: (s.masked, s.randomised, partial(load, s, self.cache)) for name, s in ZOO.items()}

    def images(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``n`` test images and their labels."""
        x, y = digits()
        return x[:n], y[:n]


Subjects = Digits | ResNet20


def measure(subjects: Subjects, file: Path, only: str, n: int) -> None:
    """Radii, claims and truths of all models, into ``file``."""
    done = {(row["name"], row["norm"]) for row in _lines(file)}
    x, y = subjects.images(n)
    models = subjects.models()
    for second in (False, True):  # each model under one norm, then under the other
        for name, (masked, randomised, make) in sorted(models.items(), key=lambda item: zlib.crc32(item[0].encode())):
            norm = NORMS[_first_norm(name) ^ second]
            if (name, norm) in done or only not in name:
                continue
            start, model = time.time(), make()
            torch.manual_seed(0)
            judge = Judge(model, x, y)
            part = Judge(model, x[:50], y[:50])
            # Another share for each model: what is hard to audit depends on it.
            aim = (0.15, 0.3, 0.45)[zlib.crc32(name.encode()) % 3] if masked else (0.35, 0.5, 0.7)[len(name) % 3]
            eps = _radius(part, norm, aim, *subjects.ranges[norm])
            claim, truth = judge.claim(norm, eps), judge.truth(norm, eps)
            paired = Paired.of(claim, truth)
            row = {
                "name": name, "norm": norm, "eps": eps, "n": n, "masked": masked, "randomised": randomised,
                "claim": round(float(claim.double().mean()), 3), "truth": round(float(truth.double().mean()), 3),
                "p": paired.p, "seconds": round(time.time() - start, 1),
            }  # fmt: skip
            _append(file, row)
            print(json.dumps(row), flush=True)


def _first_norm(name: str) -> bool:
    """Whether the model is seen under the second norm first."""
    return zlib.crc32(name.encode()) // 7 % 2 == 1


def _radius(judge: Judge, norm: str, aim: float, low: float, high: float) -> float:
    """The radius at which about the share ``aim`` of the images survives, to two digits."""
    for _ in range(4):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if judge.cheap(norm, middle) > aim else (low, middle)
    return float(f"{(low * high) ** 0.5:.2g}")


def plan(kind: str, file: Path, sizes: list[int], masked: str) -> list[dict[str, Any]]:
    """The audits to make, the most telling first: ``n`` 50, 100 and 400, both norms in turn."""
    rows = sorted(filter(usable, _lines(file)), key=lambda row: zlib.crc32(row["name"].encode()))
    rows = [row for row in rows if masked in ("both", "yes" if row["masked"] else "no")]
    first = [row for row in rows if row["norm"] == NORMS[_first_norm(row["name"])]]
    second = [row for row in rows if row not in first]
    order = [
        *(row | {"n": n} for n in (100, 50) for row in first),
        *(row | {"n": n} for n in (50, 100) for row in second),
    ]
    order += [row | {"n": 400} for row in rows if not row["masked"]]
    return [row for row in order if row["n"] in (sizes if kind == "digits" else [50])]


def usable(row: dict[str, Any]) -> bool:
    """Whether a measured row is what its model stands for.

    A masked model's claim exceeds the truth beyond chance, by 10 points or more. That of a sound one does not exceed it
    beyond chance: else the default attack is too weak for it, and an audit that says so is right.
    """
    gap = row["claim"] - row["truth"]
    return gap >= 0.1 and row["p"] < 0.01 if row["masked"] else gap <= 0.05 or row["p"] >= 0.05


def audit(subjects: Subjects, kind: str, rows: list[dict[str, Any]], out: Path) -> None:
    """Audit after audit, until all of the plan are done."""
    version = code()
    done = {(r["name"], r["norm"], r["n"]) for r in _lines(out) if r["version"] == version and r["kind"] == kind}
    models = subjects.models()
    for row in rows:
        if (row["name"], row["norm"], row["n"]) in done:
            continue
        model = models[row["name"]][2]()
        x, y = subjects.images(row["n"])
        torch.manual_seed(0)
        start, busy, result = time.time(), time.process_time(), dict[str, Any]()
        try:
            found = ito.audit(model, x, y, norm=row["norm"], eps=row["eps"])
            result = found.as_dict()
        except ItoError as error:
            result = {"verdict": "refused", "summary": str(error)}
        failed = {c["name"]: c["figure"] for c in result.get("checks", ()) if c["verdict"] == "fail"}
        undecided = {c["name"]: c["figure"] for c in result.get("checks", ()) if c["verdict"] == "undecided"}
        best = result.get("best")
        line = {
            "kind": kind, "version": version, **row, "verdict": verdict(result), "failed": failed,
            "undecided": undecided, "claimed": _percent(result.get("attacked")), "best": _percent(best),
            "attack": (best or {}).get("attack"),
            "summary": result.get("summary", result["verdict"]), "seconds": round(time.time() - start, 1),
            "busy": round(time.process_time() - busy, 1),
        }  # fmt: skip
        _append(out, line)
        words = f"{line['name']:32} {row['norm']:5} n {row['n']:3} {line['verdict']:10} {line['busy']:6} s"
        print(words, failed, flush=True)


def verdict(result: dict[str, Any]) -> str:
    """``masked``, ``undecided``, ``sound`` or ``refused``; a failed check means: not sound."""
    word = str(result["verdict"])
    for known in ("masked", "undecided", "sound", "refused"):
        if word.startswith(known):
            return known
    return "masked" if any(c["verdict"] == "fail" for c in result["checks"]) else "sound"


def table(out: Path, version: str | None) -> str:
    """Counts, and what was judged wrongly."""
    rows = [row for row in _lines(out) if version is None or row["version"] == version]
    rows = list({(r["kind"], r["name"], r["norm"], r["n"]): r for r in rows}.values())  # the last of each
    lines = ["| | audits | caught or condemned | masked | undecided | median CPU s |", "|---|---|---|---|---|---|"]
    for kind, masked, randomised in sorted({(r["kind"], r["masked"], r["randomised"]) for r in rows}):
        group = [r for r in rows if (r["kind"], r["masked"], r["randomised"]) == (kind, masked, randomised)]
        label = f"{kind}, {'masked' if masked else 'sound'}, {'randomised' if randomised else 'deterministic'}"
        lines.append(_count(label, group))
    return "\n".join([*lines, "", *(_wrong(row) for row in rows if condemned(row) != row["masked"])])


def condemned(row: dict[str, Any]) -> bool:
    """Whether the audit speaks against the model: masked, or a failed check."""
    return row["verdict"] == "masked" or bool(row["failed"])


def _wrong(row: dict[str, Any]) -> str:
    return (
        f"- {'MISSED' if row['masked'] else 'CONDEMNED'} {row['name']}, {row['norm']} {row['eps']}, n {row['n']}: "
        f"{row['verdict']}, claimed {row['claimed']}, best {row['best']}, true {100 * row['truth']:.0f}; "
        f"{row['failed']}"
    )


def _count(label: str, group: list[dict[str, Any]]) -> str:
    seconds = sorted(row["busy"] for row in group)
    caught = sum(condemned(row) for row in group)
    masked = sum(row["verdict"] == "masked" for row in group)
    unsure = sum(row["verdict"] == "undecided" for row in group)
    share = f"{caught} ({100 * caught / len(group):.0f} %)"
    return f"| {label} | {len(group)} | {share} | {masked} | {unsure} | {seconds[len(seconds) // 2]} |"


def code() -> str:
    """A digest of the library's code."""
    digest = hashlib.sha256()
    for file in sorted(Path(ito.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


def _percent(outcomes: Any) -> float | None:
    """The share of right decisions in per cent."""
    return (
        round(100 * outcomes["rates"]["correct"][0], 1) if isinstance(outcomes, dict) and "rates" in outcomes else None
    )


def _lines(file: Path) -> Iterable[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _append(file: Path, row: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("measure", "audit", "table"))
    parser.add_argument("--kind", choices=("digits", "resnet20"), default="digits")
    parser.add_argument("--cache", type=Path, required=True, help="trained weights and measured truths")
    parser.add_argument("--out", type=Path, help="results of audits; default CACHE/results.jsonl")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--n", type=int, default=100, help="images for measure")
    parser.add_argument("--sizes", default="100,50,400", help="audit: numbers of images")
    parser.add_argument("--masked", choices=("yes", "no", "both"), default="both", help="audit: which models")
    parser.add_argument("--version", help="table: of this version of the code; default the last of each audit")
    parser.add_argument("--data", type=Path, help="resnet20: the folder cifar10-jpeg")
    parser.add_argument("--weights", type=Path, help="resnet20: resnet20-12fca82f.th")
    parser.add_argument("--run", type=Path, help="resnet20: a run of one member at omega 1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out, file = args.out or args.cache / "results.jsonl", args.cache / f"truth-{args.kind}.jsonl"
    if args.what == "table":
        print(table(out, args.version))
        return
    resnet20 = args.kind == "resnet20"
    subjects = ResNet20(args.data, args.weights, args.run, args.cache) if resnet20 else Digits(args.cache)
    if args.what == "measure":
        measure(subjects, file, args.only, args.n)
    else:
        rows = plan(args.kind, file, [int(n) for n in args.sizes.split(",")], args.masked)
        audit(subjects, args.kind, [row for row in rows if args.only in row["name"]], out)


if __name__ == "__main__":
    main()
