"""Parameters as slots with roles, and the selectors that name them. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = (
    "token_embedding", "position_embedding", "type_embedding", "embedding_norm",
    "query", "key", "value", "qkv", "attention_output",
    "mlp_in", "mlp_gate", "mlp_out", "norm", "pooler", "head", "adapter_a", "adapter_b",
)  # fmt: skip


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
