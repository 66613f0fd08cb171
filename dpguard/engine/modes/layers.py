"""What one use of a layer contributes to its parameters' per-example gradients: one rule a layer type.

A rule takes (layer, input (B, ..., in), gradient of the output (B, ..., out), wanted names) and gives a factored
contribution for each wanted parameter of the layer. A layer counts as known when its type is in `RULES`, or
inherits type and forward from one that is; everything else goes to Opacus's samplers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dpguard.engine.modes.contributions import Contribution, Dense, Lookup, Outer
from dpguard.errors import UserError

Rule = Callable[[nn.Module, Tensor, Tensor, frozenset[str]], dict[str, Contribution]]


def _wide(x: Tensor) -> Tensor:
    """Norms and sums are float32 or wider, whatever the activations are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _steps(x: Tensor) -> Tensor:
    """(B, T, d) from (B, ..., d)."""
    return _wide(x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2))


def _linear(layer: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, Contribution]:
    g = _steps(g)
    return _affine(lambda: Outer(g, _steps(a)), g, wanted)


def _conv1d(layer: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, Contribution]:
    g = _steps(g)
    return _affine(lambda: Outer(_steps(a), g), g, wanted)


def _affine(weight: Callable[[], Outer], g: Tensor, wanted: frozenset[str]) -> dict[str, Contribution]:
    out: dict[str, Contribution] = {}
    if "weight" in wanted:
        out["weight"] = weight()
    if "bias" in wanted:
        out["bias"] = Dense(g.sum(1))
    return out


def _embedding(layer: nn.Module, ids: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, Contribution]:
    ids, g = ids.reshape(ids.shape[0], -1), _steps(g)
    padding: int | None = layer.padding_idx  # type: ignore[assignment]
    if padding is not None:  # autograd gives the padding row no gradient
        g = g.masked_fill((ids == padding).unsqueeze(2), 0.0)
    return {"weight": Lookup(ids, g)}


def _layer_norm(layer: nn.Module, x: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, Contribution]:
    shape: tuple[int, ...] = layer.normalized_shape  # type: ignore[assignment]
    eps: float = layer.eps  # type: ignore[assignment]
    return _normed(lambda: F.layer_norm(_wide(x), shape, eps=eps), _wide(g), len(shape), wanted)


def _scale(layer: nn.Module, x: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, Contribution]:
    """A layer that is linear in its one weight, entry by entry: the derivative is the layer with weight 1 less 0."""
    weight: Tensor = layer.weight  # type: ignore[assignment]

    def derivative() -> Tensor:
        one, zero = (
            functional_call(layer, {"weight": like(weight)}, (x,)) for like in (torch.ones_like, torch.zeros_like)
        )
        return _wide(one - zero)

    return _normed(derivative, _wide(g), weight.dim(), wanted)


def _normed(x: Callable[[], Tensor], g: Tensor, own: int, wanted: frozenset[str]) -> dict[str, Contribution]:
    """Scale and shift of a normalisation whose parameters have ``own`` dimensions."""
    middle = list(range(1, g.dim() - own))
    out: dict[str, Contribution] = {}
    if "weight" in wanted:
        scaled = g * x()
        out["weight"] = Dense(scaled.sum(middle) if middle else scaled)
    if "bias" in wanted:
        out["bias"] = Dense(g.sum(middle) if middle else g)
    return out


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    Conv1D: _conv1d,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _scale,
}


def rule_of(layer: nn.Module) -> Rule | None:
    """The exact rule of a layer, or None."""
    if isinstance(layer, nn.Embedding) and (layer.scale_grad_by_freq or layer.max_norm is not None):
        return None
    for kind, rule in RULES.items():
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return rule
    return _scale if type(layer).__name__.endswith("RMSNorm") and _is_scale(layer) else None


@torch.no_grad()
def _is_scale(layer: nn.Module) -> bool:
    """Every model family writes its own RMSNorm class: believed when its output is linear in its one weight."""
    own = dict(layer.named_parameters())
    if list(own) != ["weight"] or own["weight"].dim() != 1 or list(layer.children()):
        return False
    weight = own["weight"]
    ramp = torch.linspace(-2.0, 3.0, 3 * weight.numel(), dtype=torch.float64).reshape(1, 3, -1)
    x = ramp.to(weight.device, weight.dtype)
    at = [functional_call(layer, {"weight": w}, (x,)) for w in (weight * 0, weight * 0 + 1, x[0, 1])]
    tolerance = 1e-2 if weight.dtype in (torch.float16, torch.bfloat16) else 1e-5
    return torch.allclose(at[2], at[0] + x[0, 1] * (at[1] - at[0]), rtol=tolerance, atol=tolerance)


def fallback(layer: nn.Module, name: str) -> Rule:
    """Opacus's sampler of an unknown layer: its own, or one by functorch.

    Raises:
        UserError: a layer that holds trained parameters beside other layers, or buffers: no path can handle it.
    """
    sampler = GradSampleHooks.GRAD_SAMPLERS.get(type(layer))
    if sampler is None:
        check_callable(layer, name)
        sampler = ft_compute_per_sample_gradient

    def rule(layer: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, Contribution]:
        names = {id(p): n for n, p in layer.named_parameters(recurse=False) if n in wanted}
        found: dict[nn.Parameter, Tensor] = sampler(layer, [a], g)
        return {names[id(p)]: Dense(_wide(value)) for p, value in found.items() if id(p) in names}

    return rule


def check_callable(layer: nn.Module, name: str) -> None:
    """Refuse a layer whose own trained tensors no hook can see.

    Raises:
        UserError: it has other layers with parameters inside, buffers, or is a container that is never called (LoRA
            on embeddings).
    """
    inside = any(True for child in layer.children() for _ in child.parameters())
    container = isinstance(layer, (nn.ParameterDict, nn.ParameterList))
    if inside or container or (type(layer) not in GradSampleHooks.GRAD_SAMPLERS and any(True for _ in layer.buffers())):
        raise UserError(
            f"{name!r} ({type(layer).__name__}) has trainable tensors that no fast path and no sampler can handle; "
            "expected it frozen (train: false), or grad_mode='loop'"
        )
