"""The table "what each policy gets", and the figures quoted with it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from opacus.accountants import GaussianAccountant

import dpguard
from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy import gaussian
from dpguard.policy.table import Policy
from tests import tiny

BERT = slots(tiny.module("bert"))
DP = {"layers": "all", "clip": 1.0, "noise": 1.0}
PARTS = ["embeddings", "block[0]", "block[1]", ["block[2]", "pooler", "head"]]


def claim(rows, q=0.01, steps=1000, delta=1e-5, **more):
    return dpguard.guarantee(Policy(rows).plan(BERT), sampling_rate=q, steps=steps, delta=delta, **more)


def per_part(clips, stds):
    return [{"layers": p, "clip": c, "noise": s / c} for p, c, s in zip(PARTS, clips, stds, strict=True)]


def test_joint_accounting_of_per_layer_noise():
    # three groups at sigma .8, 1.5 and 3: joint epsilon 4.89 by PRV; as separate events 3.32 (wrong)
    rows = [
        {"layers": p, "clip": 1.0, "noise": s}
        for p, s in zip(["embeddings", "block[*]", ["pooler", "head"]], [0.8, 1.5, 3.0], strict=True)
    ]
    found = claim(rows)
    assert found.epsilon == pytest.approx(4.89, abs=0.02)
    assert found.sigma_eff == pytest.approx(1 / math.sqrt(0.8**-2 + 1.5**-2 + 3.0**-2))


def test_naive_numbers_are_wrong():
    found = claim(per_part([1, 0.5, 0.5, 0.25], [4, 1, 0.7, 0.5]), q=1.0, steps=50)
    assert found.epsilon == pytest.approx(57.3, abs=0.05)


def test_the_same_noise_multiplier_means_different_epsilons():
    flat, blocks = claim([DP]), claim([{**DP, "per": "block"}])
    assert flat.epsilon == pytest.approx(1.84, abs=0.02)
    assert blocks.sigma_eff == pytest.approx(1 / math.sqrt(6))
    assert blocks.epsilon > 5 * flat.epsilon


def test_the_central_limit_accountant_says_less():
    with pytest.warns(UserWarning, match="underestimate"):
        gdp = GaussianAccountant()
    gdp.history = [(1.0, 0.01, 1000)]
    assert gdp.get_epsilon(delta=1e-5) == pytest.approx(1.62, abs=0.005)  # quoted with the 1.84 in docs/comparison.md


def test_q_one_is_the_closed_form():
    found = claim([DP], q=1.0, steps=1)
    assert found.epsilon == pytest.approx(4.377, abs=1e-3)
    assert claim([DP], q=1.0, steps=9).epsilon == pytest.approx(gaussian.epsilon_of(3.0, 1e-5), rel=1e-12)


def test_differing_noise_inside_one_group_counts_the_smallest():
    found = claim([DP, {"layers": "block[1]", "noise": 0.5}])
    assert found.sigma_eff == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "without clip and noise"),
        ([{"layers": "all", "clip": 1.0}], "clipped but without noise"),
        ([{"layers": "all", "keep": 0.1}], "without clip and noise"),
        ([{"layers": "all", "bits": 1}], "without clip and noise"),
        ([{"layers": "all", "keep": 0.1, "prune": "random"}], "without clip and noise"),
        ([{"layers": "embeddings", "share": False}], "without clip and noise"),
        ([{"layers": "all", "noise_std": 0.1}], "noise without a per-example clip"),
        ([{"layers": "all", "clip": 1.0, "noise_std": 0.1}], "noise_std is no calibrated noise"),
        ([{"layers": "block[*]", "clip": 1.0, "noise": 1.0}], "embeddings, pooler, head"),
        ([DP, {"layers": "head", "noise": 0}], "clipped but without noise"),
        ([DP, {"layers": "embeddings", "share": False, "noise": 0}], "withheld layers train without noise"),
    ],
)
def test_no_claim_is_infinite_with_its_reason(rows, reason):
    found = claim(rows)
    assert found.epsilon == math.inf
    assert any(reason in r for r in found.reasons), found.reasons
    assert reason in found.statement
    assert "epsilon = inf" in found.statement
    assert found.bound(0.01) is None
    assert found.bound_amplified(0.01) is None


@pytest.mark.parametrize(
    "extra",
    [
        {"layers": "embeddings", "train": False},
        {"layers": "embeddings", "share": False, "train": False},
        {"layers": "all", "keep": 0.1},
        {"layers": "all", "bits": 4},
        {"layers": "all", "keep": 0.5, "prune": "random"},
    ],
)
def test_free_after_noise_and_with_frozen_layers(extra):
    assert claim([DP, extra]).epsilon == claim([DP]).epsilon


def test_withheld_layers_that_train_with_noise_join_the_sum():
    rows = [{**DP, "per": "block"}, {"layers": "embeddings", "share": False}]
    assert claim(rows).epsilon == claim([{**DP, "per": "block"}]).epsilon


def test_withheld_without_noise_is_finite_for_the_first_message_only():
    rows = [{**DP, "per": "block"}, {"layers": "embeddings", "share": False, "noise": 0}]
    once = claim(rows, q=1.0, steps=1)
    assert once.sigma_eff == pytest.approx(1 / math.sqrt(5)), "five shared groups, the withheld one is not seen"
    assert claim(rows, q=1.0, steps=2).epsilon == math.inf
    assert "first message alone" in claim(rows, q=1.0, steps=2).statement


@pytest.mark.parametrize("row", [{}, {"clip": 1.0, "noise": 1.0}, {"clip": {"quantile": 0.5}, "noise": 1.0}])
def test_nothing_shared_is_zero(row):
    found = claim([{"layers": "all", "share": False, **row}], carries=["error_feedback"])
    assert found.epsilon == 0
    assert found.sigma_eff == math.inf
    assert "Nothing leaves" in found.statement


def test_adapters_with_a_frozen_base_count_as_the_only_group():
    adapters = [replace(s, trainable=s.block == 1 and s.role == "query") for s in BERT]
    rows = [{**DP, "per": "block"}]
    found = dpguard.guarantee(Policy(rows).plan(adapters), sampling_rate=0.01, steps=1000, delta=1e-5)
    assert found.sigma_eff == 1.0, "one group of six trains"
    assert found.epsilon == claim([DP]).epsilon


def test_normalising_costs_what_clipping_costs():
    assert claim([{**DP, "mode": "normalise"}]).epsilon == claim([DP]).epsilon


ADAPTIVE = {"layers": "all", "clip": {"quantile": 0.5, "count_noise": 2.0}, "noise": 1.0}


def test_a_clip_that_follows_a_quantile_pays_for_its_counts():
    one, six = claim([ADAPTIVE]), claim([{**ADAPTIVE, "per": "block"}])
    assert one.sigma_eff == pytest.approx((1 + 1 / 16) ** -0.5)
    assert six.sigma_eff == pytest.approx((6 + 6 / 16) ** -0.5)
    assert one.epsilon > claim([DP]).epsilon
    assert "noised counts (std 2 examples)" in one.statement
    half = claim([ADAPTIVE, {"layers": "head", "clip": 1.0, "noise": 1.0}])
    assert half.sigma_eff == pytest.approx((2 + 1 / 16) ** -0.5), "a fixed clip has no count"
    assert "counts" not in claim([DP]).statement


def test_the_price_of_a_count_does_not_depend_on_where_the_clip_stands():
    plan = Policy([ADAPTIVE]).plan(BERT)
    moved = plan.with_clips({"row 1": 0.01})
    figures = [dpguard.guarantee(p, sampling_rate=0.1, steps=10, delta=1e-5).epsilon for p in (plan, moved)]
    assert figures[0] == figures[1]


WHOLE = {"layers": "all", "clip": 1.0, "noise": 2.0, "unit": "update"}


def test_a_clip_of_the_whole_update_protects_the_client_without_amplification():
    found = claim([WHOLE], q=0.01, steps=9, examples=10**7)
    assert (found.unit, found.sampling_rate, found.sigma_eff) == ("client", 1.0, 2.0)
    assert found.epsilon == pytest.approx(gaussian.epsilon_of(1.5, 1e-5), rel=1e-12)
    assert claim([WHOLE], q=0.01, steps=9, sampling="shuffle").epsilon == found.epsilon
    assert found.bound_amplified(0.01) >= found.bound(0.01, messages=9) * (1 - 1e-3), "nothing is amplified"
    for part in ("one client as a whole", "whole update replaced by zero", "doubles the sensitivity",
                 "client subsampling gives nothing", "several clients of one person"):  # fmt: skip
        assert part in found.statement, part
    for part in ("one example", "Poisson", "sampling count", "several examples", "per-example losses"):
        assert part not in found.statement, part
    assert claim([DP]).unit == "example"


def test_groups_of_a_whole_update_add_up_like_any_others():
    assert claim([{**WHOLE, "per": "block"}]).sigma_eff == pytest.approx(2 / math.sqrt(6))


def test_withheld_layers_that_train_in_the_clear_do_not_break_a_whole_update():
    rows = [{**WHOLE, "per": "block"}, {"layers": "embeddings", "share": False, "noise": 0}]
    found = claim(rows, steps=50)
    assert found.sigma_eff == pytest.approx(2 / math.sqrt(5)), "what is withheld is not counted either"
    unclipped = [{"layers": "block[*]", "clip": 1.0, "noise": 2.0, "unit": "update"},
                 {"layers": ["embeddings", "pooler", "head"], "share": False}]  # fmt: skip
    assert claim(unclipped, steps=50).sigma_eff == 2.0


def test_a_whole_update_without_noise_proves_nothing():
    assert claim([{"layers": "all", "clip": 1.0, "unit": "update"}]).epsilon == math.inf


CARRIES = ["error_feedback", "clean_momentum", "clean_local_training"]


@pytest.mark.parametrize(
    ("name", "said"), list(zip(CARRIES, ["error feedback", "Adam moments", "trained without noise"], strict=True))
)
def test_state_that_is_carried_over_un_noised_breaks_every_message_but_the_first(name, said):
    found = claim([DP], steps=2, carries=[name])
    assert found.epsilon == math.inf
    assert said in found.statement
    assert "first message alone" in found.statement
    assert claim([DP], steps=1, carries=[name]).epsilon == claim([DP], steps=1).epsilon


@pytest.mark.parametrize(("name", "formal"), list(zip(CARRIES, [False, True, True], strict=True)))
def test_a_whole_update_clip_bounds_local_state_but_not_what_is_added_after_it(name, formal):
    assert claim([WHOLE], steps=5, carries=[name]).formal is formal


def test_several_reasons_are_all_given():
    found = claim([{"layers": "all", "clip": 1.0}], carries=["clean_momentum", "error_feedback"])
    assert len(found.reasons) == 3
    assert "first message alone" not in found.statement


def test_an_unknown_carried_state_is_named():
    with pytest.raises(UserError, match="did you mean 'error_feedback'"):
        claim([DP], carries=["eror_feedback"])


def test_seeded_noise_is_said_to_be_subtractable():
    found = claim([DP], seeded=True)
    assert "comes from a seed" in found.statement
    assert "only against those who do not" in found.statement
    assert found.epsilon == claim([DP]).epsilon
    assert "seed" not in claim([DP]).statement


def test_shuffled_batches_get_no_amplification():
    shuffled = claim([DP], q=0.01, steps=1000, sampling="shuffle")
    assert shuffled.epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(10), 1e-5))
    assert "without amplification" in shuffled.statement


def test_a_dropped_last_batch_makes_more_passes_of_as_many_steps():
    """199 examples in batches of 100, the second dropped: each step is a pass, and may hold the same example."""
    shuffled = claim([DP], q=100 / 199, steps=100, sampling="shuffle")
    assert shuffled.epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(100), 1e-5))


@pytest.mark.parametrize("noise", [1e-160, 1e-310])
def test_noise_too_small_to_count_with_is_no_guarantee(noise):
    found = claim([{**DP, "noise": noise}])
    assert found.epsilon == math.inf
    assert found.bound(0.1) in (None, 1.0)


def test_the_statement_says_unit_adjacency_sampling_view_and_limits():
    words = claim([DP, {"layers": "all", "keep": 0.1}], examples=5000).statement
    for part in ("one example", "zero-out", "5000", "Poisson sampling at rate 0.01", "1000 steps", "honest-but-curious",
                 "keep 0.1 by magnitude", "Not covered", "hyper-parameters", "floating-point"):  # fmt: skip
        assert part in words, part


def test_bounds():
    found = claim([{**DP, "noise": 0.5}], q=1.0, steps=4)
    assert found.bound(0.05) == pytest.approx(0.64, abs=0.005)
    assert found.bound(0.05, messages=4) == pytest.approx(0.99, abs=0.005)
    amplified = claim([DP]).bound_amplified(0.01)
    assert 0.01 < amplified < claim([DP]).bound(0.01, messages=10)
    with pytest.raises(UserError, match="kappa"):
        found.bound(0)
    for messages in (0, -1, 0.5, 5, True):
        with pytest.raises(UserError, match="expected a whole number from 1 to the 4 covered here"):
            found.bound(0.05, messages=messages)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"q": 0}, "sampling rate"),
        ({"q": 1.5}, "sampling rate"),
        ({"steps": 0}, "steps"),
        ({"steps": math.nan}, "steps"),
        ({"delta": 1.0}, "delta"),
        ({"delta": 1e-2, "examples": 1000}, "larger than 1 / 1000"),
        ({"sampling": "poison"}, "did you mean 'poisson'?"),
    ],
)
def test_arguments_out_of_range(arguments, said):
    with pytest.raises(UserError) as error:
        claim([DP], **arguments)
    assert said in str(error.value)


def independent_epsilon(sigma, q, steps):
    """Google's PLD: an upper bound of its own, 6 % above the truth on its coarse grid where epsilon is small."""
    noise = dp_event.GaussianDpEvent(sigma)
    event = noise if q == 1 else dp_event.PoissonSampledDpEvent(q, noise)

    def on_grid_of(interval):
        return PLDAccountant(value_discretization_interval=interval).compose(event, steps).get_epsilon(1e-5)

    coarse = on_grid_of(1e-3)
    return coarse if coarse > 5 else on_grid_of(1e-4)


RATES, STEPS = [0.002, 0.01, 0.05, 0.3, 1.0], [1, 2, 30, 400, 2000]


def random_table(draw):
    """A random table over `PARTS`, and 1 / sigma_eff^2 of many messages and of one, reckoned from what was drawn.

    From a generator of its own: Hypothesis draws some numbers from the constants of the project modules that are
    loaded, so that its tables were others whenever other tests had run before.
    """
    rows, many, one, shared = [], 0.0, 0.0, False
    for index, part in enumerate(PARTS):
        noise, per = draw.uniform(0.8, 8.0), draw.choice(["row", "block"])
        count = draw.choice([None, draw.uniform(1.0, 20.0)])
        clip = draw.uniform(0.1, 2.0) if count is None else {"quantile": 0.5, "count_noise": count}
        rows.append({"layers": part, "clip": clip, "noise": noise, "per": per})
        quieter = draw.uniform(0.8, 8.0) if index == 2 and draw.random() < 0.5 else noise
        if quieter != noise:
            rows.append({"layers": "block[1].attention", "noise": quieter})
        # the last part holds block[2], the pooler and the head: one group a row, or three a block
        groups = 3 if isinstance(part, list) and per == "block" else 1
        price = groups * (min(noise, quieter) ** -2 + (0 if count is None else (2 * count) ** -2))
        withheld = draw.random() < 0.5 and (shared or index < len(PARTS) - 1)
        if withheld:
            rows.append({"layers": part, "share": False})
        shared = shared or not withheld
        many, one = many + price, one + (0 if withheld else price)
    return rows, many, one


def check_against_independent(seed):
    draw = random.Random(seed)
    rows, many, one = random_table(draw)
    q, steps = draw.choice(RATES), draw.choice(STEPS)
    found = claim(rows, q=q, steps=steps)
    sigma = (one if steps == 1 else many) ** -0.5
    assert found.sigma_eff == pytest.approx(sigma, rel=1e-12)
    independent = independent_epsilon(sigma, q, steps)
    # from e^700 on the independent accountant overflows and drops a term, which puts it up to .2 % too high
    assert found.epsilon >= independent * (1 - (1e-4 if independent < 700 else 2e-3)), (seed, "never below")
    assert found.epsilon <= independent * 1.01 + 0.02, seed


@pytest.mark.parametrize("seed", range(15))
def test_random_tables_against_an_independent_accountant(seed):
    check_against_independent(seed)


@pytest.mark.slow
def test_two_hundred_random_tables_against_an_independent_accountant():
    for seed in range(200):
        check_against_independent(seed)


def test_very_small_noise_still_has_a_finite_epsilon():
    # PRV raises here; what is printed must still be an upper bound
    found = claim([{**DP, "noise": 0.01}], steps=10)
    assert math.isfinite(found.epsilon)
    assert found.epsilon <= gaussian.epsilon_of(math.sqrt(10) / 0.01, 1e-5)
