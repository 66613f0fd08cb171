"""The caller's optimizer, stepping on what leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpguard.engine import noise, wire
from dpguard.engine.diagnostics import Diagnostics
from dpguard.engine.modes.base import GradientMode
from dpguard.engine.sampling import Part
from dpguard.errors import UserError
from dpguard.policy.table import Plan

HOOKS = tuple(
    f"register_{what}_{when}_hook" for what in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")
)


class PrivateOptimizer(Optimizer):
    """The caller's optimizer, stepping on the message that leaves instead of the raw gradient.

    ``param.grad`` between ``backward()`` and ``step()`` is not what leaves the client; inside ``step`` it
    is replaced by the message (shared tensors) or by the noised mean (withheld ones). Step hooks are the
    inner optimizer's: they run once a logical batch, and find the message in ``param.grad``, never a raw gradient.

    Args:
        inner: the caller's.
        module: whose parameters it holds.
        plan: the policy.
        mode: the attached gradient mode.
        batch_size: the public batch size, the divisor.
        drawn_from: source of the noise.
        before_release: called once a logical batch before anything is noised, with the passes over the loader that
            the batch may be of; gives the number of messages before this one, raises when nothing may leave.
    """

    def __init__(
        self,
        inner: Optimizer,
        module: nn.Module,
        plan: Plan,
        mode: GradientMode,
        *,
        batch_size: int,
        drawn_from: noise.Source,
        before_release: Callable[[frozenset[int]], int],
    ) -> None:
        self.inner = inner
        self.plan = plan
        self.mode = mode
        self.batch_size = batch_size
        self.module = module
        self.parameters_by_name = dict(module.named_parameters())
        self.diagnostics = Diagnostics()
        self.source = drawn_from
        self._before_release = before_release
        self._open = False
        self._last_part = True
        self._fetched = False
        self._handed = 0  # examples of the batch at hand
        self._own: frozenset[int] = frozenset()  # the pass of what was fetched to train on since the last step
        self._passes = frozenset({0})  # and of what was fetched in eval mode, where that may be trained on as well
        self.empty = False
        self.last_message: dict[str, Tensor] = {}
        for name in HOOKS:
            setattr(self, name, getattr(inner, name))

    # tells a GradScaler to hand over its scale, so that `step` can refuse it: an attribute of torch's own optimizers
    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    # What schedulers and checkpoints ask an optimizer for is the inner one's.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's groups."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state."""
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults."""
        return self.inner.defaults

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's state."""
        self.inner.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Let the inner optimizer step on more of what the policy trains.

        Raises:
            UserError: any other tensor, which would train without clip and noise.
        """
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else given if isinstance(given, set) else list(given)
        trained = {id(self.parameters_by_name[name]) for name in self.plan.trained}
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in given]  # (name, tensor), or a tensor
        strange = sum(id(parameter) not in trained for parameter in tensors)
        if strange:
            raise UserError(
                f"{strange} of {len(tensors)} tensors of the new group are not trained by the policy and would train "
                "without clip and noise; expected only tensors with train: true in the table"
            )
        self.inner.add_param_group({**param_group, "params": given})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, per-example ones included, and the last message (the same tensors).

        Between the parts of one logical batch the sum of the earlier parts is kept.
        """
        if self._open:
            self.mode.clear()
        else:
            self.mode.discard()
        self.last_message = {}
        self._fetched = False
        self.inner.zero_grad(set_to_none=set_to_none)

    def begin_part(self, part: Part) -> None:
        """The loader hands out the next physical part of a logical batch.

        Raises:
            UserError: the part before was neither stepped on nor given up with zero_grad(): two batches in one
                step would double what one example can change.
        """
        evaluating = not self.module.training
        if evaluating and (self._fetched or self._open):  # over the training texts, with a batch at hand
            return
        if self._fetched:
            raise UserError(
                "a second batch was fetched before step() or zero_grad(): gradients of two batches must not add up; "
                "expected one step a batch (larger batches: raise batch_size and give max_physical_batch_size)"
            )
        if part.first:
            self._open = False  # a logical batch that the caller left half-way is dropped whole
            self.mode.discard()
        # what is fetched in eval mode may be evaluated, or trained on after model.train()
        self._fetched, self._last_part = not evaluating, part.last
        self._handed = self.mode.folded + part.rows  # a part that was given up is not among the folded ones
        if not evaluating:
            self._own = frozenset({part.epoch})
        self._passes = self._own | {part.epoch}

    def fold(self) -> None:
        """Clip and sum what went backward so far: call it between the physical parts of a logical batch."""
        self.mode.fold()
        if self.mode.folded > self._handed:  # fewer: a batch that the caller cuts into parts
            self._check_rows(self.mode.folded)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on the message of everything that went backward since the last one.

        Before the last physical part of a logical batch (``max_physical_batch_size``) the part is only clipped
        and summed; ``stepped`` tells.

        Raises:
            UserError: a GradScaler; no or too many examples went backward; a message that may not leave.
        """
        if self.found_inf is not None:
            raise UserError(
                "a GradScaler steps the optimizer: it multiplies every example's gradient before the clip; expected "
                "torch.autocast with bfloat16, which needs no scale, and optimizer.step()"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._fetched = False
        if not self._last_part:
            self._open = True
            self.fold()
            self._check_rows(self.mode.folded)
            return loss
        self._open = False
        clipped = wire.empty_sum(self.parameters_by_name, self.plan) if self.empty else self.mode.collect()
        self.mode.discard()
        self._check_rows(clipped.rows)
        self._handed = 0
        self._check_frozen()
        number = self._before_release(self._passes)
        self.diagnostics.record(clipped.norms, clipped.sums, clipped.dropped, self.plan, self.batch_size)
        self._emit(clipped, number)
        self.inner.step()
        self.empty, self._own = False, frozenset()
        self._follow_quantiles(clipped.norms)
        return loss

    def _check_rows(self, rows: int) -> None:
        handed = self._handed
        if rows == handed:
            return
        self.mode.discard()  # or a caller who goes on would have it in the sum
        self._open, self._handed = False, 0
        if handed == 0:
            raise UserError(
                f"{rows} examples went backward and the loader had handed out none: only its batches are Poisson "
                "draws; expected the batches of the loader that make_private returned"
            )
        raise UserError(
            f"{rows} examples went backward for a batch of {handed}: one that counts twice, or two clipped as one, "
            "move the sum by more than the clip; expected one forward and one backward pass of each batch that the "
            "loader hands out"
        )

    def _check_frozen(self) -> None:
        """The inner optimizer would step on a raw gradient that a tensor without clip and noise holds."""
        names = {id(parameter): name for name, parameter in self.parameters_by_name.items()}
        trained = set(self.plan.trained)
        for parameter in (p for group in self.inner.param_groups for p in group["params"]):
            name = names.get(id(parameter))
            if name is None:
                raise UserError(
                    f"the optimizer holds a tensor of shape {tuple(parameter.shape)} that make_private did not see and "
                    "that would train without clip and noise; expected only the module's own"
                )
            if name not in trained and parameter.grad is not None:
                raise UserError(
                    f"{name!r} is frozen by the policy and has a gradient; expected train: true for it in the table, "
                    "or requires_grad left False and zero_grad() after a backward pass of your own"
                )

    @property
    def stepped(self) -> bool:
        """True when the last call of `step` really stepped."""
        return not self._open

    def _emit(self, clipped: wire.ClippedSum, number: int) -> None:
        """Noise and release; every message has a random mask of its own, by its public ``number``."""
        self.last_message = {}
        for out in wire.emit(clipped, self.plan, batch_size=self.batch_size, drawn_from=self.source, mask_seed=number):
            parameter = self.parameters_by_name[out.name]
            parameter.grad = (out.mean if out.wire is None else out.wire).to(parameter.dtype)
            if out.wire is not None:
                self.last_message[out.name] = out.wire

    def _follow_quantiles(self, norms: dict[str, Tensor]) -> None:
        clips = wire.next_clips(norms, self.plan, self.source, batch_size=self.batch_size)
        if clips:
            self.adopt(self.plan.with_clips(clips))

    def adopt(self, plan: Plan) -> None:
        """Go on under other bounds of the same groups."""
        self.plan = self.mode.plan = plan
