"""Where a shared weight listens: the linear layer behind it, and the vectors that a text sends into it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpguard.attacks.precision import roughly
from dpguard.engine.gradients import forward_arguments
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import Family, family_of, slots
from dpguard.policy.layers import Slot

LINEAR = ("value", "qkv", "query", "mlp_in", "mlp_gate", "key", "attention_output", "mlp_out")
"""Roles whose gradient spans the layer's inputs, those that say most about a text first."""
SAME_INPUTS = ({"value", "qkv", "query"}, {"mlp_in", "mlp_gate"})
"""Roles of a block whose layers read the very same vectors."""
CHUNK_TOKENS = 4096
_LORA = re.compile(r"\.lora_(?P<side>[AB])\.[^.]+(?=\.weight$)")


@dataclass(frozen=True)
class Site:
    """One linear layer whose weight may be on the wire.

    Attributes:
        name: the weight's parameter name.
        role: see `policy.layers.ROLES`.
        block: index of its block, from 0.
        layer: the module.
        transposed: the weight is stored (inputs, outputs), as in GPT-2's Conv1D.
        adapter: ``A``: LoRA's A beside the layer of this role, which reads the layer's inputs and shows as many
            dimensions of their span as it has rows. ``B``: LoRA's B, whose inputs are what A makes of them, as many
            as A has rows; it has a gradient before the first step, where A has none. Empty: the layer's own weight.
    """

    name: str
    role: str
    block: int
    layer: nn.Module
    transposed: bool
    adapter: str = ""

    def beside(self, other: Site) -> bool:
        """Whether another site's layer reads the very same vectors."""
        together = self.role == other.role or any({self.role, other.role} <= roles for roles in SAME_INPUTS)
        return self.block == other.block and together and "B" not in (self.adapter, other.adapter)

    def oriented(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (outputs, inputs), float64."""
        return (weight.T if self.transposed else weight).detach().double()


@dataclass(frozen=True)
class Sites:
    """The linear layers of a model's blocks.

    Attributes:
        all: every site, by block, then by how much its role says.
        last_block: index of the final block.
    """

    all: tuple[Site, ...]
    last_block: int

    def find(self, block: int, *roles: str) -> Site | None:
        """The block's first layer with one of these roles, adapters apart."""
        plain = [s for s in self.all if s.block == block and not s.adapter]
        return next((s for role in roles for s in plain if s.role == role), None)


def sites_of(model: nn.Module) -> Sites:
    """Every linear weight inside a block, LoRA's matrices among them."""
    found = [_site(model, slot) for slot in slots(model) if len(slot.shape) == 2]
    inside = sorted((s for s in found if s is not None), key=lambda s: (s.block, LINEAR.index(s.role)))
    return Sites(tuple(inside), max((s.block for s in inside), default=-1))


def _site(model: nn.Module, slot: Slot) -> Site | None:
    if slot.block is None or not slot.name.endswith(".weight"):
        return None
    role, lora = slot.role, _LORA.search(slot.name)
    if lora:
        role = (family_of(model).role(_LORA.sub("", slot.name)) or ("", None))[0]
    if role not in LINEAR:
        return None
    layer = model.get_submodule(slot.name.rpartition(".")[0])
    return Site(slot.name, role, slot.block, layer, not isinstance(layer, nn.Linear), lora["side"] if lora else "")


class _ReachedError(Exception):
    """The forward pass got to the layer that was asked for."""


class Probe:
    """Forward passes up to one layer; counts the candidate texts that went through.

    Args:
        model: the public model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.family: Family = family_of(model)
        self.config: Any = model.config
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        self.device = self.embedding.device
        self.scored = 0

    def positions(self, length: int) -> Tensor:
        """(length,) position ids of an unpadded text."""
        mask = torch.ones((1, length), dtype=torch.int64, device=self.device)
        return self.family.positions(mask, self.config)[0]

    def states(self, layer: nn.Module, ids: Tensor, *, rough: bool = False) -> Tensor:
        """(B, L, inputs) what enters ``layer`` for texts of L tokens, computed in pieces.

        Args:
            layer: a linear layer of the model.
            ids: (B, L) token ids, no padding.
            rough: in `precision.roughly`.
        """
        self.scored += len(ids)
        size = max(1, CHUNK_TOKENS // max(1, ids.shape[1]))
        with torch.no_grad(), roughly(self.embedding) if rough else nullcontext():
            return torch.cat([self._reach(layer, part, None) for part in ids.split(size)])  # type: ignore[no-untyped-call]

    def relaxed(self, layer: nn.Module, embeddings: Tensor, *, rough: bool = False) -> Tensor:
        """The same from (B, L, d) token embeddings, differentiable."""
        ids = torch.zeros(embeddings.shape[:2], dtype=torch.int64, device=self.device)
        with roughly(self.embedding) if rough else nullcontext():
            return self._reach(layer, ids, embeddings)

    def _reach(self, layer: nn.Module, ids: Tensor, embeddings: Tensor | None) -> Tensor:
        batch = Batch(ids, torch.ones_like(ids), ids[:, 0])
        return reached(self.model, layer, forward_arguments(self.model, batch, embeddings))


def reached(model: nn.Module, layer: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """What enters a layer in a forward pass, which goes no further than there."""
    kept: list[Tensor] = []

    def stop(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0])
        raise _ReachedError

    handle = layer.register_forward_pre_hook(stop)
    try:
        model(**arguments)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return kept[0]


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients for weights inside; modes and flags are put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
