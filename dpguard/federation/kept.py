"""What stays with a client between rounds (`LocalState`) as named tensors, so that it can lie in a file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpguard.engine.local import LocalState, LocalTraining


def flat(state: LocalState) -> dict[str, Tensor]:
    """``personal:NAME``, ``residual:NAME`` and ``moments:INDEX:NAME`` -> a copy of the tensor; see `restored`."""
    moments = {} if state.moments is None else state.moments["state"]
    found = {
        **{f"personal:{name}": value for name, value in state.personal.items()},
        **{f"residual:{name}": value for name, value in state.residual.items()},
        **{f"moments:{i}:{name}": v for i, own in moments.items() for name, v in own.items() if v is not None},
    }
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def restored(found: Mapping[str, Tensor], training: LocalTraining, trained: int) -> LocalState:
    """The state that `flat` took apart.

    Args:
        found: its tensors.
        training: what the client does between two messages: the optimizer's settings.
        trained: how many tensors it trains.
    """
    state = LocalState()
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in found.items():
        what, name = key.split(":", 1)
        if what == "moments":
            index, name = name.split(":", 1)
            moments.setdefault(int(index), {})[name] = value
        else:
            {"personal": state.personal, "residual": state.residual}[what][name] = value
    if moments:
        same = training.make([nn.Parameter(torch.empty(0)) for _ in range(trained)])
        groups: list[dict[str, Any]] = same.state_dict()["param_groups"]
        state.moments = {"state": moments, "param_groups": groups}
    return state
