"""The worked examples of docs/architecture.md do what the page says, in at most ten lines each."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from neuralsde_ito.cli import cli

import neuralsde_ito as ito
from neuralsde_ito.audits.audit import AuditCase
from neuralsde_ito.data import DATASETS
from neuralsde_ito.sde.integrate import NATIVE
from neuralsde_ito.sde.solvers import SOLVERS

PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def example(word: str) -> dict[str, Any]:
    """The names that the example with this word defines."""
    [text] = [block for block in BLOCKS if word in block]
    names: dict[str, Any] = {}
    exec(text, names)
    return names


@pytest.fixture(autouse=True)
def tables():
    """What the examples enter into tables is taken out again."""
    before = [(table, dict(table)) for table in (NATIVE, SOLVERS, DATASETS)]
    yield
    for table, content in before:
        table.clear()
        table.update(content)


def test_the_page_names_files_that_exist():
    root = Path(__file__).parents[1]
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|c|toml))`", PAGE))
    assert len(named) > 20
    for name in named:
        assert any((root / folder / name).is_file() for folder in ("", "neuralsde_ito", "cli")), name


def test_examples_are_short():
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        code = [line for line in block.splitlines() if line and not line.startswith(("import ", "from "))]
        assert len(code) <= 10, block


@pytest.mark.parametrize("schedule", ["inverse-time", "multiplicative"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_solver_is_a_function_and_an_entry(schedule, steps):
    example("own_heun")
    net = ito.load_resnet("resnet8").double()
    ours, theirs = (ito.recast(net, 0.3, schedule, solver, steps) for solver in ("own_heun", "heun"))
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    keys = ito.make_keys(0, "report", index=torch.arange(3))
    with torch.no_grad():
        assert torch.allclose(ours(x, keys), theirs(x, keys), rtol=1e-9, atol=1e-9)


def test_an_attack_is_a_subclass():
    attack = example("SignSteps")["SignSteps"]
    net = ito.recast(ito.load_resnet("resnet8"), omega=0.1)
    x = torch.rand(4, 3, 32, 32)
    y = ito.ItoEnsemble([net]).predict(x).labels.clamp_min(0)
    result = attack(eps=0.1, steps=3, eot=2).run(net, x, y)
    assert (result.images - x).abs().max() <= 0.1 + 1e-6
    assert result.gradients > 0


def test_a_check_is_a_function():
    check = example("mirror_images")["mirror_images"]
    net = ito.load_resnet("resnet8")
    x = torch.rand(6, 3, 32, 32)
    y = net(x).argmax(1)
    found = check(AuditCase(net, torch.cat([x, x.flip(3)]), torch.cat([y, y])))
    assert (found.number, found.name) == (25, "mirror images")
    assert found.verdict in ("pass", "fail")


def test_a_data_set_is_a_loader_and_a_row():
    example("halves")
    data = ito.load_data("halves", train_limit=20)
    assert (len(data.train), len(data.test), data.image_shape) == (20, 60, (1, 8, 8))
    _, x, y = next(data.test.batches(60))
    assert ((x[:, 0, :4].sum((1, 2)) < x[:, 0, 4:].sum((1, 2))).long() == y).all()


def test_a_verb_is_a_file_with_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = "train --run t --limit 20 --members 1 --epochs 1 --set resnet.epochs=1"
    assert CliRunner().invoke(cli, train.split()).exit_code == 0
    result = CliRunner().invoke(example("sigma(t)")["command"], ["--run", "t"])
    assert result.exit_code == 0, result.output
    assert "block  1   t =  1.00   sigma = 0.1000" in result.stdout
