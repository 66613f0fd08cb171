"""A policy's table in plain English: every column is said, and what is not in the table is not."""

import pytest

from dpguard.policy.columns import COLUMNS
from dpguard.policy.ready import READY
from dpguard.report.words import WHOLE, in_words

CLIPPED = "Everything is shared. Each example's gradient is "
SAID = {
    "train": ({"train": False}, "Everything is shared, except as follows. The head: frozen, so that there is"),
    "share": ({"share": False}, "The head: not shared, so that what is trained there stays with the client."),
    "clip": ({"clip": 2.0}, "In the head, each example's gradient is scaled down to norm 2."),
    "per": ({"clip": 1, "per": "block"}, "scaled down to norm 1, for every block by itself."),
    "mode": ({"clip": 1, "mode": "normalise"}, "each example's gradient is scaled to exactly norm 1."),
    "unit": ({"clip": 1, "unit": "update", "noise": 2}, "the client's whole update is scaled down to norm 1, and noise "
             "of 2 times that is added to it."),
    "noise": ({"clip": 1, "noise": 0.6}, "norm 1, and noise of 0.6 times that is added to the sum."),
    "noise_std": ({"noise_std": 0.01}, "noise of standard deviation 0.01 is added to every number sent, which by "
                  "itself guarantees nothing."),
    "keep": ({"keep": 0.05}, "only the largest 5 % of the numbers are sent."),
    "prune": ({"keep": 0.1, "prune": "random"}, "only a random 10 % of the numbers are sent, picked in public."),
    "bits": ({"bits": 4}, "each number is sent in 4 bits."),
    "release": ({"release": {"mine": 3}}, "before it is sent it goes through mine: 3."),
}  # fmt: skip


def words(*rows):
    return " ".join(in_words(rows))


def test_every_column_has_its_words():
    assert set(SAID) == set(COLUMNS)


@pytest.mark.parametrize("column", SAID)
def test_a_column_is_said(column):
    row, expected = SAID[column]
    assert expected in words({"layers": "head", **row})


def test_the_recommended_policy_of_the_demo_reads_as_one_would_say_it():
    assert words({"layers": "all", "clip": 1.0, "noise": 0.6}) == (
        CLIPPED + "scaled down to norm 1, and noise of 0.6 times that is added to the sum."
    )
    assert words() == WHOLE
    assert words({"layers": "all", "bits": 1}) == "Everything is shared. Of each number only the sign is sent."


def test_parts_that_override_the_whole_say_so():
    told = words(
        {"layers": "all", "clip": 1.0, "noise": 0.8, "per": "block"},
        {"layers": ["embeddings", "block[0:3]"], "share": False, "train": False},
        {"layers": "block[3].mlp", "clip": 0.5},
        {"layers": "head", "noise": 0},
    )
    assert told == (
        "Everything is shared, except as follows. Each example's gradient is scaled down to norm 1, for every block by "
        "itself, and noise of 0.8 times that is added to the sum. The embeddings and blocks 0 to 2: neither trained "
        "nor shared. In mlp of block 3 instead, each example's gradient is scaled down to norm 0.5, and noise of 0.8 "
        "times that is added to the sum. In the head instead, no noise is added."
    )


def test_shares_of_the_blocks():
    told = words({"layers": ["block[0:25%]", "block[75%:].mlp"], "share": False}, {"layers": "block[*].mlp", "bits": 1})
    assert "The lower 25 % of the blocks and mlp of the upper 25 % of the blocks: not shared" in told
    assert "In mlp of every block, of each number only the sign is sent." in told


def test_sharing_one_part_alone():
    told = words({"layers": "all", "share": False, "train": False}, {"layers": "head", "share": True, "train": True})
    assert told == "Nothing is trained or shared, except as follows. The head: trained and shared."


def test_a_clip_that_follows_a_quantile():
    told = words({"layers": "all", "clip": {"quantile": 0.5, "start": 2.0}, "noise": 1})
    assert "a norm that is moved so that a share of 0.5 of the examples is below it (from 2, at rate 0.2" in told
    assert told.endswith("and noise of 1 times that is added to the sum.")


@pytest.mark.parametrize("name", READY)
def test_ready_made_policies_have_words(name):
    told = in_words(READY[name].rows)
    assert told
    assert all(line[0].isupper() and line.endswith(".") for line in told)


def test_what_is_hostile_stays_text():
    told = words({"layers": "name:a\u202eb", "release": "x\x07"})
    assert "[U+202E]" in told
    assert "[U+0007]" in told
