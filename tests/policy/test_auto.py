"""Sweeps that look for a value: the bisection is a function of what was measured, and ends where it must."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpguard.errors import UserError
from dpguard.policy.auto import Auto, Measured, solve, step
from dpguard.policy.sweep import auto_of, expand, variant

ROWS = [{"layers": "all", "clip": 1.0, "noise": "$noise"}]


def search(auto, curve):
    """Measure whatever is asked for: (values in the order of asking, the last sentence)."""
    measured, asked = {}, []
    while True:
        now = step(auto, measured)
        if not now.ask:
            return asked, now.sentence
        for value in now.ask:
            assert value not in measured, "nothing is asked for twice"
            asked.append(value)
            measured[value] = Measured(curve(value))


@settings(max_examples=150, deadline=None)
@given(
    low=st.floats(0.001, 10), factor=st.floats(1.5, 10_000), at=st.floats(0.02, 0.98), steep=st.floats(0.2, 4),
    target=st.sampled_from(["leakage", "utility"]), rising=st.booleans(), values=st.integers(3, 14),
)  # fmt: skip
def test_a_monotone_curve_is_bracketed(low, factor, at, steep, target, rising, values):
    high = low * factor
    crossing = low * factor**at

    def curve(value):
        shape = 1 / (1 + (value / crossing) ** steep)
        return 1 - shape if rising else shape

    auto = Auto("noise", target, 0.5, low, high, values=values)
    asked, sentence = search(auto, curve)
    assert len(asked) == len(set(asked)) <= values
    assert all(low <= value <= high for value in asked)
    met = [value for value in asked if auto.met(curve(value))]
    not_met = [value for value in asked if not auto.met(curve(value))]
    kept, lost = (min(met), max(not_met)) if auto.met(curve(high)) else (max(met), min(not_met))
    assert f"noise={kept:g}" in sentence
    assert f"noise={lost:g}" in sentence
    ratio = max(kept, lost) / min(kept, lost)
    assert min(kept, lost) <= crossing * (1 + 1e-9)
    assert crossing <= max(kept, lost) * (1 + 1e-9)
    # each value after the ends halves the range on a logarithmic scale, but for the rounding to four digits
    assert ratio - 1 <= auto.within or math.log(ratio) <= math.log(factor) / 2 ** (len(asked) - 2) + 2e-3 * len(asked)
    assert "contradict" not in sentence


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=20, max_size=20), st.sampled_from(["leakage", "utility"]))
def test_any_measurements_end_and_replay_to_the_same(noise, target):
    """Resuming after any number of measurements goes on where they end."""
    auto = Auto("noise", target, 0.5, 0.01, 5.0)
    answers = iter(noise)
    known = {}

    def curve(value):
        return known.setdefault(value, next(answers))

    asked, sentence = search(auto, curve)
    assert len(asked) <= auto.values
    assert sentence
    for count in range(len(asked)):
        measured = {value: Measured(known[value]) for value in asked[:count]}
        assert step(auto, measured).ask[0] in asked[: count + 2]
    again, told = search(auto, known.__getitem__)
    assert (again, told) == (asked, sentence)


def test_the_ends_come_first_and_the_middle_is_geometric():
    auto = Auto("noise", "leakage", 0.3, 0.01, 1.0)
    assert step(auto, {}).ask == (0.01, 1.0)
    assert step(auto, {0.01: Measured(0.9)}).ask == (1.0,)
    assert step(auto, {0.01: Measured(0.9), 1.0: Measured(0.1)}).ask == (0.1,)


def test_whole_numbers_stay_whole():
    auto = Auto("bits", "leakage", 0.3, 1, 8, whole=True)
    asked, sentence = search(auto, lambda bits: bits / 16)
    assert all(value == int(value) for value in asked)
    assert sentence == "bits for leakage 0.3: bits=4 (leakage 0.25) keeps it, bits=5 (leakage 0.312) does not"


def test_a_target_outside_of_the_range_is_said():
    auto = Auto("noise", "leakage", 0.3, 0.01, 1.0)
    asked, sentence = search(auto, lambda noise: 0.5)
    assert asked == [0.01, 1.0]
    assert sentence.startswith("noise for leakage 0.3: no end of the range keeps it, noise=0.01 (leakage 0.5)")
    assert search(auto, lambda noise: 0.1)[1].startswith("noise for leakage 0.3: both ends of the range keep it")


def test_measurements_against_the_direction_are_said():
    auto = Auto("noise", "leakage", 0.3, 0.01, 1.0, values=4)
    curve = {0.01: 0.8, 1.0: 0.1, 0.1: 0.9, 0.3162: 0.2}.__getitem__
    _, sentence = search(auto, curve)
    assert sentence == (
        "noise for leakage 0.3: noise=0.3162 (leakage 0.2) keeps it, noise=0.1 (leakage 0.9) does not; all 4 values "
        "are spent; the measurements contradict that leakage falls with noise: noise=0.01 (leakage 0.8), then "
        "noise=0.1 (leakage 0.9)"
    )


def test_a_value_that_gave_nothing_ends_the_search_with_its_reason():
    auto = Auto("noise", "leakage", 0.3, 0.01, 1.0)
    measured = {0.01: Measured(0.9), 1.0: Measured(reason="out of memory")}
    assert step(auto, measured).sentence == (
        "noise for leakage 0.3: it ends at noise=1, which gave no leakage: out of memory"
    )


@settings(max_examples=80, deadline=None)
@given(scale=st.floats(0.1, 100), power=st.floats(0.5, 2), aim=st.floats(0.2, 50), rising=st.booleans())
def test_a_solved_epsilon_is_kept_and_nearly_used_up(scale, power, aim, rising):
    calls = []

    def epsilon_at(value):
        calls.append(value)
        return scale * (value**power if rising else value**-power)

    auto = Auto("noise", "epsilon", aim, 1e-4, 1e6)
    value, note = solve(auto, epsilon_at)
    if note:
        assert value in (auto.low, auto.high)
        return
    assert aim * 0.985 <= epsilon_at(value) <= aim
    assert len(calls) < 40


def test_an_epsilon_outside_of_the_range_takes_the_nearest_end():
    auto = Auto("noise", "epsilon", 1.0, 0.1, 2.0)
    value, note = solve(auto, lambda noise: 10 / noise)
    assert value == 2.0
    assert note.startswith("noise for epsilon 1: both ends of the range exceed it, noise=0.1 (epsilon 100)")
    assert solve(auto, lambda noise: 0.1 / noise)[0] == 0.1
    assert solve(auto, lambda noise: math.inf)[0] == 2.0


def test_a_search_stands_for_its_ends_and_takes_its_place_in_the_label():
    entry = {
        "rows": [{"layers": "all", "clip": "$clip", "noise": "$noise"}],
        "sweep": {"clip": [1, 2], "noise": {"auto": {"leakage": 0.3}, "between": [0.01, 5]}},
    }
    assert [found.label for found in expand("dp", entry)] == [
        "dp clip=1 noise=0.01", "dp clip=1 noise=5", "dp clip=2 noise=0.01", "dp clip=2 noise=5",
    ]  # fmt: skip
    assert auto_of("dp", entry) == Auto("noise", "leakage", 0.3, 0.01, 5.0)
    assert variant("dp", entry, {"noise": 0.3, "clip": 2}).label == "dp clip=2 noise=0.3"
    bits = {"rows": [{"layers": "all", "bits": "$b"}], "sweep": {"b": {"auto": {"utility": 0.8}, "between": [1, 8]}}}
    assert [found.values for found in expand("q", bits)] == [{"b": 1}, {"b": 8}]
    assert all(isinstance(found.policy.rows[0]["bits"], int) for found in expand("q", bits))


BAD = {
    "reversed": ({"auto": {"leakage": 0.3}, "between": [5, 1]}, ("between",), "the smaller first"),
    "from zero": ({"auto": {"leakage": 0.3}, "between": [0, 1]}, ("between",), "two numbers above 0"),
    "one number": ({"auto": {"leakage": 0.3}, "between": 3}, ("between",), "two numbers above 0"),
    "no range": ({"auto": {"leakage": 0.3}}, (), "has no 'between'"),
    "no target": ({"between": [1, 2]}, ("auto",), "expected one target, such as {leakage: 0.3}"),
    "two targets": ({"auto": {"leakage": 0.3, "utility": 1}, "between": [1, 2]}, ("auto",), "expected one target"),
    "misspelt target": ({"auto": {"leak": 0.3}, "between": [1, 2]}, ("auto", "leak"), "did you mean 'leakage'?"),
    "misspelt key": ({"auto": {"leakage": 0.3}, "betwen": [1, 2]}, ("betwen",), "did you mean 'between'?"),
    "a target beyond": ({"auto": {"leakage": 3}, "between": [1, 2]}, ("auto", "leakage"), "a number from 0 to 1"),
    "epsilon 0": ({"auto": {"epsilon": 0}}, ("auto", "epsilon"), "a number above 0"),
    "values with epsilon": ({"auto": {"epsilon": 3}, "values": 4}, ("values",), "an epsilon is computed"),
    "too few values": ({"auto": {"leakage": 0.3}, "between": [1, 2], "values": 2}, ("values",), "from 3 on"),
    "no width": ({"auto": {"leakage": 0.3}, "between": [1, 2], "within": 0}, ("within",), "a number above 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_search_that_cannot_be_meant(name):
    sweep, loc, said = BAD[name]
    with pytest.raises(UserError) as error:
        expand("x", {"rows": ROWS, "sweep": {"noise": sweep}})
    assert error.value.loc == ("sweep", "noise", *loc)
    assert said in str(error.value)


def test_two_searches_in_one_policy():
    one = {"auto": {"leakage": 0.3}, "between": [1, 2]}
    rows = [{"layers": "all", "clip": "$c", "noise": "$n"}]
    with pytest.raises(UserError, match="both 'c' and 'n' are auto; expected one a policy") as error:
        expand("x", {"rows": rows, "sweep": {"c": one, "n": one}})
    assert error.value.loc == ("sweep", "n")


def test_a_search_inside_a_text_or_for_half_a_bit():
    one = {"auto": {"leakage": 0.3}, "between": [1, 2]}
    with pytest.raises(UserError, match="stands inside a text and cannot be looked for"):
        expand("x", {"rows": [{"layers": "block[$b]", "share": False}], "sweep": {"b": one}})
    with pytest.raises(UserError, match="expected whole numbers"):
        expand("x", {"rows": [{"layers": "all", "bits": "$b"}], "sweep": {"b": {**one, "between": [1.5, 8]}}})
