"""What a policy sets for itself: its training, a target epsilon; and attacks on the control's fine-tuned weights."""

from __future__ import annotations

import pytest

from dpguard.cli.planning import plan_study
from dpguard.documents import Document
from dpguard.errors import UserError
from dpguard.study import legs
from dpguard.study.cache import Cache
from dpguard.study.grid import NEEDS
from dpguard.study.spec import Study

HEAD = "name: s\nmodel: demo\ndata: demo\npolicies:\n"
DATA = {"name": "d", "hash": "2", "train": 1000, "test": 100}


def read(text):
    return Study.read(Document.parse(HEAD + text, "study.yaml"))


def cells(text):
    return read(text).cells({"name": "m", "hash": "1"}, DATA, None)


TWO = """\
  one: {sweep: {batch: [1, 100]}, rows: [{layers: all, clip: 1, noise: 1}], utility: {batch_size: $batch}}
  plain: {rows: [{layers: all, clip: 1, noise: 1}]}
leakage: {targets: 2}
utility: {epochs: 2, batch_size: 50, learning_rate: 0.001}
"""


def test_sampling_steps_and_ids_follow_a_policys_own_training():
    found = cells(TWO)
    promised = {c.policy: c.settings for c in found if c.leg == "guarantee"}
    assert (promised["one batch=1"]["sampling_rate"], promised["one batch=1"]["steps"]) == (0.001, 2000)
    assert (promised["one batch=100"]["sampling_rate"], promised["one batch=100"]["steps"]) == (0.1, 20)
    assert (promised["plain"]["sampling_rate"], promised["plain"]["steps"]) == (0.05, 40)
    trained = {c.policy: c.settings for c in found if c.leg == "utility"}
    assert [trained[name]["batch_size"] for name in ("one batch=1", "one batch=100", "plain")] == [1, 100, 50]
    assert trained["one batch=1"]["learning_rate"] == 0.001
    assert len({c.id for c in found}) == len(found)


def test_another_policys_training_changes_no_id():
    alone = cells(TWO.split("\n", 1)[1])
    assert {c.id for c in alone} < {c.id for c in cells(TWO)}


def test_the_public_rule_is_resolved_by_the_policys_own_steps():
    text = TWO.replace("learning_rate: 0.001", "learning_rate: public")
    rates = {c.policy: c.settings["learning_rate"] for c in cells(text) if c.leg == "utility"}
    assert rates == {"none": 0.0011, "one batch=1": 0.00016, "one batch=100": 0.0016, "plain": 0.0011}


BAD = {
    "another setting": ("utility: {seeds: [1]}", "5:", "utility.seeds: a policy cannot set this for itself"),
    "misspelt": ("utility: {batchsize: 1}", "5:", "did you mean 'batch_size'?"),
    "no mapping": ("utility: 3", "5:", "utility is 3, expected a mapping"),
    "bad value": ("utility: {batch_size: 0}", "5:", "batch_size: found 0, expected a whole number above 0"),
    "infinite": ("utility: {learning_rate: .inf}", "5:", "utility.learning_rate is inf, expected a finite number"),
    "not a number": ("utility: {epochs: .nan}", "5:", "utility.epochs is nan, expected a finite number"),
    "no number": ("epsilon: much", "5:", "epsilon is 'much', expected a number above 0"),
    "nothing": ("epsilon: 0", "5:", "epsilon is 0, expected a number above 0"),
    "the study's own": ("utility: {batch_size: 50}", "6:", "are the same table in the same training"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_policy_cannot_set(name):
    more, place, words = BAD[name]
    rest = "  other: {rows: [{layers: all, clip: 1}]}\nutility: {batch_size: 50}\n"
    with pytest.raises(UserError) as caught:
        read(f"  mine: {{rows: [{{layers: all, clip: 1}}], {more}}}\n{rest}")
    assert str(caught.value).startswith(f"study.yaml:{place}")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  a: {rows: [{layers: all, clip: 1}], utility: {epochs: 1}}\nleakage: {}\n", "expected a 'utility' section"),
        ("  none:\nleakage: {at: tuned}\n", "expected a 'utility' section and no federation"),
        (
            "  a: {rows: [{layers: all, clip: 1}], epsilon: 3}\nfederation: {clients: 4, per_round: 2, rounds: 3}\n",
            "expected noise in its rows",
        ),
    ],
)
def test_what_a_study_cannot_mean(text, words):
    with pytest.raises(UserError) as caught:
        read(text)
    assert words in str(caught.value)


def test_a_batch_larger_than_the_data_is_placed_at_the_policy():
    with pytest.raises(UserError) as caught:
        cells("  mine: {rows: [{layers: all, clip: 1}], utility: {batch_size: 2000}}\nutility: {}\n")
    assert "study.yaml:5:" in str(caught.value)
    assert "2000 is more than the 1000 training examples" in str(caught.value)


def test_one_set_of_numbers_under_two_names_is_one_sentence():
    rows = "rows: [{layers: all, clip: 1}]"
    text = f"  a: {{{rows}, utility: {{learning_rate: public}}}}\n  b: {{{rows}, utility: {{learning_rate: 0.0011}}}}\n"
    with pytest.raises(UserError, match="'a' and 'b' come to the same table in the same training"):
        cells(text + "utility: {epochs: 2, batch_size: 50}\n")


def test_a_placeholder_inside_a_text():
    study = read(
        "  part:\n    sweep: {block: [0, -1], role: [query, key]}\n"
        "    rows: [{layers: all, train: false, share: false},\n"
        "      {layers: 'block[$block].attention.$role', train: true, share: true}]\nleakage: {}\n"
    )
    labels = [named.label for named in study.policies[1:]]
    assert labels == [f"part block={b} role={r}" for b in (0, -1) for r in ("query", "key")]
    assert study.policies[-1].table[1]["layers"] == "block[-1].attention.key"
    with pytest.raises(UserError, match="'\\$rule' is set by no sweep; did you mean 'role'"):
        read(
            "  a: {sweep: {role: [key]}, rows: [{layers: 'block[0].$rule', share: false}, {layers: $role, clip: 1}]}\n"
        )
    with pytest.raises(UserError, match="stands inside a text and is True; expected texts or numbers"):
        read("  a: {sweep: {role: [yes]}, rows: [{layers: 'block[0].$role', share: false}]}\n")


TARGET = """\
  dp: {sweep: {eps: [1, 8]}, rows: [{layers: all, clip: 0.5}, {layers: head, clip: 0.1}], epsilon: $eps}
  late: {rows: [{layers: all, clip: 0.5}], epsilon: 3, utility: {batch_size: 64}}
utility: {epochs: 2, batch_size: 512, train_examples: 512}
privacy: {delta: 1.0e-4}
"""


def test_a_target_epsilon_becomes_noise_under_the_policys_own_steps(tmp_path):
    (tmp_path / "s.yaml").write_text(HEAD + TARGET)
    planned = plan_study(Study.load(tmp_path / "s.yaml"), tmp_path / "out", epsilons=True)
    for name, target in (("dp eps=1", 1), ("dp eps=8", 8), ("late", 3)):
        assert 0.985 * target <= planned.epsilons[name] <= target
    assert not (tmp_path / "out").exists()  # a dry run leaves nothing behind
    tables = {c.policy: c.table for c in planned.cells if c.leg == "guarantee"}
    assert [row["clip"] for row in tables["dp eps=1"]] == [0.5, 0.1]
    first, second = (tables[f"dp eps={e}"][0]["noise"] for e in (1, 8))
    assert first > second > 0
    (tmp_path / "out").mkdir()
    again = plan_study(Study.load(tmp_path / "s.yaml"), tmp_path / "out")
    assert [c.id for c in again.cells] == [c.id for c in planned.cells]
    with pytest.raises(ValueError, match="is not calibrated"):
        Study.load(tmp_path / "s.yaml").cells({}, DATA)


def test_a_target_that_no_noise_reaches_is_placed(tmp_path):
    text = "  dp: {rows: [{layers: head, clip: 0.5}], epsilon: 3}\nutility: {}\n"
    (tmp_path / "s.yaml").write_text(HEAD + text)
    with pytest.raises(UserError, match=r"s\.yaml:5:.* no noise reaches epsilon 3"):
        plan_study(Study.load(tmp_path / "s.yaml"), tmp_path, epsilons=True)


TUNED = """\
  query: block[0].attention.query
  none:
leakage: {panel: demo, attacks: [rows], targets: 2, at: [start, tuned, end], seeds: [0, 1]}
utility: {epochs: 1, batch_size: 32, train_examples: 64, seeds: [0, 1]}
"""


def test_tuned_weights_are_the_controls_and_come_first(tmp_path):
    found = cells(TUNED)
    control = next(c for c in found if (c.leg, c.policy, c.seed) == ("utility", "none", 0))
    tuned = [c for c in found if c.settings.get("at") == "tuned"]
    assert len(tuned) == 4
    assert {c.settings[NEEDS] for c in tuned} == {control.id}
    order = [c.id for c in found]
    assert all(order.index(control.id) < order.index(c.id) for c in tuned)


def test_tuned_weights_are_attacked(tmp_path):
    (tmp_path / "s.yaml").write_text(HEAD + TUNED.replace("seeds: [0, 1]", "seeds: [0]"))
    planned = plan_study(Study.load(tmp_path / "s.yaml"), tmp_path)
    results = {}
    for cell in planned.cells:
        if cell.leg == "leakage" and cell.policy == "query":
            results[cell.settings["at"]], _ = legs.execute(cell, planned.context)
    assert {at: r.status for at, r in results.items()} == dict.fromkeys(("start", "tuned", "end"), "done")
    # the control's were not there and were trained again, the policy's own as well
    needed = {c.settings[NEEDS] for c in planned.cells if NEEDS in c.settings and c.policy == "query"}
    assert [entry.what for entry in Cache(tmp_path).entries()].count("weights") == len(needed)


def test_the_factor_keeps_the_split_of_clip_and_noise(tmp_path):
    rows = "rows: [{layers: all, clip: 1, noise: 1}, {layers: head, clip: 1, noise: 3}]"
    (tmp_path / "s.yaml").write_text(
        HEAD + f"  dp: {{{rows}, epsilon: 3}}\nutility: {{batch_size: 2048}}\nprivacy: {{delta: 1.0e-4}}\n"
    )
    planned = plan_study(Study.load(tmp_path / "s.yaml"), tmp_path, epsilons=True)
    table = next(c for c in planned.cells if c.policy == "dp").table
    assert table[1]["noise"] == pytest.approx(3 * table[0]["noise"], rel=1e-3)
