"""The page, the Markdown and the terminal of ``ito-sde reproduce``: each number once, at its place, with its record."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from neuralsde_ito.cli import output
from neuralsde_ito.cli.reproduction_page import html_page, interval, markdown_page, print_results, share
from reproduction_example import example, rate, write_pictures

VOID = {"meta", "img", "br", "hr", "link", "path", "rect"}
SHOWN = [("n", str), ("correct", interval), ("correct_abstained", interval)]


class Page(HTMLParser):
    """What a test asks of a page: its ids and links, and the text and links of every cell of every table.

    Attributes:
        ids, links: in the order of the page.
        tables: by the id of the last element before a table that had one, its rows of ``(text, link)`` cells.
        text: all text.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.text = ""
        self._open: list[str] = []
        self._cell: tuple[str, str | None] | None = None
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert len(values) == len(attrs), f"an attribute is twice in <{tag}>"
        if tag not in VOID:
            self._open.append(tag)
        if values.get("id"):
            self.ids.append(values["id"] or "")
        if tag == "a":
            self.links.append(values["href"] or "")
            if self._cell:
                self._cell = (self._cell[0], values["href"])
        if "src" in values:
            self.sources.append(values["src"] or "")
        if tag == "tr":
            self.tables.setdefault(self.ids[-1], []).append([])
        if tag in ("td", "th"):
            self._cell = ("", None)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self.ids[-1]][-1].append((" ".join(self._cell[0].split()), self._cell[1]))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data
        if self._cell:
            self._cell = (self._cell[0] + data, self._cell[1])


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    made = example()
    write_pictures(made, tmp_path)
    return made


def blocks(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every block, under its id on the page."""
    return {
        f"{name}-{number}": block
        for name, item in results["items"].items()
        for number, block in enumerate(item["blocks"], 1)
    }


def test_each_number_of_a_row_stands_once_in_its_row_and_links_to_its_record(results, tmp_path) -> None:
    page = Page(html_page(results, tmp_path))
    for anchor, block in blocks(results).items():
        header, *rows = page.tables[anchor]
        assert [text for text, _ in header] == [
            "protocol", "n", "correct", "0 to 100 %", "correct + abstained", "p against the ResNet",
        ]  # fmt: skip
        measured = rows[len(rows) - len(block["rows"]) :]
        for row, cells in zip(block["rows"], measured, strict=True):
            assert cells[0][0].startswith(row["title"])
            assert row["why"] in cells[0][0]
            if len(row["records"]) > 1:  # its images were attacked in several pieces of work
                assert cells[0][0].endswith(f"from {len(row['records'])} records " + ", ".join(row["records"]))
            link = f"#record-{row['records'][-1]}"
            expected = [(written(row[name]), link) for name, written in SHOWN if row[name] is not None]
            if row["p"] is not None:
                assert cells[5][0].startswith(output.p_value(row["p"]).replace("\u00a0", " "))
                expected.append((cells[5][0], link))
            assert [cell for cell in cells[1:] if cell[1]] == expected
            assert page.ids.count(link[1:]) == 1
        paper = {cells[0][0]: [text for text, _ in cells] for cells in rows[: len(rows) - len(block["rows"])]}
        numbers = block["paper"]
        assert len(paper) == ("correct" in numbers) + ("resnet" in numbers)
        if "correct" in numbers:
            assert paper["The paper"][2:5:2] == [share(numbers["correct"]), share(numbers["correct_abstained"])]
        if "resnet" in numbers:
            assert paper["The paper's ResNet"][2] == share(numbers["resnet"])


def test_the_summary_has_every_number_of_the_paper_beside_what_was_measured(results, tmp_path) -> None:
    page = Page(html_page(results, tmp_path))
    rows = [cells for cells in page.tables["summary"] if cells[0][1]]
    for cells in rows:
        block = blocks(results)[(cells[0][1] or "")[1:]]
        texts = [text for text, _ in cells]
        assert texts[1] == block["title"]
        resnet = next(row for row in block["rows"] if row["group"] == "resnet")
        if block["attack"]:
            near = block["nearest"]
            counted = "" if near["counted"] == "correct" else " correct + abstained"
            suite = next(row for row in block["rows"] if row["group"] == "suite")
            verdict = "✓ near" if near["near"] else "≠ not near"
            expected = [near["title"], share(near["value"]) + counted, verdict, interval(suite["correct"])]
            assert texts[2:8] == [share(block["paper"]["correct"]), *expected, interval(resnet["correct"])]
            assert texts[8] == "p = 0.35, " + ("equal" if suite["correct"] == resnet["correct"] else "above")
            assert cells[6][1] == f"#record-{suite['records'][-1]}"
        else:
            paper, clean = block["paper"], block["rows"][0]
            expected = [share(paper[what]) for what in ("resnet", "correct", "correct_abstained")]
            expected += [interval(resnet["correct"]), interval(clean["correct"]), interval(clean["correct_abstained"])]
            assert texts[2:] == expected
    assert len(rows) == sum(bool(block["paper"]) for block in blocks(results).values()) == 7
    assert "near the paper's number in 2 of 4 situations" in " ".join(page.text.split())
    assert "The strongest attack leaves 8.0 to 9.5 % correct there." in " ".join(page.text.split())


def test_the_page_is_one_whole_file(results, tmp_path) -> None:
    html = html_page(results, tmp_path)
    page = Page(html)  # which asserts that every tag is closed where it should be
    assert html.startswith("<!DOCTYPE html>")
    assert len(page.ids) == len(set(page.ids))
    assert {link[0] for link in page.links} == {"#"}
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.sources) == 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert not re.search(r"<script|<link|@import|url\(|https?:", html)
    for name, record in results["records"].items():
        assert f"record-{name}" in page.ids
        assert record["title"] in page.text
        assert record["file"] in page.text


def test_a_record_links_to_the_records_and_places_that_it_belongs_to(results, tmp_path) -> None:
    row = results["items"]["table3"]["blocks"][0]["rows"][0]
    html = html_page(results, tmp_path)
    record = html[html.index(f'id="record-{row["records"][1]}"') :].split('<div class="record"')[0]
    assert f'of: <a href="#record-{row["records"][0]}">' in record
    assert "members: [0, 1, 2, 3, 4]" in record
    assert '<a href="#table3-1">Table 3, L2, eps 0.2, omega 0.2, PGD</a>' in record
    assert "12.3 s" in record


def test_a_stranger_sees_first_what_the_scale_is(results, tmp_path) -> None:
    for text in (Page(html_page(results, tmp_path)).text, markdown_page(results)):
        assert "Scale smoke: scikit-learn's digits and a ResNet-20 stand in" in text
        assert text.index("stand in for") < text.index("Summary")
        assert "13 minutes of work" in text
        assert "members 5, inferences 20, images 200" in text
        assert "ito-sde 0.1.0, torch 2.9.0, python 3.11.2" in text


def test_an_item_that_was_not_measured_and_quoted_numbers_say_so(results, tmp_path) -> None:
    page, markdown = Page(html_page(results, tmp_path)), markdown_page(results)
    needs = "This item needs ImageNet: ito-sde reproduce table5 --scale paper --data FOLDER"
    assert f"Not measured. {needs}" in " ".join(page.text.split())
    assert needs in markdown
    quotes = [[text for text, _ in cells] for cells in page.tables["table1"][1:]]
    assert quotes[0] == ["Madry toolbox, L2 eps 2.0", "18.6", "quoted from the paper, not measured here"]
    assert "| Madry toolbox, L2 eps 2.0 | 18.6 (quoted) |" in markdown


def test_a_missing_picture_is_a_sentence(results, tmp_path) -> None:
    (tmp_path / "figures/figure2.svg").unlink()
    page = Page(html_page(results, tmp_path))
    assert len(page.sources) == 4
    assert "figures/figure2.svg cannot be read; ito-sde reproduce figure2 --scale smoke makes it." in page.text


def test_a_number_without_its_record_has_no_dead_link(results, tmp_path) -> None:
    row = results["items"]["table3"]["blocks"][0]["rows"][0]
    for name in row["records"]:
        del results["records"][name]
    page = Page(html_page(results, tmp_path))
    assert page.tables["table3-1"][2][2] == (interval(row["correct"]), None)
    assert {link[1:] for link in page.links} <= set(page.ids)


@pytest.mark.parametrize("empty", [{"items": {}, "records": {}}, {"records": {}}])
def test_little_is_shown_as_well(results, tmp_path, capsys, empty) -> None:
    results |= empty
    Page(html_page(results, tmp_path))
    markdown_page(results)
    print_results(results)
    assert ("Summary" in capsys.readouterr().out) == bool(results["items"])


def marked(value: Any) -> Any:
    """The same results with a mark in every text that people write."""
    if isinstance(value, list):
        return [marked(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _MARK + inner if key in _TEXTS else marked(inner) for key, inner in value.items()}
    return value


_MARK = "<i>&\"'|`*_"
_TEXTS = {"title", "why", "states", "open", "chosen", "stand_in", "caption", "label", "command", "network", "sentence"}


def test_texts_are_shown_as_they_are(results, tmp_path) -> None:
    results = marked(results)
    html, markdown = html_page(results, tmp_path), markdown_page(results)
    assert _MARK in Page(html).text
    assert "<i>" not in html + markdown.replace(f"``{_MARK}", "")  # what stands as code is no mark
    plain = "&lt;i&gt;&amp;\"'" + r"\|\`\*\_"
    assert f"## {plain}Table 3" in markdown
    check_tables(markdown)


def check_tables(markdown: str) -> int:
    """Every table of a Markdown page has the same number of columns in all its lines; gives the number of tables."""
    tables = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    for table in tables:
        lines = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(lines)) == 1, table
        assert re.fullmatch(r"[| -]+", table.splitlines()[1])
    return len(tables)


def test_the_markdown_has_the_same_numbers(results, tmp_path) -> None:
    markdown = markdown_page(results)
    assert check_tables(markdown) == 2 + 1 + 1 + len(blocks(results))  # summary, protocols, quotes
    for block in blocks(results).values():
        start = markdown.index(f"{block['title']}.</b>" if f"{block['title']}.</b>" in markdown else block["title"])
        lines = markdown[start:].split("\n\n")[1].splitlines()
        measured = lines[len(lines) - len(block["rows"]) :]
        for row, line in zip(block["rows"], measured, strict=True):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells[0].startswith(row["title"])
            assert cells[1:4] == ["200", interval(row["correct"]), interval(row["correct_abstained"])]
    for link in re.findall(r"\]\(([^)]*)\)", markdown):
        assert link == "results.json" or (tmp_path / link).is_file()
    assert markdown.count("![") == 5
    assert markdown.count("✓ nearest, near the paper") == 2
    assert markdown.count("<details>") == markdown.count("</details>") == 3 + 4


def check_aligned(text: str) -> int:
    """Tables are aligned and no line is wider than 110 columns; gives the number of tables."""
    lines, tables = text.splitlines(), 0
    for position, line in enumerate(lines):
        assert len(line) <= 110, line
        if line.startswith("---"):
            tables += 1
            gaps = [match.start() for match in re.finditer("  ", line)]
            for row in lines[position - 1 :]:
                if not row:
                    break
                assert all(row[gap : gap + 2].strip() == "" for gap in gaps), row
    return tables


def test_the_terminal_is_aligned_and_110_columns_wide(results, capsys) -> None:
    print_results(results)
    text = capsys.readouterr().out
    assert check_aligned(text) == 3 + 1 + 2  # items with blocks, the protocols, the summary
    row = results["items"]["table3"]["blocks"][2]["rows"][2]
    lines = [line for line in text.splitlines() if "* transfer-stops" in line]
    assert len(lines) == 4
    words = re.split(r"\s{2,}", re.sub(r"\[\s*([\d.]+),\s+", r"[\1, ", lines[2]))
    numbers = [interval(row["correct"]), interval(row["correct_abstained"]), output.p_value(row["p"])]
    assert words == ["", "* transfer-stops", "200", *numbers]
    table = text[text.index("Table 3: CIFAR-10") :].split("\n\n")[1]
    brackets = {re.sub(r"[^\[]", " ", line).rstrip() for line in table.splitlines()[2:]}
    assert len(brackets) == 2  # the row of the ResNet has one interval, the others two
    assert "This item needs ImageNet" in text
    assert "Quoted: Madry toolbox, L2 eps 2.0: 18.6" in text


def test_long_names_and_many_images_fit_the_terminal(results, capsys) -> None:
    for item in results["items"].values():
        item["title"] += " under a very long name" * 5
        for block in item["blocks"]:
            block["title"] += ", with a ResNet that was trained for a very long time" * 4
            if block["nearest"]:
                block["paper"] = {"correct_abstained": 1.0}
                block["nearest"] |= {"protocol": "a-protocol-with-a-very-long-name-of-one-word", "value": 1.0}
                block["nearest"]["counted"] = "correct + abstained"
            for row in block["rows"]:
                row["n"], row["correct"] = 50000, rate(50000, 50000)
                row["protocol"] += "-with-a-very-long-name-of-one-word"
                row["title"] += " that goes on and on" * 4
    print_results(results)
    check_aligned(capsys.readouterr().out)


def test_the_terminal_needs_no_more_than_latin_1(results, capsys) -> None:
    print_results(results)
    capsys.readouterr().out.encode("latin-1")
