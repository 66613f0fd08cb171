"""Target epsilons of a study turned into noise, before anything is planned. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dpguard.policy.auto import solve
from dpguard.policy.calibrate import default_accountant
from dpguard.policy.guarantee import guarantee
from dpguard.policy.layers import Slot
from dpguard.policy.table import Policy
from dpguard.study import grid

if TYPE_CHECKING:
    from dpguard.study.policies import Named, Search
    from dpguard.study.spec import Study

Kept = Callable[[Mapping[str, Any], Callable[[], Any]], Any]
"""Gives what belongs to a key, and makes it only when it is not known yet (`cache.Cache.plain`)."""


def calibrated(
    study: Study, slots: Sequence[Slot], data: Mapping[str, Any], kept: Kept = lambda key, make: make()
) -> Study:
    """The study with the noise that each policy's ``epsilon`` takes under its own sampling and steps.

    `Policy.calibrate` scales the noise columns by one factor, so a policy's split of clip and noise stays. The rows
    that come out are the policy: cells are identified by them, records and reports show them.

    Args:
        study: as it was read.
        slots: the model's.
        data: what identifies the texts, with their counts (see `Study.cells`).
        kept: a memory for rows that were calibrated before.

    Raises:
        UserError: a target that no noise reaches; with its place.
    """
    with study.locating():
        texts = grid.examples(study, dict(data))

    def one(named: Named) -> Named:
        if named.epsilon is None:
            return named
        epsilon, delta = named.epsilon, study.privacy.delta
        found = study.schedule_of(named, texts)
        key = {
            "what": "calibrated rows", "rows": named.table, "epsilon": epsilon, "delta": delta, "examples": texts,
            "sampling_rate": found.sampling_rate, "steps": found.steps,
            "slots": [[s.name, list(s.shape), s.role, s.block, s.tied_to, s.trainable] for s in slots],
        }  # fmt: skip

        if named.search is not None and named.search.auto.computed:
            return _solved(study, named.search, slots, texts, key, kept)

        def rows() -> list[dict[str, Any]]:
            policy = named.policy.calibrate(
                slots, epsilon=epsilon, delta=delta, sampling_rate=found.sampling_rate, steps=found.steps,
                examples=texts,
            )  # fmt: skip
            return [dict(row) for row in policy.rows]

        named.plan(slots)  # what the rows cannot mean is told at its own place, not at the target's
        with named.document.locating(*named.loc, "epsilon"):
            return replace(named, policy=Policy(kept(key, rows), named.label), epsilon=None)

    return replace(study, policies=tuple(one(named) for named in study.policies))


def _solved(
    study: Study, search: Search, slots: Sequence[Slot], texts: int, key: Mapping[str, Any], kept: Kept
) -> Named:
    """The policy at the value of its sweep variable that keeps the target epsilon."""
    delta = study.privacy.delta

    def epsilon_at(value: float) -> float:
        named = search.named(value)
        exposed = study.schedule_of(named, texts)
        return guarantee(
            named.plan(slots), sampling_rate=exposed.sampling_rate, steps=exposed.steps, delta=delta, examples=texts,
            accountant=default_accountant(),
        ).epsilon  # fmt: skip

    own = {"what": "solved sweep", "auto": vars(search.auto), "entry": search.entry, "others": search.others}
    value, note = kept({**key, **own}, lambda: list(solve(search.auto, epsilon_at)))
    return replace(search.named(value), search=None, note=f"{search.label}: {note}" if note else "")
