"""The items: from a declaration to the pieces of work that it needs, and from their results to its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from ..outcomes import ABSTAIN, Outcomes, Rate
from ..validation import ItoError, parse_eps
from .declared import ITEMS, Cell, DataName, Item, Norm, Point, load_item
from .density import density_figure
from .laboratory import Laboratory, System
from .makers import Maker
from .pieces import Block, Piece, joined
from .protocols import ABSTENTIONS, CURVES, DEFAULT, PROTOCOLS, SUITE, Protocol
from .rows import Judged, Situation, triple
from .voters import heat_maps

CLEAN = Protocol("clean", "no attack", "the ensemble on clean images")
UNTRAINED = Protocol("untrained", "recast, not fine-tuned", "what the noise does to the ResNet before fine-tuning")
RESNET = Protocol("resnet", "original ResNet", "the network from which the members began")
RESNET_SUITE = Protocol("resnet-suite", "original ResNet, its own suite", "the strongest attack on the ResNet itself")


NORMS: dict[Norm, str] = {"linf": "L-inf", "l2": "L2"}  # as people write them


class Reproduction:
    """One item at one scale.

    Attributes:
        lab: where the work is done.
        item: its declaration.
    """

    def __init__(self, lab: Laboratory, item: Item) -> None:
        self.lab, self.item = lab, item

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of work that the item needs; what they need themselves is not in the list."""
        raise NotImplementedError

    def results(self) -> dict[str, Any]:
        """Its numbers, when all pieces are done, ready for JSON: ``blocks``, ``figures`` and ``conclusions``."""
        raise NotImplementedError

    # --- what kinds share ------------------------------------------------------------------------------------

    def attacked_blocks(self, data: DataName) -> list[Block]:
        """The blocks of images under attack."""
        return self.lab.blocks(data, self.lab.scale.attacked)

    def index(self, blocks: Sequence[Block]) -> Tensor:
        """The images' names in blocks, ``(N,)``."""
        names = self.lab.dataset(blocks[0].data).test.first(blocks[0].count).names
        assert names is not None
        return names

    def level(self, norm: Norm, eps: str) -> int:
        """Which of the scale's radii this is.

        Raises:
            ItoError: none of them.
        """
        radii = [parse_eps(text) for text in self.lab.scale.radii[norm]]
        if parse_eps(eps) not in radii:
            raise ItoError(f"The scale's radii for {norm} do not hold {eps}, which an item needs: add it to the scale.")
        return radii.index(parse_eps(eps))

    def weak(self, maker: Maker, protocol: Protocol, kind: str, norm: Norm, eps: str, blocks: list[Block]) -> Judged:
        """A weak protocol's row: its images, and the ensemble's vote on them."""
        attacks = [maker.attack(protocol, kind, norm, eps, block) for block in blocks]
        votes = (maker.vote(block, attack) for block, attack in zip(blocks, attacks, strict=True))
        return Judged(protocol, "weak", tuple(votes))

    def suite(self, maker: Maker, norm: Norm, eps: str, blocks: list[Block], resnet: bool = False) -> Judged:
        """The suite's row, of the ensemble or of the original ResNet."""
        level = self.level(norm, eps)
        pieces = tuple(maker.suite(norm, block, resnet) for block in blocks)
        protocol, group = (RESNET_SUITE, "resnet") if resnet else (SUITE, "suite")
        return Judged(protocol, group, pieces, f"denial-{level}", f"evasion-{level}")

    def line(self, label: str, style: str, x: Iterable[float], rows: Sequence[Judged], index: Tensor) -> dict[str, Any]:
        """A curve of accuracies with its band."""
        rates = [row.right(self.lab, index)[1].rate("correct") for row in rows]
        return curve(label, style, list(x), rates)


def curve(label: str, style: str, x: list[float], rates: Sequence[Rate]) -> dict[str, Any]:
    """A line of a figure, ready for JSON."""
    y, low, high = ([getattr(rate, end) for rate in rates] for end in ("value", "low", "high"))
    return {"label": label, "style": style, "x": x, "y": y, "low": low, "high": high}


class Benign(Reproduction):
    """Tables without attack: the ResNet, the recast ResNet before fine-tuning, the ensemble."""

    @cached_property
    def situations(self) -> list[Situation]:
        """A block for each cell."""
        return [self._situation(cell) for cell in self.item.cells]

    def _situation(self, cell: Cell) -> Situation:
        system = self.lab.system(cell.data, cell.network, cell.omega)
        maker, blocks = Maker(self.lab, system), self.lab.blocks(cell.data, self.lab.scale.benign)
        votes = tuple(maker.vote(block) for block in blocks)
        rows = (
            Judged(CLEAN, "clean", votes),
            Judged(UNTRAINED, "clean", tuple(maker.untrained(block) for block in blocks)),
        )
        resnet = Judged(RESNET, "resnet", votes, "resnet", "resnet")
        title = f"{cell.network}, omega {cell.omega:g}"
        return Situation(title, cell, rows, resnet, self.index(blocks))

    @property
    def pieces(self) -> list[Piece]:
        """See `Reproduction`."""
        return [piece for situation in self.situations for piece in situation.pieces]

    def results(self) -> dict[str, Any]:
        """See `Reproduction`."""
        return {"blocks": [situation.results(self.lab) for situation in self.situations]}


class Attacked(Reproduction):
    """Tables under attack: every weak protocol, the default attack, the suite, and the ResNet under its suite."""

    @cached_property
    def situations(self) -> list[Situation]:
        """A block for each cell that the scale has data for."""
        return [self._situation(cell) for cell in self.item.cells if cell.data in self.lab.scale.data]

    def _situation(self, cell: Cell) -> Situation:
        assert cell.norm is not None
        assert cell.eps is not None
        norm, eps, kind = cell.norm, cell.eps, cell.attack
        system = self.lab.system(cell.data, cell.network, cell.omega)
        maker, blocks = Maker(self.lab, system), self.attacked_blocks(cell.data)
        protocols = [protocol for protocol in PROTOCOLS.values() if kind == "pgd" or protocol.one_step]
        rows = [self.weak(maker, protocol, kind, norm, eps, blocks) for protocol in protocols]
        # The strong rows of an FGSM table are those of PGD: the ball is the same.
        radii = self.swept(cell, norm)
        sweeps, level = tuple(maker.sweep(norm, radii, block) for block in blocks), radii.index(eps)
        denial, evasion = f"denial-{level}", f"evasion-{level}"
        rows.append(Judged(ABSTENTIONS, "weak", sweeps, denial, denial, abstentions_right=True))
        rows.append(Judged(DEFAULT, "default", sweeps, denial, evasion))
        rows.append(self.suite(maker, norm, eps, blocks))
        place = "ImageNet, " if cell.data == "imagenet" else ""
        title = f"{place}{cell.network}, {NORMS[norm]}, eps {eps}, omega {cell.omega:g}, {kind.upper()}"
        return Situation(title, cell, tuple(rows), self.suite(maker, norm, eps, blocks, True), self.index(blocks))

    def swept(self, cell: Cell, norm: Norm) -> tuple[str, ...]:
        """The radii of the default attack on the cell's system: those of all tables, so that tables share it."""
        scale = self.lab.scale
        stand_in = scale.data[cell.data].presets[cell.network]
        found = {
            other.eps
            for name in ITEMS
            for other in load_item(name).cells
            if other.norm == norm
            and other.eps is not None
            and other.omega == cell.omega
            and other.data in scale.data
            and scale.data[other.data].presets[other.network] == stand_in
        }
        return tuple(sorted(found, key=parse_eps))

    @property
    def pieces(self) -> list[Piece]:
        """See `Reproduction`."""
        return [piece for situation in self.situations for piece in situation.pieces]

    def results(self) -> dict[str, Any]:
        """See `Reproduction`."""
        blocks = [situation.results(self.lab) for situation in self.situations]
        return {"blocks": blocks, "conclusions": _conclusions(blocks)}


def _conclusions(blocks: Sequence[dict[str, Any]]) -> list[str]:
    """What the blocks say: which protocols come near, and which leave 80 % at 8/255."""
    said = []
    near = [block for block in blocks if block["nearest"] and block["nearest"]["near"]]
    if near:
        said.append(
            f"In {len(near)} of {len(blocks)} situations the interval of some protocol holds the paper's number; that "
            "is no evidence that the paper used it."
        )
    else:
        said.append(f"In none of {len(blocks)} situations does the interval of any protocol hold the paper's number.")
    for block in blocks:
        strong = next(row["correct"][0] for row in block["rows"] if row["group"] == "suite")
        in_ball = [row for row in block["rows"] if row["group"] != "resnet" and row["protocol"] != "eps-divided"]
        least = min(in_ball, key=lambda row: row["correct"][0])
        if least["correct"][0] < strong:
            said.append(
                f"{block['title']}: the suite is not the strongest attack here. It leaves {100 * strong:.1f} %, and "
                f"'{least['title']}' {100 * least['correct'][0]:.1f} %."
            )
        if (block["norm"], block["eps"], block["attack"]) == ("linf", "8/255", "PGD"):
            high = [row["title"] for row in block["rows"] if row["group"] == "weak" and row["correct"][0] >= 0.8]
            suite = next(row for row in block["rows"] if row["group"] == "suite")
            what = f"80 % or more are left by: {'; '.join(high)}" if high else "no weak protocol leaves 80 %"
            said.append(f"{block['title']}: {what}. The suite leaves {100 * suite['correct'][0]:.1f} %.")
    return said


class Curves(Reproduction):
    """Figures of accuracy against eps: a panel for each norm and omega."""

    @cached_property
    def panels(self) -> list[tuple[Norm, float, dict[str, list[Judged]], Judged]]:
        """For each panel norm, omega, the rows of each line at all radii, and the row of clean images."""
        item, panels = self.item, []
        for norm in item.norms:
            for omega in item.omegas:
                maker = Maker(self.lab, self.lab.system(item.data, item.network, omega))
                blocks, radii = self.attacked_blocks(item.data), self.lab.scale.radii[norm]
                rows = {
                    name: [self.weak(maker, PROTOCOLS[name], "pgd", norm, eps, blocks) for eps in radii]
                    for name in CURVES
                }
                rows["suite"] = [self.suite(maker, norm, eps, blocks) for eps in radii]
                rows["resnet"] = [self.suite(maker, norm, eps, blocks, True) for eps in radii]
                panels.append((norm, omega, rows, Judged(CLEAN, "clean", tuple(map(maker.vote, blocks)))))
        return panels

    @property
    def pieces(self) -> list[Piece]:
        """See `Reproduction`."""
        rows = [
            row for *_, lines, clean in self.panels for row in (clean, *(r for line in lines.values() for r in line))
        ]
        return [piece for row in rows for piece in row.pieces]

    def results(self) -> dict[str, Any]:
        """See `Reproduction`."""
        index = self.index(self.attacked_blocks(self.item.data))
        panels = [self._panel(*panel, index) for panel in self.panels]
        caption = (
            f"Accuracy on {len(index)} test images, with 95 % Wilson intervals: two weak protocols, the suite, the "
            "original ResNet under its own suite, and the paper's numbers (diamonds); crosses are numbers that the "
            "paper quotes."
        )
        return {"figures": [{"kind": "curves", "title": self.item.title, "caption": caption, "panels": panels}]}

    def _panel(
        self, norm: Norm, omega: float, rows: dict[str, list[Judged]], clean: Judged, index: Tensor
    ) -> dict[str, Any]:
        radii = self.lab.scale.radii[norm]
        x = [0.0, *(parse_eps(eps) for eps in radii)]
        resnet = Judged(RESNET, "resnet", clean.pieces, "resnet", "resnet")
        lines = [self.line(f"Itô, {PROTOCOLS[name].title}", "weak", x, [clean, *rows[name]], index) for name in CURVES]
        lines.append(self.line("Itô, suite", "strong", x, [clean, *rows["suite"]], index))
        lines.append(self.line("original ResNet, suite", "resnet", x, [resnet, *rows["resnet"]], index))
        lines += _points("the paper", "paper", [p for p in self.item.points if (p.norm, p.omega) == (norm, omega)])
        lines += _points("Madry toolbox, quoted", "quoted", [p for p in self.item.quoted if p.norm == norm])
        return {
            "title": f"{NORMS[norm]}, omega {omega:g}",
            "x_label": f"eps ({NORMS[norm]}, pixel units)",
            "y_label": "correct (%)",
            "x_ticks": ["0", *radii],
            "lines": lines,
        }


def _points(label: str, style: str, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Points of the paper as a line; none if there are no points."""
    if not points:
        return []
    x, y = [parse_eps(point.eps) for point in points], [point.correct / 100 for point in points]
    return [{"label": label, "style": style, "x": x, "y": y, "low": None, "high": None}]


class Gallery(Reproduction):
    """Benign images on which the ensemble abstains."""

    @cached_property
    def _work(self) -> tuple[System, list[Block], list[Piece], Piece]:
        system = self.lab.system(self.item.data, self.item.network, 0.2)
        maker, blocks = Maker(self.lab, system), self.lab.blocks(self.item.data, self.lab.scale.benign)
        votes = [maker.vote(block) for block in blocks]
        return system, blocks, votes, maker.gallery(votes, blocks)

    @property
    def pieces(self) -> list[Piece]:
        """See `Reproduction`."""
        return [self._work[-1]]

    def results(self) -> dict[str, Any]:
        """See `Reproduction`."""
        _, blocks, votes, gallery = self._work
        parts, index = [self.lab.read(vote) for vote in votes], self.index(blocks)
        outcomes = Outcomes.of(joined(parts, index, "labels"), joined(parts, index, "truth"))
        shown, classes = self.lab.read(gallery), self.lab.dataset(self.item.data).classes
        images = []
        for position, name in enumerate(shown["index"].tolist()):
            votes_of = shown["votes"][:, position]  # (members, classes)
            shares = votes_of.sum(0) / votes_of.sum().clamp_min(1)
            top = shares.topk(min(3, len(classes)))
            labels = shown["members"][:, position].tolist()
            said = [("none" if label == ABSTAIN else classes[label]) for label in labels]
            images.append(
                {
                    "index": name,
                    "truth": classes[int(shown["truth"][position])],
                    "abstains": bool(shown["labels"][position] == ABSTAIN),
                    "answers": [[classes[c], s] for s, c in zip(*(t.tolist() for t in top), strict=True)],
                    "members": [[word, said.count(word)] for word in sorted(set(said))],
                }
            )
        rate = outcomes.rate("abstained")
        abstains = sum(image["abstains"] for image in images)
        caption = (
            f"The ensemble abstains on {outcomes.abstained} of {outcomes.n} clean test images "
            f"({100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]). Shown: {abstains} of these, "
            "then the least certain ones, each with the shares of all inferences and what the members say."
        )
        figure = {"kind": "gallery", "title": self.item.title, "caption": caption, "images": images}
        return {"figures": [{**figure, "abstained": triple(rate)}]}


class VotesAndOmega(Reproduction):
    """Figure 4: members against inferences from one set of votes; accuracy against omega."""

    @cached_property
    def _maps(self) -> tuple[list[Piece], list[Piece]]:
        """The pieces of the left part: votes on clean and on attacked images."""
        item, blocks = self.item, self.attacked_blocks(self.item.data)
        maker = Maker(self.lab, self.lab.system(item.data, item.network, 0.2))
        attacks = [maker.attack(PROTOCOLS["one-path"], "pgd", "linf", item.attacked, block) for block in blocks]
        attacked = [maker.paths(block, attack) for block, attack in zip(blocks, attacks, strict=True)]
        return [maker.paths(block) for block in blocks], attacked

    @cached_property
    def _lines(self) -> dict[str, dict[str, list[Judged]]]:
        """The right part: for each eps the rows of each line at all omegas."""
        item, blocks = self.item, self.attacked_blocks(self.item.data)
        makers = [Maker(self.lab, self.lab.system(item.data, item.network, omega)) for omega in self.lab.scale.omegas]
        panels = {}
        for eps in self._eps:
            rows = {
                name: [self.weak(maker, PROTOCOLS[name], "pgd", "linf", eps, blocks) for maker in makers]
                for name in CURVES
            }
            rows["suite"] = [self.suite(maker, "linf", eps, blocks) for maker in makers]
            rows["clean"] = [Judged(CLEAN, "clean", tuple(map(maker.vote, blocks))) for maker in makers]
            panels[eps] = rows
        return panels

    @property
    def _eps(self) -> list[str]:
        """The paper's eps, and smaller ones of the scale, where a small network has anything left."""
        smallest = min(map(parse_eps, self.item.eps))
        below = [eps for eps in self.lab.scale.radii["linf"] if parse_eps(eps) < smallest][:1]
        return [*below, *self.item.eps]

    @property
    def pieces(self) -> list[Piece]:
        """See `Reproduction`."""
        rows = [row for lines in self._lines.values() for line in lines.values() for row in line]
        return [*self._maps[0], *self._maps[1], *(piece for row in rows for piece in row.pieces)]

    def results(self) -> dict[str, Any]:
        """See `Reproduction`."""
        index = self.index(self.attacked_blocks(self.item.data))
        clean, attacked = ([self.lab.read(piece) for piece in pieces] for pieces in self._maps)
        system = self.lab.system(self.item.data, self.item.network, 0.2)
        maps, conclusions = heat_maps(
            {"clean images": clean, f"one path a gradient, L-inf {self.item.attacked}": attacked},
            index,
            system.config.ensemble.rule,
        )
        left = {
            "kind": "heatmap",
            "title": "Figure 4, left: members against inferences",
            "caption": f"Correct + abstention on {len(index)} test images; all sizes are from one set of votes, "
            "each the mean over random choices of members and inferences. The paper: 5.1 points more at 20 x 20 "
            "than at 3 x 3.",
            "panels": maps,
        }
        omegas = list(self.lab.scale.omegas)
        panels = []
        for eps, rows in self._lines.items():
            lines = [self.line(f"Itô, {PROTOCOLS[n].title}", "weak", omegas, rows[n], index) for n in CURVES]
            lines.append(self.line("Itô, suite", "strong", omegas, rows["suite"], index))
            lines.append(self.line("Itô, no attack", "clean", omegas, rows["clean"], index))
            axes = {"x_label": "omega", "y_label": "correct (%)", "x_ticks": [f"{omega:g}" for omega in omegas]}
            panels.append({"title": f"L-inf, eps {eps}", **axes, "lines": lines})
        right = {
            "kind": "curves",
            "title": "Figure 4, right: accuracy against omega",
            "caption": f"Accuracy on {len(index)} test images, with 95 % Wilson intervals, under two weak protocols, "
            "the suite and no attack. The paper: it rises, then falls.",
            "panels": panels,
        }
        return {"figures": [left, right], "conclusions": [*conclusions, *self._peaks(panels)]}

    def _peaks(self, panels: Sequence[dict[str, Any]]) -> list[str]:
        """At which omega each curve of the right part is highest."""
        said = []
        for panel in panels:
            tops = []
            for line in panel["lines"][:3]:
                top = max(range(len(line["y"])), key=lambda i: line["y"][i])
                tops.append(f"{100 * line['y'][top]:.1f} % at omega {line['x'][top]:g} ({line['label']})")
            said.append(f"{panel['title']}: the highest accuracies are {'; '.join(tops)}.")
        return said


class Density(Reproduction):
    """How far an attack moves the law of the output, against omega and eps."""

    @cached_property
    def _work(self) -> tuple[list[list[Piece]], dict[str, list[list[Piece]]]]:
        """The votes on clean images at each omega; and for each eps and omega the measured shifts."""
        item, scale = self.item, self.lab.scale
        blocks = self.lab.blocks(item.data, scale.density.images)
        makers = [Maker(self.lab, self.lab.system(item.data, item.network, omega)) for omega in scale.omegas]
        clean = [[maker.vote(block) for block in self.attacked_blocks(item.data)] for maker in makers]
        shifts = {}
        for eps in scale.density.eps:
            shifts[eps] = [
                [
                    maker.density(block, maker.attack(PROTOCOLS["one-path"], "pgd", "linf", eps, block))
                    for block in blocks
                ]
                for maker in makers
            ]
        return clean, shifts

    @property
    def pieces(self) -> list[Piece]:
        """See `Reproduction`."""
        clean, shifts = self._work
        flat = [piece for omegas in shifts.values() for pieces in omegas for piece in pieces]
        return [*flat, *(piece for pieces in clean for piece in pieces)]

    def results(self) -> dict[str, Any]:
        """See `Reproduction`."""
        item, scale = self.item, self.lab.scale
        clean, shifts = self._work
        index = self.index(self.attacked_blocks(item.data))
        rates, resnet = [], None
        for pieces in clean:
            parts = [self.lab.read(piece) for piece in pieces]
            truth = joined(parts, index, "truth")
            rates.append(Outcomes.of(joined(parts, index, "labels"), truth).rate("correct"))
            resnet = Outcomes.of(joined(parts, index, "resnet"), truth).rate("correct")
        assert resnet is not None
        names = self.index(self.lab.blocks(item.data, scale.density.images))
        measured = {
            eps: [_columns([self.lab.read(piece) for piece in pieces], names) for pieces in omegas]
            for eps, omegas in shifts.items()
        }
        return density_figure(list(scale.omegas), measured, rates, resnet)


def _columns(parts: Sequence[dict[str, Tensor]], index: Tensor) -> dict[str, Tensor]:
    return {name: joined(parts, index, name) for name in parts[0] if name not in ("index", "truth")}


KINDS: dict[str, type[Reproduction]] = {
    "benign": Benign,
    "attacked": Attacked,
    "gallery": Gallery,
    "curves": Curves,
    "votes-and-omega": VotesAndOmega,
    "density": Density,
}
