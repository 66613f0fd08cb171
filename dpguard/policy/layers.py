"""Parameters as slots with roles, and the selectors that name them. No torch here."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dpguard.errors import UserError, did_you_mean

ROLES = (
    "token_embedding", "position_embedding", "type_embedding", "embedding_norm",
    "query", "key", "value", "qkv", "attention_output",
    "mlp_in", "mlp_gate", "mlp_out", "norm", "pooler", "head", "adapter_a", "adapter_b",
)  # fmt: skip

EMBEDDINGS = frozenset({"token_embedding", "position_embedding", "type_embedding", "embedding_norm"})
NORMS = frozenset({"norm", "embedding_norm"})
QKV = frozenset({"query", "key", "value", "qkv"})
ADAPTERS = frozenset({"adapter_a", "adapter_b"})

_WORDS: dict[str, frozenset[str]] = {
    "all": frozenset(ROLES),
    "embeddings": EMBEDDINGS,
    "embeddings.token": frozenset({"token_embedding"}),
    "embeddings.position": frozenset({"position_embedding"}),
    "embeddings.type": frozenset({"type_embedding"}),
    "embeddings.norm": frozenset({"embedding_norm"}),
    "head": frozenset({"head"}),
    "pooler": frozenset({"pooler"}),
    "norms": NORMS,
    "adapters": ADAPTERS,
    "adapters.a": frozenset({"adapter_a"}),
    "adapters.b": frozenset({"adapter_b"}),
}
_INSIDE: dict[str, frozenset[str]] = {
    "": frozenset(ROLES),
    "attention": QKV | {"attention_output"},
    "attention.query": frozenset({"query"}),
    "attention.key": frozenset({"key"}),
    "attention.value": frozenset({"value"}),
    "attention.qkv": QKV,
    "attention.output": frozenset({"attention_output"}),
    "mlp": frozenset({"mlp_in", "mlp_gate", "mlp_out"}),
    "mlp.in": frozenset({"mlp_in"}),
    "mlp.gate": frozenset({"mlp_gate"}),
    "mlp.out": frozenset({"mlp_out"}),
    "norms": frozenset({"norm"}),
    "adapters": ADAPTERS,
}
_BLOCK = re.compile(r"block\[(?P<index>[^\]]*)\](?:\.(?P<inside>[a-z.]+))?")
_END = r"\d{1,2}%|100%|-?\d+"
_INDEX = re.compile(rf" *(?:(?P<one>-?\d+)|(?P<any>\*)|(?P<start>{_END})? *: *(?P<stop>{_END})?) *")


@dataclass(frozen=True)
class Slot:
    """One parameter of a model, as a policy sees it.

    Attributes:
        name: the parameter's name in the module.
        shape: its shape.
        role: one of `ROLES`.
        block: index of its transformer block, or None outside the blocks.
        tied_to: name of the slot whose tensor this one shares, or "".
        trainable: False when the model itself has it frozen (requires_grad False).
    """

    name: str
    shape: tuple[int, ...]
    role: str
    block: int | None = None
    tied_to: str = ""
    trainable: bool = True

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def part(self) -> str:
        """The place in the model: ``embeddings``, ``block[3]``, ``pooler``, ``head`` or ``final norm``."""
        if self.block is not None:
            return f"block[{self.block}]"
        if self.role in EMBEDDINGS:
            return "embeddings"
        return "final norm" if self.role == "norm" else self.role

    @property
    def is_bias(self) -> bool:
        """True for additive vectors, by the name that every supported family gives them."""
        return self.name.endswith("bias")


def select(selector: str, slots: Sequence[Slot]) -> list[Slot]:
    """The slots that one selector names, in the model's order.

    ``all``, ``embeddings``, ``embeddings.token``, ``head``, ``pooler``, ``norms``, ``biases``,
    ``adapters``, ``block[3]``, ``block[-1].mlp.in``, ``block[0:4].attention``, ``block[0:50%]`` (the lower
    half), ``block[*].attention.query``, ``name:<glob>``; a final ``.weight`` or ``.bias`` takes one kind.

    Raises:
        UserError: the selector cannot be read, or matches nothing in this model.

    >>> slots = [Slot("q", (2, 2), "query", 0), Slot("q.bias", (2,), "query", 0), Slot("c", (2,), "head")]
    >>> [s.name for s in select("block[0].attention.query.weight", slots)]
    ['q']
    """
    if not isinstance(selector, str) or not selector.strip():
        raise UserError(f"selector {selector!r} is no text; expected for example 'all' or 'block[3]'")
    if selector.startswith("name:"):
        found = [s for s in slots if fnmatch.fnmatchcase(s.name, selector[5:])]
    else:
        found = _by_role(selector, slots)
    if not found:
        raise UserError(f"selector {selector!r} matches nothing in this model{_hint(selector, slots)}")
    return found


def blocks(selector: str, slots: Sequence[Slot]) -> list[int]:
    """Indices of the blocks that ``block[*]`` or ``block[:-1]`` selects, lowest first.

    Raises:
        UserError: as `select`.
    """
    return sorted({s.block for s in select(selector, slots) if s.block is not None})


def check_blocks(selector: str) -> str:
    """What stands between the brackets of ``block[...]``.

    Raises:
        UserError: a text that does not select whole blocks.
    """
    block = _BLOCK.fullmatch(selector)
    if block is None or block["inside"]:
        raise UserError(f"{selector!r} names no blocks; expected a list of values, or 'block[*]' for every block")
    check(selector)
    return block["index"]


def check(selector: str) -> None:
    """Raise a UserError when a selector could match no model at all (misspelt, bad index)."""
    if not isinstance(selector, str):
        raise UserError(f"selector {selector!r} is no text; expected for example 'all' or 'block[3]'")
    if not selector.startswith("name:"):
        _by_role(selector, [])


def _by_role(selector: str, slots: Sequence[Slot]) -> list[Slot]:
    stem, kind = _split_kind(selector)
    if stem == "biases":
        return [s for s in slots if s.is_bias and kind != "weight"]
    block = _BLOCK.fullmatch(stem)
    if block:
        roles = _inside(selector, block["inside"] or "")
        wanted = _indices(selector, block["index"], slots)
        found = [s for s in slots if s.block is not None and s.block in wanted and s.role in roles]
    elif stem in _WORDS:
        found = [s for s in slots if s.role in _WORDS[stem]]
    else:
        known = [*_WORDS, "biases", "block[0]", "block[*].attention", "name:<glob>"]
        raise UserError(f"unknown selector {selector!r}{did_you_mean(selector, known)}")
    if kind == "bias":
        return [s for s in found if s.is_bias]
    return [s for s in found if not s.is_bias] if kind == "weight" else found


def _split_kind(selector: str) -> tuple[str, str]:
    for kind in ("weight", "bias"):
        if selector.endswith("." + kind):
            return selector[: -len(kind) - 1], kind
    return selector, ""


def _inside(selector: str, inside: str) -> frozenset[str]:
    if inside not in _INSIDE:
        near = did_you_mean(inside, [name for name in _INSIDE if name])
        raise UserError(f"selector {selector!r} has no part {inside!r} inside a block{near}")
    return _INSIDE[inside]


def _indices(selector: str, text: str, slots: Sequence[Slot]) -> set[int]:
    count = 1 + max((s.block for s in slots if s.block is not None), default=-1)
    match = _INDEX.fullmatch(text)
    if match is None:
        raise UserError(f"selector {selector!r} has block index {text!r}; expected 3, -1, *, 0:4, 2: or 0:50%")
    if match["any"]:
        return set(range(count))
    if match["one"]:
        index = int(match["one"])
        return {index + count if index < 0 else index}
    ends = [_end(match[name], count) for name in ("start", "stop")]
    return set(range(count)[slice(*ends)])


def _end(text: str | None, count: int) -> int | None:
    if text is None:
        return None
    return math.floor(count * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def _hint(selector: str, slots: Sequence[Slot]) -> str:
    blocks = sorted({s.block for s in slots if s.block is not None})
    if selector.startswith("block["):
        fused = any(s.role == "qkv" for s in slots)
        if fused and any(word in selector for word in (".query", ".key", ".value")):
            return "; its query, key and value are one fused matrix: use '.attention.qkv'"
        if blocks:
            return f"; it has blocks 0 to {blocks[-1]}"
    if selector.startswith("name:"):
        return did_you_mean(selector[5:], [s.name for s in slots]) if len(slots) < 400 else ""
    roles = sorted({s.role for s in slots})
    return f"; it has roles {', '.join(roles)}"
