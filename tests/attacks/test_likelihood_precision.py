"""The search's precision follows what the processor can multiply."""

from __future__ import annotations

import pytest
import torch

from dpguard.attacks.likelihood_precision import search_dtype

TABLE = torch.zeros(8, 384)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_bfloat16_where_the_processor_has_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    assert search_dtype(TABLE) is torch.bfloat16
    assert search_dtype(TABLE[:, :64]) is torch.float32  # nothing to gain
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: False, "avx2": True})
    assert search_dtype(TABLE) is torch.float32


def test_float32_where_torch_does_not_say_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert search_dtype(TABLE) is torch.float32


def test_float32_on_devices_that_are_not_known() -> None:
    assert search_dtype(TABLE.to("meta")) is torch.float32
