"""What a private model's own call needs: explicit positions, a way through empty batches, per-example losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpguard.engine.gradients import losses_of_logits
from dpguard.engine.private_optimizer import PrivateOptimizer
from dpguard.errors import UserError
from dpguard.inputs.family import family_of


class ForwardHooks:
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
