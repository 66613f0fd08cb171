"""What each client runs, what the accountant counts, and what is promised: for each client's messages, or their mean.

``client``: every client adds the whole noise of the table, whatever the others do.
``aggregate``: secure aggregation is ASSUMED; the server sees one mean a round. One example changes the SUM over the
round by at most its client's clip C, so noise of std z C on the sum is the table's noise multiplier z. Each of the n
clients adds 1/(n - f) of the variance: any n - f honest shares reach it, so f clients may drop out or collude. That
counts only for what the server sees through the sum:

- what stays at home (withheld layers that train) is never summed, so it gets the whole noise;
- where a client feeds its own noised state into what it sends next (local steps, kept moments, error feedback), or
  changes its message in a way that does not commute with the sum (magnitude pruning, quantising, Adam), the others'
  shares do not hide that, and only the client's own share is counted: z / sqrt(n - f).
- With ``unit: update`` the clip bounds whatever the client did before, so local steps cost nothing there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dpguard.engine.accounting import guarantee
from dpguard.errors import UserError
from dpguard.federation.personal import frozen_at_home
from dpguard.federation.settings import Settings, rounds_of
from dpguard.federation.turn import sampling_rate
from dpguard.policy.guarantee import Guarantee, check_delta, sigma_eff
from dpguard.policy.ledger import Mechanism
from dpguard.policy.reasons import why_infinite
from dpguard.policy.statement import View
from dpguard.policy.table import Plan, Rule


def check(plan: Plan, settings: Settings) -> None:
    """Refuse what no federation of this kind can run.

    Raises:
        UserError: nothing is trained and shared, or a clip follows a quantile.
    """
    if not message_plan(plan, settings).shared:
        raise UserError("the policy shares nothing that is trained, so a federation learns nothing from its clients")
    if any(group.quantile is not None for group in plan.groups.values()):
        raise UserError(
            "a clip that follows a quantile would move at every client on its own, and the noise with it; expected "
            "fixed clips (dpguard fit-clips finds them)"
        )


def own_plan(plan: Plan, settings: Settings) -> Plan:
    """The table as a client trains by it: withheld layers frozen if they are to be."""
    return frozen_at_home(plan) if settings.personal == "frozen" else plan


def message_plan(plan: Plan, settings: Settings) -> Plan:
    """What each client runs: withheld layers frozen if they are to be, and its share of the noise."""
    own = own_plan(plan, settings)
    return own if settings.view == "client" else _shares(own, settings)


def claim_plan(plan: Plan, settings: Settings) -> Plan:
    """What the accountant counts for one client: the noise that hides its messages from the server."""
    own = own_plan(plan, settings)
    return _shares(own, settings) if settings.view == "aggregate" and own_share_only(own, settings) else own


def _shares(plan: Plan, settings: Settings) -> Plan:
    """1 / (n - f) of the variance on everything that is summed; what stays at home keeps the whole noise."""
    share = 1 / math.sqrt(settings.per_round - settings.may_fail)

    def shared(rule: Rule) -> Rule:
        return replace(rule, noise=rule.noise * share, noise_std=rule.noise_std * share) if rule.sent else rule

    return replace(plan, rules={name: shared(rule) for name, rule in plan.items()})


def own_share_only(plan: Plan, settings: Settings) -> tuple[str, ...]:
    """Why the other clients' noise does not hide a client's message; empty when it does."""
    out = []
    changed = [plan[name] for name in plan.shared]
    if any(rule.keep < 1 and rule.prune == "magnitude" for rule in changed):
        out.append("each message is pruned by magnitude before the sum")
    if any(rule.bits is not None or rule.release for rule in changed):
        out.append("each message is quantised or otherwise changed before the sum")
    if settings.error_feedback:
        out.append("what a message left out is fed into the client's next one")
    if plan.unit == "example":
        if settings.local_steps > 1:
            out.append("every local step starts from the client's own noised step before")
        if settings.optimizer == "adam":
            out.append("Adam rescales the client's own noised gradient before the sum")
        elif settings.keep_state:
            out.append("the client's own noised moments feed its next message")
    return tuple(out)


def messages_a_round(plan: Plan, settings: Settings) -> int:
    """How many noised steps one message of a client is made of, for the accountant: 1 where it is noised once."""
    return 1 if plan.unit == "update" else settings.local_steps


def mechanism(plan: Plan, settings: Settings, examples: int, rounds: int) -> Mechanism:
    """What a client's ledger counts, for a client of so many texts that takes part in so many rounds in all.

    Where that comes to one message there is no later one that layers trained at home could feed.
    """
    counted = claim_plan(plan, settings)
    found = Mechanism.of(counted, sampling_rate=sampling_rate(settings.batch_size, examples))
    if rounds * messages_a_round(plan, settings) > 1:
        return found
    reasons = why_infinite(counted, 1)
    return replace(found, sigma_eff=0.0 if reasons else sigma_eff(counted, 1), reasons=reasons)


@dataclass(frozen=True)
class Promise:
    """What is printed for a federation.

    Attributes:
        guarantee: the worst client's, over all seeds.
        client: which client, from 0.
        rounds: in how many rounds it takes part.
        examples: how many texts it has.
    """

    guarantee: Guarantee
    client: int
    rounds: int
    examples: int


def promise(plan: Plan, settings: Settings, sizes: Sequence[int], *, seeds: Collection[int], delta: float) -> Promise:
    """The guarantee that holds for every client, and the client whose it is.

    Args:
        plan: the policy resolved against the model.
        settings: the federation.
        sizes: public number of texts of every client.
        seeds: of the study; who takes part depends on them.
        delta: of (epsilon, delta).

    Raises:
        UserError: see `check`; or a delta that promises nothing to the texts of the largest client.
    """
    check(plan, settings)
    counted = claim_plan(plan, settings)
    if plan.unit == "example":  # the worst client is a small one, and one delta must do for all
        check_delta(delta, max(sizes))
    taken = [(rounds, client) for seed in seeds for client, rounds in enumerate(rounds_of(settings, seed)) if rounds]
    worst: Promise | None = None
    for rounds, client in _undominated(taken, sizes):
        found = guarantee(
            counted, delta=delta, examples=sizes[client],
            sampling_rate=sampling_rate(settings.batch_size, sizes[client]),
            steps=rounds * messages_a_round(plan, settings),
        )  # fmt: skip
        if worst is None or found.epsilon > worst.guarantee.epsilon:
            worst = Promise(found, client, rounds, sizes[client])
    if worst is None:
        raise UserError("nobody takes part in any round; expected at least one seed")
    return _in_words(worst, plan, counted, settings, delta)


def _undominated(taken: Sequence[tuple[int, int]], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(rounds, client) that no other has as few texts and as many rounds as: epsilon grows with both."""
    kept: list[tuple[int, int]] = []
    for rounds, client in sorted(set(taken), key=lambda entry: (-entry[0], sizes[entry[1]], entry[1])):
        if not kept or sizes[client] < min(sizes[other] for _, other in kept):
            kept.append((rounds, client))
    return kept


def _in_words(worst: Promise, plan: Plan, counted: Plan, settings: Settings, delta: float) -> Promise:
    found = worst.guarantee
    who = (
        f"This is the worst of {settings.clients} clients, which takes part in {worst.rounds} of {settings.rounds} "
        f"rounds, {settings.local_steps} local step{'s' if settings.local_steps > 1 else ''} each; the server knows "
        "who takes part, so nothing is claimed from that."
    )
    if settings.view == "client":
        only = "noise counts" if plan.unit == "update" else "noise and its own secret sampling count"
        seen = (
            "View: an honest-but-curious server that sees every message of every client; only the client's own "
            f"{only}. {who}"
        )
        view = View("Each client's messages are", seen)
    else:
        view = View("The means that the server sees are", f"{_aggregate(worst, plan, settings, delta)} {who}")
    said = guarantee(
        counted, delta=delta, examples=worst.examples, sampling_rate=found.sampling_rate, steps=found.steps, view=view
    )
    return replace(worst, guarantee=said)


def _aggregate(worst: Promise, plan: Plan, settings: Settings, delta: float) -> str:
    needed = settings.per_round - settings.may_fail
    own = own_plan(plan, settings)
    words = (
        "View: secure aggregation is assumed, and not part of what was run: the server sees only the mean over the "
        f"{settings.per_round} clients of a round. Each adds 1/{needed} of the noise's variance."
    )
    alone = own_share_only(own, settings)
    if alone:
        return f"{words} Only the client's own share is counted, because {'; '.join(alone)}."
    words += f" The claim needs {needed} honest shares a round: "
    words += f"{settings.may_fail} of the clients" if settings.may_fail else "none of the clients"
    words += " may drop out or collude with the server."
    if not worst.guarantee.formal:
        return words
    left = guarantee(
        _shares(own, settings), delta=delta, sampling_rate=worst.guarantee.sampling_rate, steps=worst.guarantee.steps
    ).epsilon
    return (
        f"{words} With m of {needed} shares left the noise multiplier is sqrt(m/{needed}) of what is stated; with the "
        f"client's own alone epsilon is {left:.3g}."
    )
