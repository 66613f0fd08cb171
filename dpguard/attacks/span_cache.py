"""States of texts that go on from a common beginning: the beginning runs once, every candidate is one position."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dpguard.attacks.span_sites import CHUNK_TOKENS, Probe, reached
from dpguard.inputs.family import bare

LONG = 16
"""Cached positions of a prefix that weigh as much as one position that is computed."""


class Extender:
    """What enters one layer of a decoder at the last position of a prefix plus one token.

    Args:
        probe: the model; every state counts as one candidate.
        layer: a linear layer of the model.
    """

    def __init__(self, probe: Probe, layer: nn.Module) -> None:
        self.probe, self.layer = probe, layer
        self.placed = "position_ids" in inspect.signature(bare(probe.model).forward).parameters

    def states(self, prefix: Sequence[int], tokens: Tensor) -> Tensor:
        """(n, inputs) states of the last position of ``prefix`` followed by each of some tokens.

        Args:
            prefix: token ids, possibly none.
            tokens: (n,) token ids.
        """
        self.probe.scored += len(tokens)
        with torch.no_grad():
            past = self._past(prefix) if len(prefix) else []
            parts = tokens.split(max(1, CHUNK_TOKENS // (2 + len(prefix) // LONG)))  # type: ignore[no-untyped-call]
            return torch.cat([self._run(part[:, None], past, len(prefix))[0][:, -1] for part in parts])

    def _past(self, prefix: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a prefix in every block below the layer's, and perhaps in its own."""
        cache = self._run(torch.tensor([list(prefix)], device=self.probe.device), [], 0)[1]
        return [(page.keys, page.values) for page in cache.layers if page.keys is not None and page.keys.numel()]

    def _run(self, ids: Tensor, past: list[tuple[Tensor, Tensor]], place: int) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache()
        for block, (keys, values) in enumerate(past):
            cache.update(keys.expand(len(ids), -1, -1, -1), values.expand(len(ids), -1, -1, -1), block)
        arguments: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        if self.placed:
            rows = self.probe.positions(place + ids.shape[1])[place:]
            arguments["position_ids"] = rows.expand(len(ids), -1)
        return reached(self.probe.model, self.layer, arguments), cache
