"""A client of a federation: what it would send for a batch, or after some local steps, under a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dpguard.engine import clipping, local, noise, wire
from dpguard.engine.gradients import per_example_losses, running_as
from dpguard.engine.local import LocalTraining
from dpguard.engine.resolved import freeze, resolved
from dpguard.engine.update import Update as Update
from dpguard.errors import UserError
from dpguard.inputs.batch import Batch, check_batch
from dpguard.inputs.family import family_of
from dpguard.inputs.randomness import devices_of, seeded
from dpguard.policy.ledger import Ledger, Mechanism
from dpguard.policy.table import Plan


@dataclass
class Client:
    """One client. It reads the model's weights anew at every message, so a server may set them in between.

    Args:
        model: the public model; left as it was found after every call.
        plan: the policy resolved against it (a `Policy` is resolved here).
        seed: seed of the noise, for studies and tests only: whoever knows it can subtract the noise. None
            (the default) draws from a cryptographic source, see `noise.SecureSource`.
        batch_size: the PUBLIC batch size; the number of rows of the observed batch when None, which is refused where
            that number is drawn (``sampling_rate`` below 1).
        mode: ``eval`` = dropout off, ``train`` = dropout on.
        mask_seed: public seed of random pruning masks.
        dropout_seed: seed of the dropout masks in ``train`` mode, for studies and tests only: removing one example
            gives all later ones another mask, and whoever knows the masks sees all of them change. The k-th local
            step adds k. None: 0 beside a ``seed``, else fresh secret masks for every message and step.
        grad_mode: ``fast``, ``opacus`` or ``loop``, see `clipping.MODES`; they agree, at very different speeds.
        training: what the client does with several batches.
        ledger: entered before every message (and every noised local step) leaves; `BudgetSpent` when it is full.
        sampling_rate: probability that an example is in a batch, for the ledger.
        run: name of this run in the ledger.
    """

    model: nn.Module
    plan: Plan
    seed: int | None = None
    batch_size: int | None = None
    mode: str = "eval"
    mask_seed: int = 0
    dropout_seed: int | None = None
    grad_mode: str = "fast"
    training: LocalTraining = field(default_factory=LocalTraining)
    ledger: Ledger | None = None
    sampling_rate: float = 1.0
    run: str = "rounds"
    dropped: int = field(default=0, init=False)
    state: local.LocalState = field(default_factory=local.LocalState, init=False, repr=False)

    def __post_init__(self) -> None:
        clipping.check_mode(self.grad_mode)
        if self.mode not in ("eval", "train"):
            raise UserError(f"mode is {self.mode!r}; expected 'eval' or 'train'")
        self.plan = resolved(self.plan, self.model)
        if self.batch_size is not None and (isinstance(self.batch_size, bool) or self.batch_size < 1):
            raise UserError(f"batch_size is {self.batch_size!r}; expected a whole number of at least 1")
        if self.batch_size is None and self.sampling_rate < 1:
            raise UserError(
                f"batch_size is None at sampling rate {self.sampling_rate:g}; expected the public batch size, because "
                "the number of rows that were drawn is private"
            )
        clipping.check_model(self.model, self.plan)
        self._source = noise.source(self.seed)
        self._mechanism = Mechanism.of(self.plan, sampling_rate=self.sampling_rate) if self.ledger else None

    def observe(self, batch: Batch | Mapping[str, Any] | Sequence[Batch | Mapping[str, Any]]) -> Update:
        """The message for one batch (a gradient), or for a list of batches (the change of weights after a local
        step on each).

        One batch: clip, sum, noise, divide by the public batch size, prune, quantise. Several: see `LocalTraining`.
        Calling it again gives fresh noise. Diagnostics stay here (``dropped``).

        Raises:
            BudgetSpent: the ledger's budget does not reach; nothing leaves, and nothing was noised.
        """
        if isinstance(batch, (list, tuple)):
            return self._after_steps([self._read(one) for one in batch])
        batch = self._read(batch)
        self.spend(1)
        message = self.message(batch, self._source)
        return Update(message.wire, self.divisor(batch), mode=self.mode, mask_seed=self.mask_seed)

    def message(self, batch: Batch, generator: noise.Source) -> wire.Message:
        """Noised sum and wire for a given source of noise: for audits, which judge the noised tensors."""
        clipped = self.clipped(batch)
        self.dropped = clipped.dropped
        return wire.make_message(
            clipped, self.plan, batch_size=self.divisor(batch), generator=generator, mask_seed=self.mask_seed
        )

    def clipped(self, batch: Batch, *, step: int = 0) -> wire.ClippedSum:
        """The private clipped sum, before noise."""
        if len(batch) == 0:
            return wire.empty_sum(dict(self.model.named_parameters()), self.plan)
        with running_as(self.model, self.mode), training_only(self.model, self.plan):
            hooks = clipping.per_example(self.model, self.plan, "sum", self.grad_mode)
            try:
                with seeded(self._masks(step), devices_of(self.model)):
                    torch.autograd.backward(per_example_losses(self.model, batch).sum())
                return hooks.collect()
            finally:
                hooks.discard()
                hooks.detach()

    def _masks(self, step: int) -> int:
        if self.dropout_seed is None and self.seed is None:
            return noise.secret_seed()
        return (self.dropout_seed or 0) + step

    def _read(self, value: object) -> Batch:
        batch = Batch.of(value, getattr(self.model.config, "pad_token_id", None))
        check_batch(batch, self.model.config, family_of(self.model).max_tokens(self.model.config))
        return batch

    def spend(self, messages: int) -> None:
        """Enter messages in the ledger, if there is one, before they leave."""
        if self.ledger is None or self._mechanism is None:
            return
        self.ledger.spend_next(self._mechanism, self.run, count=messages)

    def _after_steps(self, batches: list[Batch]) -> Update:
        if not batches:
            raise UserError("observe got an empty list of batches; expected one batch a local step")
        self.spend(1 if self.plan.unit == "update" else len(batches))
        tensors = local.delta(self, batches, self._source)
        return Update(
            tensors, self.divisor(batches[0]), kind="delta", mode=self.mode, mask_seed=self.mask_seed,
            local_steps=len(batches), training=self.training,
        )  # fmt: skip

    def divisor(self, batch: Batch) -> int:
        """The public batch size: the client's, or the rows of the batch where it has none."""
        return self.batch_size if self.batch_size is not None else max(1, len(batch))


@contextmanager
def training_only(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Let only the plan's trained tensors require gradients, and none have one; then put everything back."""
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    try:
        freeze(model, plan)
        for parameter in before:
            parameter.grad = None  # a backward pass would add to the caller's
        yield
    finally:
        for parameter, (flag, grad) in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = grad
