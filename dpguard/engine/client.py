"""A client of a federation: what it would send for a batch under a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dpguard.engine import clipping, noise, wire
from dpguard.engine.gradients import per_example_losses, running_as
from dpguard.errors import UserError
from dpguard.inputs.batch import Batch
from dpguard.policy.table import Plan


@dataclass(frozen=True)
class Update:
    """What leaves the client, and nothing else: no norm, no count, no seed of the noise.

    Attributes:
        tensors: shared parameter name -> tensor on the wire.
        batch_size: the public batch size, the divisor.
        kind: ``gradient``: of one step.
        mode: ``eval`` (dropout off) or ``train``.
        mask_seed: public seed of random pruning masks.
    """

    tensors: dict[str, Tensor]
    batch_size: int
    kind: str = "gradient"
    mode: str = "eval"
    mask_seed: int = 0


@dataclass
class Client:
    """One client at fixed weights.

    Args:
        model: the public model; left as it was found after every call.
        plan: the policy resolved against it.
        seed: seed of the noise, for studies and tests only: whoever knows it can subtract the noise. None
            (the default) draws from a cryptographic source, see `noise.SecureSource`.
        batch_size: the PUBLIC batch size; the number of rows of the observed batch when None.
        mode: ``eval`` = dropout off, ``train`` = dropout on (its masks come from ``dropout_seed``).
        mask_seed: public seed of random pruning masks.
        dropout_seed: seed of the dropout masks in ``train`` mode.
        grad_mode: ``fast``, ``opacus`` or ``loop``, see `clipping.MODES`; they agree, at very different speeds.
    """

    model: nn.Module
    plan: Plan
    seed: int | None = None
    batch_size: int | None = None
    mode: str = "eval"
    mask_seed: int = 0
    dropout_seed: int = 0
    grad_mode: str = "fast"
    dropped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.mode not in ("eval", "train"):
            raise UserError(f"mode is {self.mode!r}; expected 'eval' or 'train'")
        clipping.check_model(self.model, self.plan)
        self._source = noise.source(self.seed)

    def observe(self, batch: Batch) -> Update:
        """The message for one batch: clip, sum, noise, divide by the public batch size, prune, quantise.

        Calling it again gives fresh noise. Diagnostics stay here (``dropped``).
        """
        message = self.message(batch, self._source)
        return Update(message.wire, self._divisor(batch), mode=self.mode, mask_seed=self.mask_seed)

    def message(self, batch: Batch, generator: noise.Source) -> wire.Message:
        """Noised sum and wire for a given source of noise: for audits, which judge the noised tensors."""
        clipped = self.clipped(batch)
        self.dropped = clipped.dropped
        return wire.make_message(
            clipped, self.plan, batch_size=self._divisor(batch), generator=generator, mask_seed=self.mask_seed
        )

    def clipped(self, batch: Batch) -> wire.ClippedSum:
        """The private clipped sum, before noise."""
        if len(batch) == 0:
            return self._empty()
        with running_as(self.model, self.mode), training_only(self.model, self.plan):
            hooks = clipping.MODES[self.grad_mode](self.model, self.plan, "sum")
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self.dropout_seed)
                    torch.autograd.backward(per_example_losses(self.model, batch).sum())
                return hooks.collect()
            finally:
                hooks.discard()
                hooks.detach()

    def _empty(self) -> wire.ClippedSum:
        parameters = dict(self.model.named_parameters())
        zeros = {name: torch.zeros_like(parameters[name], requires_grad=False) for name in self.plan.trained}
        return wire.ClippedSum(zeros, {key: torch.zeros(0) for key in self.plan.groups})

    def _divisor(self, batch: Batch) -> int:
        return self.batch_size if self.batch_size is not None else max(1, len(batch))


@contextmanager
def training_only(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Let only the plan's trained tensors require gradients, then put everything back."""
    before = {p: p.requires_grad for p in model.parameters()}
    trained = set(plan.trained)
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
