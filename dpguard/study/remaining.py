"""How long the rest of a study will take, from the cells that are done. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dpguard.study.record import Cell, Record


def kind(cell: Cell) -> str:
    """Cells of one kind take about as long: the leg, and for an attack where it is.

    >>> kind(Cell("leakage", "none", [], {}, {}, {"at": "end"}))
    'leakage at end'
    """
    at = cell.settings.get("at")
    return f"{cell.leg} at {at}" if at else cell.leg


class Pace:
    """Mean seconds of the cells of each kind, as far as any is done.

    >>> pace = Pace()
    >>> pace.seconds({"utility": 1}, [], places=1) is None
    True
    >>> pace.add(Record(Cell("utility", "none", [], {}, {}, {}), "done", provenance={"seconds": 4.0}))
    >>> pace.seconds({"utility": 2}, [("utility", 1.0)], places=2)
    5.5
    >>> pace.seconds({"leakage": 2}, [("leakage", 10.0)], places=2)
    10.0
    """

    def __init__(self) -> None:
        self._took: dict[str, tuple[float, int]] = {}

    def add(self, record: Record) -> None:
        """Learn from a record that is done."""
        took = record.provenance.get("seconds")
        if record.status == "done" and isinstance(took, int | float):
            total, count = self._took.get(kind(record.cell), (0.0, 0))
            self._took[kind(record.cell)] = total + took, count + 1

    def of(self, name: str) -> float | None:
        """Expected seconds of a cell of a kind: the mean of that, or of its leg, or of all; None before the first."""
        leg = name.partition(" ")[0]
        found = [took for known, took in self._took.items() if known == name]
        found = found or [took for known, took in self._took.items() if known.partition(" ")[0] == leg]
        found = found or list(self._took.values())
        count = sum(count for _, count in found)
        return sum(total for total, _ in found) / count if count else None

    def seconds(
        self, left: Mapping[str, int], running: Sequence[tuple[str, float]] = (), *, places: int
    ) -> float | None:
        """Seconds until all is done, None when nothing is known yet.

        Args:
            left: kind -> how many cells have not been started.
            running: kind and seconds so far of the running ones.
            places: cells side by side.
        """
        expected = {name: self.of(name) for name in (*left, *(name for name, _ in running))}
        for name, spent in running:  # none of its kind is done, and it is longer already than the others
            if name not in self._took and expected[name] is not None:
                expected[name] = max(expected[name] or 0.0, spent)
        if any(one is None for one in expected.values()):
            return None
        rest = [max(0.0, (expected[name] or 0.0) - spent) for name, spent in running]
        total = sum(rest) + sum(count * (expected[name] or 0.0) for name, count in left.items())
        return max([total / max(1, places), *rest])


def words(seconds: float | None) -> str:
    """A span of time as one says it.

    >>> [words(s) for s in (None, 0.4, 50, 400, 8000, 400_000)]
    ['unknown', '1 s', '50 s', '7 min', '2 h 13 min', '4 d 15 h']
    """
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
