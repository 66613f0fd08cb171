"""LoRA on a model: an adapter that PEFT saved to a folder, or a fresh one, ``+lora8`` after a model's name."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dpguard.errors import UserError
from dpguard.inputs.family import slots

FILE = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTED = frozenset({"query", "value", "qkv"})
"""Roles of the layers that a fresh LoRA sits on, the LoRA paper's choice (arXiv 2106.09685, section 4.2)."""
_HEAD = re.compile(r"(?:^|\.)(?:classifier(?:\.out_proj)?|score)\.weight$")
SCALE = 2.0
"""Alpha over rank of a fresh LoRA."""


@dataclass(frozen=True)
class Saved:
    """A PEFT adapter on disk: its folder and, as its configuration names it, its base model."""

    folder: Path
    base: str


def split(name: str) -> tuple[str, int | None]:
    """A model's name without ``+lora<rank>`` at its end, and the rank; None without it, or where a folder is called so.

    >>> split("minilm+lora8"), split("minilm")
    (('minilm', 8), ('minilm', None))

    Raises:
        UserError: something else after a plus.
    """
    base, plus, more = name.rpartition("+")
    if not plus or "/" in more or expanded(name).exists():
        return name, None
    rank = more.removeprefix("lora")
    if not base or rank == more or not (rank.isascii() and rank.isdecimal()):
        raise UserError(f"no model {name!r}; expected a folder of that name, or +lora and a rank, as in 'minilm+lora8'")
    return base, int(rank)


def saved(name: str) -> Saved | None:
    """What adapter_config.json says, or None for a folder without one or a hub name.

    Raises:
        UserError: a file that names no base model, another task's adapter, or one without weights.
    """
    folder = expanded(name)
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"adapter {name!r}: {FILE} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"adapter {name!r}: {FILE} is no JSON ({first_line(error)})") from None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise UserError(f"adapter {name!r} names no base model; expected base_model_name_or_path in {FILE}")
    task = config.get("task_type")
    if task not in (None, "SEQ_CLS"):
        raise UserError(f"adapter {name!r} has task_type {task!r}; expected 'SEQ_CLS', a sequence classifier's adapter")
    if not any((folder / weights).is_file() for weights in WEIGHTS):
        raise UserError(f"adapter {name!r} has no weights; expected {WEIGHTS[0]} beside {FILE}")
    return Saved(folder, base)


def classes(folder: Path) -> int | None:
    """Number of classes of the head that an adapter saved beside its matrices; None where it saved none.

    A file that cannot be read has none here: `attached` says what is wrong with it.
    """
    try:
        shapes = _shapes(folder)
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
        SafetensorError,
    ):
        return None
    return next((shape[0] for name, shape in shapes.items() if _HEAD.search(name) and len(shape) == 2), None)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    safe, old = (folder / file for file in WEIGHTS)
    if not safe.is_file():
        saved = torch.load(old, map_location="cpu", weights_only=True)
        return {name: tuple(value.shape) for name, value in saved.items()}
    with safe_open(safe, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)


def attached(name: str, module: nn.Module, folder: Path) -> nn.Module:
    """A base model inside a saved adapter, which alone is trainable.

    Raises:
        UserError: an adapter of another model or kind, or PEFT not installed.
    """
    PeftModel = _peft(name).PeftModel
    try:
        with warnings.catch_warnings():
            # adapters that the file does not have would stay as they were drawn
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(module, str(folder), is_trainable=True)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserWarning, SafetensorError) as error:
        raise UserError(f"adapter {name!r} does not fit its base model: {_why(error)}") from None


def with_lora(name: str, module: nn.Module, rank: int) -> nn.Module:
    """A model inside a fresh LoRA on the query and value (or fused qkv) of every block; it and the head are trainable.

    As in the LoRA paper (arXiv 2106.09685, section 4.1) A is drawn, from torch's global generator, and B is zero: the
    model's outputs are the base model's, and the first gradient is B's alone.

    Raises:
        UserError: a rank below 1 or above the layers' width, a model without such layers, or PEFT not installed.
    """
    peft = _peft(name)
    layers = [slot for slot in slots(module) if slot.role in ADAPTED and slot.name.endswith(".weight")]
    if not layers:
        raise UserError(f"model {name!r} has no query or value layer for LoRA to sit on")
    most = min(min(slot.shape) for slot in layers)
    if not 1 <= rank <= most:
        raise UserError(f"model {name!r} asks for LoRA of rank {rank}; expected 1 to {most}, the layers' width")
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=SCALE * rank,
        target_modules=[slot.name.removesuffix(".weight") for slot in layers],
        fan_in_fan_out=not isinstance(module.get_submodule(layers[0].name.removesuffix(".weight")), nn.Linear),
    )
    return peft.get_peft_model(module, config)  # type: ignore[no-any-return]


def absolute(name: str, bundled: Container[str] = ()) -> str:
    """The same model, named so that it is found from any working folder; ``bundled`` names are no folders."""
    base, rank = split(name)
    folder = expanded(base)
    place = str(folder.resolve()) if base not in bundled and folder.is_dir() else base
    return place if rank is None else f"{place}+lora{rank}"


def expanded(name: str) -> Path:
    """The path that a name may be, ``~`` and ``~user`` replaced where there is such a user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _peft(name: str) -> Any:
    try:
        import peft
    except ImportError:
        raise UserError(f"model {name!r} needs PEFT; install it with: pip install 'dpguard[lora]'") from None
    return peft


def first_line(error: Exception) -> str:
    """What an error says first, at most 200 letters of it."""
    return str(error).strip().partition("\n")[0][:200]


def _why(error: Exception) -> str:
    """The line that says something: PyTorch names the tensor that does not fit on the second."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return lines[1 if lines[0].endswith(":") and len(lines) > 1 else 0][:240]
