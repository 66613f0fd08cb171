"""The guarantee in words: unit, adjacency, sampling, view, what is covered and what is not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpguard.policy.table import Plan

NOT_COVERED = (
    "hyper-parameters chosen on private data and reports made from it (use proxy or public data)",
    "several examples of one person (k examples multiply mu by k)",
    "the floating-point form of the Gaussian sampler",
    "diagnostics such as clipped fractions, which must stay with the client",
)


def compose(
    plan: Plan,
    *,
    epsilon: float,
    delta: float,
    sigma_eff: float,
    sampling_rate: float,
    steps: int,
    sampling: str,
    examples: int | None,
    reasons: Sequence[str],
) -> str:
    """The statement that is printed beside every epsilon; one paragraph of plain sentences."""
    if reasons:
        first = f"No formal guarantee (epsilon = inf): {'; '.join(reasons)}."
        if "withheld" in reasons[-1] and len(reasons) == 1:
            first += " The first message alone would have a finite epsilon."
        return f"{first} {_shares(plan)} Clipping, pruning, quantising and withholding alone prove nothing."
    if not plan.shared:
        return "Nothing leaves the client (epsilon = 0): every layer is frozen or withheld."
    return " ".join(
        (
            f"Each client's messages are ({_number(epsilon)}, {delta:g})-differentially private for one example "
            "(zero-out adjacency: one example's gradient replaced by zero; the number of examples is public"
            + (f", {examples}" if examples else "")
            + "; replacing an example by another doubles the sensitivity).",
            f"Effective noise multiplier {_number(sigma_eff)} a step, {steps} step{'s' if steps > 1 else ''}, "
            + _sampling(sampling, sampling_rate),
            "View: an honest-but-curious server that sees every message of the client; only the client's own "
            "noise and its own secret sampling count.",
            _shares(plan),
            _post(plan) + "The loss must be a mean of per-example losses.",
            f"Not covered: {'; '.join(NOT_COVERED)}.",
        )
    )


def _sampling(sampling: str, rate: float) -> str:
    if rate == 1:
        return "every example in every step."
    if sampling == "shuffle":
        return f"shuffled fixed batches of {rate:.3g} of the examples, counted without amplification."
    return f"Poisson sampling at rate {rate:.4g}."


def _shares(plan: Plan) -> str:
    words = [f"{100 * plan.shared_fraction:.3g} % of the parameters leave"]
    if plan.withheld:
        words.append(f"{len(plan.withheld)} tensors are trained but withheld")
    frozen = len(plan) - len(plan.trained)
    if frozen:
        words.append(f"{frozen} tensors are frozen")
    return "; ".join(words) + "."


def _post(plan: Plan) -> str:
    done = sorted({plan[name].describe() for name in plan.shared} - {""})
    return f"Done after the noise, at no privacy cost: {'; '.join(done)}. " if done else ""


def _number(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.3g}"
