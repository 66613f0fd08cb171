from __future__ import annotations

import pytest

from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy.columns import Quantile
from dpguard.policy.table import Policy
from tests import tiny

QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.fixture(scope="module")
def bert():
    return slots(tiny.module("bert"))


def plan(rows, found):
    return Policy(rows).plan(found)


def test_later_rows_override_column_by_column(bert):
    found = plan([{"layers": "all", "clip": 1.0, "noise": 0.5}, {"layers": "block[1]", "noise": 2.0}], bert)
    assert (found[QUERY].clip, found[QUERY].noise) == (1.0, 2.0)
    assert found["classifier.weight"].noise == 0.5


def test_a_clip_group_is_what_one_row_clipped_last(bert):
    found = plan(
        [
            {"layers": "all", "clip": 1.0, "noise": 1.0},
            {"layers": "block[1]", "clip": 0.5, "per": "tensor"},
            {"layers": "head", "noise": 3.0},
        ],
        bert,
    )
    groups = found.groups
    assert "classifier.weight" in groups["row 1"].names, "overriding only noise leaves the group as it is"
    assert found[QUERY].group == f"row 2 {QUERY}"
    assert all(len(g.names) == 1 and g.clip == 0.5 for key, g in groups.items() if key != "row 1")


@pytest.mark.parametrize(
    ("per", "count"),
    [("row", 1), ("block", 6), ("role", 13), ("tensor", 57)],
)
def test_per(bert, per, count):
    found = plan([{"layers": "all", "clip": 1.0, "per": per}], bert)
    assert len(found.groups) == count
    assert sorted(n for g in found.groups.values() for n in g.names) == sorted(found.trained)


def test_per_block_puts_embeddings_pooler_and_head_in_groups_of_their_own(bert):
    found = plan([{"layers": "all", "clip": 1.0, "per": "block"}], bert)
    assert [g.removeprefix("row 1 ") for g in found.groups] == [
        "embeddings", "block[0]", "block[1]", "block[2]", "pooler", "head",
    ]  # fmt: skip


def test_frozen_is_what_the_policy_or_the_model_freezes():
    model = tiny.module("bert")
    model.classifier.bias.requires_grad_(False)
    found = plan([{"layers": "embeddings", "train": False}], slots(model))
    assert not found["classifier.bias"].train
    assert not any("embeddings" in name for name in found.trained)
    assert not set(found.shared) - set(found.trained)


def test_shared_fraction_counts_shared_parameters_and_ignores_keep_and_bits(bert):
    everything = sum(s.size for s in bert)
    part = sum(s.size for s in bert if s.block == 1 and s.role == "query")
    rows = [
        {"layers": "all", "share": False},
        {"layers": "block[1].attention.query", "share": True, "keep": 0.1, "bits": 4},
    ]
    assert plan(rows, bert).shared_fraction == pytest.approx(part / everything)


def test_a_tied_tensor_is_one_tensor():
    found = slots(tiny.module("gpt2-lm"))
    tied = [s for s in found if s.tied_to]
    assert [(s.name, s.tied_to) for s in tied] == [("lm_head.weight", "transformer.wte.weight")]
    one = plan([{"layers": "head", "share": False}], found)
    assert not one["transformer.wte.weight"].share
    assert "lm_head.weight" not in one
    with pytest.raises(UserError, match="one tied tensor"):
        plan([{"layers": "embeddings", "clip": 1.0}, {"layers": "head", "clip": 2.0}], found)
    both = plan([{"layers": "all", "clip": 1.0}, {"layers": "head", "clip": 2.0}], found)
    assert both["transformer.wte.weight"].clip == 2.0, "a row that names both names is simply overridden"


@pytest.mark.parametrize(
    ("rows", "loc", "said"),
    [
        ([{"layers": "all", "noise": 1.0}], ("rows", 0, "noise"), "without a clip"),
        (
            [{"layers": "all", "clip": 1.0, "noise": 1.0, "noise_std": 0.1}],
            ("rows", 0, "noise_std"),
            "expected one of them",
        ),
        (
            [{"layers": "all", "clip": 1.0, "noise": 1.0}, {"layers": "head", "noise_std": 0.1}],
            ("rows", 1, "noise_std"),
            "expected one of them",
        ),
        ([{"layers": "all", "layres": 1}], ("rows", 0, "layres"), "did you mean 'layers'?"),
        ([{"layers": "all", "keep": 1.5}], ("rows", 0, "keep"), "above 0 and at most 1"),
        ([{"layers": "all", "clip": False}], ("rows", 0, "clip"), "is False; expected a number above 0"),
        ([{"layers": "all", "clip": -1}], ("rows", 0, "clip"), "a number above 0"),
        (
            [{"layers": "all", "clip": 1e308}],
            ("rows", 0, "clip"),
            "is 1e+308; expected a number above 0 and at most 1e+12",
        ),
        (
            [{"layers": "all", "clip": 1.0, "noise": "1.0e+160"}],
            ("rows", 0, "noise"),
            "expected a number at least 0 and at most 1e+12",
        ),
        ([{"layers": "all", "noise_std": 1e13}], ("rows", 0, "noise_std"), "at most 1e+12"),
        ([{"layers": "all", "clip": {"quantile": 0.5, "start": 1e13}}], ("rows", 0, "clip", "start"), "at most 1e+12"),
        ([{"layers": "all", "clip": {"quantil": 0.5}}], ("rows", 0, "clip", "quantil"), "did you mean 'quantile'?"),
        ([{"layers": "all", "clip": {"start": 1}}], ("rows", 0, "clip"), "a mapping with 'quantile'"),
        ([{"layers": "all", "clip": {"quantile": 1}}], ("rows", 0, "clip", "quantile"), "above 0 and below 1"),
        (
            [{"layers": "all", "clip": {"quantile": 0.5, "count_noise": 0}}],
            ("rows", 0, "clip", "count_noise"),
            "setting 'count_noise' is 0",
        ),
        (
            [{"layers": "all", "clip": {"quantile": 0.5}, "mode": "normalise"}],
            ("rows", 0, "mode"),
            "whatever the norms are",
        ),
        ([{"layers": "all", "clip": {"quantile": 0.5}, "unit": "update"}], ("rows", 0, "unit"), "nothing to count"),
        (
            [{"layers": "all", "clip": 1.0, "unit": "update"}, {"layers": "head", "clip": 0.5}],
            ("rows", 1, "clip"),
            "expected one unit",
        ),
        (
            [{"layers": "all", "clip": 1.0}, {"layers": "head", "clip": 0.5, "unit": "update"}],
            ("rows", 1, "unit"),
            "expected one unit",
        ),
        (
            [{"layers": "all", "clip": 1.0, "mode": "normalise"}, {"layers": "all", "clip": 2.0}],
            ("rows", 0),
            "later rows override all of it",
        ),
        ([{"layers": "all", "clip": 1.0, "unit": "updates"}], ("rows", 0, "unit"), "did you mean 'update'?"),
        ([{"layers": "all", "clip": 1.0, "mode": "scale"}], ("rows", 0, "mode"), "expected one of: clip, normalise"),
        ([{"layers": "all", "per": "block"}], ("rows", 0, "per"), "per without clip"),
        ([{"layers": "all", "prune": "random"}], ("rows", 0, "prune"), "prune without keep"),
        ([{"layers": "all", "bits": 2.5}], ("rows", 0, "bits"), "a whole number"),
        ([{"layers": "all"}], ("rows", 0), "sets no column"),
        ([{"clip": 1.0}], ("rows", 0), "has no 'layers'"),
        ([{"layers": "all", "release": "swap"}], ("rows", 0, "release"), "unknown release operation 'swap'"),
        ([{"layers": ["all", "hed"], "clip": 1.0}], ("rows", 0, "layers", 1), "did you mean 'head'?"),
        (
            [{"layers": "all", "clip": 1.0}, {"layers": "all", "clip": 2.0}],
            ("rows", 0),
            "later rows override all of it",
        ),
        (
            [{"layers": "embeddings", "train": False}, {"layers": "embeddings", "clip": 1.0}],
            ("rows", 1),
            "frozen or withheld",
        ),
        ([{"layers": "head", "share": False}, {"layers": "head", "bits": 4}], ("rows", 1), "frozen or withheld"),
    ],
)
def test_a_row_that_cannot_be_meant_is_one_sentence_with_its_place(bert, rows, loc, said):
    with pytest.raises(UserError) as error:
        plan(rows, bert)
    assert error.value.loc == loc
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_to_frame_has_a_row_a_tensor(bert):
    frame = plan([{"layers": "all", "clip": 1.0, "noise": 0.5}], bert).to_frame()
    assert len(frame) == len(bert)
    assert frame["fraction"].sum() == pytest.approx(1.0)
    assert set(frame["noise"]) == {0.5}


def test_hash_changes_with_any_rule(bert):
    hashes = {
        plan(rows, bert).hash for rows in ([], [{"layers": "all", "keep": 0.5}], [{"layers": "all", "keep": 0.6}])
    }
    assert len(hashes) == 3


def test_a_policy_does_not_change_with_the_list_it_was_made_of(bert):
    rows = [{"layers": "all", "clip": 1.0}]
    policy = Policy(rows)
    rows[0]["clip"] = 9.0
    assert policy.plan(bert)[QUERY].clip == 1.0


HASHES = {
    "none": "ee32522a9716fdfa",
    "dp-sgd": "20e695dd08e7caa7",
    "clip-only": "22ca78bf54ce3101",
    "prune": "7abd67094b4e55da",
    "last-block": "5c4f4e44c8b68e2e",
    "upper-blocks": "64e832c7fd7235d4",
    "no-embeddings": "762b8f98cb5409bd",
    "head-only": "5c24e6282528cc93",
    "block[0].attention.query": "0f433e282184bb2b",
}


@pytest.mark.parametrize("name", HASHES)
def test_hashes_of_plans_stay_what_records_were_written_with(bert, name):
    assert Policy.load(name).plan(bert).hash == HASHES[name]


def test_hash_changes_with_every_setting_of_a_quantile_and_with_mode_and_unit(bert):
    clips = [1.0, {"quantile": 0.5}, {"quantile": 0.6}, {"quantile": 0.5, "start": 2}, {"quantile": 0.5, "rate": 0.1},
             {"quantile": 0.5, "count_noise": 5}]  # fmt: skip
    rows = [[{"layers": "all", "clip": clip, "noise": 1.0}] for clip in clips]
    rows += [[{"layers": "all", "clip": 1.0, "noise": 1.0, **m}] for m in ({"mode": "normalise"}, {"unit": "update"})]
    assert len({plan(r, bert).hash for r in rows}) == len(rows)


def test_an_adaptive_clip_starts_where_it_says_and_belongs_to_its_group(bert):
    found = plan(
        [{"layers": "all", "clip": {"quantile": 0.5, "start": 3}, "per": "block"}, {"layers": "head", "clip": 1.0}],
        bert,
    )
    assert found[QUERY].clip == 3.0
    assert found[QUERY].quantile == Quantile(0.5, start=3.0, rate=0.2, count_noise=10.0)
    assert found["classifier.weight"].quantile is None
    assert {key: group.quantile is None for key, group in found.groups.items()}["row 1 block[1]"] is False
    assert found.groups["row 2"].quantile is None


def test_mode_and_unit_go_with_the_row_that_set_the_clip(bert):
    rows = [{"layers": "block[0]", "clip": 1.0, "mode": "normalise"}, {"layers": ["block[0].mlp", "head"], "clip": 2.0}]
    found = plan(rows, bert)
    assert {rule.mode for rule in found.groups["row 2"].rules} == {"clip"}
    assert {rule.mode for rule in found.groups["row 1"].rules} == {"normalise"}
    assert plan([{"layers": "all", "clip": 1.0, "unit": "update"}], bert).unit == "update"
    assert found.unit == "example"


def test_with_clips_moves_the_bounds_and_the_noise_of_named_groups_alone(bert):
    rows = [{"layers": "all", "clip": {"quantile": 0.5}, "noise": 2.0, "per": "block"}]
    before = plan(rows, bert)
    after = before.with_clips({"row 1 block[1]": 0.25})
    assert after[QUERY].clip == 0.25
    assert after[QUERY].std(8) == 0.5
    assert after["classifier.weight"] == before["classifier.weight"]
    assert {k: g.names for k, g in after.groups.items()} == {k: g.names for k, g in before.groups.items()}
    assert before[QUERY].clip == 1.0
    assert after.hash != before.hash
    with pytest.raises(UserError, match="did you mean 'row 1 block"):
        before.with_clips({"row 1 block[7]": 1.0})
    with pytest.raises(UserError, match="a number above 0"):
        before.with_clips({"row 1 head": 0.0})


def test_the_noise_of_a_whole_update_is_in_wire_units(bert):
    one = plan([{"layers": "all", "clip": 0.5, "noise": 2.0}], bert)[QUERY]
    whole = plan([{"layers": "all", "clip": 0.5, "noise": 2.0, "unit": "update"}], bert)[QUERY]
    assert one.std(16) == 1.0
    assert whole.std(16) / 16 == 1.0
