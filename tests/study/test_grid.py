from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from dpguard.errors import UserError
from dpguard.measure.leakage import pick_targets
from dpguard.study.grid import NEEDS, describe, plan_table


def test_guarantees_come_first_then_every_policy_before_the_second_seed(kit):
    cells = kit.cells()
    assert [cell.leg for cell in cells[:4]] == ["guarantee"] * 4
    assert all(cell.leg != "guarantee" for cell in cells[4:])
    first_seeds = [(cell.policy, cell.seed) for cell in cells[4:]]
    assert first_seeds.index(("none", 1)) > max(i for i, (_, seed) in enumerate(first_seeds) if seed == 0)
    assert [describe(cell) for cell in cells[4:7]] == [
        "utility, none, seed 0",
        "leakage at start, none, seed 0",
        "leakage at end, none, seed 0",
    ]


def test_the_grid_is_complete_and_every_id_is_its_own(kit):
    cells = kit.cells()
    assert len(cells) == 4 + 4 * 3 + 4 * 2 * 2
    assert len({cell.id for cell in cells}) == len(cells)


def test_an_attack_at_the_end_follows_the_training_that_it_attacks(kit):
    cells = kit.cells()
    place = {cell.id: index for index, cell in enumerate(cells)}
    ends = [cell for cell in cells if cell.settings.get("at") == "end"]
    assert ends
    for cell in ends:
        needed = cells[place[cell.settings[NEEDS]]]
        assert place[needed.id] < place[cell.id]
        assert (needed.leg, needed.policy, needed.seed) == ("utility", cell.policy, cell.seed)


def test_an_attack_whose_seed_is_not_trained_takes_the_first_training(kit):
    text = kit.text.replace("seeds: [0, 1]}", "seeds: [7, 2]}")
    cells = kit.cells(text)
    by_id = {cell.id: cell for cell in cells}
    trained = {c.seed: by_id[c.settings[NEEDS]].seed for c in cells if c.settings.get("at") == "end"}
    assert trained == {7: 0, 2: 2}
    order = [cell.id for cell in cells]
    assert all(order.index(c.settings[NEEDS]) < order.index(c.id) for c in cells if NEEDS in c.settings)


def test_a_guarantee_holds_the_public_schedule(kit):
    guarantee = kit.cells()[0]
    assert guarantee.settings == {"sampling_rate": 0.05, "steps": 40, "delta": 1e-5, "examples": 1000}
    cut = kit.cells(kit.text.replace("batch_size: 50", "batch_size: 50, train_examples: 500"))
    assert cut[0].settings == {"sampling_rate": 0.1, "steps": 20, "delta": 1e-5, "examples": 500}
    alone = kit.cells(kit.text.replace(", at: [start, end]", "").split("utility:")[0])
    assert alone[0].settings == {"sampling_rate": 1.0, "steps": 1, "delta": 1e-5, "examples": 1000}
    assert {cell.leg for cell in alone} == {"guarantee", "leakage"}


# What is changed in the study -> the legs whose ids change.
CHANGES = {
    "epochs: 2 -> epochs: 3": {"guarantee", "utility", "leakage at end"},
    "batch_size: 50 -> batch_size: 100": {"guarantee", "utility", "leakage at end"},
    "batch_size: 50 -> batch_size: 50, learning_rate: 0.1": {"utility", "leakage at end"},
    "batch_size: 50 -> batch_size: 50, optimizer: sgd": {"utility", "leakage at end"},
    "batch_size: 50 -> batch_size: 50, train_examples: 500": {"guarantee", "utility", "leakage at end"},
    "targets: 3 -> targets: 4": {"leakage at start", "leakage at end"},
    "targets: 3 -> targets: 3, batch_size: 2": {"leakage at start", "leakage at end"},
    "targets: 3 -> targets: 3, panel: other": {"leakage at start", "leakage at end"},
    "targets: 3 -> targets: 3, attacks: prior": {"leakage at start", "leakage at end"},
    "data: demo -> data: demo\nprivacy: {delta: 1.0e-4}": {"guarantee"},
    # What is only shown, or written in another way, changes nothing.
    "targets: 3 -> targets: 3, metric: rouge1": set(),
    "batch_size: 50 -> batch_size: 50, metric: mcc": set(),
    "epochs: 2 -> epochs: 2.0": set(),
    "batch_size: 50 -> batch_size: 50, train_examples: 1000": set(),
    "question: Does it help? -> question: Another": set(),
    "data: demo -> data: demo\nrecommend: {max_leakage: 0.1}": set(),
    "name: which-layers -> name: other": set(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_id_changes_with_what_changes_the_result_and_nothing_else(kit, change):
    old, new = change.split(" -> ")
    assert old in kit.text

    def legs(text):
        found = {}
        for cell in kit.cells(text):
            leg = " at ".join([cell.leg, *([cell.settings["at"]] if "at" in cell.settings else [])])
            found.setdefault(leg, set()).add(cell.id)
        return found

    before, after = legs(kit.text), legs(kit.text.replace(old, new))
    assert {leg for leg in before if before[leg] != after[leg]} == CHANGES[change]


def test_more_seeds_keep_the_cells_that_there_are(kit):
    before = {cell.id for cell in kit.cells()}
    after = {cell.id for cell in kit.cells(kit.text.replace("[0, 1, 2]", "[0, 1, 2, 3]"))}
    assert before < after
    assert len(after - before) == 4


def test_model_data_and_panel_are_part_of_an_id(kit):
    study = kit.study()
    ids = {cell.id for cell in study.cells(kit.model, kit.data)}
    assert not ids & {cell.id for cell in study.cells({**kit.model, "hash": "x"}, kit.data)}
    assert not ids & {cell.id for cell in study.cells(kit.model, {**kit.data, "hash": "x"})}
    panel = {"name": "panel-1", "hash": "x", "attacks": ["prior"]}
    cells = study.cells(kit.model, kit.data, panel)
    assert all(cell.settings["panel"] == panel for cell in cells if cell.leg == "leakage")
    changed = {cell.id for cell in study.cells(kit.model, kit.data, {**panel, "hash": "y"})}
    assert {cell.leg for cell in cells if cell.id not in changed} == {"leakage"}


def test_cells_are_plain_data(kit):
    for cell in kit.cells():
        assert json.loads(json.dumps(cell.content())) == cell.content()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "data: demo",
            "data: demo\nprivacy: {delta: 2e-3}",
            "5:18: privacy.delta: 0.002 is larger than one over the number of training examples, "
            "expected at most 1/1000",
        ),
        (
            "batch_size: 50",
            "batch_size: 2000",
            "9:34: utility.batch_size: 2000 is more than the 1000 training examples, expected at most 1000",
        ),
        (
            "batch_size: 50",
            "batch_size: 50, train_examples: 1001",
            "9:54: utility.train_examples: 1001 is more than the data holds, expected at most 1000",
        ),
        (
            "epochs: 2",
            "epochs: 0.01",
            "9:19: utility.epochs: 0.01 is less than one step, expected at least 0.05",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data_have_their_place(kit, old, new, sentence):
    with pytest.raises(UserError) as caught:
        kit.cells(kit.text.replace(old, new))
    assert str(caught.value) == f"study.yaml:{sentence}"


@pytest.mark.parametrize(
    ("targets", "batch_size", "seeds", "apart"),
    [
        (30, 1, "[0, 1, 2]", True),
        (30, 1, "[0, 33]", False),  # texts 990 on, and from the beginning again
        (30, 1, "[1, 33]", True),
        (20, 7, "[0, 7]", False),
        (100, 1, "[0, 10]", False),  # the very same
    ],
)
def test_seeds_attack_different_texts_or_are_refused(kit, targets, batch_size, seeds, apart):
    """What the planner lets pass is what `pick_targets` keeps apart, for the study's 1,000 texts."""
    numbers = json.loads(seeds)
    line = f"leakage: {{targets: {targets}, batch_size: {batch_size}, seeds: {seeds}, at: start}}\n"
    text = re.sub(r"^leakage: .*\n", line, kit.text, flags=re.MULTILINE)
    assert line in text
    corpus = SimpleNamespace(train=range(1000))
    picked = [pick_targets(corpus, targets=targets, batch_size=batch_size, seed=s) for s in numbers]
    each = [{index for message in messages for index in message} for messages in picked]
    assert apart == (sum(map(len, each)) == len(set().union(*each)))
    if apart:
        assert kit.cells(text)
    else:
        expected = rf"leakage\.seeds: {numbers[0]} and {numbers[1]} attack some of the same texts \(of 1000\)"
        with pytest.raises(UserError, match=expected):
            kit.cells(text)


def test_a_default_delta_that_is_too_large_is_placed_in_the_file(kit):
    with pytest.raises(UserError, match=r"^study\.yaml:1:1: privacy\.delta: 1e-05 is larger .* at most 1/200000$"):
        kit.study().cells(kit.model, {**kit.data, "train": 200_000})


def test_the_dry_run_counts_the_cells_of_every_policy(kit):
    study, cells = kit.study(), kit.cells()
    finished = {cell.id for cell in cells if cell.policy == "none" and cell.leg == "utility"}
    epsilons = {named.label: len(named.policy.rows) * 2.0 for named in study.policies}
    rows = plan_table(study, cells, epsilons=epsilons, finished=finished)
    assert [row.policy for row in rows] == ["none", "dp-sgd noise=0.3", "dp-sgd noise=0.6", "last-block"]
    assert [row.epsilon for row in rows] == [0.0, 2.0, 2.0, 2.0]
    assert all(row.cells == {"guarantee": 1, "utility": 3, "leakage": 4} for row in rows)
    assert [row.finished for row in rows] == [3, 0, 0, 0]
    shard = plan_table(study, cells[:4], epsilons=epsilons)  # four guarantees, none of them finished
    assert [row.cells["guarantee"] for row in shard] == [1, 1, 1, 1]
    assert {row.cells["leakage"] + row.finished for row in shard} == {0}


def test_a_federation_is_trained_before_its_rounds_are_attacked_and_every_policy_before_the_second_seed(kit):
    text = kit.text.replace("at: [start, end]", "at: [start, rounds, end]")
    text = text.replace("epochs: 2, batch_size: 50, seeds: [0, 1, 2]", "seeds: [0, 1]")
    cells = kit.cells(text + "federation: {clients: 10, per_round: 5, rounds: 4, observe: [1, 3]}\n")
    order = {cell.id: index for index, cell in enumerate(cells)}
    assert [cell.leg for cell in cells[:4]] == ["guarantee"] * 4
    for seed in (0, 1):
        own = [c for c in cells if c.policy == "none" and c.leg != "guarantee" and c.seed == seed]
        assert [c.settings.get("at", c.leg) for c in own] == ["utility", "start", "rounds", "end"]
        assert own[2].settings["observe"] == [1, 3]
        for attack in own[2:]:
            assert attack.settings[NEEDS] == own[0].id
            assert order[own[0].id] < order[attack.id]
    seeds = [cell.seed for cell in cells[4:]]
    assert seeds == sorted(seeds)
    assert len({cell.policy for cell in cells[4:] if cell.seed == 0}) == 4


def test_more_targets_than_texts_is_refused_before_anything_runs(kit):
    leakage = kit.study().leakage
    each = leakage.batch_size * len(leakage.seeds)
    most = kit.data["train"] // each
    kit.cells(re.sub(r"targets: \d+", f"targets: {most}", kit.text))
    with pytest.raises(UserError, match=rf"leakage.targets: {most + 1} messages of .* expected at most {most}$"):
        kit.cells(re.sub(r"targets: \d+", f"targets: {most + 1}", kit.text))


@pytest.mark.parametrize(
    ("federation", "own", "each"),
    [
        ("{clients: 9, per_round: 4, rounds: 3}", "", 2),
        ("{clients: 9, per_round: 4, rounds: 3, view: aggregate}", "", 8),
        ("{clients: 9, per_round: 4, rounds: 3}", ", federation: {view: aggregate, per_round: 5}", 10),
    ],
)
def test_a_mean_holds_the_texts_of_all_its_clients(kit, federation, own, each):
    text = re.sub(r"utility:.*", f"federation: {federation}", kit.text).replace(
        "noise: $noise}]", f"noise: $noise}}]{own}"
    )
    text = text.replace("at: [start, end], seeds: [0, 1]", "batch_size: 2, seeds: [0, 1]")
    most = kit.data["train"] // (2 * each)
    kit.cells(text.replace("targets: 3", f"targets: {most}"))
    with pytest.raises(UserError, match=rf"{most + 1} messages of {each} texts at each of 2 seeds .* at most {most}$"):
        kit.cells(text.replace("targets: 3", f"targets: {most + 1}"))
