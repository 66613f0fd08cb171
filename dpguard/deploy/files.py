"""Tensors in a client's folder: a file is the old one or the new one, and a damaged one is said."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpguard.errors import UserError


def save(tensors: Mapping[str, Tensor], path: Path, told: dict[str, str] | None = None) -> None:
    """Write in one step and onto the disk: the old file or the new one, also after a power cut."""
    draft = path.with_suffix(".part")
    try:
        save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, draft, metadata=told)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, SafetensorError) as error:  # a full disk is either
        draft.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write {path}: {why}; expected a disk with space left") from None


def about(path: Path) -> dict[str, str]:
    """What was written beside the tensors of a file; empty without one."""
    if not path.is_file():
        return {}
    with _opened(path) as file:
        return dict(file.metadata() or {})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, what was written beside them) of a file; empty without one."""
    if not path.is_file():
        return {}, {}
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError:
        raise UserError(
            f"{path} is damaged; expected the file as it was written, from a copy (without it, what it holds is made "
            "and paid again)"
        ) from None
