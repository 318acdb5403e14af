"""The paper's numbers beside measured ones: a page in HTML, a page in Markdown, and tables on the terminal.

All are made from the dict that ``results.json`` holds, which `neuralsde_ito.reproduction` makes. Its rates are
fractions; here they become per cent with one decimal.
"""

from __future__ import annotations

import base64
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jinja2
import yaml
from markupsafe import Markup, escape
from tabulate import tabulate

from neuralsde_ito.outcomes import Rate

from . import output

NONE = "–"  # in a cell without a number
KINDS = {  # what a record is, in the order of the page's last section
    "resnet": "Original ResNets",
    "member": "Members",
    "vote": "Votes",
    "untrained": "Votes before fine-tuning",
    "attack": "Attacks",
    "sweep": "Sweeps over eps",
    "suite": "Suites of attacks",
    "density": "Laws of the output",
    "paths": "Votes of single inferences",
    "gallery": "Galleries",
}
GROUPS = {  # what kind of protocol a row has
    "clean": "no attack",
    "weak": "weak protocol",
    "default": "default attack",
    "suite": "strongest attack",
    "resnet": "original ResNet",
}


@dataclass(frozen=True)
class Situation:
    """A block of an item, with what a summary says about it.

    Attributes:
        item: the item's name and its short title: ``"table3"``, ``"Table 3"``.
        anchor: the block's id on the page.
        block: the block.
    """

    item: tuple[str, str]
    anchor: str
    block: dict[str, Any]

    @property
    def attacked(self) -> bool:
        """Whether there is an attack."""
        return self.block["attack"] is not None

    @property
    def counted(self) -> str:
        """What the paper's number counts: ``"correct"`` where the paper gives it."""
        paper = self.block["paper"]
        return "correct" if paper.get("correct") is not None else "correct_abstained"

    @property
    def paper(self) -> float | None:
        """The paper's number about the ensemble."""
        return self.block["paper"].get(self.counted)

    @property
    def nearest(self) -> dict[str, Any] | None:
        """The protocol that comes nearest to the paper's number."""
        return self.block["nearest"]

    @property
    def clean(self) -> dict[str, Any] | None:
        """The row without attack."""
        return self._row("clean")

    @property
    def strongest(self) -> dict[str, Any] | None:
        """The row of the strongest attack that was made."""
        return self._row("suite") or self._row("default")

    @property
    def resnet(self) -> dict[str, Any] | None:
        """The row of the original ResNet."""
        return self._row("resnet")

    @property
    def nearest_row(self) -> dict[str, Any] | None:
        """The row of the protocol that comes nearest."""
        return next(filter(self.is_nearest, self.block["rows"]), None)

    def is_nearest(self, row: dict[str, Any]) -> bool:
        """Whether this row comes nearest to the paper's number."""
        return self.nearest is not None and self.nearest["protocol"] == row["protocol"] and row["group"] != "resnet"

    def paired(self, row: dict[str, Any]) -> str:
        """The row's paired test against the ResNet, and on which side of it the ensemble is."""
        if row["p"] is None:
            return NONE
        if self.resnet is None or row["correct"] is None or self.resnet["correct"] is None:
            return output.p_value(row["p"])
        here, there = row["correct"][0], self.resnet["correct"][0]
        return f"{output.p_value(row['p'])}, {'above' if here > there else 'below' if here < there else 'equal'}"

    def _row(self, group: str) -> dict[str, Any] | None:
        return next((row for row in self.block["rows"] if row["group"] == group), None)


def situations(results: dict[str, Any]) -> dict[str, list[Situation]]:
    """The blocks of every item, under the item's name."""
    return {
        name: [
            Situation((name, item["title"].split(":")[0]), f"{name}-{number}", block)
            for number, block in enumerate(item["blocks"], 1)
        ]
        for name, item in results["items"].items()
    }


def share(value: float | None) -> str:
    """``73.9``, in per cent."""
    return NONE if value is None else f"{100 * value:.1f}"


def interval(rate: Sequence[float] | None) -> str:
    """``73.9 [70.1, 77.3]``, in per cent with its 95 % interval."""
    return NONE if rate is None else f"{share(rate[0])} [{share(rate[1])}, {share(rate[2])}]"


def spent(hours: float) -> str:
    """``13 minutes`` or ``3.4 hours``."""
    return output.count(round(60 * hours), "minute") if hours < 1 else f"{hours:.1f} hours"


def moment(date: str) -> str:
    """``2026-11-24 15:00:00 UTC``, from the date in ISO's form."""
    return date.replace("T", " ").replace("+00:00", " UTC")


def listed(settings: dict[str, Any]) -> str:
    """``members 5, inferences 20``; settings without a value are left out, inner ones follow their outer one."""
    words = []
    for name, value in settings.items():
        if isinstance(value, dict):
            words.append(listed(value))
        elif value is not None:
            words.append(f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return ", ".join(filter(None, words))


def versions(results: dict[str, Any]) -> str:
    """Versions of software, and the machine, as far as they are known."""
    environment = results["environment"]
    packages = {"ito-sde": results["version"], **environment.get("packages", {})}
    return listed({**packages, **{key: environment[key] for key in environment if key not in ("packages", "date")}})


def headline(blocks: Iterable[Situation]) -> str:
    """What the blocks under attack say together; nothing where the paper gives no number."""
    judged = [block for block in blocks if block.attacked and block.paper is not None and block.nearest]
    if not judged:
        return ""
    near = [block.nearest["title"] for block in judged if block.nearest and block.nearest["near"]]
    text = f"Some protocol comes near the paper's number in {len(near)} of {len(judged)} situations under attack"
    if near:
        title, times = Counter(near).most_common(1)[0]
        text += f" (its interval holds it); most often, {times} times: {title}"
    left = [block.strongest["correct"][0] for block in judged if block.strongest and block.strongest["correct"]]
    if left:
        ends = share(min(left)), share(max(left))
        text += f". The strongest attack leaves {' to '.join(dict.fromkeys(ends))} % correct there"
    return f"{text}."


def with_numbers(blocks: dict[str, list[Situation]], attacked: bool) -> list[Situation]:
    """The blocks for which the paper gives a number: those under attack, or those without."""
    every = [block for of_item in blocks.values() for block in of_item]
    return [b for b in every if b.attacked == attacked and any(v is not None for v in b.block["paper"].values())]


# --- HTML -----------------------------------------------------------------------------------------------


def html_page(results: dict[str, Any], folder: Path) -> str:
    """The results on one HTML page, which has no scripts and loads nothing.

    Args:
        results: the content of ``results.json``.
        folder: where the files of the figures are.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    records = results["records"]
    environment.filters |= {
        "share": share,
        "interval": interval,
        "spent": spent,
        "moment": moment,
        "listed": listed,
        "near": near,
        "seconds": output.seconds,
        "inputs": lambda inputs: _inputs(inputs, records),
    }
    blocks = situations(results)
    page = environment.get_template("reproduction.html").render(
        results=results,
        blocks=blocks,
        headline=headline(block for of_item in blocks.values() for block in of_item),
        attacked=with_numbers(blocks, attacked=True),
        clean=with_numbers(blocks, attacked=False),
        pictures={
            figure["name"]: _embedded(figure, folder)
            for item in results["items"].values()
            for figure in item["figures"]
        },
        uses=_uses(results, blocks),
        versions=versions(results),
        groups=GROUPS,
        kinds=KINDS | {record["kind"]: record["kind"] for record in records.values() if record["kind"] not in KINDS},
    )
    return page.lstrip()


def _embedded(figure: dict[str, Any], folder: Path) -> str | None:
    """A figure's file as an address that holds the picture itself; None if the file cannot be read."""
    kind, name = _picture_file(figure)
    try:
        content = (folder / name).read_bytes()
    except OSError:
        return None
    return f"data:image/{'svg+xml' if kind == 'svg' else kind};base64,{base64.b64encode(content).decode()}"


def _picture_file(figure: dict[str, Any]) -> tuple[str, str]:
    """The ending and the name of a figure's file: the SVG, if there is one."""
    files = figure["files"]
    kind = "svg" if "svg" in files else next(iter(files))
    return kind, files[kind]


def _inputs(inputs: dict[str, Any], records: dict[str, Any]) -> Markup:
    """What determines a record, as YAML; the names of other records are links."""
    # A list that is there twice as one object becomes two: YAML would write the second as a reference to the first.
    plain = json.loads(json.dumps(inputs))
    text = yaml.safe_dump(plain, default_flow_style=None, sort_keys=False, allow_unicode=True, width=100)

    def link(word: re.Match[str]) -> str:
        name = word[0]
        return f'<a href="#record-{name}">{name}</a>' if name in records else name

    return Markup(re.sub(r"\b[a-z]+-[0-9a-z]+\b", link, str(escape(text.strip()))))


def _uses(results: dict[str, Any], blocks: dict[str, list[Situation]]) -> dict[str, dict[str, str]]:
    """For each record the places of the page that show numbers of it: their ids and titles."""
    uses: dict[str, dict[str, str]] = {}
    for name, item in results["items"].items():
        for situation in blocks[name]:
            for row in situation.block["rows"]:
                for record in row["records"]:
                    uses.setdefault(record, {})[situation.anchor] = f"{situation.item[1]}, {situation.block['title']}"
        for figure in item["figures"]:
            for record in figure["records"]:
                uses.setdefault(record, {})[f"figure-{figure['name']}"] = figure["title"]
    return uses


# --- Markdown -------------------------------------------------------------------------------------------


def markdown_page(results: dict[str, Any]) -> str:
    """The results in GitHub's Markdown; pictures are linked, records are left to ``results.json``."""
    blocks = situations(results)
    parts = [
        "# The paper's numbers, beside the truth",
        f"**Scale {_plain(results['scale'])}: {_plain(results['stand_in'])}**",
        f"{_code(results['command'])}: seed {results['seed']}, {_plain(results['device'])}, {moment(results['date'])}, "
        f"{spent(results['hours'])} of work; {_plain(listed(results['settings']))}; "
        f"{_plain(versions(results))}. Rates are in per cent, with 95 % "
        "Wilson intervals. [results.json](results.json) has every number with the records that it comes from: their "
        "commands, seeds and inputs.",
        *_markdown_summary(blocks),
        *_markdown_protocols(blocks),
    ]
    for name, item in results["items"].items():
        parts += [f"## {_plain(item['title'])}", _code(item["command"])]
        if item["status"] == "needs":
            parts.append(f"**Not measured.** {_plain(item['needs'])}")
        told = {"The paper states": item["states"], "It leaves open": item["open"], "Chosen here": item["chosen"]}
        parts.append("\n".join(f"- {what}: {_plain(text)}" for what, text in told.items()))
        if item["conclusions"]:
            parts.append("\n".join(f"- **{_plain(text)}**" for text in item["conclusions"]))
        for situation in blocks[name]:
            parts += _markdown_block(situation, folded=len(blocks[name]) > 2)
        if item["quotes"]:
            quotes = [[_plain(quote["label"]), f"{share(quote['value'])} (quoted)"] for quote in item["quotes"]]
            parts += ["Quoted from the paper, not measured here:", _pipes(["system", "accuracy"], quotes)]
        for figure in item["figures"]:
            parts.append(f"![{_plain(figure['title'])}]({_picture_file(figure)[1]})")
            parts.append(f"*{_plain(figure['caption'])}*")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_summary(blocks: dict[str, list[Situation]]) -> list[str]:
    """What the page says first: every number of the paper beside what was measured."""
    parts = []
    if attacked := with_numbers(blocks, attacked=True):
        rows = [[_plain(cell) for cell in _attacked_cells(situation)] for situation in attacked]
        parts += ["## Summary", _plain(headline(attacked)), "Under attack:", _pipes(_ATTACKED_HEADERS, rows)]
    if clean := with_numbers(blocks, attacked=False):
        rows = [[_plain(cell) for cell in _clean_cells(situation)] for situation in clean]
        parts += [] if attacked else ["## Summary"]
        parts += ["Without attack:", _pipes(_CLEAN_HEADERS, rows)]
    return parts


def _markdown_protocols(blocks: dict[str, list[Situation]]) -> list[str]:
    """Every protocol once, with why it is there."""
    rows = {
        row["protocol"]: [_plain(row["title"]), GROUPS[row["group"]], _plain(row["why"])]
        for of_item in blocks.values()
        for situation in of_item
        for row in situation.block["rows"]
    }
    return ["## Protocols", _pipes(["protocol", "kind", "why"], rows.values())] if rows else []


def _markdown_block(situation: Situation, folded: bool) -> list[str]:
    """The table of one block; in an item of many blocks behind its summary line."""
    block = situation.block
    rows = []
    for who, numbers in _paper_rows(block):
        rows.append([f"**{who}**", "", *(f"**{share(v)}**" if v is not None else NONE for v in numbers), ""])
    for row in block["rows"]:
        mark = f" {_nearest_mark(situation)}" if situation.is_nearest(row) else ""
        rates = [interval(row["correct"]), interval(row["correct_abstained"])]
        rows.append([_plain(row["title"]) + mark, str(row["n"]), *rates, situation.paired(row)])
    table = _pipes(["protocol", "n", "correct", "correct + abstained", "p against the ResNet"], rows)
    if not folded:
        return [f"**{_plain(block['title'])}.** {_plain(summary_line(situation))}", table]
    line = f"<b>{escape(block['title'])}.</b> {escape(summary_line(situation))}"
    return [f"<details><summary>{line}</summary>", table, "</details>"]


def _nearest_mark(situation: Situation) -> str:
    """A sign and a word at the protocol that comes nearest."""
    assert situation.nearest
    return "**✓ nearest, near the paper**" if situation.nearest["near"] else "**≠ nearest, yet not near**"


def _pipes(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the cells are Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """A command in Markdown, between more backticks than it holds in a row."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}"


def _plain(text: str) -> str:
    """Text in which Markdown and HTML mark nothing."""
    escaped = re.sub(r"([\\`*_|\[\]])", r"\\\1", " ".join(str(text).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# --- what all three say ---------------------------------------------------------------------------------

_ATTACKED_HEADERS = [
    "item",
    "situation",
    "paper",
    "nearest protocol",
    "gives",
    "near?",
    "strongest attack leaves",
    "original ResNet",
    "p, strongest against ResNet",
]
_CLEAN_HEADERS = [
    "item",
    "situation",
    "paper: ResNet",
    "paper: Itô",
    "paper: correct + abstained",
    "here: ResNet",
    "here: Itô",
    "here: correct + abstained",
]


def _attacked_cells(situation: Situation) -> list[str]:
    """The cells under `_ATTACKED_HEADERS`."""
    nearest, strongest, resnet = situation.nearest, situation.strongest, situation.resnet
    counted = "" if situation.counted == "correct" else " (correct + abstained)"
    return [
        situation.item[1],
        situation.block["title"],
        share(situation.paper) + counted,
        nearest["title"] if nearest else NONE,
        gives(nearest) if nearest else NONE,
        near(nearest) if nearest else NONE,
        share(strongest["correct"][0]) if strongest and strongest["correct"] else NONE,
        share(resnet["correct"][0]) if resnet and resnet["correct"] else NONE,
        situation.paired(strongest) if strongest else NONE,
    ]


def _clean_cells(situation: Situation) -> list[str]:
    """The cells under `_CLEAN_HEADERS`."""
    paper, clean, resnet = situation.block["paper"], situation.clean, situation.resnet
    measured = [
        (resnet, "correct"),
        (clean, "correct"),
        (clean, "correct_abstained"),
    ]
    return [
        situation.item[1],
        situation.block["title"],
        *(share(paper.get(what)) for what in ("resnet", "correct", "correct_abstained")),
        *(share(row[what][0]) if row and row[what] else NONE for row, what in measured),
    ]


def gives(nearest: dict[str, Any]) -> str:
    """The nearest protocol's number, and what it counts if that is not *correct*."""
    return share(nearest["value"]) + ("" if nearest["counted"] == "correct" else f" ({nearest['counted']})")


def near(nearest: dict[str, Any]) -> str:
    """Whether the nearest protocol is near, in a word and a sign."""
    return "✓ near" if nearest["near"] else "≠ not near"


def _paper_rows(block: dict[str, Any]) -> list[tuple[str, list[float | None]]]:
    """The paper's own rows: who, and correct, correct + abstained."""
    paper = block["paper"]
    rows: list[tuple[str, list[float | None]]] = []
    if paper.get("correct") is not None or paper.get("correct_abstained") is not None:
        rows.append(("the paper", [paper.get("correct"), paper.get("correct_abstained")]))
    if paper.get("resnet") is not None:
        rows.append(("the paper's ResNet", [paper["resnet"], None]))
    return rows


def summary_line(situation: Situation) -> str:
    """A block in one line: the paper, the nearest protocol, the strongest attack and the ResNet."""
    words = []
    if situation.paper is not None:
        what = "" if situation.counted == "correct" else " correct + abstained"
        words.append(f"paper {share(situation.paper)}{what}")
    if nearest := situation.nearest:
        words.append(f"nearest {gives(nearest)} {near(nearest)}: {nearest['title']}")
    for what, row in (
        ("no attack", situation.clean),
        ("strongest attack leaves", situation.strongest),
        ("original ResNet", situation.resnet),
    ):
        if row and row["correct"]:
            words.append(f"{what} {share(row['correct'][0])}")
    return "; ".join(words)


# --- the terminal ---------------------------------------------------------------------------------------


def print_results(results: dict[str, Any]) -> None:
    """Print a table for each item, what the names in it mean, and the summary; 110 columns wide."""
    blocks = situations(results)
    click.echo(
        f"Scale {results['scale']}, seed {results['seed']}, {results['device']}, {spent(results['hours'])} of work"
    )
    output.sentence(results["stand_in"])
    for name, item in results["items"].items():
        click.echo()
        output.sentence(item["title"])
        click.echo()
        if item["status"] == "needs":
            output.sentence(item["needs"])
        if blocks[name]:
            rows = [row for situation in blocks[name] for row in _terminal_rows(situation)]
            headers = ["situation", "protocol", "n", "correct", "correct + abstained", "paired"]
            _aligned(rows, headers, "left left right right right left")
            click.echo()
        for quote in item["quotes"]:
            output.sentence(f"Quoted: {quote['label']}: {share(quote['value'])}")
        for figure in item["figures"]:
            output.sentence(f"{figure['title']}: {_picture_file(figure)[1]}")
        for text in item["conclusions"]:
            output.sentence(text)
    _print_legend(blocks)
    _print_summary(blocks)


def _terminal_rows(situation: Situation) -> list[list[str]]:
    """The rows of one block; its title runs down the first column."""
    block, rows = situation.block, []
    for who, numbers in _paper_rows(block):
        rows.append([who, "", *("-" if v is None else f"{share(v)} [ the paper ]" for v in numbers), ""])  # as wide
    for row in block["rows"]:
        mark = "* " if situation.is_nearest(row) else ""
        rates = [_rate(row[counted], row["n"]) for counted in ("correct", "correct_abstained")]
        p = "" if row["p"] is None else output.p_value(row["p"])
        rows.append([_wrapped(mark + row["protocol"], 22), f"{row['n']}", *rates, p])
    title = _wrapped(block["title"], 22).split("\n")
    rows += [[""] * 5] * (len(title) - len(rows))
    return [[title[i] if i < len(title) else "", *row] for i, row in enumerate(rows)]


def _rate(rate: Sequence[float] | None, n: int) -> str:
    """A rate of ``n`` images as every verb prints it."""
    if rate is None:
        return "-"
    value, low, high = rate
    return output.percent(Rate(round(value * n), n, value, low, high))


def _aligned(rows: Sequence[Sequence[str]], headers: Sequence[str], sides: str) -> None:
    """A table on stdout whose numbers stand at the right edge of their columns."""
    click.echo(tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=sides.split()))


def _print_legend(blocks: dict[str, list[Situation]]) -> None:
    """What each protocol is, and what the columns mean; nothing where no block was measured."""
    rows = {
        row["protocol"]: [_wrapped(row["protocol"], 22), GROUPS[row["group"]], _wrapped(row["title"], 60)]
        for of_item in blocks.values()
        for situation in of_item
        for row in situation.block["rows"]
    }
    if rows:
        click.echo("\nProtocols\n")
        output.table(list(rows.values()), ["name", "kind", "what it is"])
        click.echo()
        output.sentence(
            "In per cent, with 95 % Wilson intervals. *: the protocol that comes nearest to the paper's number. "
            "Paired: McNemar's exact test of correct, against the original ResNet under its own strongest attack, "
            "on the same images."
        )


def _print_summary(blocks: dict[str, list[Situation]]) -> None:
    """Every number of the paper beside what was measured."""
    if attacked := with_numbers(blocks, attacked=True):
        rows = []
        for situation in attacked:
            nearest, cells = situation.nearest, _attacked_cells(situation)
            name = nearest["protocol"] if nearest else "-"
            gave = cells[4].replace("correct + abstained", "c + a")
            paper = cells[2].replace("correct + abstained", "c + a")
            yes = "-" if nearest is None else "yes" if nearest["near"] else "no"
            where = _wrapped(f"{cells[0]}: {cells[1]}", 28)
            rows.append([where, paper, _wrapped(name, 20), gave, yes, *cells[6:8]])
        headers = ["under attack", "paper", "nearest", "gives", "near", "strongest", "ResNet"]
        click.echo("\nSummary\n")
        rows = [[cell.replace(NONE, "-") for cell in row] for row in rows]
        _aligned(rows, headers, "left right left left left right right")
        click.echo()
        output.sentence(
            f"{headline(attacked)} Near: the interval of the nearest protocol holds the paper's number. c + a: correct "
            "+ abstained. Strongest: correct under the strongest attack on the ensemble; ResNet: under its own."
        )
    if clean := with_numbers(blocks, attacked=False):
        rows = []
        for situation in clean:
            item, title, *numbers = _clean_cells(situation)
            rows.append([_wrapped(f"{item}: {title}", 40), *(number.replace(NONE, "-") for number in numbers)])
        click.echo()
        headers = ["no attack", "paper: ResNet", "Itô", "c + a", "here: ResNet", "Itô", "c + a"]
        _aligned(rows, headers, "left" + 6 * " right")


def _wrapped(text: str, width: int) -> str:
    """Text in lines of at most ``width`` columns."""
    return textwrap.fill(text, width)
