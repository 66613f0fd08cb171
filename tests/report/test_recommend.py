"""The decision: caps hold at the bad end, dominated policies change nothing, and silence where nothing is known."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpguard.errors import UserError
from dpguard.report.frontier import Frontier, Gap, Measure, Row, frontier
from dpguard.report.recommend import Caps, moved_cap, recommend
from dpguard.stats import Interval
from tests.report.made_up_study import sample

FLOOR = Interval(0.1, 0.08, 0.15, 50)
CONTROL = Row(
    "none", leakage=Interval(0.98, 0.95, 1.0, 50), utility=Interval(0.9, 0.88, 0.92, 400), epsilon=math.inf,
    attack="span", attacks=("prior", "span"), rows=1,
)  # fmt: skip
share = st.floats(0, 1).map(lambda x: round(x, 2))


def policy(name, leakage, utility, epsilon=4.0, rows=1):
    """A row of which only the bad ends matter."""
    return Row(
        name, leakage=Interval(leakage, 0.0, leakage, 50), utility=Interval(utility, utility, 1.0, 400),
        epsilon=epsilon, attack="span", attacks=("prior", "span"), rows=rows,
    )  # fmt: skip


def board(*rows, floor=FLOOR, control=CONTROL):
    return Frontier((control, *rows) if control else rows, "rougeL", "accuracy", floor)


@st.composite
def boards(draw):
    count = draw(st.integers(0, 6))
    epsilons = st.one_of(st.just(math.inf), st.floats(0.1, 50).map(lambda x: round(x, 1)))
    rows = [policy(f"p{n}", draw(share), draw(share), draw(epsilons), draw(st.integers(1, 3))) for n in range(count)]
    return board(*(replace(row, columns=draw(st.integers(0, 3))) for row in rows))


caps_of = st.fixed_dictionaries(
    {},
    optional={"max_leakage": share, "min_utility": share, "max_epsilon": st.floats(0.5, 60)},
)


@given(boards(), caps_of)
@settings(max_examples=300, deadline=None)
def test_a_recommendation_never_breaks_a_cap_at_the_bad_end(table, caps):
    got = recommend(table, **caps)
    if got.verdict != "recommended":
        return
    row = table.row(got.policy)
    assert row.leakage.high <= caps.get("max_leakage", 1)
    assert row.utility.low >= caps.get("min_utility", 0)
    assert row.epsilon <= caps.get("max_epsilon", math.inf)


@given(boards(), caps_of)
@settings(max_examples=300, deadline=None)
def test_none_qualifies_exactly_when_none_does(table, caps):
    def keeps(row):
        return (
            row.leakage.high <= caps.get("max_leakage", 1)
            and row.utility.low >= caps.get("min_utility", 0)
            and row.epsilon <= caps.get("max_epsilon", math.inf)
        )

    got = recommend(table, **caps)
    if not caps:
        assert (got.verdict, got.policy) == ("no caps", "")
    elif any(keeps(row) for row in table.rows):
        assert got.verdict == "recommended"
    else:
        assert (got.verdict, got.policy) == ("none qualifies", "")
        assert "nearest miss" in got.sentence


@given(boards(), caps_of, st.data())
@settings(max_examples=400, deadline=None)
def test_a_dominated_policy_never_changes_the_choice(table, caps, data):
    better = data.draw(st.sampled_from(table.rows))
    worse = data.draw(st.tuples(share, share, st.floats(0, 9).map(lambda x: round(x, 1))))
    if worse == (0, 0, 0):
        return
    added = policy(
        "dominated", min(1.0, better.leakage.high + worse[0]), better.utility.low - worse[1],
        better.epsilon + worse[2], rows=data.draw(st.integers(0, 3)),
    )  # fmt: skip
    same = (added.leakage.high, added.utility.low, added.epsilon)
    if same == (better.leakage.high, better.utility.low, better.epsilon):
        return
    place = data.draw(st.integers(1, len(table.rows)))
    rows = (*table.rows[:place], added, *table.rows[place:])
    assert recommend(replace(table, rows=rows), **caps).policy == recommend(table, **caps).policy


@given(boards(), share)
@settings(max_examples=150, deadline=None)
def test_among_those_under_the_caps_the_most_useful_wins(table, cap):
    got = recommend(table, max_leakage=cap)
    if got.verdict == "recommended":
        fit = [row.utility.low for row in table.rows if row.leakage.high <= cap]
        assert table.row(got.policy).utility.low == pytest.approx(max(fit), abs=1e-3)


def test_ties_go_to_the_shorter_table():
    table = board(policy("long", 0.2, 0.8, rows=3), policy("short", 0.25, 0.8, epsilon=3.0, rows=1))
    got = recommend(table, max_leakage=0.3)
    assert got.policy == "short"
    assert any("as useful to three digits, and its table has 3 rows, not 1" in line for line in got.why)
    wide = replace(policy("wide", 0.2, 0.8), columns=4)
    slim = replace(policy("slim", 0.25, 0.8, epsilon=3.0), columns=2)
    assert recommend(board(wide, slim), max_leakage=0.3).policy == "slim"


def test_the_sentence_names_the_bad_ends():
    got = recommend(board(policy("calm", 0.2, 0.8)), max_leakage=0.3, min_utility=0.5, max_epsilon=8)
    assert got.sentence == ("Use calm: accuracy is at least 0.800, leakage (ROUGE-L) at most 0.200, and epsilon is 4.")
    assert any("0.100 under the cap" in line for line in got.why)
    assert any("No other policy keeps every cap" in line for line in got.why)


@pytest.mark.parametrize(("metric", "by_client", "worth", "said"), [
    ("accuracy", False, 0.5, "always answering the commonest class reaches accuracy 0.500."),
    ("accuracy", True, 0.4, "always answering each client's own commonest class reaches accuracy 0.500."),
    ("accuracy", True, 0.51, ""),
    ("mcc", False, 0.0, "always answering the commonest class reaches Matthews correlation 0.000."),
    ("mcc", False, 0.01, ""),
    ("f1", False, 0.5, "always answering one class reaches F1 0.500."),
    ("f1", False, 0.51, ""),
])  # fmt: skip
def test_a_policy_that_may_have_learnt_nothing_is_named_with_a_caution(metric, by_client, worth, said):
    table = replace(board(policy("idle", 0.2, worth)), utility_metric=metric, majority=0.5, by_client=by_client)
    got = recommend(table, max_leakage=0.3)
    assert got.policy == "idle"
    assert got.caution == (f"But it is not shown to have learnt anything: {said}" if said else "")
    assert got.sentence.endswith(got.caution)


def weak(*rows, low=0.45, majority=0.5, **settings):
    """A study whose undefended control is not shown to beat always answering one class."""
    control = replace(CONTROL, utility=Interval(max(low, 0.5), low, 1.0, 9))
    return replace(board(*rows, control=control), majority=majority, **settings)


def test_utility_that_cannot_tell_the_control_from_an_idle_answer_has_no_power_whatever_is_decided():
    told = (
        "Utility has no power here: without any defence accuracy may be as low as 0.450, where always answering the "
        "commonest class reaches 0.500."
    )
    nothing = " What is chosen would not be shown to have learnt anything."
    table = weak(policy("calm", 0.35, 0.3), policy("bold", 0.4, 0.48))
    got = recommend(table, max_leakage=0.3)
    assert (got.verdict, got.caution) == ("none qualifies", told + nothing)
    assert got.sentence == f"{got.answer} {got.caution}"
    assert got.answer.startswith("None qualifies")
    assert got.answer.endswith("too much).")
    assert got.sensitivity == (
        "With leakage at most 0.350, calm would be chosen, which is not shown to have learnt anything.",
        "Utility has no power here, whatever the caps.",
    )
    assert recommend(table).sentence.endswith(f"is the answer. {told}{nothing}")
    chosen = recommend(table, max_leakage=0.36)
    assert chosen.policy == "calm"
    assert chosen.caution == f"{told} It is not shown to have learnt anything."
    assert "bold would be chosen, which is not shown to have learnt anything." in chosen.sensitivity[0]
    assert chosen.sensitivity[-1] == "Utility has no power here, whatever the caps."
    lucky = recommend(weak(policy("lucky", 0.2, 0.6)), max_leakage=0.3)
    assert (lucky.policy, lucky.caution) == ("lucky", told)


def test_test_texts_of_one_class_prove_nothing_of_utility():
    got = recommend(weak(policy("calm", 0.4, 0.9), low=0.9, majority=1.0), max_leakage=0.3)
    assert "always answering the commonest class reaches 1.000 (all test texts are of one class)." in got.caution
    own = weak(policy("calm", 0.4, 0.9), low=0.9, majority=1.0, by_client=True)
    assert "(all test texts" not in recommend(own, max_leakage=0.3).caution
    matthews = weak(policy("calm", 0.4, 0.1), low=-0.1, majority=None, utility_metric="mcc")
    assert "Matthews correlation may be as low as −0.100" in recommend(matthews, max_leakage=0.3).caution


def test_what_another_cap_would_admit_is_said_to_have_learnt_nothing():
    table = replace(board(policy("idle", 0.35, 0.5), policy("mute", 0.05, 0.4)), majority=0.5)
    [line] = recommend(table, max_leakage=0.3, min_utility=0.45).sensitivity[:1]
    assert line.endswith("idle would be chosen, which is not shown to have learnt anything.")
    table = replace(board(policy("good", 0.25, 0.8), policy("mute", 0.05, 0.4)), majority=0.5)
    got = recommend(table, max_leakage=0.3, min_utility=0.6)
    assert (got.policy, got.caution) == ("good", "")
    assert any("mute has both, which is not shown to have learnt anything." in line for line in got.sensitivity)


def test_relaxing_a_cap_says_what_it_would_gain():
    table = board(policy("calm", 0.2, 0.6), policy("bold", 0.35, 0.85), policy("hush", 0.05, 0.4))
    got = recommend(table, max_leakage=0.3, min_utility=0.5)
    assert got.policy == "calm"
    assert got.sensitivity == (
        "With 5.0 points more leakage (a cap of 0.350) you would gain 25.0 points of accuracy: bold would be chosen.",
        "15.0 points less leakage would cost 20.0 points of accuracy: hush has both.",
        "The choice stays the same for leakage caps from 0.200 to just under 0.350.",
    )
    fixed = recommend(board(policy("calm", 0.2, 0.6), policy("bold", 0.35, 0.95)), max_leakage=0.9)
    assert fixed.sensitivity[-1] == "The choice stays the same for any leakage cap from 0.350 up."
    strict = recommend(table, min_utility=0.5)
    assert strict.policy == "calm"
    assert (
        "Accepting 20.0 points less accuracy (at least 0.400) would bring leakage down by 15.0 points: "
        "hush would be chosen." in strict.sensitivity
    )


CLAIM = re.compile(r"\(a cap of ([\d.]+)\) you would gain ([\d.]+) points of accuracy: (\w+) would be chosen")


@given(boards(), share, share)
@settings(max_examples=200, deadline=None)
def test_what_a_relaxed_cap_is_said_to_change_it_changes(table, leak, worth):
    got = recommend(table, max_leakage=leak, min_utility=worth)
    if got.verdict != "recommended":
        return
    for cap, gain, name in CLAIM.findall(" ".join(got.sensitivity)):
        other = recommend(table, max_leakage=float(cap), min_utility=worth)
        assert other.policy == name
        gained = table.row(name).utility.low - table.row(got.policy).utility.low
        assert gained == pytest.approx(float(gain) / 100, abs=6e-4)
    [steady] = [line for line in got.sensitivity if line.startswith("The choice stays")]
    least, *until = map(float, re.findall(r"\d\.\d{3}", steady))
    for cap in (least, max(least, until[0] - 0.001) if until else 1.0):
        assert recommend(table, max_leakage=cap, min_utility=worth).policy == got.policy


@given(boards(), caps_of, st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_the_order_of_the_policies_never_matters(table, caps, random):
    rows = list(table.rows)
    random.shuffle(rows)
    assert recommend(replace(table, rows=tuple(rows)), **caps) == recommend(table, **caps)


def test_ends_are_told_so_that_they_hold_and_can_be_asked_for():
    """Rounded to the nearest digit an end is no end: asking for what was printed found nothing."""
    rows = board(policy("one", 0.27946, 0.79875))
    got = recommend(rows, max_leakage=0.5, min_utility=0.5)
    assert "is at least 0.798, leakage (ROUGE-L) at most 0.280" in got.sentence
    assert recommend(rows, max_leakage=0.28, min_utility=0.798).policy == "one"
    near = recommend(board(policy("near", 0.3 + 1e-9, 0.8)), max_leakage=0.3)
    assert "leakage of up to 0.301 (less than 0.001 too much)" in near.sentence
    assert "With leakage at most 0.301, near would be chosen." in near.sensitivity


def test_where_nothing_was_measured_in_full_no_policy_is_said_to_break_a_cap():
    rows, control = [replace(policy("low", 0.2, 0.9), utility=None)], replace(CONTROL, utility=None)
    found = recommend(board(*rows, control=control), max_leakage=0.7)
    assert (found.policy, found.sentence[:27]) == ("", "Nothing can be recommended:")


def test_nearest_miss_is_in_words():
    got = recommend(board(policy("near", 0.34, 0.8), policy("far", 0.6, 0.8)), max_leakage=0.3, min_utility=0.7)
    assert got.verdict == "none qualifies"
    assert "The nearest miss is near, for its leakage of up to 0.340 (0.040 too much)." in got.sentence
    both = recommend(board(policy("off", 0.34, 0.6, 30.0)), max_leakage=0.3, min_utility=0.95, max_epsilon=10)
    assert "its leakage of up to 0.340 (0.040 too much) and its accuracy of only 0.600 (0.350 too" in both.sentence
    assert both.sentence.endswith("and its epsilon of 30.")
    assert both.sensitivity == ()
    assert got.sensitivity == ("With leakage at most 0.340, near would be chosen.",)


def test_of_equally_near_misses_the_most_useful_is_named():
    """All leak what a guess does, and 0.43 is what ten targets allow: the one that learned nothing was named."""
    rows = [policy(f"dp {k}", 0.43, worth, float(k)) for k, worth in ((1, 0.5), (8, 0.75), (20, 0.78))]
    got = recommend(board(*rows), max_leakage=0.3, max_epsilon=8)
    assert "The nearest miss is dp 8, for its leakage of up to 0.430 (0.130 too much)." in got.sentence
    assert got.sensitivity == ("With leakage at most 0.430, dp 8 would be chosen.",)
    few = recommend(board(replace(rows[1], leakage=Interval(0.18, 0.12, 0.43, 10))), max_leakage=0.3, max_epsilon=8)
    assert few.sentence.endswith(" Its mean is 0.180 on 10 targets: more of them narrow the interval.")


def test_without_caps_there_is_only_the_frontier():
    assert recommend(board(policy("calm", 0.2, 0.8))).verdict == "no caps"


def test_a_utility_floor_alone_takes_the_least_leaking():
    table = board(policy("calm", 0.2, 0.75), policy("quiet", 0.12, 0.72), policy("useless", 0.1, 0.3))
    assert recommend(table, min_utility=0.7).policy == "quiet"


@pytest.mark.parametrize("reached", [Interval(0.4, 0.3, 0.5, 50), Interval(0.12, 0.1, 0.2, 50)])
def test_an_attack_that_does_not_recover_the_control_concludes_nothing(reached):
    table = board(policy("calm", 0.05, 0.8), control=replace(CONTROL, leakage=reached))
    got = recommend(table, max_leakage=0.3)
    assert (got.verdict, got.policy) == ("no power", "")
    assert "This attack has no power here; nothing can be concluded." in got.sentence


def test_a_floor_as_high_as_the_ceiling_concludes_nothing():
    table = board(policy("calm", 0.05, 0.8), floor=Interval(0.9, 0.8, 0.95, 50))
    assert recommend(table, max_leakage=0.3).verdict == "no power"


def test_a_control_that_failed_concludes_nothing_and_says_why():
    lost = replace(CONTROL, leakage=None, gaps=(Gap("none", "leakage", "failed", "the disk was full"),))
    got = recommend(board(policy("calm", 0.1, 0.8), control=lost), max_leakage=0.3)
    assert got.verdict == "no control"
    assert "the disk was full" in got.sentence
    assert recommend(board(control=None), max_leakage=0.3).verdict == "no control"
    assert recommend(board(policy("calm", 0.1, 0.8), floor=None), max_leakage=0.3).verdict == "no control"


def test_a_policy_that_was_not_measured_in_full_is_never_chosen():
    whole = policy("calm", 0.2, 0.8)
    holes = [replace(whole, policy=f"without {leg}", **{leg: None}) for leg in ("leakage", "utility", "epsilon")]
    assert recommend(board(*holes), max_leakage=0.3).verdict == "none qualifies"
    assert recommend(board(*holes, whole), max_leakage=0.3).policy == "calm"


def test_a_policy_above_its_bound_stops_every_recommendation():
    whole = Measure("exact_match", Interval(0.9, 0.7, 1.0, 50), bound=0.2, proven=0.6)
    table = board(replace(policy("calm", 0.2, 0.8), measures={"exact_match": whole}), policy("other", 0.2, 0.8))
    got = recommend(table, max_leakage=0.3)
    assert (got.verdict, got.policy) == ("bound broken", "")
    assert got.sentence.startswith("Nothing is recommended: calm gave away more than the guarantee allows")
    kept = board(replace(policy("calm", 0.2, 0.8), measures={"exact_match": replace(whole, proven=0.19)}))
    assert recommend(kept, max_leakage=0.3).policy == "calm"
    assert any(
        "gives a text away whole with chance at most" in line
        for line in recommend(
            board(replace(policy("calm", 0.2, 0.8), measures={"exact_match": replace(whole, proven=0.1, upper=0.001)})),
            max_leakage=0.3,
        ).why
    )


def test_policies_that_could_not_be_considered_are_named():
    lost = replace(policy("lost", 0.1, 0.9), leakage=None)
    for cap in (0.3, 0.01):
        got = recommend(board(policy("calm", 0.2, 0.8), lost), max_leakage=cap)
        assert "1 policy was not measured in full and could not be considered: lost (no leakage)." in got.why


def test_what_is_not_protected_is_said():
    bare = replace(policy("bare", 0.2, 0.8, epsilon=math.inf), leakage=Interval(0.19, 0.15, 0.2, 50))
    limits = " ".join(recommend(board(bare), max_leakage=0.3).limits)
    assert "no formal guarantee" in limits
    assert "Something still leaks" in limits
    untried = replace(policy("untried", 0.2, 0.8), attacks=("prior",))
    assert "No attack but the guess" in " ".join(recommend(board(untried), max_leakage=0.3).limits)


@pytest.mark.parametrize(
    "caps", [{"max_leakage": 1.5}, {"max_leakage": math.nan}, {"max_epsilon": -1.0}, {"min_utility": True}]
)
def test_caps_that_cannot_be_meant(caps):
    with pytest.raises(UserError, match="expected a number from"):
        recommend(board(), **caps)


def test_caps_of_a_study_file():
    assert Caps.read({}) == Caps()
    assert Caps.read({"recommend": {"max_leakage": 0.2, "min_utility": None}}) == Caps(max_leakage=0.2)
    with pytest.raises(UserError, match="did you mean 'max_leakage'"):
        Caps.read({"recommend": {"max_leakge": 0.2}})


def test_the_made_up_study_has_a_recommendation():
    got = recommend(frontier(sample(50)), max_leakage=0.32, min_utility=0.7, max_epsilon=20)
    assert got.verdict == "recommended"
    assert got.policy == "dp-sgd noise=0.6"


def test_a_cap_that_was_set_for_another_metric_says_so():
    spec = {"leakage": {"metric": "rougeL"}}
    told = moved_cap(spec, "exact_match", Caps(max_leakage=0.3))
    assert told.startswith("The cap on leakage, 0.3, was set in the study for ROUGE-L; here it is applied to exact")
    assert not moved_cap(spec, "rougeL", Caps(max_leakage=0.3))
    assert not moved_cap(spec, "exact_match", Caps(min_utility=0.7))


def test_a_policy_that_no_attack_could_read_is_named_with_a_caution():
    got = recommend(board(replace(policy("blind", 0.2, 0.7), attack="prior", attacks=("prior",))), max_leakage=0.3)
    assert got.policy == "blind"
    assert got.caution.startswith("No attack could read its messages: its leakage is that of a guess.")


def test_a_coin_has_no_power_in_a_closed_world():
    """Of two candidates a coin names half, and half of a wrong one's words are right: far above a guess without any."""

    def control(named):
        exact = Measure(
            "exact_match", Interval(named, named - 0.1, 1.0, 200), floor=Interval(0.0, 0.0, 0.0, 200), chance=0.5
        )
        return replace(CONTROL, candidates=2, measures={"exact_match": exact})

    table = [policy("p", 0.2, 0.7)]
    assert recommend(board(*table, control=control(0.5)), max_leakage=0.3).verdict == "no power"
    assert "exact match" in recommend(board(*table, control=control(0.5)), max_leakage=0.3).sentence.lower()
    assert recommend(board(*table, control=control(1.0)), max_leakage=0.3).policy == "p"
