"""What a client would send for candidate texts: gradients of many candidates in one pass, differentiable.

A linear layer Y = X Wᵀ has the gradient dYᵀ X, so the two numbers that every matching objective needs,
its inner product with the message and its squared norm, follow from X and dY without forming it:
<dYᵀ X, M> = <X, dY M> and ||dYᵀ X||² = <X Xᵀ, dY dYᵀ>. Tensors of which only some entries arrive are formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from dpguard.engine.gradients import per_example_losses
from dpguard.engine.wire import clip_factors
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import family_of
from dpguard.policy.layers import Slot
from dpguard.policy.table import Plan

EMBEDDED = "token_embedding", "position_embedding", "type_embedding"


@dataclass(frozen=True)
class Tap:
    """Where a parameter's gradient comes from.

    Attributes:
        slot: the parameter.
        module: name of the module that owns it, "" for the embedding tables (all of them see the
            gradient of the summed embeddings).
        kind: "linear", "conv1d", "norm" or "embedding".
        part: "weight" or "bias".
    """

    slot: Slot
    module: str
    kind: str
    part: str

    @property
    def matrix(self) -> bool:
        """Whether this is the weight of a linear layer."""
        return self.part == "weight" and self.kind in {"linear", "conv1d"}


def find_taps(model: nn.Module, slots: Sequence[Slot]) -> dict[str, Tap]:
    """Parameter name -> tap, for every slot that a replay can form; the others are left out."""
    taps = {}
    for slot in slots:
        owner, _, part = slot.name.rpartition(".")
        if slot.role in EMBEDDED:
            taps[slot.name] = Tap(slot, "", "embedding", part)
            continue
        kind = _kind(model.get_submodule(owner))
        if kind and part in {"weight", "bias"}:
            taps[slot.name] = Tap(slot, owner, kind, part)
    return taps


def _kind(module: nn.Module) -> str:
    for kind, types in (("linear", nn.Linear), ("conv1d", Conv1D), ("norm", nn.LayerNorm)):
        if isinstance(module, types):
            return kind
    return "norm" if type(module).__name__.endswith("RMSNorm") else ""


def _normalised(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a norm multiplies with its scale; other modules' inputs as they are."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    if _kind(module) != "norm":
        return inputs
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    wide = inputs.float()
    least = torch.finfo(wide.dtype).eps if epsilon is None else float(epsilon)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + least)).to(inputs.dtype)


@dataclass(frozen=True)
class Rows:
    """Inputs and output gradients of N candidate texts at one module.

    Attributes:
        inputs: (N, T, in) what the module read (normalised for a norm).
        signals: (N, T, out) gradient of each text's own loss with respect to what it wrote.
        positions: (N, T) position ids, for the embedding tables.
    """

    inputs: Tensor
    signals: Tensor
    positions: Tensor

    def grouped(self, texts: int) -> Rows:
        """(N / texts, texts * T, ...): messages of several texts."""
        return Rows(*(x.reshape(x.shape[0] // texts, -1, *x.shape[2:]) for x in self._all))

    def scaled(self, factors: Tensor) -> Rows:
        """Every text's gradient times its factor (N,)."""
        return Rows(self.inputs, self.signals * factors[:, None, None], self.positions)

    @property
    def _all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inputs, self.signals, self.positions


def record(
    model: nn.Module,
    taps: Mapping[str, Tap],
    batch: Batch,
    embeddings: Tensor,
    *,
    create_graph: bool,
) -> dict[str, Rows]:
    """One forward and one backward pass, no deeper than the taps: module name -> rows, for every module they name.

    Args:
        model: the public classifier.
        taps: the parameters of interest.
        batch: N candidate texts; its token ids are not read.
        embeddings: (N, L, d) token embeddings.
        create_graph: keep the graph, so that what is computed from the rows can be differentiated again.
    """
    if not embeddings.requires_grad:
        embeddings = embeddings.detach().requires_grad_()
    modules = {tap.module: model.get_submodule(tap.module) for tap in taps.values() if tap.module}
    tables = [embeddings] if any(not tap.module for tap in taps.values()) else []
    with torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]), recording(modules) as calls:
        losses = per_example_losses(model, batch, embeddings=embeddings)
        outputs = tables + [output for name in modules for _, output in calls[name]]
        found = torch.autograd.grad(losses.sum(), outputs, create_graph=create_graph, allow_unused=True)
    signals = iter([torch.zeros_like(y) if g is None else g for y, g in zip(outputs, found, strict=True)])
    positions = family_of(model).positions(batch.attention_mask, model.config)
    rows = {"": Rows(embeddings, next(signals), positions)} if tables else {}
    for name, module in modules.items():
        pairs = [(_tokens(x), _tokens(next(signals))) for x, _ in calls[name]]
        inputs, signal = pairs[0] if len(pairs) == 1 else (torch.cat(side, 1) for side in zip(*pairs, strict=True))
        inputs = _normalised(module, inputs)
        where = positions if positions.shape[1] == inputs.shape[1] else positions[:, :1].expand(inputs.shape[:2])
        rows[name] = Rows(inputs, signal, where)
    return rows if create_graph else {name: Rows(*(x.detach() for x in r._all)) for name, r in rows.items()}


def _tokens(x: Tensor) -> Tensor:
    """(N, T, width), also for modules that see one vector a text."""
    return x.unsqueeze(1) if x.dim() == 2 else x


@contextmanager
def recording(
    modules: Mapping[str, nn.Module], *, start: bool = False
) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Collect (input, output) of every call of the modules; the hooks are gone afterwards.

    With ``start`` differentiation starts at the first output that nothing led to.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    def hook(name: str) -> object:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if start and not output.requires_grad:
                output.requires_grad_(True)
            calls[name].append((inputs[0], output))

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]  # type: ignore[arg-type]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def form(tap: Tap, rows: Rows) -> Tensor:
    """(R, *shape) gradients of one parameter, one a message.

    Raises:
        ValueError: the token-embedding table, whose rows soft tokens do not have.
    """
    x, signal = rows.inputs, rows.signals
    if tap.kind == "embedding":
        return _embedding_gradient(tap, rows)
    if tap.part == "bias":
        return signal.sum(1)
    if tap.kind == "norm":
        return (signal * x).sum(1)
    return torch.einsum("rti,rto->rio" if tap.kind == "conv1d" else "rto,rti->roi", *_order(tap, x, signal))


def _order(tap: Tap, x: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    return (x, signal) if tap.kind == "conv1d" else (signal, x)


def _embedding_gradient(tap: Tap, rows: Rows) -> Tensor:
    if tap.slot.role == "token_embedding":
        raise ValueError(f"{tap.slot.name}: soft tokens have no row of the token-embedding table")
    out = rows.signals.new_zeros((rows.signals.shape[0], *tap.slot.shape))
    where = rows.positions if tap.slot.role == "position_embedding" else torch.zeros_like(rows.positions)
    return out.scatter_add(1, where[:, :, None].expand_as(rows.signals), rows.signals)


def squared_norms(tap: Tap, rows: Rows) -> Tensor:
    """(R,) squared norms of one parameter's gradients; token embeddings as if no token came twice."""
    if tap.slot.role == "token_embedding":
        return rows.signals.pow(2).sum((1, 2))
    if not tap.matrix:
        return form(tap, rows).flatten(1).pow(2).sum(1)
    x, signal = rows.inputs, rows.signals
    return ((x @ x.transpose(1, 2)) * (signal @ signal.transpose(1, 2))).sum((1, 2))


def clip_rows(
    rows: Mapping[str, Rows], taps: Mapping[str, Tap], plan: Plan, *, texts: int = 1, batch_size: int = 1
) -> dict[str, dict[str, Rows]]:
    """The client's clipping, of each example or of the whole message: clip group -> module name -> clipped rows.

    The group "" holds the rows of what is not clipped. Norms run over every trained tensor of a group,
    also over those that stay with the client.

    Args:
        rows: module name -> rows of N texts, before grouping into messages.
        taps: parameter name -> tap, for all tensors of the groups.
        plan: the policy.
        texts: consecutive texts that form one message.
        batch_size: public divisor of a message; ``unit: update`` clips what is left after the division.
    """
    out = {"": dict(rows)}
    for key, group in plan.groups.items():
        members = [taps[name] for name in group.names if name in taps]
        if members:
            together, divisor = (texts, batch_size) if group.unit == "update" else (1, 1)
            whole = {tap.module: rows[tap.module].grouped(together) for tap in members}
            squared = torch.stack([squared_norms(tap, whole[tap.module]) for tap in members]).sum(0)
            norms = squared.clamp(min=1e-30).sqrt() / divisor
            factors = clip_factors(norms, group.clip, group.mode).repeat_interleave(together)
            out[key] = {tap.module: rows[tap.module].scaled(factors) for tap in members}
    return out
