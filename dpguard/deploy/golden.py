"""Golden vectors: one update, the exported table and one seed, with the result that the core gave, to the bit.

The vectors are of a miniature of the rehearsed model: the same names, roles and table, every dimension cut to `MOST`.
So the file stays small, and whoever receives it needs no weights to try it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpguard.deploy.gate import outgoing
from dpguard.deploy.rehearsal import MessageForm, ModelCard, Rehearsal, Weight, digest
from dpguard.errors import UserError

FILE = "golden.safetensors"
MOST = 8
SEED = 20
"""Of the stored vectors alone: nothing that is sent in the field is drawn from a seed."""
ROUND = 1
NEAR = 1e-5
"""Largest relative difference between processors that is put down to their arithmetic."""


@dataclass(frozen=True)
class Vectors:
    """A case to try the gate on.

    Attributes:
        rehearsal: the miniature's.
        base: its first weights.
        update: what a client would hand to the gate.
        expected: what left when the folder was made.
        version: of torch, that made it.
    """

    rehearsal: Rehearsal
    base: dict[str, Tensor]
    update: dict[str, Tensor]
    expected: dict[str, Tensor]
    version: str = torch.__version__

    def generator(self) -> torch.Generator:
        """A fresh source of the stored vectors' noise."""
        return torch.Generator().manual_seed(SEED)

    def write(self, folder: Path) -> None:
        """`golden.safetensors`."""
        parts = {"base": self.base, "update": self.update, "expected": self.expected}
        flat = {f"{part} {name}": v.contiguous() for part, tensors in parts.items() for name, v in tensors.items()}
        save_file(flat, folder / FILE, metadata={"torch": self.version})

    @staticmethod
    def read(folder: str | Path, rehearsal: Rehearsal) -> Vectors:
        """The stored vectors of an exported folder.

        Raises:
            UserError: no such file, or of another model.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise UserError(f"no {path}; expected the file as exported")
        parts: dict[str, dict[str, Tensor]] = {"base": {}, "update": {}, "expected": {}}
        try:
            with safe_open(path, framework="pt") as file:
                version = (file.metadata() or {}).get("torch", "unknown")
            for key, value in load_file(path).items():
                part, _, name = key.partition(" ")
                parts[part][name] = value
            small = miniature(rehearsal, parts["base"])
        except (SafetensorError, KeyError, OSError):
            raise UserError(f"{path} is damaged or of another model; expected the file as exported") from None
        return Vectors(small, parts["base"], parts["update"], parts["expected"], version)


def miniature(rehearsal: Rehearsal, base: Mapping[str, Tensor] | None = None) -> Rehearsal:
    """The rehearsal with every dimension of its model cut to `MOST`, at the weights ``base``."""
    weights = []
    for weight in rehearsal.model.weights:
        slot = replace(weight.slot, shape=tuple(min(n, MOST) for n in weight.slot.shape))
        mark = "" if base is None else digest(base[slot.tied_to or slot.name])
        weights.append(Weight(slot, weight.dtype, mark))
    card: ModelCard = replace(rehearsal.model, kind=f"miniature of {rehearsal.model.kind}", weights=tuple(weights))
    return replace(rehearsal, model=card)


def make(rehearsal: Rehearsal) -> Vectors:
    """Vectors of a rehearsal, by the core itself."""
    source = torch.Generator().manual_seed(SEED + 1)
    cut = miniature(rehearsal)
    own = [weight.slot for weight in cut.model.weights if not weight.slot.tied_to]
    dtype = cut.model.dtype
    base = {slot.name: torch.randn(slot.shape, generator=source, dtype=dtype) for slot in own}
    small = miniature(rehearsal, base)
    plan = small.plan
    names = plan.trained if small.content == "clipped" else plan.shared
    update = {n: 0.01 * torch.randn(plan[n].slot.shape, generator=source, dtype=dtype) for n in names}
    vectors = Vectors(small, base, update, {})
    return replace(vectors, expected=through_core(vectors))


def through_core(vectors: Vectors) -> dict[str, Tensor]:
    """What the core makes of the stored update."""
    form: MessageForm = vectors.rehearsal.message
    return outgoing(
        vectors.update, vectors.rehearsal.plan,
        content=vectors.rehearsal.content, batch_size=form.batch_size, generator=vectors.generator(),
        base=vectors.base, examples=form.examples, mask_seed=ROUND, dtype=vectors.rehearsal.model.dtype,
    ).wire  # fmt: skip


def compare(vectors: Vectors, through: Callable[[Vectors], Mapping[str, Tensor]] = through_core) -> str:
    """Run the vectors through the core, or an adapter of it, and say how the result compares.

    Returns:
        A sentence.

    Raises:
        UserError: other tensors came out.
    """
    found = dict(through(vectors))
    if found.keys() != vectors.expected.keys():
        odd = sorted(found.keys() ^ vectors.expected.keys())
        raise UserError(f"golden vectors: {odd[0]!r} is in one result and not in the other; expected the same tensors")
    if all(torch.equal(found[name], value) for name, value in vectors.expected.items()):
        return f"golden vectors: {len(found)} tensors, identical to the bit"
    worst = max(_apart(found[name], value) for name, value in vectors.expected.items())
    if vectors.version != torch.__version__ and worst <= NEAR:
        return (
            f"golden vectors: {len(found)} tensors, equal to {worst:.1e} (made with torch {vectors.version}, this is "
            f"{torch.__version__})"
        )
    raise UserError(
        f"golden vectors: results differ by {worst:.1e} of their size; expected identical tensors (this gate does "
        "not do what was rehearsed)"
    )


def _apart(one: Tensor, two: Tensor) -> float:
    size = max(float(two.double().norm()), 1e-12)
    return float((one.double() - two.double()).norm()) / size
