"""The audit of one policy: every check of the suite, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dpguard.engine.audit import claims, noise, on_model, quantiles, release, sampling, sensitivity, source, two_worlds
from dpguard.engine.audit.report import CHECKS, Report, Row, Step, judged, not_applicable
from dpguard.engine.audit.subject import Builder, MechanismError, Subject, of_the_engine
from dpguard.errors import UserError
from dpguard.inputs import models
from dpguard.inputs.family import slots as slots_of
from dpguard.inputs.models import LoadedModel
from dpguard.policy.layers import Slot
from dpguard.policy.table import Plan, Policy

MOST_BATCH = 4096
"""Twice as many examples go through the mechanism at once, every one with its own gradient: some gigabytes."""
MOST_SEED = 2**32
"""Seeds of the draws are spaced a million apart and must fit 64 bits."""


def audit(
    policy_or_plan: Policy | Plan,
    *,
    model: LoadedModel | str | None = None,
    slots: Sequence[Slot] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    thorough: bool = False,
    mechanism: Builder | None = None,
    each: Callable[[Sequence[Step]], Iterable[Step]] = iter,
) -> Report:
    """Check that a policy's mechanism does what its claims say.

    Judged is the tensor just after the noise, as a function of per-example gradients and a seed, on the
    plan's groups and rules over smaller tensors; then what leaves; then the claims. Twice the same arguments
    give the same report.

    Args:
        policy_or_plan: what to audit.
        model: a loaded model or its name: real texts go through it as well.
        slots: resolve the policy against these instead; without ``model`` and ``slots`` the bundled demo
            model's are taken.
        batch_size: the public batch size, from 1 to `MOST_BATCH`.
        seed: of everything random, from 0 to `MOST_SEED` - 1.
        thorough: add check D, some ten seconds more.
        mechanism: (plan, batch size) -> the mechanism to judge; the engine's own when None.
        each: goes through the steps, for example behind a progress bar.

    Raises:
        UserError: a batch size or a seed out of range, or a policy that does not fit the model.
    """
    if not 1 <= batch_size <= MOST_BATCH:
        raise UserError(f"batch size is {batch_size}; expected a whole number from 1 to {MOST_BATCH}")
    if not 0 <= seed < MOST_SEED:
        raise UserError(f"seed is {seed}; expected a whole number from 0 to {MOST_SEED - 1}")
    loaded = models.load(model) if isinstance(model, str) else model
    plan = policy_or_plan if isinstance(policy_or_plan, Plan) else policy_or_plan.plan(_slots(loaded, slots))
    # far apart, so that two seeds share no draw
    subject = Subject(plan, batch_size, seed * 1_000_003, mechanism or of_the_engine)
    steps = mechanism_steps(subject, thorough=thorough)
    if loaded is not None and mechanism is None:
        steps += on_model.steps(loaded, plan, batch_size=batch_size, seed=seed)
    rows = [row for step in each(steps) for row in step()]
    order = list(CHECKS)
    rows.sort(key=lambda row: order.index(row.check))
    named = loaded.name if loaded is not None else "" if slots is not None or plan is policy_or_plan else "demo"
    return Report(plan.name, named, seed, tuple(rows))


def _slots(loaded: LoadedModel | None, slots: Sequence[Slot] | None) -> Sequence[Slot]:
    if slots is not None:
        return slots
    return slots_of((loaded or models.load("demo")).module)


def mechanism_steps(subject: Subject, *, thorough: bool = False) -> list[Step]:
    """Every check that needs no model."""
    if not subject.plan.trained:
        return [lambda: [not_applicable(letter, what, "the policy trains nothing") for letter, what in CHECKS.items()]]

    def noise_and_claims() -> list[Row]:
        measured = noise.measure(subject)
        return noise.check(subject, measured) + claims.check(subject, measured)

    steps = [
        _guarded("S", lambda: sensitivity.check(subject)),
        _guarded("N", noise_and_claims),
        _guarded("E", lambda: noise.check_other(subject)),
        _guarded("W", lambda: release.check(subject)),
        _guarded("P", lambda: release.check_count(subject)),
        lambda: sampling.check(subject.seed),
    ]
    if subject.build is of_the_engine:
        steps += [lambda: quantiles.check(subject), source.check]
    if thorough:
        steps.append(_guarded("D", lambda: two_worlds.check(subject)))
    return steps


def _guarded(letter: str, check: Step) -> Step:
    """A mechanism that raises has failed the check; any other exception is a bug of the audit."""

    def step() -> list[Row]:
        try:
            return check()
        except MechanismError as error:
            return [judged(letter, CHECKS[letter], f"raised {error}", "a message", False)]

    return step
