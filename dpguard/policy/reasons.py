"""Why a policy can claim nothing: what leaves, or feeds what leaves, without calibrated noise on clipped sums."""

from __future__ import annotations

from collections.abc import Collection

from dpguard.errors import UserError, did_you_mean
from dpguard.policy.table import Plan, Rule

CARRIES = {
    # What compression or the clip left behind is added to the next message after the clip, so the clip bounds
    # it for no unit. (A residual of the NOISED tensors is post-processing, and one that is added before the
    # whole-update clip is local training: neither is named here.)
    "error_feedback": "what earlier messages left out is added un-noised to later ones (error feedback)",
    # One example moves the moments, and through them every later gradient step, by more than its clip. A
    # whole-update clip comes after the optimizer, so it bounds the moments' effect together with the rest.
    "clean_momentum": "momentum or Adam moments of un-noised gradients feed later messages",
    # Later per-example gradients are taken at weights that depend on the example un-noised: all of them may
    # move, not one. The whole-update clip bounds the client's update whatever its weights were (F11).
    "clean_local_training": "local weights that trained without noise feed later messages",
}
"""State that a client keeps un-noised between messages -> why nothing can be claimed then."""
_BREAKS_CLIENT_LEVEL = frozenset({"error_feedback"})


def why_infinite(plan: Plan, steps: int, carries: Collection[str] = ()) -> tuple[str, ...]:
    """Reasons for epsilon = infinity after ``steps`` messages; empty when a finite epsilon can be claimed.

    Args:
        plan: the policy resolved against a model.
        steps: number of messages; state that is carried over matters from the second on.
        carries: un-noised state that feeds later messages, keys of `CARRIES`.

    Raises:
        UserError: an unknown name in ``carries``.
    """
    for name in carries:
        if name not in CARRIES:
            raise UserError(f"unknown carried state {name!r}{did_you_mean(name, CARRIES)}")
    if not plan.shared:
        return ()
    out = _on_the_wire([plan[name] for name in plan.shared])
    if steps > 1:
        out += _from_state(plan, carries)
    return tuple(out)


def _on_the_wire(sent: list[Rule]) -> list[str]:
    out = []
    bare = [r for r in sent if r.clip is None]
    uncalibrated = [r for r in bare if r.noise_std]
    clean = [r for r in sent if r.clip is not None and not r.noise]
    if uncalibrated:
        out.append(f"noise without a per-example clip bounds nothing ({_where(uncalibrated)})")
    if len(bare) > len(uncalibrated):
        rest = [r for r in bare if not r.noise_std]
        out.append(f"gradients leave without clip and noise ({_where(rest)})")
    if clean:
        word = "noise_std is no calibrated noise" if any(r.noise_std for r in clean) else "clipped but without noise"
        out.append(f"{word} ({_where(clean)})")
    return out


def _from_state(plan: Plan, carries: Collection[str]) -> list[str]:
    client = plan.unit == "update"
    breaking = _BREAKS_CLIENT_LEVEL if client else frozenset(CARRIES)
    out = []
    # Inside one clip group the least noise counts, also that of withheld members seen only through the state.
    loud = [plan[name] for name in plan.withheld if not plan[name].noise]
    if loud and not client:
        out.append(
            "withheld layers train without noise, and from the second message on the shared gradients depend "
            f"on that un-noised state ({_where(loud)})"
        )
    return out + [why for name, why in CARRIES.items() if name in carries and name in breaking]


def _where(rules: list[Rule]) -> str:
    parts = list(dict.fromkeys(rule.slot.part for rule in rules))
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
