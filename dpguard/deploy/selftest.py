"""What the receiver of an exported folder runs before anything else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dpguard.deploy import golden, hostile
from dpguard.deploy.rehearsal import Rehearsal
from dpguard.errors import UserError
from dpguard.inputs import models


def run(folder: str | Path, *, model: str | None = None) -> list[str]:
    """Check the folder: the table is the rehearsed one, the gate does what it did, nothing hostile passes.

    Args:
        folder: the exported folder.
        model: name or folder of the model, to check that it is the rehearsed one too.

    Returns:
        What was found, a sentence a line.

    Raises:
        UserError: a check that failed.
    """
    made = Rehearsal.read(folder)
    told = [f"table: plan {made.plan.hash}, the one that was rehearsed ({len(made.plan.shared)} tensors leave)"]
    vectors = golden.Vectors.read(folder, made)
    told.append(golden.compare(vectors))
    hostile.good_leaves(vectors)
    counts = Counter(hostile.try_all(vectors).values())
    told.append(
        f"hostile messages: {counts['refused']} kinds refused, {counts['handled']} handled as documented, 0 passed "
        f"through ({counts['not applicable']} do not exist for this table)"
    )
    if model is not None:
        loaded = models.load(model, labels=made.model.labels, seed=0)
        if loaded.fingerprint != made.model.hash:
            raise UserError(
                f"model {model!r} has hash {loaded.fingerprint}; expected {made.model.hash}, the rehearsed one"
            )
        told.append(f"model: {loaded.fingerprint}, the one that was rehearsed")
    return told


def main(folder: Path, words: list[str]) -> int:
    """``self_test.py [MODEL]``: prints what was found; the exit status is 1 when a check fails."""
    try:
        for line in run(folder, model=words[0] if words else None):
            print(f"ok    {line}")
    except UserError as error:
        print(f"FAIL  {error}")
        return 1
    return 0
