"""A made-up ``results.json`` with every kind of item, block, row, figure and record, for the tests of the pages."""

import math
from pathlib import Path
from typing import Any

from neuralsde_ito.outcomes import Rate

WEAK = {
    "one-path": ("one path a gradient", "The paper names no expectation over noise."),
    "one-member": ("gradient of one member", "The paper does not say through what the gradient goes."),
    "transfer-stops": ("transfer from the original ResNet that stops at its border", "Attack libraries stop there."),
    "no-start": ("no random start", "The Madry toolbox starts at the image."),
    "eps-over-std": ("eps after normalisation: pixel eps divided by std", "The paper names no unit of eps."),
    "eps-times-std": ("eps after normalisation, the wrong way round", "The paper names no unit of eps."),
    "noise-off": ("gradient without noise", "A switch of evaluation mode would do this."),
}
TABLE3 = [
    ("0.2", 0.2, "PGD", 0.9134, 0.9483),
    ("0.2", 0.2, "FGSM", 0.9141, 0.9493),
    ("2.0", 0.2, "PGD", 0.7391, 0.7980),
    ("2.0", 0.4, "PGD", 0.7907, 0.8843),
]
TABLE2 = [
    ("ResNet-18", 0.9151, 0.9428, 0.9333),
    ("ResNet-34", 0.9133, 0.9420, 0.9292),
    ("ResNet-50", 0.9159, 0.9529, 0.9386),
]
OPEN = {
    "status": "done",
    "needs": None,
    "states": "PGD and FGSM with eps in L2.",
    "open": "Steps, step size and expectation.",
    "chosen": "20 steps of 2.5 eps/20, as in the toolbox that the paper quotes.",
    "blocks": [],
    "figures": [],
    "quotes": [],
    "conclusions": [],
}


def rate(count: int, n: int = 200) -> list[float]:
    """``[value, low, high]``."""
    measured = Rate.of(count, n)
    return [measured.value, measured.low, measured.high]


def example() -> dict[str, Any]:
    """The results; every call makes new dicts, so that a test may change them."""
    records: dict[str, Any] = {}
    items = {
        "table1": OPEN
        | {
            "title": "Table 1: beside other defences",
            "command": "ito-sde reproduce table1 --scale smoke",
            "quotes": [
                {"label": "Madry toolbox, L2 eps 2.0", "value": 0.1859},
                {"label": "Engstrom 2020, L-inf 8/255", "value": 0.5349},
            ],
        },
        "table2": OPEN
        | {
            "title": "Table 2: CIFAR-10, no attack",
            "command": "ito-sde reproduce table2 --scale smoke",
            "blocks": [_clean_block(records, *numbers) for numbers in TABLE2],
            "conclusions": ["The noise costs 2.0 points of clean accuracy here; 2.3 in the paper."],
        },
        "table3": OPEN
        | {
            "title": "Table 3: CIFAR-10, L2, PGD and FGSM",
            "command": "ito-sde reproduce table3 --scale smoke",
            "blocks": [_attacked_block(records, number, *numbers) for number, numbers in enumerate(TABLE3)],
            "conclusions": ["A weak protocol comes near the paper's number in 3 of 4 situations."],
        },
        "table5": OPEN
        | {
            "title": "Table 5: ImageNet, no attack",
            "status": "needs",
            "needs": "This item needs ImageNet: ito-sde reproduce table5 --scale paper --data FOLDER",
            "command": "ito-sde reproduce table5 --scale smoke",
        },
        "figure1": OPEN
        | {
            "title": "Figure 1: benign images without a majority",
            "command": "ito-sde reproduce figure1 --scale smoke",
            "figures": [_gallery(records)],
        },
        "figure2": OPEN
        | {
            "title": "Figure 2: accuracy against eps, L2",
            "command": "ito-sde reproduce figure2 --scale smoke",
            "blocks": [_attacked_block(records, 9, "0.5", 0.2, "PGD", None, None)],
            "figures": [_curves(records, "figure2", "Accuracy against eps, L2")],
        },
        "figure4": OPEN
        | {
            "title": "Figure 4: members, inferences and omega",
            "command": "ito-sde reproduce figure4 --scale smoke",
            "figures": [_heatmap(records), _curves(records, "figure4-right", "Accuracy against omega")],
            "conclusions": ["From 3 x 3 to 20 x 20 the rate rises by 1.5 points (paper: 5.1)."],
        },
        "density": OPEN
        | {
            "title": "Density: how far an attack moves the law of the output",
            "command": "ito-sde reproduce density --scale smoke",
            "figures": [_curves(records, "density", "Energy distance against eps", kind="density")],
            "conclusions": ["At eps 2.0 the distance is 40 times its null."],
        },
    }
    return {
        "format": 1,
        "version": "0.1.0",
        "scale": "smoke",
        "command": "ito-sde reproduce all",
        "device": "cpu",
        "seed": 0,
        "date": "2026-11-24T15:00:00+00:00",
        "hours": 0.21,
        "environment": {
            "date": "2026-11-24T15:00:00+00:00",
            "python": "3.11.2",
            "cuda": None,
            "packages": {"ito-sde": "0.1.0", "torch": "2.9.0"},
        },
        "stand_in": "scikit-learn's digits and a ResNet-20 stand in for CIFAR-10, ImageNet and ResNet-50: the numbers "
        "below are not those of the paper's networks.",
        "settings": {"members": 5, "inferences": 20, "images": 200},
        "items": items,
        "records": records,
    }


def write_pictures(results: dict[str, Any], folder: Path) -> None:
    """A small picture for every figure."""
    for item in results["items"].values():
        for figure in item["figures"]:
            path = folder / figure["files"]["svg"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 240"><rect width="600" height="240" '
                f'fill="#ddd"/><text x="20" y="130" font-size="28">{figure["name"]}</text></svg>'
            )


def _record(records: dict[str, Any], kind: str, title: str, **inputs: Any) -> str:
    """Add a record; gives its name."""
    name = f"{kind}-{len(records):012x}"
    records[name] = {
        "kind": kind,
        "title": title,
        "command": "ito-sde reproduce table3 --scale smoke",
        "seed": 0,
        "inputs": inputs,
        "seconds": 12.34,
        "date": "2026-11-24T14:30:00+00:00",
        "file": f"cache/{name}.safetensors",
    }
    return name


def _row(protocol: str, group: str, correct: int, both: int | None, p: float | None, records: list[str]) -> dict:
    """One row of a block, of 200 images."""
    title, why = WEAK.get(protocol, (f"{protocol}: {group}", "Chosen here."))
    return {
        "protocol": protocol,
        "group": group,
        "title": title,
        "why": why,
        "n": 200,
        "correct": rate(correct),
        "correct_abstained": None if both is None else rate(both),
        "p": p,
        "records": records,
    }


def _clean_block(records: dict, network: str, correct: float, both: float, resnet: float) -> dict[str, Any]:
    """A situation without attack."""
    votes = _record(records, "vote", f"Votes of {network} on clean images", network=network)
    alone = _record(records, "resnet", f"{network}, trained", network=network, epochs=40)
    return {
        "title": f"{network}, omega 0.2",
        "norm": None,
        "eps": None,
        "omega": 0.2,
        "attack": None,
        "network": network,
        "paper": {"correct": correct, "correct_abstained": both, "resnet": resnet},
        "rows": [
            _row("hierarchical", "clean", 191, 195, 0.0625, [votes]),
            _row("resnet", "resnet", 195, None, None, [alone]),
        ],
        "nearest": None,
    }


def _attacked_block(
    records: dict, number: int, eps: str, omega: float, attack: str, correct: float | None, both: float | None
) -> dict[str, Any]:
    """A situation under attack: seven weak protocols, the default attack, the suite and the ResNet."""
    title = f"L2, eps {eps}, omega {omega}, {attack}"
    rows = []
    for position, protocol in enumerate(WEAK):
        made = _record(records, "attack", f"{title}: {protocol}", eps=eps, protocol=protocol, paths={"seed": 0})
        votes = _record(records, "vote", f"Votes on {title}: {protocol}", of=made, members=[0, 1, 2, 3, 4])
        left = 120 - 11 * position - 3 * number
        rows.append(_row(protocol, "weak", left, left + 14, [0.0004, 0.021, 1.0][position % 3], [made, votes]))
    rows[2]["correct"], rows[2]["correct_abstained"] = rate(150 - number), rate(163 - number)
    for protocol, left, p in (("default", 31, 0.04), ("suite", 19 - number, 0.35)):
        made = _record(records, protocol.replace("default", "sweep"), f"{title}: {protocol}", eps=eps)
        rows.append(_row(protocol, protocol, left, left + 5, p, [made]))
    alone = _record(records, "suite", f"{title}: original ResNet", eps=eps)
    rows.append(_row("resnet-suite", "resnet", 16, None, None, [alone]))
    nearest, paper = None, {}
    if correct is not None:
        value = rows[2]["correct"][0]
        near = rows[2]["correct"][1] <= correct <= rows[2]["correct"][2]
        side = "above" if value > correct else "below"
        nearest = {
            "protocol": "transfer-stops",
            "title": WEAK["transfer-stops"][0],
            "counted": "correct + abstained" if attack == "FGSM" else "correct",
            "value": value,
            "difference": value - correct,
            "near": near,
            "sentence": f"{WEAK['transfer-stops'][0]}: {100 * value:.1f} %, {100 * abs(value - correct):.1f} points "
            f"{side} the paper",
        }
        paper = {"correct": correct, "correct_abstained": both}
    return {
        "title": title,
        "norm": "l2",
        "eps": eps,
        "omega": omega,
        "attack": attack,
        "network": "ResNet-50",
        "paper": paper,
        "rows": rows,
        "nearest": nearest,
    }


def _figure(name: str, title: str, kind: str, records: list[str], **content: Any) -> dict[str, Any]:
    """A figure with its files."""
    files = {end: f"figures/{name}.{end}" for end in ("svg", "png")}
    caption = f"{title}; bands are 95 % Wilson intervals."
    return {
        "name": name,
        "title": title,
        "caption": caption,
        "files": files,
        "kind": kind,
        "records": records,
    } | content


def _curves(records: dict, name: str, title: str, kind: str = "curves") -> dict[str, Any]:
    """One panel with a line of each style."""
    x = [0.2, 0.5, 1.0, 2.0]
    styles = ("weak", "strong", "resnet", "paper", "quoted", "clean")
    lines = []
    for position, style in enumerate(styles):
        y = [math.exp(-eps * (1 + position) / 4) for eps in x]
        banded = style not in ("paper", "quoted")
        low, high = ([v * 0.9 for v in y], [min(1.0, v * 1.1) for v in y]) if banded else (None, None)
        lines.append({"label": f"Itô, {style}", "style": style, "x": x, "y": y, "low": low, "high": high})
    panel = {"title": "L2, omega 0.2", "x_label": "eps (L2, pixel units)", "y_label": "correct (%)", "x_ticks": None}
    used = [_record(records, "density" if kind == "density" else "sweep", title)]
    return _figure(name, title, kind, used, panels=[panel | {"lines": lines}])


def _heatmap(records: dict) -> dict[str, Any]:
    """Members x inferences."""
    sizes = list(range(3, 21))
    values = [[0.9 + 0.001 * m + 0.0005 * s for s in sizes] for m in sizes]
    panel = {"title": "omega 0.2", "members": sizes, "inferences": sizes, "values": values}
    used = [_record(records, "vote", "20 members x 20 inferences on clean images", members=list(range(20)))]
    label = {"label": "correct + abstained (%)"}
    return _figure("figure4", "Members and inferences", "heatmap", used, panels=[panel | label])


def _gallery(records: dict) -> dict[str, Any]:
    """Two images on which the ensemble abstains."""
    images = [
        {"index": 17, "truth": "3", "answers": [["3", 0.45], ["8", 0.55]], "members": [["3", 2], ["none", 3]]},
        {"index": 41, "truth": "9", "answers": [["9", 0.5], ["4", 0.5]], "members": [["9", 2], ["4", 2], ["none", 1]]},
    ]
    used = [_record(records, "vote", "Votes on clean images")]
    return _figure("figure1", "Images without a majority", "gallery", used, images=images)
