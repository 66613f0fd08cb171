"""The first block of a post-norm encoder as plain matrices, for rows that are solved without their texts.

A row is one token of one text. What enters the MLP for it is ``norm(z + W o + b)``: z depends on the token and
its position alone, o is the mixture of values that the row's attention picks out of its own text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpguard.attacks.span_guess import activation
from dpguard.attacks.span_sites import Probe, Site, Sites
from dpguard.inputs.family import slots

ROLES = ("query", "key", "value", "attention_output", "mlp_in", "mlp_out")
AGREES = 1e-4
"""Relative error up to which these formulas and the model's own forward pass are the same thing."""
SAMPLE = (1, 3, 2, 5)
"""Any text (rows of the token table) on which the formulas are held against the model."""


@dataclass(frozen=True)
class Norm:
    """Layer normalisation.

    Attributes:
        gain, shift: (d,).
        epsilon: added to the variance.
    """

    gain: Tensor
    shift: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """(..., d) normalised."""
        out: Tensor = nn.functional.layer_norm(x, self.gain.shape, self.gain, self.shift, self.epsilon)
        return out


@dataclass(frozen=True)
class Linear:
    """y = W x + b with W (outputs, inputs) and b (outputs,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(..., outputs) of (..., inputs)."""
        return x @ self.weight.T + self.bias


@dataclass(frozen=True)
class FirstBlock:
    """Embeddings and first block, all tensors in one precision.

    Attributes:
        words: (V, d) token table.
        places: (P, d) what a position adds (its row of the position table, and the token type's), by position.
        entrance: normalisation after the embeddings.
        query, key, value, output, mlp_in: linear layers.
        norm: normalisation between attention and MLP.
        act: activation function of the MLP.
        heads: attention heads.
    """

    words: Tensor
    places: Tensor
    entrance: Norm
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    mlp_in: Linear
    norm: Norm
    act: Any
    heads: int

    @property
    def width(self) -> int:
        """Numbers in a state."""
        return self.words.shape[1]

    def embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        """(n, d) what enters the block for (n,) tokens at (n,) positions."""
        return self.entrance(self.words[tokens] + self.places[places])

    def split(self, x: Tensor) -> Tensor:
        """(n, heads, d / heads) of (n, d)."""
        return x.reshape(len(x), self.heads, -1)

    def attention(self, rows: Tensor, keys: Tensor) -> Tensor:
        """(n, heads, m) logarithms of what (n, d) rows' attention gives to (m, d) keys, up to a constant a row."""
        scores = torch.einsum("nhk,mhk->nhm", self.split(self.query(rows)), self.split(keys))
        out: Tensor = scores / (self.width // self.heads) ** 0.5
        return out

    def mixtures(self, rows: Tensor, context: Tensor) -> Tensor:
        """(n, d) the attention's mixtures of values for (n, d) rows over one (m, d) context."""
        share = self.attention(rows, self.key(context)).softmax(-1)
        out: Tensor = torch.einsum("nhm,mhk->nhk", share, self.split(self.value(context)))
        return out.flatten(1)

    def states(self, rows: Tensor, mixtures: Tensor) -> Tensor:
        """(n, d) what enters the MLP."""
        return self.norm(rows + self.output(mixtures))

    def in_precision(self, dtype: torch.dtype) -> FirstBlock:
        """The same in another precision."""

        def cast(part: Any) -> Any:
            if isinstance(part, Tensor):
                return part.to(dtype)
            if isinstance(part, Linear):
                return Linear(part.weight.to(dtype), part.bias.to(dtype))
            if isinstance(part, Norm):
                return replace(part, gain=part.gain.to(dtype), shift=part.shift.to(dtype))
            return part

        return FirstBlock(**{name: cast(value) for name, value in vars(self).items()})


def first_block(probe: Probe, sites: Sites) -> FirstBlock | None:
    """The model's first block in float64, or None when it is not a post-norm encoder's."""
    found = {role: sites.find(0, role) for role in ROLES}
    tables = {slot.role: slot.name for slot in slots(probe.model) if slot.block is None}
    norms = [slot.name for slot in slots(probe.model) if slot.block == 0 and slot.role == "norm"]
    if probe.family.causal or not norms or None in found.values() or "position_embedding" not in tables:
        return None
    first, entrance = (_norm(probe.model, name) for name in (norms[0], tables.get("embedding_norm", "")))
    if first is None or entrance is None:
        return None
    linear = {role: _linear(site) for role, site in found.items() if site is not None}
    longest = probe.family.max_tokens(probe.config)
    places = probe.model.get_parameter(tables["position_embedding"]).detach().double()[probe.positions(longest)]
    if "type_embedding" in tables:
        places = places + probe.model.get_parameter(tables["type_embedding"]).detach().double()[0]
    del linear["mlp_out"]
    block = FirstBlock(
        words=probe.embedding.double(), places=places, entrance=entrance, output=linear.pop("attention_output"),
        norm=first, act=activation(probe.config), heads=int(probe.config.num_attention_heads), **linear,
    )  # fmt: skip
    return block if _agrees(block, probe, sites) else None


def later_block(probe: Probe, sites: Sites, index: int) -> FirstBlock | None:
    """Another block's layers in the same form (without tokens and places), or None when it is not a post-norm one's."""
    found = {role: sites.find(index, role) for role in ROLES}
    norms = [slot.name for slot in slots(probe.model) if slot.block == index and slot.role == "norm"]
    norm = _norm(probe.model, norms[0]) if norms else None
    query, inner = found["query"], found["mlp_in"]
    if probe.family.causal or norm is None or None in found.values() or query is None or inner is None:
        return None
    linear = {role: _linear(site) for role, site in found.items() if site is not None}
    del linear["mlp_out"]
    nothing = probe.embedding.double()[:0]
    block = FirstBlock(
        words=nothing, places=nothing, entrance=norm, output=linear.pop("attention_output"), norm=norm,
        act=activation(probe.config), heads=int(probe.config.num_attention_heads), **linear,
    )  # fmt: skip
    scored, ids = probe.scored, torch.tensor(SAMPLE, device=probe.device)[None] % len(probe.embedding)
    rows, theirs = (probe.states(site.layer, ids)[0].double() for site in (query, inner))
    probe.scored = scored
    mine = block.states(rows, block.mixtures(rows, rows))
    return block if float((mine - theirs).norm()) < AGREES * float(theirs.norm()) else None


def _linear(site: Site) -> Linear:
    weight = site.oriented(site.layer.get_parameter("weight"))
    bias = getattr(site.layer, "bias", None)
    return Linear(weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().double())


def _norm(model: nn.Module, parameter: str) -> Norm | None:
    layer = model.get_submodule(parameter.rpartition(".")[0])
    if not parameter or not isinstance(layer, nn.LayerNorm) or not layer.elementwise_affine:
        return None
    return Norm(layer.weight.detach().double(), layer.bias.detach().double(), layer.eps)


def _agrees(block: FirstBlock, probe: Probe, sites: Sites) -> bool:
    """Whether one forward pass of the model says the same."""
    site = sites.find(0, "mlp_in")
    if site is None:
        return False
    ids = torch.tensor(SAMPLE, device=probe.device) % len(block.words)
    rows = block.embed(ids, torch.arange(len(ids), device=probe.device))
    mine = block.states(rows, block.mixtures(rows, rows))
    scored = probe.scored
    theirs = probe.states(site.layer, ids[None])[0].double()
    probe.scored = scored
    return float((mine - theirs).norm()) < AGREES * float(theirs.norm())
