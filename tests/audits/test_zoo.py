"""The zoo: what is called masked misleads, what is called sound does not, and an honest copy is the same model."""

import json
import random

import numpy as np
import pytest
import torch
import zoo_run
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO, After, Masking, Normal, Prototypes, Specimen, digits, dropped, fit, honest
from zoo_truth import Judge

from neuralsde_ito.models.inspection import alike
from neuralsde_ito.outcomes import Outcomes


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[:4], y[:4]


def built(specimen: Specimen) -> nn.Module:
    torch.manual_seed(1)
    model = dropped(specimen.build())
    for module in model.modules():
        if isinstance(module, Prototypes):
            module.learn(*digits("train"))
    return model


def called(model: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of their cross-entropy, with all generators seeded."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    for module in model.modules():
        if isinstance(module, Normal):
            module.own = np.random.default_rng(seed)
    x = x.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), x)
    return logits.detach(), gradient


@pytest.mark.parametrize("name", [name for name in ZOO if not name.startswith("Itô")])
def test_a_specimen_is_what_its_row_says(name, images):
    specimen, (x, y) = ZOO[name], images
    model = built(specimen)
    logits, gradient = called(model, x, y)
    assert logits.shape == (4, 10)
    assert torch.isfinite(logits).all()
    truth, its_gradient = called(honest(model), x, y)
    assert its_gradient.isfinite().all()
    assert its_gradient.abs().sum() > 0
    if any(isinstance(module, After) for module in model.modules()):
        assert torch.equal(logits.argmax(1), truth.argmax(1))
    else:
        # A straight-through gradient is made of a sum and a difference: equal to rounding.
        torch.testing.assert_close(logits, truth, rtol=1e-3, atol=1e-3)
    assert alike(gradient, its_gradient) != specimen.masked
    assert any(isinstance(module, Masking) for module in model.modules()) == specimen.masked
    others = [called(model, x, y, seed)[0] for seed in range(1, 9)]  # a draw may be one of three
    assert any(not alike(logits, other) for other in others) == specimen.randomised


def test_there_are_enough_of_each_kind():
    kinds = [(specimen.masked, specimen.randomised) for specimen in ZOO.values()]
    assert all(kinds.count(kind) >= 20 for kind in [(False, False), (False, True), (True, False), (True, True)])


def test_the_truth_lies_below_what_a_masked_gradient_claims():
    specimen = ZOO["logits x 1e4"]
    torch.manual_seed(0)
    model = specimen.build()
    teacher = honest(model)
    fit(teacher.train(), steps=100)
    model.load_state_dict(teacher.state_dict())
    x, y = digits()
    judge = Judge(model.eval(), x[:30], y[:30])
    claim, truth = judge.claim("linf", 0.15), judge.truth("linf", 0.15)
    assert claim.sum() >= truth.sum() + 10


def line(name: str = "mlp", **changes) -> dict:
    row = {"kind": "digits", "version": "a", "name": name, "norm": "linf", "n": 50, "eps": 0.1, "masked": False}
    row |= {"randomised": False, "verdict": "sound", "failed": {}, "claimed": 40.0, "best": 38.0, "truth": 0.38}
    return row | {"busy": 9} | changes


def test_the_table_counts_and_names_what_was_judged_wrongly(tmp_path):
    rows = [line(), line(n=100, verdict="masked"), line("k", masked=True), line("l", masked=True, failed={"x": "1"})]
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    text = zoo_run.table(file, None)
    assert "| digits, sound, deterministic | 2 | 1 (50 %) | 1 | 0 | 9 |" in text
    assert "| digits, masked, deterministic | 2 | 1 (50 %) | 0 | 0 | 9 |" in text
    assert "CONDEMNED mlp, linf 0.1, n 100" in text
    assert "MISSED k" in text
    assert "l, linf" not in text


def test_outcomes_are_read_as_per_cent():
    labels = torch.tensor([1, 1, 2, -1])
    assert zoo_run._percent(Outcomes.of(labels, torch.tensor([1, 1, 1, 1])).as_dict()) == 50.0
