"""Two runs of a benchmark side by side, from records that are made up: nothing is measured here."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from neuralsde_ito.cli import bench, cli

from neuralsde_ito.benchmarks import measuring
from neuralsde_ito.benchmarks.record import FORMAT, Row, compare_rows, read_record
from neuralsde_ito.validation import ItoError

SETTINGS = {"batch": 2, "eps": [0.1], "images": 2, "steps": 1, "eot": 1}


def row(name: str, ratio: float, quartiles: tuple[float, float] | None = None, part: str = "inference") -> dict:
    return {"part": part, "name": name, "seconds": 0.1, "ratio": ratio, "quartiles": quartiles}


def written(folder: Path, rows: list[dict], **changes: object) -> Path:
    head = {"command": "bench", "format": FORMAT, "network": "resnet8", "machine": "a machine", "date": "2026-01-31"}
    path = folder / "before.json"
    path.write_text(json.dumps({**head, "settings": SETTINGS, "rows": rows, **changes}))
    return path


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ((1.0, (0.9, 1.1)), (1.5, (1.4, 1.6)), "more"),
        ((1.5, (1.4, 1.6)), (1.0, (0.9, 1.1)), "less"),
        ((1.0, (0.9, 1.1)), (1.05, (1.0, 1.1)), ""),
        ((1.0, (0.9, 1.1)), (1.5, (0.9, 1.6)), ""),  # the new run's quartiles hold the old ratio
        ((1.0, (0.9, 1.6)), (1.5, (1.4, 1.6)), ""),  # the old run's quartiles hold the new one
        ((1.0, None), (9.0, (8.0, 10.0)), ""),  # measured once
    ],
)
def test_a_ratio_has_moved_if_it_lies_outside_the_quartiles_of_both(old, new, word) -> None:
    before, now = (Row("vote", "decision", 1.0, ratio, quartiles=quartiles) for ratio, quartiles in (old, new))
    (change,) = compare_rows([before], [now])
    assert (change.old, change.new, change.word) == (old[0], new[0], word)
    assert change.share == pytest.approx(new[0] / old[0] - 1)


def test_rows_of_one_run_only_are_new_or_gone() -> None:
    before = [Row("vote", "a", 1, 1.0), Row("vote", "b", 1, 2.0), Row("memory", "c", 1, 3.0)]
    changes = compare_rows(before, [Row("vote", "a", 1, 1.0), Row("vote", "d", 1, 4.0)])
    assert [(c.name, c.old, c.new, c.word) for c in changes] == [
        ("a", 1.0, 1.0, ""),
        ("d", None, 4.0, "new"),
        ("b", 2.0, None, "gone"),  # of the part that was measured; memory was not
    ]
    assert changes[1].share is None


def test_quartiles_are_of_the_ratios_within_a_repeat(monkeypatch) -> None:
    import torch

    times = iter([1.0, 1.0, *(t for pair in ((1, 2), (2, 6), (1, 4), (1, 5), (1, 6)) for t in pair)])
    clock = [0.0]

    def case() -> None:
        clock[0] += next(times)

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
    plain, ours = measuring.interleaved("vote", {"plain": case, "ours": case}, 5, torch.device("cpu"))
    assert (plain.ratio, plain.quartiles) == (1, (1, 1))
    assert (ours.ratio, ours.quartiles) == (4, (3, 5))


BAD = {
    "missing": (None, "cannot be read"),
    "no JSON": ("{", "no record of a benchmark"),
    "no text": (b"\xff\xfe\xfd", "no record of a benchmark"),
    "a list": ("[]", "no record of a benchmark"),
    "of another verb": ('{"command": "attack"}', "no record of a benchmark"),
    "of an earlier version": ('{"command": "bench", "rows": []}', "another version"),
    "without rows": (f'{{"command": "bench", "format": {FORMAT}}}', "damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_no_record_gets_one_sentence(case: str, tmp_path: Path) -> None:
    content, sentence = BAD[case]
    path = tmp_path / "before.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ItoError, match=sentence):
        read_record(path)
    result = CliRunner().invoke(cli, ["bench", "--arch", "resnet8", "--against", str(path)])
    assert isinstance(result.exception, ItoError)


@pytest.mark.parametrize(
    "broken", [{"part": "other"}, {"ratio": "much"}, {"ratio": float("nan")}, {"quartiles": [1]}, {"seconds": None}]
)
def test_a_row_that_is_none_is_damage(broken: dict, tmp_path: Path) -> None:
    with pytest.raises(ItoError, match="damaged"):
        read_record(written(tmp_path, [{**row("plain", 1.0), **broken}]))


def test_other_parts_and_other_settings_are_refused_before_anything_is_measured(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("was measured"))
    path = written(tmp_path, [row("plain", 1.0)])

    def refused(*words: str) -> str:
        result = CliRunner().invoke(cli, ["bench", "--arch", "resnet8", "--against", str(path), *words])
        assert result.exit_code
        return result.output + str(result.exception)

    assert "no part 'path'" in refused("--part", "path")
    assert "--part inference" in refused("--part", "path")
    assert "batch 2, this run has 3" in refused("--batch", "3")
    assert "--images would do nothing" in refused("--images", "3")
    path = written(tmp_path, [row("decision", 1.0, part="vote")])
    assert "need a run" in refused()


def test_bench_prints_old_ratios_beside_new_ones(tmp_path: Path, monkeypatch) -> None:
    recorded = [row("plain", 1.0, (1.0, 1.0)), row("engine", 2.0, (1.9, 2.1)), row("decision", 3.0, part="vote")]
    path = written(tmp_path, recorded)
    now = [
        Row("inference", "plain", 0.1, 1.0, quartiles=(1, 1)),
        Row("inference", "engine", 0.3, 3.0, quartiles=(2.9, 3.1)),
    ]
    monkeypatch.setattr(bench, "_measure", lambda *_: now)
    words = ["bench", "--arch", "resnet8", "--batch", "2", "--against", str(path)]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert any(line.split() == ["engine", "2.00", "3.00", "+50", "%", "more"] for line in result.stdout.splitlines())
    assert "1 ratio moved" in result.stdout
    assert "Not compared: vote" in result.stdout
    report = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert [change["word"] for change in report["against"]["changes"]] == ["", "more"]
    (tmp_path / "after.json").write_text(json.dumps(report))  # what --json prints is a record
    assert read_record(tmp_path / "after.json").rows[1].quartiles == (2.9, 3.1)
