"""The least noise, in the proportions of a table, that keeps an epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from dpguard import registry
from dpguard.errors import UserError
from dpguard.policy.guarantee import Accountant, Guarantee, Sampling, guarantee
from dpguard.policy.layers import Slot

if TYPE_CHECKING:
    from dpguard.policy.table import Policy

WITHIN = 0.01
"""The calibrated epsilon is at most this fraction below the target."""
_FACTORS = (1e-4, 1e6)


class _Accounting(Protocol):
    PLUGIN: Callable[[], Accountant]


def default_accountant() -> Accountant:
    """The engine's accountant, found by name when it is needed: `policy` imports no torch, and so no engine."""
    return cast(_Accounting, registry.load("dpguard.engine", "accounting", "accountant")).PLUGIN()


def calibrate(
    policy: Policy,
    slots: Sequence[Slot],
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    accountant: Accountant | None = None,
    sampling: Sampling = "poisson",
    examples: int | None = None,
) -> Policy:
    """See `Policy.calibrate`."""
    if not epsilon > 0 or math.isinf(epsilon):
        raise UserError(f"target epsilon is {epsilon!r}; expected a number above 0")
    start = with_some_noise(policy)
    facts: dict[str, Any] = {
        "delta": delta, "sampling_rate": sampling_rate, "steps": steps, "sampling": sampling, "examples": examples,
        "accountant": accountant or default_accountant(),
    }  # fmt: skip

    def claim(factor: float) -> Guarantee:
        return guarantee(scaled(start, factor).plan(slots), **facts)

    _check_reachable(claim, epsilon)
    return scaled(start, _least_factor(lambda factor: claim(factor).epsilon, epsilon))


def with_some_noise(policy: Policy) -> Policy:
    """The policy itself when any row has noise, else noise 1 in every row that sets a clip."""
    if any(row.columns.get("noise") for row in policy._read):
        return policy
    rows = [{**row, "noise": 1.0} if "clip" in row else row for row in policy.rows]
    return type(policy)(rows, policy.name)


def scaled(policy: Policy, factor: float) -> Policy:
    """Every noise multiplier times one factor, rounded up to five digits (never less noise than asked)."""
    rows = []
    for row, read in zip(policy.rows, policy._read, strict=True):
        noise = read.columns.get("noise")
        rows.append({**row, "noise": _round_up(noise * factor)} if noise else row)
    return type(policy)(rows, policy.name)


def _round_up(value: float) -> float:
    digits = 4 - math.floor(math.log10(value))
    up = math.ceil(value * 10**digits * (1 - 1e-12)) / 10**digits
    return float(f"{up:.5g}")


def _check_reachable(claim: Callable[[float], Guarantee], epsilon: float) -> None:
    most = claim(_FACTORS[1])
    if most.reasons:
        raise UserError(f"no noise reaches epsilon {epsilon:g}: {'; '.join(most.reasons)}")
    if most.sigma_eff == math.inf:
        raise UserError("nothing leaves the client, so epsilon is 0 whatever the noise; expected a shared layer")
    if most.epsilon > epsilon:
        raise UserError(
            f"no noise reaches epsilon {epsilon:g}: the noised counts of the adaptive clips alone cost "
            f"{most.epsilon:.3g}; expected a larger count_noise, fewer clip groups or a number as clip"
        )


def _least_factor(epsilon_at: Callable[[float], float], target: float) -> float:
    """Factor whose epsilon is at most ``target`` and within `WITHIN` of it; epsilon falls with the factor.

    False position on the logarithms (epsilon is nearly a power of the noise), and a plain bisection every
    third time, so that a curved stretch costs a few more queries and never stalls it.
    """
    low, high = _bracket(epsilon_at, target)
    for turn in range(80):
        if low[1] == high[1] or high[0] / low[0] < 1 + 1e-9:
            break
        slope = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
        aim = math.log(target * (1 - WITHIN / 2) / low[1]) / slope if turn % 3 < 2 and slope < 0 else math.nan
        middle = low[0] * math.exp(aim) if math.isfinite(aim) else math.nan
        if not low[0] < middle < high[0]:
            middle = math.sqrt(low[0] * high[0])
        found = (middle, max(epsilon_at(middle), 1e-12))
        if found[1] > target:
            low = found
        else:
            high = found
            if found[1] >= target * (1 - WITHIN):
                break
    return high[0]


def _bracket(epsilon_at: Callable[[float], float], target: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """(factor, epsilon) just above and just below the target, a factor of four apart."""
    least, most = _FACTORS
    factor, found = 1.0, max(epsilon_at(1.0), 1e-12)
    last = (factor, found)
    if found > target:
        while found > target and factor < most:
            last, factor = (factor, found), factor * 4
            found = max(epsilon_at(factor), 1e-12)
        return last, (factor, found)
    while found <= target:
        if factor < least:
            raise UserError(f"epsilon {target:g} is kept almost without noise; expected a smaller one")
        last, factor = (factor, found), factor / 4
        found = max(epsilon_at(factor), 1e-12)
    return (factor, found), last
