"""The guarantee in words: unit, adjacency, sampling, view, what is covered and what is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpguard.policy.table import Plan

NOT_COVERED = (
    "hyper-parameters chosen on private data and reports made from it (use proxy or public data)",
    "several examples of one person (k examples multiply mu by k)",
    "the floating-point form of the Gaussian sampler",
    "diagnostics such as clipped fractions, which must stay with the client",
)
_SEVERAL = {"example": NOT_COVERED[1], "client": "several clients of one person (k clients multiply mu by k)"}


@dataclass(frozen=True)
class View:
    """Who sees what, where it is not each client's messages that the server sees.

    Attributes:
        subject: the beginning of the statement, up to the epsilon ("The means of a round are").
        sentences: what is assumed and what counts.
    """

    subject: str
    sentences: str


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
    seeded: bool = False,
    once: bool = False,
    view: View | None = None,
) -> str:
    """The statement that is printed beside every epsilon; one paragraph of plain sentences.

    ``once``: epsilon is infinite, but the first message alone would have a finite one.
    ``view``: None = the server sees every message of every client.
    """
    if reasons:
        first = f"No formal guarantee (epsilon = inf): {'; '.join(reasons)}."
        if once:
            first += " The first message alone would have a finite epsilon."
        first += f" {view.sentences}" if view else ""
        return f"{first} {_shares(plan)} Clipping, pruning, quantising and withholding alone prove nothing."
    if not plan.shared:
        return "Nothing leaves the client (epsilon = 0): every layer is frozen or withheld."
    client = plan.unit == "update"
    not_covered = [_SEVERAL["client"] if client and item == _SEVERAL["example"] else item for item in NOT_COVERED]
    return " ".join(
        (
            f"{view.subject if view else SUBJECT} ({_number(epsilon)}, {delta:g})-differentially private for "
            + (_CLIENT if client else _example(examples)),
            f"Effective noise multiplier {_number(sigma_eff)} a step, {steps} step{'s' if steps > 1 else ''}, "
            + ("the client in every one." if client else _sampling(sampling, sampling_rate)),
            *_counts(plan),
            view.sentences if view else _view(client),
            *([SEEDED] if seeded else []),
            _shares(plan),
            _post(plan) + ("" if client else "The loss must be a mean of per-example losses. ")
            + f"Not covered: {'; '.join(not_covered)}.",
        )
    )  # fmt: skip


SUBJECT = "Each client's messages are"
SEEDED = (
    "The noise comes from a seed: whoever knows the seed can subtract the noise, and this epsilon holds only "
    "against those who do not."
)
_CLIENT = (
    "one client as a whole (zero-out adjacency: the client's whole update replaced by zero in every message; "
    "replacing it by another client's doubles the sensitivity). However often the client takes part, client "
    "subsampling gives nothing against this view."
)


def _example(examples: int | None) -> str:
    return (
        "one example (zero-out adjacency: one example's gradient replaced by zero; the number of examples is public"
        + (f", {examples}" if examples else "")
        + "; replacing an example by another doubles the sensitivity)."
    )


def _view(client: bool) -> str:
    only = "noise counts" if client else "noise and its own secret sampling count"
    return f"View: an honest-but-curious server that sees every message of the client; only the client's own {only}."


def _counts(plan: Plan) -> list[str]:
    noises = sorted({group.quantile.count_noise for group in plan.groups.values() if group.quantile})
    if not noises:
        return []
    stds = ", ".join(f"{noise:g}" for noise in noises)
    return [
        f"Clips follow quantiles of the norms by noised counts (std {stds} examples), from which the example is left "
        "out as well; they are paid for here."
    ]


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
