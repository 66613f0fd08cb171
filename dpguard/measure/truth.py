"""The truth about a message: known to the judge, never to an attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpguard.inputs.texts import Example


@dataclass(frozen=True)
class Truth:
    """What was in the batch.

    Attributes:
        examples: the texts.
        tokens: token ids of each without special tokens.
    """

    examples: tuple[Example, ...]
    tokens: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(examples: Sequence[Example], tokenizer: Any) -> Truth:
        """Encode the texts."""
        encoded = tokenizer([e.text for e in examples], add_special_tokens=False)["input_ids"]
        return Truth(tuple(examples), tuple(tuple(ids) for ids in encoded))

    def texts(self, tokenizer: Any) -> list[str]:
        """The texts as the tokenizer gives them back: case and spacing that no attack can know are gone."""
        return [str(tokenizer.decode(ids, clean_up_tokenization_spaces=True)) for ids in self.tokens]
