"""The published defences: they run, their noise is drawn again by its address, and each is short."""

from pathlib import Path

import pytest
import torch
from defences import ranking
from defences.ranking import DEFENCES
from torch import nn

import neuralsde_ito as ito
from neuralsde_ito.attacks import PGD
from neuralsde_ito.models.vote import as_voter

DETERMINISTIC = {"none", "none, adversarial training", "k-WTA"}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def defended(name: str) -> nn.Module:
    torch.manual_seed(0)
    return DEFENCES[name][0].defend(ito.load_resnet("resnet8", in_channels=1)).eval()


@pytest.mark.parametrize("name", DEFENCES)
def test_a_defence_votes_and_its_noise_is_drawn_again(name, x):
    voter = as_voter(defended(name), 10)
    voter.observe(x)
    assert voter.noisy == (name not in DETERMINISTIC)
    first, again, other = (voter.predict(x, seed=seed, full=True).votes for seed in (1, 1, 2))
    assert first.shape == (1, 6, 10)
    assert torch.equal(first, again)
    paths = ito.noise.keys.PathRange(1, "report", torch.arange(6), 0, 2)
    one, two = (voter.path_logits(x, paths) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(one[0], one[1]) != voter.noisy
    assert other.sum() == first.sum()


@pytest.mark.parametrize("name", DEFENCES)
def test_the_claimed_protocol_is_an_attack_and_the_gradient_arrives(name, x):
    module = DEFENCES[name][0]
    attack = PGD(eps=0.1, stop=False, **(module.CLAIMED | {"steps": 1, "eot": 2}))
    moved = attack.run(defended(name), x, torch.zeros(6, dtype=torch.int64)).images
    assert 0 < float((moved - x).abs().max()) <= 0.1 + 1e-6


def test_each_defence_is_at_most_60_lines():
    files = [file for file in Path(ranking.__file__).parent.glob("*.py") if file.name[:4] not in ("rank", "test")]
    assert len(files) == len({module for module, _ in DEFENCES.values()})
    assert all(len(file.read_text().splitlines()) <= 60 for file in files)


def test_the_table_is_sorted_by_the_suite():
    def rows(name: str, left: int) -> dict:
        cell = {"right": [1] * left + [0] * (10 - left), "gradients": 5}
        return {(name, column): cell for column in ("clean", "eotpgd", "suite")}

    text = ranking.table(rows("RSE", 3) | rows("PNI", 7))
    assert text.index("| PNI |") < text.index("| RSE |")
    assert "| RSE | 30 [11, 60] | - | 30 [11, 60] | - | 30 [11, 60] | - |" in text
