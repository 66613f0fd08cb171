from __future__ import annotations

import json
import math
import subprocess
import sys
import threading

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

import dpguard
from dpguard.engine.accounting import SubsampledGaussian
from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy import gaussian, ledger_file
from dpguard.policy.ledger import BudgetSpent, Ledger, Mechanism, largest
from dpguard.policy.table import Policy
from tests import tiny

BERT = slots(tiny.module("bert"))
DELTA = 1e-5
ROWS = [{"layers": "all", "clip": 1.0, "noise": 1.0}]
WHOLE = Mechanism("whole", 3.0, 1.0)
SAMPLED = Mechanism("sampled", 1.0, 0.02)


def plan(rows=ROWS):
    return Policy(rows).plan(BERT)


def opened(path=None, budget=None, **more):
    return Ledger("clinic", "f00d", DELTA, budget, path, **more)


def spend(ledger, mechanism, count, run="a"):
    return [ledger.spend(mechanism, (run, ledger.next_number(run))) for _ in range(count)]


def independent(history):
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for sigma, q, steps in history:
        noise = dp_event.GaussianDpEvent(sigma)
        accountant.compose(noise if q == 1 else dp_event.PoissonSampledDpEvent(q, noise), steps)
    return accountant.get_epsilon(DELTA)


# what is composed


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        (ROWS, {"sampling_rate": 0.02}),
        (ROWS, {"sampling_rate": 1.0}),
        (ROWS, {"sampling_rate": 0.3, "sampling": "shuffle"}),
        ([{**ROWS[0], "clip": {"quantile": 0.5, "count_noise": 3}, "per": "block"}], {"sampling_rate": 0.02}),
        ([{**ROWS[0], "unit": "update"}], {"sampling_rate": 0.02}),
        ([{"layers": "all", "share": False}], {"sampling_rate": 0.02}),
        ([{"layers": "all", "clip": 1.0}], {"sampling_rate": 0.02}),
        ([*ROWS, {"layers": "head", "share": False, "noise": 0}], {"sampling_rate": 0.02}),
    ],
)
def test_one_mechanism_costs_what_its_guarantee_says(rows, facts):
    ledger = opened()
    spend(ledger, Mechanism.of(plan(rows), **facts), 25)
    said = dpguard.guarantee(plan(rows), steps=25, delta=DELTA, **facts)
    assert ledger.epsilon() == pytest.approx(said.epsilon, rel=1e-12)
    assert ledger.messages == 25


def test_carried_state_makes_the_ledger_infinite():
    ledger = opened()
    spend(ledger, Mechanism.of(plan(), sampling_rate=0.1, carries=["clean_momentum"]), 1)
    assert ledger.epsilon() == math.inf


@pytest.mark.parametrize(
    "history",
    [
        [(1.0, 0.01, 300), (0.7, 0.02, 200), (3.0, 0.1, 50)],
        [(1.0, 0.01, 300), (2.0, 1.0, 4)],
        [(2.0, 1.0, 4), (5.0, 1.0, 3), (0.6, 0.005, 100)],
        [(0.4, 0.02, 30), (4.0, 0.3, 30)],
    ],
)
def test_different_mechanisms_are_composed_jointly(history):
    ledger = opened(allow_change=True)
    for index, (sigma, q, steps) in enumerate(history):
        spend(ledger, Mechanism(str(index), sigma, q), steps, run=str(index))
    found, truth = ledger.epsilon(), independent(history)
    assert found >= truth * (1 - 1e-4), "never below"
    assert found <= truth * 1.01 + 0.02
    assert found < sum(independent([part]) for part in history) * 0.95, "not the sum of the parts"
    assert ledger.epsilon(1e-6) > found


def test_order_does_not_matter():
    parts = [(1.0, 0.01, 30), (0.7, 0.02, 20), (2.0, 1.0, 3), (1.0, 0.01, 5)]
    compose = SubsampledGaussian().compose
    assert compose(history=parts, delta=DELTA) == compose(history=parts[::-1], delta=DELTA)


def test_without_sampling_the_composition_is_the_closed_form():
    parts = [(2.0, 1.0, 4), (5.0, 1.0, 25)]
    assert SubsampledGaussian().compose(history=parts, delta=DELTA) == gaussian.epsilon_of(math.sqrt(2), DELTA)


def test_very_small_noise_among_others_still_has_a_bound():
    # PRV fails here; RDP answers
    parts = [(0.03, 0.01, 20), (1.0, 0.01, 100)]
    found = SubsampledGaussian().compose(history=parts, delta=DELTA)
    assert math.isfinite(found)
    assert found > SubsampledGaussian().epsilon(sigma=1.0, sampling_rate=0.01, steps=100, delta=DELTA)


def test_every_run_of_shuffled_batches_rounds_up_on_its_own():
    shuffled = Mechanism("s", 2.0, 0.25, sampling="shuffle")
    ledger = opened()
    for run in "abc":
        spend(ledger, shuffled, 5, run)  # an epoch and a step: at most two messages with the example
    assert ledger.epsilon() == pytest.approx(gaussian.epsilon_of(math.sqrt(6) / 2, DELTA))


# keys


def test_a_message_is_counted_once_however_often_it_is_entered():
    ledger = opened()
    assert spend(ledger, WHOLE, 3) == [True] * 3
    assert [ledger.spend(WHOLE, ("a", n)) for n in (1, 3, 2, 3)] == [False] * 4
    assert ledger.messages == 3
    assert ledger.spend(WHOLE, ("b", 1)), "another run is another message"
    assert (ledger.next_number("a"), ledger.next_number("b"), ledger.next_number("c")) == (4, 2, 1)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (("a", 2), "expected 1, because a gap"),
        (("a", 0), "a message number from 1"),
        (("a", 1.5), "a message number from 1"),
        (("a", True), "a message number from 1"),
        (("", 1), "a run's name"),
    ],
)
def test_a_key_that_cannot_be_meant(key, said):
    ledger = opened()
    with pytest.raises(UserError, match=said):
        ledger.spend(WHOLE, key)
    assert ledger.messages == 0


def test_threads_enter_every_message_once(tmp_path):
    ledger = opened(tmp_path / "l.json")
    counted = []

    def work():
        for number in range(1, 31):
            while ledger.next_number("a") < number:
                pass
            counted.append(ledger.spend(WHOLE, ("a", number)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counted) == 30
    assert len(counted) == 120
    assert ledger.messages == 30


def test_threads_that_do_not_know_of_each_other_enter_all_their_messages(tmp_path):
    ledger, numbers = opened(tmp_path / "l.json"), []

    def work():
        numbers.extend(ledger.spend_next(WHOLE, "rounds", count=2) for _ in range(15))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.messages == 120
    assert sorted(numbers) == list(range(1, 121, 2))


# the budget


@pytest.mark.parametrize(
    ("rows", "facts", "budget"),
    [
        (ROWS, {"sampling_rate": 1.0}, 20.0),
        (ROWS, {"sampling_rate": 0.1}, 3.0),
        (ROWS, {"sampling_rate": 0.3, "sampling": "shuffle"}, 12.0),
        ([{"layers": "all", "clip": 0.1, "noise": 4.0, "unit": "update"}], {"sampling_rate": 0.1}, 3.0),
    ],
)
def test_it_halts_at_exactly_the_last_message_that_fits(rows, facts, budget):
    ledger, mechanism = opened(budget=budget), Mechanism.of(plan(rows), **facts)
    room = ledger.left(mechanism, "a")
    assert room >= 5
    with pytest.raises(BudgetSpent, match=f"above its budget of {budget:g}"):
        spend(ledger, mechanism, 10_000)
    assert ledger.messages == room
    assert ledger.left(mechanism, "a") == 0

    def said(steps):
        return dpguard.guarantee(plan(rows), steps=steps, delta=DELTA, **facts).epsilon

    assert said(room) <= budget < said(room + 1)
    assert ledger.epsilon() <= budget
    assert not ledger.spend(mechanism, ("a", room)), "what was entered may be sent again"


def test_several_messages_are_entered_whole_or_not_at_all(tmp_path):
    ledger = opened(tmp_path / "l.json", budget=8.0)
    room = int(ledger.left(WHOLE, "a"))
    assert ledger.spend(WHOLE, ("a", 1), count=room - 2)
    assert not ledger.spend(WHOLE, ("a", 1), count=room - 2)
    assert not ledger.spend(WHOLE, ("a", 3), count=2)
    with pytest.raises(BudgetSpent, match=f"message {room + 1} of run 'a'"):
        ledger.spend(WHOLE, ("a", room - 1), count=3)
    assert ledger.messages == room - 2
    assert ledger.spend(WHOLE, ("a", room - 2), count=3), "one was entered before, two are new"
    assert (ledger.messages, ledger.left(WHOLE, "a")) == (room, 0)
    with pytest.raises(UserError, match="count is 0"):
        ledger.spend(WHOLE, ("b", 1), count=0)
    ledger.close()
    assert opened(tmp_path / "l.json").messages == room


def test_left_counts_down_without_asking_the_accountant_again():
    asked = []

    class Counting(SubsampledGaussian):
        def compose(self, *, history, delta):
            asked.append(history)
            return super().compose(history=history, delta=delta)

    ledger = opened(budget=4.0, accountant=Counting())
    room = ledger.left(SAMPLED, "a")
    once = len(asked)
    assert once <= 25
    spend(ledger, SAMPLED, 40)
    assert ledger.left(SAMPLED, "a") == room - 40
    assert len(asked) == once


def test_another_mechanism_spends_from_the_same_budget():
    ledger = opened(budget=4.0, allow_change=True)
    before = ledger.left(SAMPLED)
    spend(ledger, WHOLE, 5)
    after = ledger.left(SAMPLED)
    assert 0 < after < before
    parts = [(3.0, 1.0, 5), (1.0, 0.02, after)]
    compose = SubsampledGaussian().compose
    assert compose(history=parts, delta=DELTA) <= 4.0
    assert compose(history=[parts[0], (1.0, 0.02, after + 1)], delta=DELTA) > 4.0


def test_no_budget_and_no_cost_know_no_end():
    assert opened().left(WHOLE) == math.inf
    silent = Mechanism.of(plan([{"layers": "all", "share": False}]), sampling_rate=0.1)
    assert opened(budget=1.0).left(silent) == math.inf
    ledger = opened(budget=1.0)
    spend(ledger, silent, 3)
    assert ledger.epsilon() == 0


def test_a_mechanism_without_a_claim_is_refused_at_its_first_message():
    ledger = opened(budget=100.0)
    with pytest.raises(BudgetSpent, match=r"epsilon inf \(clipped but without noise"):
        spend(ledger, Mechanism.of(plan([{"layers": "all", "clip": 1.0}]), sampling_rate=0.1), 1)
    assert ledger.messages == 0


@pytest.mark.parametrize("true", [0, 1, 2, 9, 63, 64, 65, 12_345, 999_999, 10**6])
@pytest.mark.parametrize("power", [0.3, 0.5, 1.0, 2.0])
def test_the_largest_count_is_found_to_the_message(true, power):
    asked = []

    def cost(n):
        asked.append(n)
        return 0.02 + n**power

    assert largest(cost, 0.02 + (true + 0.5) ** power, 10**6) == true
    assert len(asked) <= 40


# the file


def test_killed_after_every_message_nothing_is_forgotten_and_it_halts_at_the_same_one(tmp_path):
    path = Ledger.beside(tmp_path)
    mechanism = Mechanism.of(plan(), sampling_rate=0.1)
    room = int(opened(budget=1.75).left(mechanism))
    for number in range(1, room + 1):
        with opened(path, 1.75) as ledger:
            assert ledger.next_number("a") == number
            assert ledger.spend(mechanism, ("a", number))
            if number > 1:
                assert not ledger.spend(mechanism, ("a", number - 1))
    with opened(path) as ledger:
        assert ledger.budget == 1.75, "kept when none is given"
        assert ledger.messages == room
        with pytest.raises(BudgetSpent):
            ledger.spend(mechanism, ("a", room + 1))
        assert ledger.epsilon() == dpguard.guarantee(plan(), sampling_rate=0.1, steps=room, delta=DELTA).epsilon


def test_a_file_that_has_gone_and_an_older_copy_are_noticed(tmp_path):
    path = Ledger.beside(tmp_path)
    mechanism = Mechanism.of(plan(), sampling_rate=0.1)
    opened(path).close()
    with opened(path) as ledger:  # nothing was spent the first time
        ledger.spend(mechanism, ("a", 1))
        older = path.read_bytes()
        ledger.spend(mechanism, ("a", 2))
    latest = path.read_bytes()
    path.write_bytes(older)
    with pytest.raises(UserError, match=r"holds 1 messages, and 2 were entered; expected the latest file"):
        opened(path)
    path.unlink()
    with pytest.raises(UserError, match=r"is gone, though 2 messages were entered; expected the file from a copy"):
        opened(path)
    path.write_bytes(latest)
    with opened(path) as ledger:
        assert ledger.messages == 2


def test_a_message_is_on_disk_when_spend_returns_and_a_refused_one_is_not(tmp_path):
    path = tmp_path / "l.json"
    with opened(path, 2.0) as ledger:
        spend(ledger, WHOLE, 1)
        before = path.read_bytes()
        assert json.loads(before)["entries"][0]["runs"] == {"a": 1}
        with pytest.raises(BudgetSpent):
            spend(ledger, Mechanism("whole", 0.1, 1.0), 1)
        assert path.read_bytes() == before


def test_the_file_does_not_grow_with_the_messages(tmp_path):
    path = tmp_path / "l.json"
    with opened(path) as ledger:
        spend(ledger, WHOLE, 10)
        before = path.stat().st_size
        spend(ledger, WHOLE, 90)
        assert path.stat().st_size <= before + 2


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "l.json"
    with opened(path) as ledger:
        spend(ledger, WHOLE, 2)

        def full(_handle):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(ledger_file.os, "fsync", full)
            with pytest.raises(UserError, match="No space left"):
                spend(ledger, WHOLE, 1)
        assert ledger.messages == 2, "not on disk, not entered, not to be sent"
        assert spend(ledger, WHOLE, 1) == [True]
    with opened(path) as ledger:
        assert ledger.messages == 3


def test_everything_comes_back_from_the_file(tmp_path):
    path = tmp_path / "l.json"
    silent = Mechanism("silent", math.inf, 0.5, "example", "shuffle")
    bad = Mechanism("bad", 0.0, 0.1, "example", "poisson", ("clipped but without noise (head)",))
    with opened(path, allow_change=True) as ledger:
        for mechanism in (silent, SAMPLED, bad):
            spend(ledger, mechanism, 2)
        before = ledger._entries
    with opened(path) as ledger:
        assert ledger._entries == before
        assert ledger.epsilon() == math.inf


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"client": "hospital"}, "of another client, 'clinic'; expected 'hospital'"),
        ({"model": "beef"}, "of another model, 'f00d'; expected 'beef'"),
        ({"budget": 9.0}, "budget is 9, laxer than the 8"),
        ({"delta": 1e-3}, "delta is 0.001, laxer"),
    ],
)
def test_a_ledger_of_something_else_is_refused(tmp_path, changed, said):
    path = tmp_path / "l.json"
    with opened(path, 8.0) as ledger:
        spend(ledger, WHOLE, 1)
    mine = {"client": "clinic", "model": "f00d", "delta": DELTA, "budget": 8.0}
    with pytest.raises(UserError) as error:
        Ledger(**{**mine, **changed}, path=path)
    assert said in str(error.value)
    Ledger(**mine, path=path).close()  # the refusal let go of the file
    if "laxer" in said:
        with Ledger(**{**mine, **changed}, path=path, allow_change=True) as ledger:
            assert ledger.messages == 1


def test_a_changed_policy_needs_a_word(tmp_path):
    path = tmp_path / "l.json"
    with opened(path) as ledger:
        spend(ledger, WHOLE, 2)
    with opened(path) as ledger, pytest.raises(UserError, match="the policy has changed"):
        spend(ledger, SAMPLED, 1)
    with opened(path, allow_change=True) as ledger:
        spend(ledger, SAMPLED, 1)
    with opened(path) as ledger:
        spend(ledger, SAMPLED, 1)
        with pytest.raises(UserError, match="the policy has changed"):
            spend(ledger, WHOLE, 1)
        assert ledger.messages == 4


def test_another_sampling_rate_is_the_same_policy():
    ledger = opened()
    spend(ledger, Mechanism("p", 1.0, 0.01), 30)
    spend(ledger, Mechanism("p", 1.0, 0.02), 30)
    assert ledger.epsilon() >= independent([(1.0, 0.01, 30), (1.0, 0.02, 30)]) * (1 - 1e-4)


def test_units_are_never_mixed(tmp_path):
    whole = Mechanism.of(plan([{**ROWS[0], "unit": "update"}]), sampling_rate=0.1)
    ledger = opened(allow_change=True)
    spend(ledger, whole, 1)
    with pytest.raises(UserError, match="counts per client, this policy per example"):
        spend(ledger, SAMPLED, 1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "", "is damaged"),
        (lambda text: text.replace('"a": 2', '"a": 1'), "is damaged"),
        (lambda text: text.replace('"version": 1', '"version": 7'), "has version 7, expected 1"),
        (lambda text: text.replace("dpguard ledger", "ledger"), "is no ledger"),
        (lambda text: "[]", "is no ledger"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_one_sentence(tmp_path, spoil, said):
    path = tmp_path / "l.json"
    with opened(path) as ledger:
        spend(ledger, WHOLE, 2)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(UserError) as error:
        opened(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "l.json"
    other = (
        "import sys; from dpguard.policy.ledger import Ledger; from dpguard.errors import UserError\n"
        f"try: Ledger('clinic', 'f00d', {DELTA}, path={str(path)!r})\n"
        "except UserError as error: sys.exit(str(error))"
    )
    with opened(path) as ledger:
        spend(ledger, WHOLE, 1)
        refused = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
        assert "is in use" in refused.stderr
        assert refused.returncode == 1
        with pytest.raises(UserError, match="is in use"):
            opened(path)
    assert subprocess.run([sys.executable, "-c", other], check=False).returncode == 0
    with pytest.raises(UserError, match="is closed"):
        spend(ledger, WHOLE, 1)


def test_a_process_that_is_killed_lets_go(tmp_path):
    path = tmp_path / "l.json"
    code = (
        "import os, signal; from dpguard.policy.ledger import Ledger, Mechanism\n"
        f"ledger = Ledger('clinic', 'f00d', {DELTA}, path={str(path)!r})\n"
        "ledger.spend(Mechanism('whole', 3.0, 1.0), ('a', 1)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with opened(path) as ledger:
        assert ledger.messages == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"delta": 0.0}, "delta is 0.0"),
        ({"budget": 0.0}, "budget is 0.0"),
        ({"path": "no such folder/l.json"}, "expected a writable folder"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(UserError, match=said):
        Ledger(**{"client": "c", "model": "m", "delta": DELTA, **arguments})


def test_a_mechanism_without_noise_needs_its_reason():
    with pytest.raises(UserError, match="without a reason"):
        Mechanism("p", 0.0, 0.1)
    with pytest.raises(UserError, match="sampling rate"):
        Mechanism("p", 1.0, 0.0)


def test_a_ledger_needs_no_torch():
    code = (
        "import sys; from dpguard.policy.ledger import Ledger, Mechanism\n"
        "Ledger('c', 'm', 1e-5, 9.0).spend(Mechanism('p', 3.0, 1.0), ('a', 1)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_link_to_a_ledger_is_that_ledger(tmp_path):
    """Replacing the link by a file left the ledger that it named at what was spent before."""
    path, link = tmp_path / "mounted" / "ledger.json", tmp_path / "ledger.json"
    path.parent.mkdir()
    with opened(path) as first:
        spend(first, WHOLE, 1)
    link.symlink_to(path)
    with opened(link) as second:
        spend(second, WHOLE, 2)
        with pytest.raises(UserError, match="in use"):
            opened(path)
    assert link.is_symlink()
    with opened(path) as third:
        assert third.messages == 3


def test_a_message_of_before_was_paid_for_under_its_own_mechanism():
    ledger = opened(allow_change=True)
    assert ledger.spend(WHOLE, ("r", 1))
    assert not ledger.spend(WHOLE, ("r", 1))
    with pytest.raises(UserError, match="entered under another policy, noise or sampling rate"):
        ledger.spend(Mechanism("weak", 0.01, 1.0), ("r", 1))
