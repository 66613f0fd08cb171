"""What a message must be before it may leave. Fails closed: whatever is not known to be right is refused.

No sentence here holds a number that was computed from the update: refusals reach the server's logs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dpguard.errors import UserError, did_you_mean
from dpguard.policy.table import Plan

Content = Literal["raw", "clipped", "noised"]
"""What a dict of tensors is said to be before the table is applied to it.

``raw``: a difference of weights as trained, neither clipped nor noised; for tables that clip the whole update, or
nothing. ``clipped``: the SUM over a batch of per-example clipped gradients. ``noised``: a difference of weights whose
every local step was clipped and noised already.
"""
CLOSE = 0.5
"""A tensor nearer to the weights than this share of their norm is the weights, not a difference of them."""
ALIGNED = 0.9
"""Cosine between an update and the weights above which it is a multiple of them."""
ENOUGH = 64
"""Entries from which on a tensor alone is judged by `CLOSE`."""
MOST_ZEROS = 0.01
"""Gaussian noise leaves no entry at zero; rounding of a difference leaves hardly any."""
SPACINGS = 50
"""A change is told from rounding when the tensor's usual change is so many float spacings of the weight."""


class Refused(UserError):  # noqa: N818 - it is what happened, not a failure
    """The message does not fit what was rehearsed; nothing leaves."""


def check_names(update: Mapping[Any, Any], required: Sequence[str], optional: Collection[str]) -> None:
    """Exactly the tensors that were rehearsed: ``required``, and maybe some of ``optional``.

    Raises:
        Refused: not a mapping, an unknown or a missing name.
    """
    if not isinstance(update, Mapping):
        raise Refused(f"the update is a {type(update).__name__}; expected a mapping of names to tensors")
    known = {*required, *optional}
    for name in update:
        if name not in known:
            near = did_you_mean(str(name), known)
            hint = near if near.startswith("; did") else "; expected the trained parameters that were rehearsed"
            raise Refused(f"unknown tensor {name!r}{hint} (buffers, frozen and tied second names never leave)")
    missing = [name for name in required if name not in update]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Refused(f"tensor {missing[0]!r}{more} is missing; expected every tensor that was rehearsed")


def check_tensor(name: str, value: Any, shape: Sequence[int], dtype: torch.dtype, *, finite: bool = True) -> None:
    """A plain tensor of the rehearsed shape and type, finite unless ``finite`` is False.

    Raises:
        Refused: anything else.
    """
    if not isinstance(value, Tensor):
        raise Refused(f"{name!r} is a {type(value).__name__}; expected a tensor")
    if value.layout != torch.strided:
        raise Refused(f"{name!r} has layout {value.layout}; expected a dense tensor")
    if value.dtype != dtype:
        raise Refused(
            f"{name!r} has type {value.dtype}; expected {dtype}, the type that was rehearsed (convert nothing on the "
            "way: rounding after the clip breaks it)"
        )
    if tuple(value.shape) != tuple(shape):
        raise Refused(f"{name!r} has shape {tuple(value.shape)}; expected {tuple(shape)}")
    if finite and not bool(torch.isfinite(value).all()):
        raise Refused(f"{name!r} has entries that are not finite; expected finite numbers")


def check_content(plan: Plan, content: str) -> None:
    """The declared content is one that this table can be applied to.

    Raises:
        Refused: an unknown word, or a clip that cannot be made (again) at this place.
    """
    if content not in ("raw", "clipped", "noised"):
        raise Refused(f"unknown content {content!r}{did_you_mean(content, ['raw', 'clipped', 'noised'])}")
    by_example = any(group.unit == "example" for group in plan.groups.values())
    if content == "raw" and by_example:
        raise Refused(
            "the table clips every example and the update is declared raw; expected a clipped sum, or a difference "
            "whose local steps were clipped and noised, because examples cannot be told apart afterwards"
        )
    if content == "noised" and plan.unit == "update":
        raise Refused(
            "the table clips the whole update and the update is declared noised; expected it raw: it is clipped and "
            "noised here, once"
        )


def check_difference(update: Mapping[str, Tensor], base: Mapping[str, Tensor] | None, names: Sequence[str]) -> None:
    """A difference of weights, not the weights themselves, nor a multiple of them.

    Args:
        update: what would leave.
        base: the global weights that the client began from.
        names: the tensors on the wire.

    Raises:
        Refused: no base to compare with, or full weights.
    """
    if base is None:
        raise Refused("no weights to compare the difference with; expected the global weights of this round")
    dot = norm = size = 0.0
    for name in names:
        value, weight = update[name].double().flatten(), base[name].double().flatten()
        length = float(weight.norm())
        dot += float(value @ weight)
        norm, size = norm + float(value.norm()) ** 2, size + length**2
        near = float((value - weight).norm()) < CLOSE * length
        if near and (weight.numel() >= ENOUGH or torch.equal(value, weight)):
            raise _full(name)
    if norm and size and dot > ALIGNED * (norm * size) ** 0.5:
        raise _full(names[0])


def _full(name: str) -> Refused:
    return Refused(
        f"{name!r} holds full weights where a difference was meant; expected weights after training minus those before"
    )


def check_noised(update: Mapping[str, Tensor], plan: Plan, base: Mapping[str, Tensor] | None) -> None:
    """A difference that is said to carry noise does: Gaussian noise leaves no entry at zero.

    An entry whose weight has a float spacing near the size of the tensor's changes may have been rounded to zero.

    Args:
        update: differences.
        plan: the table.
        base: the weights that the client began from.

    Raises:
        Refused: a noised tensor with many entries that are exactly zero.
    """
    for name in plan.shared:
        if plan[name].noise and float(_unmoved(update[name], (base or {}).get(name)).double().mean()) > MOST_ZEROS:
            raise Refused(
                f"{name!r} is declared noised and has many entries at zero; expected the noise of every local step on "
                "every entry"
            )


def _unmoved(change: Tensor, weight: Tensor | None) -> Tensor:
    """Entries at zero that no rounding explains."""
    moved = change[change != 0].abs()
    if weight is None or not moved.numel():
        return change == 0
    spacing = torch.nextafter(weight.abs(), torch.full_like(weight, torch.inf)) - weight.abs()
    return (change == 0) & (spacing * SPACINGS < moved.median())


def check_not_zero(update: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Something was trained.

    Raises:
        Refused: every entry is zero.
    """
    if not any(bool(update[name].any()) for name in names):
        raise Refused("the update is zero everywhere; expected a client that trained (nothing leaves)")


def check_metrics(metrics: Mapping[str, Any], allowed: Mapping[str, float | None]) -> dict[str, float]:
    """Numbers beside the tensors: only the ones on the list, because they pass by clip and noise.

    Args:
        metrics: what the client would send.
        allowed: name -> the public value that it must have, or None for a name that the site lets through as it is.

    Raises:
        Refused: a name that is not on the list, a value that is no finite number, or not the public one.
    """
    out = {}
    for name, value in metrics.items():
        if name not in allowed:
            expected = f"only {', '.join(sorted(allowed))}" if allowed else "none"
            raise Refused(
                f"metric {name!r} would leave beside the update, past clip and noise; expected {expected} "
                "(name it when exporting, and say so)"
            )
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value != value
            or abs(value) == float("inf")
        ):
            raise Refused(f"metric {name!r} is no finite number; expected one")
        public = allowed[name]
        if public is not None and value != public:
            raise Refused(f"metric {name!r} is not the public value {public:g}; expected that one")
        out[name] = float(value)
    return out
