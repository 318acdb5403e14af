"""Whether two versions of the program compute the same figures: a script, for changes that must not change any.

    python tests/same_figures.py record ITO_SDE FOLDER       # runs the program's verbs, keeps their JSON in FOLDER
    python tests/same_figures.py compare BEFORE AFTER        # two such folders, figure by figure

Each version wants its own virtual environment; ITO_SDE is the program in it. Figures are compared exactly: both folders
must come from one machine. The third-party ResNet-20 takes part where ../shared holds its weights and images.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"
WEIGHTS, IMAGES = SHARED / "weights" / "resnet20-12fca82f.th", SHARED / "data" / "cifar10-jpeg.tar.xz"

# Each line's name, and its words. The forms are those of before the verb `suite`: both versions understand them.
DIGITS = {
    "digits-train": "train --run digits --json",
    "digits-evaluate": "evaluate --run digits --untrained --full --json",
    "digits-confidence": "evaluate --run digits --confidence 0.999 --json",
    "digits-attack": "attack --run digits --norm linf --eps 8/255 --json",
    "digits-attack-l2": "attack --run digits --norm l2 --eps 0.5 --eps 1 --limit 30 --restarts 2 --steps 10 --json",
    "digits-madry20": "attack --run digits --norm linf --eps 0.1 --preset madry20 --limit 30 --json",
    "digits-suite": "attack --run digits --suite standard --norm linf --eps 0.1 --limit 30 --bundle bundle --json",
    "digits-suite-l2": "attack --run digits --suite standard --norm l2 --eps 1 --limit 30 --effort 0.3 --json",
    "digits-verify": "verify bundle/linf-0.1 --seed 5 --sample 8 --json",
    "digits-audit": "audit --run digits --eps 0.1 --limit 20 --draws 2000 --queries 100 --html audit.html --json",
    "digits-compare": "compare --run digits --limit 8 --json",
    "digits-depth": "compare --run digits --depth --limit 50 --json",
    "orders": "compare --problem all --solver euler --solver srk --json",
    "milstein-train": "train --run milstein --set sde.schedule=multiplicative --set sde.solver=milstein "
    "--set sde.steps=2 --members 2 --epochs 1 --limit 300 --json",
    "milstein-attack": "attack --run milstein --norm linf --eps 8/255 --limit 30 --steps 5 --eot 4 --json",
}
RESNET20 = {
    "resnet20-train": "train --run resnet20 --config cifar10-resnet20 --weights {weights} --data {images} "
    "--members 2 --epochs 1 --limit 400 --json",
    "resnet20-evaluate": "evaluate --run resnet20 --limit 100 --untrained --json",
    "resnet20-attack": "attack --run resnet20 --norm linf --eps 2/255 --limit 30 --steps 10 --eot 4 --json",
    "resnet20-suite": "attack --run resnet20 --suite standard --norm linf --eps 2/255 --limit 30 --effort 0.2 --json",
    "resnet20-compare": "compare --run resnet20 --limit 4 --steps 1 --steps 2 --json",
}
# Words that were renamed in what the verbs print: inferences without a gradient are "queries" everywhere now.
RENAMED = {"forwards": "queries"}
# What a clock, a memory or a folder says, not the program; and the environment, which names the versions.
UNLIKE = {"seconds", "cost", "memory", "unit", "command", "created", "date", "environment", "run", "folder", "path"}
# Lists that records of suites hold since they can be paired; an earlier version has nothing to compare them with.
ADDED = {"index", "truth", "labels"}
FRESH = (".checks.0.figure", ".checks.1.figure")


def record(program: str, folder: Path) -> None:
    """Run every line in ``folder``, and keep what it prints and what the runs hold."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = dict(DIGITS)
    if WEIGHTS.is_file() and IMAGES.is_file():
        images = folder / "images"
        if not images.is_dir():
            with tarfile.open(IMAGES) as tar:
                tar.extractall(images, filter="data")
        lines |= {k: v.format(weights=WEIGHTS, images=images.resolve()) for k, v in RESNET20.items()}
    for name, words in lines.items():
        target = folder / f"{name}.json"
        if target.is_file():
            continue
        print(name, flush=True)
        done = subprocess.run([program, *words.split()], cwd=folder, capture_output=True, text=True, env=os.environ)
        if not done.stdout.startswith("{"):
            sys.exit(f"{words}: {done.stderr}")
        found = json.loads(done.stdout)
        if "train" in name:
            run = folder / "runs" / name.split("-")[0]
            found = {
                "printed": found,
                "metrics": [json.loads(s) for s in (run / "metrics.jsonl").read_text().splitlines()],
            }
            weights = sorted((run / "members").glob("*.safetensors"))
            found["members"] = {w.name: hashlib.sha256(w.read_bytes()).hexdigest() for w in weights}
        target.write_text(json.dumps(found, indent=1))


def figures(value: Any, name: str = "") -> dict[str, Any]:
    """All figures of a JSON value by their dotted names."""
    if isinstance(value, dict):
        items = [(RENAMED.get(k, k), v) for k, v in value.items() if k not in UNLIKE]
    elif isinstance(value, list):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {name: value}
    return {k: v for key, inner in items for k, v in figures(inner, f"{name}.{key}").items()}


def compare(before: Path, after: Path) -> int:
    """Print what differs, and a line for each file; gives the number of differences."""
    total = 0
    for file in sorted(before.glob("*.json")):
        if not (after / file.name).is_file():
            print(f"{file.stem:20} NOT RECORDED after")
            total += 1
            continue
        old, new = (figures(json.loads((side / file.name).read_text())) for side in (before, after))
        if "audit" in file.name:  # its first two checks look at fresh noise, which nobody can repeat
            old, new = ({k: v for k, v in side.items() if k not in FRESH} for side in (old, new))
        added = [key for key in new if key not in old and not ADDED & set(key.split("."))]
        odd = [key for key in [*old, *added] if old.get(key, "-") != new.get(key, "-")]
        for key in odd:
            print(f"  {key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}")
        print(f"{file.stem:20} {len(old):5} figures, {len(odd)} differ")
        total += len(odd)
    return total


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("record", "compare"):
        sys.exit(__doc__)
    if sys.argv[1] == "record":
        record(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(1 if compare(Path(sys.argv[2]), Path(sys.argv[3])) else 0)
