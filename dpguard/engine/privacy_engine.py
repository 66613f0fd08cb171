"""Opacus's calling convention with a policy table: module, optimizer and loader in, the same three out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpguard.engine import clipping, noise, sampling
from dpguard.engine.accounting import guarantee
from dpguard.engine.diagnostics import Diagnostics
from dpguard.engine.forward import ForwardHooks
from dpguard.engine.private_optimizer import PrivateOptimizer
from dpguard.engine.resolved import freeze, resolved
from dpguard.errors import UserError
from dpguard.inputs.family import identity
from dpguard.policy.guarantee import Guarantee, Sampling
from dpguard.policy.ledger import Ledger, Mechanism
from dpguard.policy.table import Plan, Policy


class PrivacyEngine:
    """Trains a model under a policy and knows what may be claimed about it.

    Attributes:
        plan: the policy resolved against the module, None before `make_private`.
        sampling_rate: public batch size / number of examples.
        examples: number of examples.
        steps: messages released so far.
        seeded: True when the noise comes from a seed.

    Example:
        >>> engine = PrivacyEngine()
        >>> engine.get_epsilon(delta=1e-5)  # nothing was released yet
        0.0
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.sampling_rate = 1.0
        self.examples = 0
        self.steps = 0
        self.poisson = True
        self.seeded = False
        self._optimizer: PrivateOptimizer | None = None
        self._undo = ExitStack()  # what close() takes back
        self._ledger: tuple[Ledger, Mechanism, str] | None = None
        self._coins: noise.Source | None = None
        self._epochs: set[int] = set()

    def close(self) -> None:
        """Take every hook off the module, which is then an ordinary model again (for saving, evaluating).

        What the policy froze requires a gradient again where it did before `make_private`.
        """
        self._undo.close()

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        policy: Policy | Plan | str | Path,
        seed: int | None = None,
        poisson_sampling: bool = True,
        loss_reduction: str = "mean",
        grad_mode: str = "fast",
        max_physical_batch_size: int | None = None,
        lengths: Sequence[int] | None = None,
        ledger: Ledger | None = None,
        run: str = "training",
    ) -> tuple[nn.Module, PrivateOptimizer, DataLoader[Any]]:
        """Wire a policy into an ordinary training loop.

        The module stays the same object: it gets explicit position ids, a per-example loss whenever labels
        are passed, and requires_grad False where the policy freezes, all until `close`, or until this call raises.
        The divisor is the loader's batch size, the sampling rate that over the number of examples.

        Args:
            module: a Hugging Face model in train mode.
            optimizer: any optimizer over (some of) the module's parameters.
            data_loader: with a batch size and a dataset that has a length.
            policy: a `Policy`, a `Plan` of this very module, or what `Policy.load` reads (a file, a name).
            seed: seed of noise and sampling, for studies and tests only, and said in the statement: whoever
                knows it can subtract the noise. None: a cryptographic source (`noise.SecureSource`).
            poisson_sampling: False keeps the loader's own batches; no amplification is claimed then, and every
                pass over the loader counts as a whole one, however soon it is left.
            loss_reduction: ``mean`` or ``sum``, as your loss reduces over the batch.
            grad_mode: ``fast``, ``opacus`` or ``loop``, see `clipping.MODES`; they agree, at different speeds.
            max_physical_batch_size: the loader hands out parts of at most this many examples; ``step`` clips
                and sums each, and noises and steps once at the end of a batch (``optimizer.stepped`` tells).
            lengths: tokens of each example, in the data set's order: a batch is then handed out in parts of like
                length, which pads less (1.3 to 2 times as fast, `benchmarks/parts.py`); its sum is the same.
            ledger: what this client has spent on this model (`open_ledger`); every step is entered before its
                noise is drawn, and ``step`` raises `BudgetSpent` before the budget would be exceeded.
            run: name of this training in the ledger.

        Returns:
            (module, optimizer, data_loader).

        Raises:
            UserError: a second call (an engine serves one training), eval mode, batch normalisation, gradient
                checkpointing, an optimizer holding other parameters, a loader without a length, a layer that no
                gradient mode can handle, a ledger of another model or policy, or a mistake in the policy.
        """
        self._check_fresh(module, loss_reduction)
        plan = _trainable(policy, module)
        _check_optimizer(module, optimizer)
        drawn_from = noise.source(seed)
        coins = noise.source(None if seed is None else seed + 1_000_003)
        loader = sampling.poisson_loader(
            data_loader, coins, physical=max_physical_batch_size, poisson=poisson_sampling, lengths=lengths
        )
        examples, batch_size = sampling.public_sizes(data_loader)
        # of the caller's own batches the share that one pass' batches are, its last one dropped or not
        rate = batch_size / examples if poisson_sampling else 1 / len(loader)
        entered = _entered(ledger, module, plan, run, rate=rate, poisson=poisson_sampling)
        with ExitStack() as undo:
            for parameter in module.parameters():
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
            freeze(module, plan)
            mode = clipping.attach(module, plan, loss_reduction=loss_reduction, grad_mode=grad_mode)
            undo.callback(mode.detach)
            private = PrivateOptimizer(
                optimizer, module, plan, mode,
                batch_size=batch_size, drawn_from=drawn_from, before_release=self._before_release,
            )  # fmt: skip
            undo.callback(ForwardHooks(module, private, loss_reduction, secret=seed is None).detach)
            self._undo = undo.pop_all()
        loader.on_part = private.begin_part
        # only now: an engine whose set-up was refused has no policy, and books nothing
        self.plan, self.poisson, self.seeded = plan, poisson_sampling, seed is not None
        self.examples, self.sampling_rate, self._ledger = examples, rate, entered
        self._optimizer, self._coins = private, coins
        return module, private, loader

    def _check_fresh(self, module: nn.Module, loss_reduction: str) -> None:
        if self._optimizer is not None:
            made = f"has made {self.steps} steps under its policy" if self.steps else "serves another training"
            raise UserError(
                f"this engine {made} already; expected an engine of its own for every training (and one ledger for all "
                "of them)"
            )
        if not module.training:
            raise UserError("the model is in eval mode; expected train mode (call model.train() first)")
        if loss_reduction not in ("mean", "sum"):
            raise UserError(f"loss_reduction is {loss_reduction!r}; expected 'mean' or 'sum'")
        if any(isinstance(getattr(hook, "__self__", None), ForwardHooks) for hook in module._forward_hooks.values()):
            raise UserError("the model is private already; expected close() on the engine that made it so")

    @staticmethod
    def open_ledger(
        module: nn.Module,
        folder: str | Path,
        *,
        client: str,
        delta: float,
        budget: float | None = None,
        allow_change: bool = False,
    ) -> Ledger:
        """The ledger of one client and one model, in the folder where the model is saved; made when missing.

        Args:
            module: the model; known by its type and shapes, so that training does not change whose ledger it is.
            folder: where the model is saved.
            client: the client's name.
            delta: of (epsilon, delta).
            budget: the epsilon that is never exceeded.
            allow_change: accept another policy or a laxer budget than before; what was spent stays counted.

        Raises:
            UserError: the file is another client's or model's, damaged, or in use.
        """
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot keep a ledger in {folder}: {error.strerror}; expected a folder") from None
        return Ledger(client, identity(module), delta, budget, Ledger.beside(folder), allow_change=allow_change)

    def _before_release(self, passes: Iterable[int]) -> int:
        """Count a message before its noise is drawn; returns how many there were before it."""
        if self._ledger is not None:
            ledger, mechanism, run = self._ledger
            # own batches: every pass over the loader is a run of its own, in which each example appears once
            for name in [run] if self.poisson else [f"{run}, pass {number}" for number in sorted(passes)]:
                ledger.spend_next(mechanism, name)
        self._epochs.update(passes)
        self.steps += 1
        return self.steps - 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep beside the model's and the optimizer's: steps, policy and adaptive bounds.

        With a seed also the generators, so that a resumed training draws what an uninterrupted one would have.
        """
        plan = None if self._optimizer is None else self._optimizer.plan
        return {
            "plan": self.plan.hash if self.plan else "",
            "steps": self.steps,
            "sampling_rate": self.sampling_rate,
            "poisson": self.poisson,
            "seeded": self.seeded,
            "clips": {} if plan is None else {key: g.clip for key, g in plan.groups.items() if g.quantile},
            "passes": len(self._epochs),
            "generators": [g.get_state() for g in self._generators()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was made; call it after `make_private`.

        Raises:
            UserError: before `make_private`, after a step, or a checkpoint of another policy, sampling or source of
                noise.
        """
        if self.plan is None or self._optimizer is None:
            raise UserError("nothing is private yet; expected make_private to be called before load_state_dict")
        if self.steps:
            raise UserError(
                f"this engine has made {self.steps} steps since make_private, which a checkpoint would forget; "
                "expected load_state_dict before the first step"
            )
        if state.get("plan") != self.plan.hash:
            raise UserError(
                f"the checkpoint is of plan {state.get('plan')!r}, this training's is {self.plan.hash!r}; expected the "
                "policy that the training began with"
            )
        if state["sampling_rate"] != self.sampling_rate:
            raise UserError(
                f"the checkpoint was made at sampling rate {state['sampling_rate']:g}, this training's is "
                f"{self.sampling_rate:g}; expected the same batch size and number of examples"
            )
        for key, words, own in (("poisson", "poisson_sampling", self.poisson), ("seeded", "a seed", self.seeded)):
            if state[key] != own:
                raise UserError(
                    f"the checkpoint was made {'with' if state[key] else 'without'} {words}, this training is "
                    f"{'with' if own else 'without'}; expected the same for all steps that are claimed together"
                )
        self.steps = int(state["steps"])
        self._epochs = {-k for k in range(1, int(state["passes"]) + 1)}
        for generator, drawn in zip(self._generators(), state["generators"], strict=self.seeded):
            generator.set_state(drawn)
        self._optimizer.adopt(self._optimizer.plan.with_clips(state["clips"]))

    def _generators(self) -> list[torch.Generator]:
        sources = [self._coins, self._optimizer.source if self._optimizer else None]
        return [s for s in sources if isinstance(s, torch.Generator)]

    @property
    def diagnostics(self) -> Diagnostics:
        """Clipped fractions, signal to noise and dropped examples: private, they stay with the client."""
        return Diagnostics() if self._optimizer is None else self._optimizer.diagnostics

    def get_guarantee(self, delta: float, *, steps: int | None = None) -> Guarantee:
        """What may be claimed after the steps so far (or after ``steps``).

        Raises:
            UserError: before `make_private`, or delta above 1 / number of examples.
        """
        if self.plan is None:
            raise UserError("nothing is private yet; expected make_private to be called first")
        return guarantee(
            self.plan,
            sampling_rate=self.sampling_rate,
            steps=self._counted() if steps is None else steps,
            delta=delta,
            sampling="poisson" if self.poisson else "shuffle",
            examples=self.examples,
            seeded=self.seeded,
        )

    def _counted(self) -> int:
        """Steps; of the caller's own batches those of whole passes, because each may begin with the same example."""
        whole = math.ceil(len(self._epochs) / self.sampling_rate - 1e-9)
        return self.steps if self.poisson else max(self.steps, whole)

    def get_epsilon(self, delta: float) -> float:
        """Epsilon spent so far at ``delta``; infinity when the policy supports no claim."""
        return 0.0 if self.steps == 0 else self.get_guarantee(delta).epsilon


def _trainable(policy: Policy | Plan | str | Path, module: nn.Module) -> Plan:
    """The plan of a policy for a module that can be trained under it."""
    clipping.check_layers(module)
    plan = resolved(policy, module)
    clipping.check_model(module, plan)
    if not plan.trained:
        raise UserError("the policy trains nothing of this model; expected at least one trained tensor")
    return plan


def _entered(
    ledger: Ledger | None, module: nn.Module, plan: Plan, run: str, *, rate: float, poisson: bool
) -> tuple[Ledger, Mechanism, str] | None:
    """What every step is entered as, where there is a ledger."""
    if ledger is None:
        return None
    if ledger.model != identity(module):
        raise UserError(
            f"the ledger is of model {ledger.model!r}, this one is {identity(module)!r}; expected the ledger of "
            "this model (PrivacyEngine.open_ledger)"
        )
    sampling_word: Sampling = "poisson" if poisson else "shuffle"
    mechanism = Mechanism.of(plan, sampling_rate=rate, sampling=sampling_word)
    ledger.accepts(mechanism)
    return ledger, mechanism, run if poisson else f"{run} {os.urandom(4).hex()}"


def _check_optimizer(module: nn.Module, optimizer: Optimizer) -> None:
    own = {id(p) for p in module.parameters()}
    strange = sum(id(p) not in own for group in optimizer.param_groups for p in group["params"])
    if strange:
        raise UserError(f"the optimizer holds {strange} tensors that are not the module's; expected only its own")
