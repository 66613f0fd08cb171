"""What every gradient mode is: an ordinary backward pass fills it, `collect` hands out the clipped sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dpguard.engine import wire
from dpguard.errors import UserError
from dpguard.policy.table import Plan

NOTHING = (
    "step() found no gradient; expected a forward pass in train mode and backward() between zero_grad() and step()"
)


class GradientMode:
    """One way to the clipped sum of a batch's per-example gradients; see `clipping.attach`.

    Keeps the running sum of a logical batch's parts; a mode gives the sum of the latest part.
    """

    plan: Plan
    parameters: Mapping[str, nn.Parameter]
    _folded: wire.ClippedSum | None = None

    def part(self, before: wire.ClippedSum | None) -> wire.ClippedSum:
        """The clipped sum of the latest backward pass, added to ``before``."""
        raise NotImplementedError

    def pending(self) -> bool:
        """True when something went backward since the last fold."""
        raise NotImplementedError

    def clear(self) -> None:
        """Drop what the latest backward pass left."""
        raise NotImplementedError

    def detach(self) -> None:
        """Remove every hook from the model."""
        raise NotImplementedError

    @property
    def folded(self) -> int:
        """Examples of the logical batch that are folded already."""
        return 0 if self._folded is None else self._folded.rows

    def fold(self) -> None:
        """Clip and sum what went backward so far, so that a large logical batch needs the memory of a part.

        A caller's ``torch.autocast`` ends here: norms and sums in 16 bits would let an example exceed its clip.
        """
        device = next((p.device.type for p in self.parameters.values()), "cpu")
        with torch.autocast(device, enabled=False):
            self._folded = self.part(self._folded)
        self.clear()

    def collect(self) -> wire.ClippedSum:
        """The clipped sum of everything since the last call; per-example state is dropped."""
        if self._folded is None or self.pending():
            self.fold()
        folded, self._folded = self._folded, None
        if folded is None:
            raise UserError(NOTHING)
        return folded

    def discard(self) -> None:
        """Forget everything since the last `collect`, folded parts included."""
        self._folded = None
        self.clear()


def trained_parameters(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """The plan's trained tensors, in the model's order; a tied one once, under its first name."""
    trained = set(plan.trained)
    return {name: p for name, p in model.named_parameters() if name in trained}
