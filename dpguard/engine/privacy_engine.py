"""Opacus's calling convention with a policy table: module, optimizer and loader in, the same three out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpguard.engine import clipping, noise, sampling, wire
from dpguard.engine.accounting import guarantee
from dpguard.engine.gradients import losses_of_logits
from dpguard.engine.modes.base import GradientMode
from dpguard.errors import UserError
from dpguard.inputs.family import family_of, slots
from dpguard.policy.guarantee import Guarantee
from dpguard.policy.table import Plan, Policy


class PrivateOptimizer(Optimizer):
    """The caller's optimizer, stepping on the message that leaves instead of the raw gradient.

    ``param.grad`` between ``backward()`` and ``step()`` is not what leaves the client; inside ``step`` it
    is replaced by the message (shared tensors) or by the noised mean (withheld ones).
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
        on_step: Callable[[dict[str, Tensor], int], None],
        mask_seed: int = 0,
    ) -> None:
        self.inner = inner
        self.plan = plan
        self.mode = mode
        self.batch_size = batch_size
        self.parameters_by_name = dict(module.named_parameters())
        self._source = drawn_from
        self._on_step = on_step
        self._mask_seed = mask_seed
        self.empty = False
        self.last_message: dict[str, Tensor] = {}

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, per-example ones included, and the last message (the same tensors)."""
        self.mode.discard()
        self.last_message = {}
        self.inner.zero_grad(set_to_none=set_to_none)

    def fold(self) -> None:
        """Clip and sum what went backward so far: call it between the physical parts of a logical batch."""
        self.mode.fold()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on the message of everything that went backward since the last one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clipped = self._empty_sum() if self.empty else self.mode.collect()
        self.mode.discard()
        norms, dropped = clipped.norms, clipped.dropped
        self.last_message = {}
        for name, noised, sent in wire.emit(
            clipped, self.plan, batch_size=self.batch_size, drawn_from=self._source, mask_seed=self._mask_seed
        ):
            parameter = self.parameters_by_name[name]
            parameter.grad = (noised / self.batch_size if sent is None else sent).to(parameter.dtype)
            if sent is not None:
                self.last_message[name] = sent
        self.inner.step()
        self.empty = False
        self._on_step(norms, dropped)
        return loss

    def _empty_sum(self) -> wire.ClippedSum:
        zeros = {n: torch.zeros_like(self.parameters_by_name[n], requires_grad=False) for n in self.plan.trained}
        return wire.ClippedSum(zeros, {key: torch.zeros(0) for key in self.plan.groups})


class PrivacyEngine:
    """Trains a model under a policy and knows what may be claimed about it.

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
        self._clipped: list[tuple[int, int]] = []
        self.dropped = 0
        self._attached: tuple[GradientMode, _Forward] | None = None

    def close(self) -> None:
        """Take every hook off the module, which is then an ordinary model again (for saving, evaluating)."""
        if self._attached is not None:
            for part in self._attached:
                part.detach()
            self._attached = None

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        policy: Policy | Plan,
        seed: int | None = None,
        poisson_sampling: bool = True,
        loss_reduction: str = "mean",
        grad_mode: str = "fast",
    ) -> tuple[nn.Module, PrivateOptimizer, DataLoader[Any]]:
        """Wire a policy into an ordinary training loop.

        The module stays the same object: it gets explicit position ids, a per-example loss whenever labels
        are passed, and requires_grad False where the policy freezes. The divisor is the loader's batch
        size, the sampling rate that over the number of examples.

        Args:
            module: a Hugging Face model in train mode.
            optimizer: any optimizer over (some of) the module's parameters.
            data_loader: with a batch size and a dataset that has a length.
            policy: a `Policy`, or a `Plan` of this very module.
            seed: seed of noise and sampling, for studies and tests only. None: operating system's entropy.
            poisson_sampling: False keeps the loader's own batches; no amplification is claimed then.
            loss_reduction: ``mean`` or ``sum``, as your loss reduces over the batch.
            grad_mode: ``fast``, ``opacus`` or ``loop``, see `clipping.MODES`; they agree, at different speeds.

        Returns:
            (module, optimizer, data_loader).

        Raises:
            UserError: eval mode, batch normalisation, gradient checkpointing, an optimizer holding other
                parameters, a loader without a length, or a mistake in the policy.
        """
        if not module.training:
            raise UserError("the model is in eval mode; expected train mode (call model.train() first)")
        plan = policy.plan(slots(module)) if isinstance(policy, Policy) else policy
        clipping.check_model(module, plan)
        _check_optimizer(module, optimizer)
        drawn_from = noise.source(seed)
        coins = noise.source(None if seed is None else seed + 1_000_003)
        loader = sampling.poisson_loader(data_loader, coins)
        self.plan, self.poisson = plan, poisson_sampling
        self.examples, self.sampling_rate = len(data_loader.dataset), loader.batch_sampler.rate  # type: ignore[arg-type,union-attr]
        trained = set(plan.trained)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
        mode = clipping.attach(module, plan, loss_reduction=loss_reduction, grad_mode=grad_mode)
        private = PrivateOptimizer(
            optimizer, module, plan, mode,
            batch_size=round(self.sampling_rate * self.examples), drawn_from=drawn_from, on_step=self._stepped,
        )  # fmt: skip
        self._attached = (mode, _Forward(module, private))
        return module, private, loader if poisson_sampling else data_loader

    def _stepped(self, norms: dict[str, Tensor], dropped: int) -> None:
        self.steps += 1
        self.dropped += dropped
        if self.plan is not None:
            groups = self.plan.groups
            over = sum(int((n > groups[key].clip).sum()) for key, n in norms.items())
            self._clipped.append((over, sum(len(n) for n in norms.values())))

    @property
    def clipped_fraction(self) -> float | None:
        """Share of (example, group) pairs that were scaled down; private, keep it with the client."""
        total = sum(n for _, n in self._clipped)
        return sum(k for k, _ in self._clipped) / total if total else None

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
            steps=self.steps if steps is None else steps,
            delta=delta,
            sampling="poisson" if self.poisson else "shuffle",
            examples=self.examples,
        )

    def get_epsilon(self, delta: float) -> float:
        """Epsilon spent so far at ``delta``; infinity when the policy supports no claim."""
        return 0.0 if self.steps == 0 else self.get_guarantee(delta).epsilon


class _Forward:
    """Hooks on the module's own call: explicit positions, empty batches, per-example loss."""

    def __init__(self, module: nn.Module, optimizer: PrivateOptimizer) -> None:
        self.module = module
        self.optimizer = optimizer
        self.family = family_of(module)
        self.handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def before(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        """Inject position ids (Opacus #841); give an empty Poisson batch one row that will not count."""
        named = dict(named)
        if arguments:
            named["input_ids"], arguments = arguments[0], arguments[1:]
        self.optimizer.empty = module.training and _tokens(named).shape[0] == 0
        if self.optimizer.empty:
            named = {k: _one_row(v) for k, v in named.items() if k != "labels"}
        tokens = _tokens(named)
        mask = named.get("attention_mask")
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        if named.get("position_ids") is None:
            named["position_ids"] = self.family.positions(mask, module.config)
        named["attention_mask"] = mask
        return arguments, named

    def after(self, module: nn.Module, _arguments: Any, named: dict[str, Any], output: Any) -> Any:
        """A mean over examples of each example's own loss, whatever the model's head would have used."""
        if self.optimizer.empty:
            output.logits = output.logits[:0]
            output.loss = output.logits.sum() * 0.0
        elif named.get("labels") is not None:
            losses = losses_of_logits(output.logits, named["labels"], named["attention_mask"])
            output.loss = losses.mean()
        return output


def _tokens(named: dict[str, Any]) -> Tensor:
    found = named.get("input_ids")
    found = named.get("inputs_embeds") if found is None else found
    if not isinstance(found, Tensor):
        raise UserError("the model was called without input_ids or inputs_embeds")
    return found


def _one_row(value: Any) -> Any:
    if isinstance(value, Tensor) and value.shape[:1] == (0,):
        return torch.ones((1, max(1, *value.shape[1:2]), *value.shape[2:]), dtype=value.dtype, device=value.device)
    return value


def _check_optimizer(module: nn.Module, optimizer: Optimizer) -> None:
    own = {id(p) for p in module.parameters()}
    strange = sum(id(p) not in own for group in optimizer.param_groups for p in group["params"])
    if strange:
        raise UserError(f"the optimizer holds {strange} tensors that are not the module's; expected only its own")
