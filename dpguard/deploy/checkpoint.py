"""Where a training stands: weights, the optimizer's moments and the step they are of, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpguard.deploy import files
from dpguard.deploy.training import first_weights, set_weights
from dpguard.errors import UserError
from dpguard.inputs.models import LoadedModel

NAME, MODEL = "training.safetensors", "model.safetensors"
_WEIGHT, _MOMENT = "weight/", "moment/"


def save(folder: str | Path, model: LoadedModel, optimizer: Optimizer, step: int) -> None:
    """Write what `load` goes on from.

    Args:
        folder: the client's state.
        model: as trained so far.
        optimizer: torch's own, as it was before it was made private.
        step: how many messages of the ledger are in these weights.
    """
    weights = {_WEIGHT + name: p for name, p in model.module.named_parameters()}
    moments = {
        f"{_MOMENT}{number}/{name}": torch.as_tensor(value)
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }
    files.save({**weights, **moments}, Path(folder) / NAME, {"step": str(step)})


def finish(folder: str | Path, model: LoadedModel) -> Path:
    """Write the plain weights, for whoever uses the model; where they are."""
    files.save(first_weights(model), Path(folder) / MODEL)
    return Path(folder) / MODEL


def load(folder: str | Path, model: LoadedModel, optimizer: Optimizer, entered: int) -> int:
    """Go on where the last `save` was.

    Args:
        folder, model, optimizer: as in `save`; both are changed.
        entered: how many messages the ledger has.

    Returns:
        The step of the weights; 0 where nothing was saved.

    Raises:
        UserError: a damaged file, or weights of more steps than the ledger has.
    """
    kept, beside = files.load(Path(folder) / NAME)
    if not kept:
        return 0
    step = int(beside["step"])
    if step > entered:
        raise UserError(
            f"{Path(folder) / NAME} holds {step} steps and the ledger beside it {entered}; expected the ledger that "
            "goes with it, from a copy (another one forgets what was spent)"
        )
    set_weights(model.module, {name.removeprefix(_WEIGHT): w for name, w in kept.items() if name.startswith(_WEIGHT)})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in kept.items():
        if name.startswith(_MOMENT):
            number, _, what = name.removeprefix(_MOMENT).partition("/")
            state.setdefault(int(number), {})[what] = value
    told: dict[str, Any] = {**optimizer.state_dict(), "state": state}
    optimizer.load_state_dict(told)
    return step
