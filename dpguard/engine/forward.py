"""What a private model's own call needs: explicit positions, a way through empty batches, per-example losses."""

from __future__ import annotations

from contextlib import ExitStack
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from dpguard.engine import noise
from dpguard.engine.gradients import check_padding, losses_of_logits
from dpguard.engine.private_optimizer import PrivateOptimizer
from dpguard.errors import UserError
from dpguard.inputs.batch import mask_of
from dpguard.inputs.family import family_of
from dpguard.inputs.randomness import seeded


class ForwardHooks:
    """Hooks on the module's own call: explicit positions, empty batches, per-example loss, secret dropout masks.

    Args:
        module: the private model.
        optimizer: its optimizer.
        loss_reduction: ``mean`` or ``sum``: how the model's own loss is reduced over the batch.
        secret: draw dropout masks from the operating system's entropy. Removing one example gives all later ones
            another mask; whoever knows the masks (``torch.manual_seed`` in a script) sees all of them change.
    """

    def __init__(self, module: nn.Module, optimizer: PrivateOptimizer, loss_reduction: str, *, secret: bool) -> None:
        self.module = module
        self.optimizer = optimizer
        self.mean = loss_reduction == "mean"
        self.secret = secret
        self.family = family_of(module)
        self._forked = ExitStack()
        self._empty = False  # the call at hand has no rows
        self.handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True),
            module.register_forward_hook(self.restore, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def before(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        """Inject position ids (Opacus #841); give an empty Poisson batch one row that will not count."""
        named = {**_by_name(module, arguments), **named}
        if named.get("return_dict") is False:
            raise UserError("return_dict is False; expected a private model to be called without it")
        self._empty = _tokens(named).shape[0] == 0
        if module.training:  # an evaluation does not change what the next step is on
            self.optimizer.empty = self._empty
        if self._empty:
            # token types begin at 0, and RoBERTa has no other
            named = {k: _one_row(v, k != "token_type_ids") for k, v in named.items() if k != "labels"}
        tokens = _tokens(named)
        mask = named.get("attention_mask")
        if mask is None and (self._empty or not module.training):
            mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        elif mask is None:
            mask = mask_of(named.get("input_ids"), getattr(module.config, "pad_token_id", None))
        check_padding(module, named.get("input_ids"), mask)
        if named.get("position_ids") is None:
            named["position_ids"] = self.family.positions(mask, module.config)
        named["attention_mask"] = mask
        if module.training and self.secret:
            self._fork(tokens.device)
        return (), named

    def _fork(self, device: torch.device) -> None:
        self._forked.enter_context(seeded(noise.secret_seed(), [device]))

    def restore(self, _module: nn.Module, _arguments: Any, _output: Any) -> None:
        """The caller's own random numbers go on where they were, also after an error."""
        self._forked.close()

    def after(self, module: nn.Module, _arguments: Any, named: dict[str, Any], output: Any) -> Any:
        """The mean or sum over examples of each example's own loss, whatever the model's head would have used.

        Raises:
            UserError: a mean in 16 bits, which rounds every example's gradient by the private number of examples.
        """
        if self._empty:
            output.logits = output.logits[:0]
            output.loss = output.logits.sum() * 0.0
        elif named.get("labels") is not None:
            if self.mean and module.training and output.logits.dtype in (torch.float16, torch.bfloat16):
                raise UserError(
                    f"the logits are {output.logits.dtype} and the loss is a mean; expected loss_reduction='sum' in 16 "
                    "bits, because dividing by the private number of examples rounds all their gradients anew"
                )
            losses = losses_of_logits(module, output.logits, named["labels"], named["attention_mask"])
            output.loss = losses.mean() if self.mean else losses.sum()
        return output


def _by_name(module: nn.Module, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of a model's call under their names."""
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in signature(module.forward).parameters.values() if p.kind in kinds] or ["input_ids"]
    if len(arguments) > len(names):
        raise UserError(f"{len(arguments)} positional arguments; expected a private model to be called by keywords")
    return dict(zip(names, arguments, strict=False))


def _tokens(named: dict[str, Any]) -> Tensor:
    found = named.get("input_ids")
    found = named.get("inputs_embeds") if found is None else found
    if not isinstance(found, Tensor):
        raise UserError("the model was called without input_ids or inputs_embeds")
    return found


def _one_row(value: Any, fill: int) -> Any:
    if isinstance(value, Tensor) and value.shape[:1] == (0,):
        shape = (1, max(1, *value.shape[1:2]), *value.shape[2:])
        return torch.full(shape, fill, dtype=value.dtype, device=value.device)
    return value
