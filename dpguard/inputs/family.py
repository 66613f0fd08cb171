"""What a model family is to dpguard: role rules for parameter names and the conventions of its forward pass.

A new family is one file in `inputs/families/` that assigns `PLUGIN = Family(...)`, and a row in the table
of the contract suite (tests/tiny.py); docs/families.md tells how.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dpguard import registry
from dpguard.errors import UserError
from dpguard.policy.layers import ROLES, Slot

PACKAGE = "dpguard.inputs.families"
# what PEFT puts into a name; the last component of an adapter's name is absent for embeddings
_WRAPPERS = re.compile(
    r"^base_model\.model\.|\.base_layer(?=\.)|\.original_module(?=\.)|\.modules_to_save\.[^.]+(?=\.)"
)
_ADAPTER = re.compile(r"\.lora_(?:embedding_)?(?P<side>[AB])\.[^.]+(?:\.(?P<kind>weight|bias))?$")
_PEFT = re.compile(r"\.(lora|ia3|hada|lokr|oft|boft|vera|vblora|randlora)_|^prompt_encoder\.|^base_model\.(?!model\.)")
_OWN = ("weight", "bias")


@dataclass(frozen=True)
class Family:
    """Role rules and conventions of one architecture.

    Attributes:
        name: the file's name.
        model_types: values of ``config.model_type`` that this family covers.
        rules: (regular expression on the whole parameter name, role); the first that matches wins; a
            group called ``block`` captures the block index.
        causal: True for decoders (a position sees only what is left of it).
        position_offset: position id of the first token; -1 means "padding index + 1, padding skipped"
            (RoBERTa).
    """

    name: str
    model_types: tuple[str, ...]
    rules: tuple[tuple[str, str], ...]
    causal: bool = False
    position_offset: int = 0

    def role(self, parameter: str) -> tuple[str, int | None] | None:
        """Role and block index of a parameter name, or None when no rule knows it.

        LoRA matrices belong to the block of the layer that they adapt. A rule knows a layer's own weight
        and bias and nothing else below it, except that a head may have layers of its own: other kinds of
        adapters (DoRA's magnitudes, IA3 ...) must not pass for the layer that they sit on.
        """
        plain = _WRAPPERS.sub("", parameter)
        adapter = _ADAPTER.search(plain)
        if adapter:
            plain = f"{plain[: adapter.start()]}.{adapter['kind'] or 'weight'}"
        for pattern, role in self.rules:
            found = re.search(pattern, plain)
            if found:
                rest = plain[found.end() :].split(".")
                if rest[-1] not in _OWN or (len(rest) > 1 and role != "head") or ".lora_" in plain:
                    return None
                block = found.groupdict().get("block")
                return f"adapter_{adapter['side'].lower()}" if adapter else role, None if block is None else int(block)
        return None

    def positions(self, mask: Tensor, config: Any) -> Tensor:
        """Explicit position ids, one row an example, contiguous (Opacus issue #841: a broadcast row of
        ids makes the position embedding's per-example gradient wrong without an error).

        Counted over the example's own tokens: padding on the left, as long as the batch's longest text asks for,
        would otherwise move it, and with it its gradient.

        Args:
            mask: (B, L) attention mask, 1 for tokens.
            config: the model's configuration.

        Returns:
            (B, L) int64.

        Raises:
            UserError: an encoder's text padded on the left: what stands first is read as the whole text.
        """
        if not self.causal and not bool(mask[:, 0].all()):
            raise UserError(
                f"a text is padded on the left; expected padding on the right, because {self.name} reads the first "
                "position as the whole text"
            )
        if self.position_offset == -1:
            kept = mask.long()
            padding = int(config.pad_token_id)
            return (torch.cumsum(kept, dim=1) * kept + padding).contiguous()
        counted = torch.cumsum(mask.long(), dim=1) - 1
        return (counted.clamp_(min=0) + self.position_offset).contiguous()

    def max_tokens(self, config: Any) -> int:
        """How many tokens (special ones included) a text may have."""
        limit = int(config.max_position_embeddings)
        return limit - config.pad_token_id - 1 if self.position_offset == -1 else limit


@cache
def families() -> dict[str, Family]:
    """Every family by name."""
    return {name: registry.load(PACKAGE, name, "model family").PLUGIN for name in registry.names(PACKAGE)}


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model, by its configuration's model type.

    Raises:
        UserError: no family covers it; the sentence lists those that exist.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for family in families().values():
        if kind in family.model_types:
            return family
    known = ", ".join(sorted(t for f in families().values() for t in f.model_types))
    raise UserError(
        f"model type {kind!r} belongs to no known family; expected one of: {known} (a family is one file of role rules)"
    )


def slots(model: nn.Module) -> list[Slot]:
    """Every named parameter of a model as a `Slot`, in the module's order; tied names follow their first.

    Raises:
        UserError: a parameter that no rule of the family knows.
    """
    family, out = family_of(model), []
    first: dict[int, str] = {}
    for name, parameter in _named(model):
        known = family.role(name)
        if known is None or known[0] not in ROLES:
            raise _unknown(name, family)
        tied = first.setdefault(id(parameter), name)
        out.append(
            Slot(
                name=name,
                shape=tuple(parameter.shape),
                role=known[0],
                block=known[1],
                tied_to="" if tied == name else tied,
                trainable=parameter.requires_grad,
            )
        )
    return out


def bare(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PEFT wrapper (whose adapters sit in its layers), or the model itself."""
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) else model


def predicts_tokens(model: nn.Module) -> bool:
    """Whether the model has a head over its vocabulary: its loss is the prediction of every next token."""
    inner = bare(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None  # type: ignore[operator]
    return head is not None


def _unknown(name: str, family: Family) -> UserError:
    if _PEFT.search(name):
        return UserError(
            f"parameter {name!r} belongs to a kind of adapter that no rule knows; "
            "expected plain LoRA (lora_A and lora_B: use_dora=False) or modules_to_save"
        )
    return UserError(
        f"parameter {name!r} has no known role in family {family.name!r}; "
        f"select it as 'name:{name}' after adding a rule to inputs/families/{family.name}.py"
    )


def identity(model: nn.Module) -> str:
    """16 hex digits of a model's kind: its type, parameter names and shapes; the weights do not count.

    A ledger follows a model through its training, so what it is known by must not change with the weights.
    """
    kind = getattr(getattr(bare(model), "config", None), "model_type", "")
    shapes = [[name, list(p.shape)] for name, p in _named(model)]
    return hashlib.sha256(json.dumps([kind, shapes]).encode()).hexdigest()[:16]


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from model.named_parameters(remove_duplicate=False)
