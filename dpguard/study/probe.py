"""How long a study will take, from short real probes of its kinds of cells. No torch here.

A probe is a cell made short: one message instead of all, a few training steps or one round instead of the whole
training. It runs as the cell would, and its parts are scaled up: what grows with messages or steps, and what does not.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpguard.study.executor import Executor
from dpguard.study.grid import NEEDS
from dpguard.study.record import Cell, Record
from dpguard.study.remaining import kind, words

STEPS = 3
"""Training steps of a probe."""
TEXTS = (64, 16)
"""Texts that a step of it has at most; for a larger step both are probed, which tells a step's cost from a text's."""
MINUTES = 0.5
"""That a probe may take; one that takes longer says "at least"."""


@dataclass(frozen=True)
class Estimate:
    """Seconds that a study will take.

    Attributes:
        low, high: with the fastest, and with the slowest probe of every kind.
        probes: how many cells were probed.
        over: kinds whose probe was ended at its limit, so that ``high`` may be too low.
        unknown: kinds whose probe failed: reason.
    """

    low: float
    high: float
    probes: int
    over: tuple[str, ...]
    unknown: Mapping[str, str]

    @property
    def sentence(self) -> str:
        """The estimate in words.

        >>> Estimate(50, 400, 4, (), {}).sentence
        'estimate: 50 s to 7 min, from 4 short probes (one message attacked, 3 small training steps); other policies \
may differ'
        >>> Estimate(5.1, 5.2, 1, (), {}).sentence.split(",")[0]
        'estimate: about 5 s'
        """
        low, high = words(self.low), words(self.high)
        text = f"estimate: about {low}" if low == high else f"estimate: {low} to {high}"
        if self.over:
            text += f" or more ({', '.join(self.over)}: the probe was ended after {60 * MINUTES:g} s)"
        text += f", from {self.probes} short probes (one message attacked, {STEPS} small training steps)"
        text += "; other policies may differ"
        return text + "".join(f"; nothing is known of {name}: {why}" for name, why in self.unknown.items())


def short(cell: Cell, texts: int = TEXTS[0]) -> Cell:
    """The cell made short: the same work, less of it; training steps of at most so many texts."""
    settings: dict[str, Any] = {key: value for key, value in cell.settings.items() if key != NEEDS}
    if cell.leg == "leakage":
        settings |= {"targets": 1, "at": "start"}
    elif cell.leg == "utility" and "federation" in settings:
        settings["federation"] = {**settings["federation"], "rounds": 1}
    elif cell.leg == "utility":
        settings["batch_size"] = min(settings["batch_size"], texts)
        examples = settings.get("train_examples") or cell.data["train"]
        settings["epochs"] = min(settings["epochs"], STEPS * settings["batch_size"] / examples)
    return replace(cell, settings=settings)


def whole(cell: Cell, record: Record, smaller: Record | None = None) -> float:
    """Seconds of the whole cell, from the record of the short one.

    Args:
        cell: the cell.
        record: of its short form.
        smaller: of a form with fewer texts a step; without it a step costs nothing but its texts.
    """
    took, result = float(record.provenance["seconds"]), record.result
    if cell.leg == "leakage":
        # an attack's time is that of the whole message, and stands beside each of its texts
        attacks = {score["attack"]: score["seconds"] for score in result["scores"] if not score.get("inherited")}
        each = sum(attacks.values())
        moments = len(cell.settings["observe"]) if cell.settings["at"] == "rounds" else 1
        return float(max(0.0, took - each) + each * int(cell.settings["targets"]) * moments)
    if cell.leg == "utility":
        step = (
            _step(record) if "federation" in cell.settings else _step_of(cell.settings["batch_size"], record, smaller)
        )
        return max(0.0, took - float(result["train_seconds"])) + step * _steps(cell)
    return took


def _step(record: Record) -> float:
    """Seconds of one of its steps or rounds."""
    return float(record.result["train_seconds"]) / max(1, int(record.result["steps"]))


def _step_of(texts: int, record: Record, smaller: Record | None) -> float:
    """Seconds of a step of so many texts: a part that every step costs, and one that grows with its texts."""
    probed, step, each = int(record.cell.settings["batch_size"]), _step(record), 0.0
    if smaller is not None:
        less = int(smaller.cell.settings["batch_size"])
        each = min(step / probed, max(0.0, (step - _step(smaller)) / (probed - less)))
    each = each or step / probed
    return step + each * (texts - probed)


def _steps(cell: Cell) -> int:
    given = cell.settings
    if "federation" in given:
        return int(given["federation"]["rounds"])
    return max(
        1,
        round(
            float(given["epochs"]) * int(given.get("train_examples") or cell.data["train"]) / int(given["batch_size"])
        ),
    )


def chosen(cells: Sequence[Cell]) -> list[Cell]:
    """Two cells of every kind: the undefended control's, or the first, and that of the longest table."""
    kinds: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        kinds[kind(cell)].append(cell)
    picked = [one for own in kinds.values() for one in (own[0], max(own, key=lambda c: len(str(c.table))))]
    return list({short(cell).id: cell for cell in picked}.values())


def estimate(cells: Sequence[Cell], executor: Callable[[], Executor]) -> Estimate:
    """Probe a study.

    Args:
        cells: what is left to run.
        executor: makes what runs the probes; its limits end a probe that takes too long (`MINUTES`).
    """
    probed = chosen(cells)
    found: dict[str, list[float]] = defaultdict(list)
    over: dict[str, None] = {}
    unknown: dict[str, str] = {}
    runner = executor()
    try:
        # The first one makes what all share, so it runs alone, and once more with the others.
        first = _answers(probed[:1], runner)
        answers = _answers(probed, runner)
        large = [cell for cell in probed if _is_large(cell)]
        second = {cell.id: record for cell, record in _answers(large, runner, TEXTS[1]) if record.status == "done"}
        for cell, record in answers:
            smaller = second.get(cell.id)
            if _late(record) and smaller is not None:
                record, smaller = smaller, None
            if record.status == "done":
                found[kind(cell)].append(whole(cell, record, smaller))
            elif _late(record):
                found[kind(cell)].append(60 * MINUTES * (1 if cell.leg == "guarantee" else 2))
                over[kind(cell)] = None
            elif record.status == "failed":
                unknown[kind(cell)] = record.reason
    finally:
        runner.close()
    once = sum(float(record.provenance.get("seconds", 0.0)) for _, record in first)
    counts = {name: sum(kind(cell) == name for cell in cells) for name in found}
    low, high = (once + sum(counts[name] * of(found[name]) for name in found) / runner.places for of in (min, max))
    missing = {name: why for name, why in unknown.items() if name not in found}
    return Estimate(low, high, len(probed), tuple(over), missing)


def _is_large(cell: Cell) -> bool:
    """Whether a training step has more texts than a probe's."""
    return cell.leg == "utility" and "federation" not in cell.settings and cell.settings["batch_size"] > TEXTS[0]


def _late(record: Record) -> bool:
    return record.provenance.get("failure") == "time"


def _answers(cells: Sequence[Cell], runner: Executor, texts: int = TEXTS[0]) -> list[tuple[Cell, Record]]:
    """Each cell with the record of its short form."""
    waiting, running, found = list(cells), dict[str, Cell](), []
    wake, ring = os.pipe()
    try:
        while waiting or running:
            while len(running) < runner.places and (cell := next((c for c in waiting if runner.takes(c)), None)):
                waiting.remove(cell)
                started = short(cell, texts)
                runner.start(started)
                running[started.id] = cell
            found += [(running.pop(record.cell.id), record) for record, _texts in runner.wait(wake)]
    finally:
        os.close(wake)
        os.close(ring)
    return found
