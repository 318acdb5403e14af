"""The paper's tables and figures: what is declared, how work is named and kept, and a whole reproduction."""

import json
import re
from pathlib import Path

import pytest
import torch

from neuralsde_ito.models.ensemble import ItoEnsemble
from neuralsde_ito.outcomes import ABSTAIN
from neuralsde_ito.reproduction import items, makers, protocols, reproduce
from neuralsde_ito.reproduction.declared import ITEMS, SCALES, Item, Scale, load_item, load_scale
from neuralsde_ito.reproduction.laboratory import fit_inputs
from neuralsde_ito.reproduction.pieces import Piece, Work, dealt, in_order, joined
from neuralsde_ito.reproduction.protocols import PROTOCOLS, STEPS
from neuralsde_ito.reproduction.reproduce import Plan, Request, carry_out, make_plan, results_of
from neuralsde_ito.reproduction.rows import nearest_row
from neuralsde_ito.reproduction.store import Store
from neuralsde_ito.reproduction.voters import heat_maps, right_or_abstained
from neuralsde_ito.runs.config import Adversary, Fit
from neuralsde_ito.validation import ItoError

PAPER = Path(__file__).resolve().parents[3] / "shared" / "PAPER.md"


# --- what is declared ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ITEMS)
def test_every_number_of_an_item_is_one_of_the_papers(name: str) -> None:
    item = load_item(name)
    if not PAPER.is_file():
        pytest.skip("needs shared/PAPER.md beside the checkout")
    paper = {float(number) for number in re.findall(r"\d+\.\d+|\d+", PAPER.read_text(encoding="utf-8"))}
    numbers = [*item.cells, *item.points, *item.quoted]
    given = {getattr(entry, key, None) for entry in numbers for key in ("correct", "correct_abstained", "resnet")}
    given = {*given, *item.quotes.values()} - {None}
    assert given <= paper, given - paper
    assert item.states
    assert item.open
    assert item.chosen


def test_tables_three_and_four_hold_all_cells_of_the_paper() -> None:
    assert [(c.norm, c.eps, c.attack, c.omega) for c in load_item("table4").cells] == [
        ("linf", eps, attack, 0.2) for eps in ("4/255", "8/255", "16/255", "32/255") for attack in ("pgd", "fgsm")
    ]
    assert len(load_item("table3").cells) == 9


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_holds_every_radius_that_an_item_needs(name: str) -> None:
    scale = load_scale(name)
    for item in map(load_item, ITEMS):
        for cell in item.cells:
            if cell.norm and cell.data in scale.data:
                assert cell.eps in scale.radii[cell.norm], (item.title, cell.eps)


@pytest.mark.parametrize("name", SCALES)
def test_presets_of_a_scale_load_with_its_settings(name: str) -> None:
    scale = load_scale(name)
    for data, source in scale.data.items():
        for network in source.presets:
            config = scale.config(data, network, {"sde.omega": 0.3})
            assert config.sde.omega == 0.3
            assert config.ensemble.members <= scale.voters


def test_unknown_items_and_scales_are_told_the_nearest() -> None:
    with pytest.raises(ItoError, match="did you mean 'table4'"):
        load_item("tabel4")
    with pytest.raises(ItoError, match="did you mean 'small'"):
        load_scale("smal")


# --- protocols ----------------------------------------------------------------------------------------------


def test_each_protocol_is_weak_in_what_it_says_and_only_in_that() -> None:
    honest = PROTOCOLS["no-start"].attack("pgd", "linf", 8 / 255, 0.25, 20)
    assert (honest.steps, honest.eot, honest.random_start, honest.eps) == (STEPS, 20, False, 8 / 255)
    for name, protocol in PROTOCOLS.items():
        attack = protocol.attack("pgd", "linf", 8 / 255, 0.25, 20)
        assert (attack.eot == 1) == (name == "one-path")
        assert attack.stop == (name not in ("one-path", "transfer", "noise-off"))
        assert attack.random_start == (name != "no-start")
        factor = {"eps-normalised": 0.25, "eps-wrong-way": 0.0625, "eps-divided": 4.0}.get(name, 1.0)
        assert attack.eps == pytest.approx(factor * 8 / 255)
        assert attack.step == pytest.approx(2.5 * attack.eps / STEPS)
        assert protocol.why


def test_fgsm_is_one_step_as_long_as_the_radius_it_attacks() -> None:
    attack = PROTOCOLS["eps-normalised"].attack("fgsm", "l2", 2.0, 0.25, 20)
    assert (attack.steps, attack.eps, attack.step, attack.random_start, attack.keep) == (1, 0.5, 0.5, False, "last")


def test_a_radius_is_never_more_than_the_range_of_a_pixel() -> None:
    assert PROTOCOLS["eps-divided"].attack("pgd", "linf", 0.5, 0.25, 1).eps == 1.0
    assert PROTOCOLS["eps-divided"].attack("pgd", "l2", 0.5, 0.25, 1).eps == 2.0


# --- how work is named, dealt out and kept --------------------------------------------------------------------


def _piece(kind: str = "vote", needs: tuple[Piece, ...] = (), work: Work = Work(), **inputs: object) -> Piece:  # noqa: B008
    return Piece(kind, kind, inputs, needs, dict, work, "net", "net, omega 0.2")


def test_a_name_depends_on_all_that_determines_the_result_and_on_nothing_else() -> None:
    base = _piece("attack", eps=0.1)
    same = Piece("attack", "another title", {"eps": 0.1}, (), dict, Work(gradients=5), "other", "other")
    assert base.name == same.name
    assert _piece(needs=(base,)).name == _piece(needs=(same,)).name
    others = [_piece("attack", eps=0.2), _piece("vote", eps=0.1), _piece("attack", eps=0.1, seed=1)]
    assert len({base.name, *(piece.name for piece in others)}) == 4
    assert _piece(needs=(base,)).name != _piece(needs=(others[0],)).name


def test_a_piece_comes_after_all_that_it_needs_and_once() -> None:
    resnet = _piece("resnet")
    members = [_piece("member", (resnet,), number=n) for n in range(3)]
    votes = [_piece("vote", (resnet, *members), number=n) for n in range(2)]
    stages = in_order([*votes, members[1], *votes])
    assert [[piece.kind for piece in stage] for stage in stages] == [["resnet"], ["member"] * 3, ["vote"] * 2]
    assert in_order([]) == []


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_piece_is_done_by_exactly_one_process_and_none_has_twice_the_work(size: int) -> None:
    pieces = [_piece(number=n, work=Work(queries=1 + n % 5)) for n in range(40)]
    shares = [dealt(pieces, lambda piece: piece.work.queries, rank, size) for rank in range(size)]
    assert sorted(piece.name for share in shares for piece in share) == sorted(piece.name for piece in pieces)
    loads = [sum(piece.work.queries for piece in share) for share in shares]
    assert max(loads) - min(loads) <= 5


def test_a_result_with_a_missing_or_doubled_image_is_refused() -> None:
    index = torch.tensor([3, 5, 8, 9])
    parts = [{"index": index[:2], "labels": torch.tensor([0, 1])}, {"index": index[2:], "labels": torch.tensor([2, 3])}]
    assert joined(parts, index, "labels").tolist() == [0, 1, 2, 3]
    for wrong in ([parts[0]], [parts[0], parts[0]], [parts[1], parts[0]], [*parts, parts[1]]):
        with pytest.raises(RuntimeError, match="exactly once"):
            joined(wrong, index, "labels")


def test_results_of_another_version_and_damaged_ones_are_named_and_not_used(tmp_path: Path, monkeypatch) -> None:
    store = Store(tmp_path)
    tensor = torch.arange(6.0).view(2, 3)
    store.write("vote-a", {"x": tensor, "same": tensor}, {"seconds": 1.0})
    assert store.record("vote-a") == {"seconds": 1.0}
    assert torch.equal(store.read("vote-a")["x"], tensor)
    assert not store.has("vote-b")
    assert not store.refused
    monkeypatch.setattr("neuralsde_ito.reproduction.store.VERSION", "0, ito-sde 0.0.1")
    store.write("vote-b", {"x": tensor}, {})
    monkeypatch.undo()
    content = store.file("vote-a").read_bytes()
    store.file("vote-c").write_bytes(content[: len(content) // 2])
    store.file("vote-d").write_bytes(b"")
    store.file("vote-e").write_bytes(content[:-3])
    assert not any(store.has(f"vote-{letter}") for letter in "bcde")
    assert store.refused == {"vote-b", "vote-c", "vote-d", "vote-e"}


# --- rows ------------------------------------------------------------------------------------------------------


def _row(protocol: str, value: float, group: str = "weak") -> dict[str, object]:
    return {"protocol": protocol, "title": protocol, "group": group, "correct": [value, value - 0.05, value + 0.05]}


def test_the_nearest_protocol_is_named_and_near_means_inside_the_interval() -> None:
    rows = [_row("a", 0.7), _row("b", 0.82), _row("suite", 0.1, "suite"), _row("resnet", 0.846, "resnet")]
    found = nearest_row(rows, 84.6)
    assert found is not None
    assert (found["protocol"], found["near"]) == ("b", True)  # the ResNet is no protocol for the ensemble
    assert found["sentence"] == "b: 82.0 %, 2.6 points below the paper"
    far = nearest_row(rows, 95.0)
    assert far is not None
    assert (far["protocol"], far["near"]) == ("b", False)
    assert far["sentence"].startswith("none; the nearest is b")
    assert nearest_row(rows, None) is None


def test_a_heat_map_of_all_votes_is_the_vote_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    winners = torch.randint(-1, 4, (7, 5, 60), generator=generator).to(torch.int16)
    truth, index = torch.randint(0, 4, (60,), generator=generator), torch.arange(60)
    parts = [{"winners": winners[..., s], "truth": truth[s], "index": index[s]} for s in (slice(0, 25), slice(25, 60))]
    (panel,), (said,) = heat_maps({"clean": parts}, index, "hierarchical")
    assert (panel["members"], panel["inferences"]) == ([3, 4, 5], [3, 4, 5, 6, 7])
    right = 0
    for n in range(60):
        labels = []
        for m in range(5):
            counts = [int((winners[:, m, n] == c).sum()) for c in range(4)]
            labels.append(counts.index(max(counts)) if 2 * max(counts) > 7 else ABSTAIN)
        ballots = [labels.count(c) for c in range(4)]
        label = ballots.index(max(ballots)) if 2 * max(ballots) > 5 else ABSTAIN
        right += label in (int(truth[n]), ABSTAIN)
    assert panel["values"][-1][-1] == pytest.approx(right / 60)
    assert int(right_or_abstained(winners, truth, range(5), range(7), "hierarchical").sum()) == right
    assert said.startswith("clean: correct + abstention gains")


# --- a whole reproduction ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch) -> None:
    """The scale `smoke`, so small that all items together take seconds."""
    scale: Scale = load_scale("smoke")
    changes = {
        "set": {
            "ensemble.members": 2,
            "ensemble.inferences": 3,
            "finetune.epochs": 1,
            "resnet.epochs": 6,
            "data.train_limit": 200,
        },
        "benign": 12,
        "attacked": 6,
        "block": 4,
        "eot": 2,
        "effort": 0.01,
        "voters": 3,
        "omegas": (0.1, 0.2),
        "radii": {"linf": ("8/255",), "l2": ("2.0",)},
        "density": scale.density.model_copy(update={"images": 4, "paths": 10, "eps": ("8/255",)}),
    }
    monkeypatch.setattr(reproduce, "load_scale", lambda name: scale.model_copy(update=changes))
    monkeypatch.setattr(reproduce, "load_item", _few_cells)
    monkeypatch.setattr(items, "load_item", _few_cells)
    for module in (protocols, makers):
        monkeypatch.setattr(module, "STEPS", 3)


def _few_cells(name: str) -> Item:
    """An item with one radius a norm and two omegas."""
    item = load_item(name)
    cells = [c for c in item.cells if c.eps in (None, "8/255", "2.0") and c.omega in (0.1, 0.2)]
    return item.model_copy(update={"cells": tuple(cells), "omegas": item.omegas[:1], "eps": ("8/255",)})


def _request(folder: Path, *items: str, **settings: object) -> Request:
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    return Request(items or ("all",), "smoke", changes, folder=folder)


def _numbers(plan: Plan) -> str:
    """All results but times."""
    results = results_of(plan, "test")
    for record in results["records"].values():
        del record["seconds"], record["date"]
    return json.dumps({key: results[key] for key in ("items", "records", "settings")}, sort_keys=True)


def test_all_items_and_a_run_killed_many_times_ends_with_the_same_numbers(tmp_path: Path, tiny) -> None:
    plan = make_plan(_request(tmp_path / "whole"))
    carry_out(plan)
    assert not plan.pending()
    results = results_of(plan, "test")
    assert list(results["items"]) == list(ITEMS)
    for name, item in results["items"].items():
        assert item["status"] == "done"
        assert item["blocks"] or item["figures"], name
        for block in item["blocks"]:
            groups = {row["group"] for row in block["rows"]}
            assert groups == (
                {"clean", "resnet"}
                if item["title"].endswith(("attack", "omega")) and not block["norm"]
                else {"weak", "default", "suite", "resnet"}
            )
            for row in block["rows"]:
                value, low, high = row["correct"]
                assert 0 <= low <= value <= high <= 1
                assert set(row["records"]) <= results["records"].keys()
    assert [block["attack"] for block in results["items"]["table4"]["blocks"]] == ["PGD", "FGSM"]

    class Killed(Exception):
        pass

    def kill(after: int):
        left = iter(range(after))

        def begin(piece: Piece) -> None:
            if next(left, None) is None:
                raise Killed

        return begin

    plan_of = lambda: make_plan(_request(tmp_path / "killed"))  # noqa: E731
    for after in (0, 3, 7, 20, 31):
        with pytest.raises(Killed):
            carry_out(plan_of(), kill(after))
    again = plan_of()
    carry_out(again)
    assert _numbers(again) == _numbers(plan)


def test_a_second_call_does_nothing_and_a_changed_setting_only_what_depends_on_it(tmp_path: Path, tiny) -> None:
    carry_out(make_plan(_request(tmp_path, "table4", "density")))
    assert not make_plan(_request(tmp_path, "table4")).pending()
    assert not make_plan(_request(tmp_path, "density")).pending()
    changed = make_plan(_request(tmp_path, "table4", "density", ensemble__rule="flat")).pending()
    assert {piece.kind for piece in changed} == {"vote", "sweep", "suite"}
    flat = make_plan(_request(tmp_path, "table2", ensemble__rule="flat", ensemble__inferences=4))
    carry_out(flat)
    system = flat.lab.system("cifar10", "ResNet-50", 0.2)
    (vote, *_) = (piece for stage in flat.stages for piece in stage if piece.kind == "vote")
    images = flat.lab.images(flat.lab.blocks("cifar10", 12)[0])
    again = ItoEnsemble(system.ensemble(2).members, 4, "flat").predict(images.x, 0, images.index)
    assert torch.equal(flat.lab.read(vote)["votes"], again.votes)
    assert torch.equal(flat.lab.read(vote)["labels"], again.labels)
    changed = make_plan(_request(tmp_path, "table4", "density", finetune__lr=1e-3 / 2)).pending()
    assert "resnet" not in {piece.kind for piece in changed}
    assert {"member", "attack", "vote"} <= {piece.kind for piece in changed}
    # The ResNet's own suite does not depend on the members.
    assert not any(piece.title.startswith("suite on the ResNet") for piece in changed)
    (tmp_path / "models").rename(tmp_path / "gone")  # the networks themselves are gone
    assert {"resnet", "member"} <= {piece.kind for piece in make_plan(_request(tmp_path, "table4")).pending()}


def test_work_dealt_out_to_two_processes_is_the_work_of_one(tmp_path: Path, tiny) -> None:
    class Half:
        size, first = 2, True

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def barrier(self) -> None:
            pass

    # The shares of two processes, one after the other: stage by stage, as their barriers would order them.
    alone, shared = make_plan(_request(tmp_path / "one", "table2", "figure1")), None
    carry_out(alone)
    for _ in range(8):
        for rank in (0, 1):
            shared = make_plan(_request(tmp_path / "two", "table2", "figure1"))
            stages = [stage for stage in shared.stages if any(not shared.lab.done(piece) for piece in stage)][:1]
            half = Plan(shared.request, shared.lab, shared.items, shared.reproductions, shared.needs, stages)
            carry_out(half, processes=Half(rank))
    assert shared is not None
    assert not shared.pending()
    assert _numbers(shared) == _numbers(alone)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_scale_says_what_it_needs_and_an_item_that_needs_imagenet_names_its_command(tmp_path: Path) -> None:
    command = "ito-sde reproduce table4 --scale small --data FOLDER --weights FILE"
    with pytest.raises(ItoError, match=f"needs --data and --weights: {command}"):
        make_plan(Request(("table4",), "small", {}, folder=tmp_path))
    command = "ito-sde reproduce table5 --scale paper --imagenet FOLDER"
    with pytest.raises(ItoError, match=f"The item table5 needs ImageNet: {command}"):
        make_plan(Request(("table5",), "paper", {}, folder=tmp_path))


def test_settings_that_do_nothing_leave_the_names_of_results_as_they_were() -> None:
    fit = Fit(epochs=2, lr=0.1)
    assert set(fit_inputs(fit)) == {"epochs", "lr", "optimizer", "decay", "weight_decay", "batch_size"}
    assert fit_inputs(Fit(epochs=2, lr=0.1, awp=0.01)) == {**fit_inputs(fit), "awp": 0.01}
    attacked = fit_inputs(Fit(epochs=2, lr=0.1, adversary=Adversary(method="pgd")))
    assert attacked["adversary"]["method"] == "pgd"
