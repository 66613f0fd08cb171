"""Cutting batches."""

from __future__ import annotations

import pytest
import torch

from dpguard.inputs.batch import Batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_keep_every_token_and_lose_padding_that_nobody_needs(side):
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.arange(1, 16).view(3, 5)
    batch = Batch(ids, mask, ids.clone())
    cut = batch.rows(slice(0, 2))
    assert cut.input_ids.shape == (2, 3)
    for row in range(2):
        kept, whole = cut.attention_mask[row].bool(), mask[row].bool()
        assert cut.input_ids[row][kept].tolist() == ids[row][whole].tolist() == cut.labels[row][kept].tolist()
    assert batch.rows(slice(0, 0)).input_ids.shape == (0, 5)
