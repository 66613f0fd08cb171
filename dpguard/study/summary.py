"""How a run ended, in numbers and in one sentence. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from dpguard.study.grid import describe
from dpguard.study.interrupts import INTERRUPTED
from dpguard.study.record import Cell, Record
from dpguard.study.store import FINISHED, Store
from dpguard.study.todo import again

_NAMED = 3


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        planned: cells of the study.
        resumed: cells that an earlier run had finished.
        taken: cells whose answers were taken over from other folders now.
        done, failed, skipped: cells of this run, by status.
        ignored: stored records that the study no longer plans.
        interrupted: it was stopped before the end.
        failures: what failed, in words: (cell, reason); of earlier runs as well, when it was left as it was.
        left: failed cells of earlier runs that were left as they were.
        lost: of those that failed now, how many were ended from outside, and run again without being asked.
        ignored_kinds: what was ignored, in words, with counts.
        ran, took: ids of the cells of this run, and of those that were taken over.
        stopped: Ctrl-C was pressed, whether or not a cell was left then.
        reused: folders whose answers were asked for; one that had none to give is a mistake in its name, most likely.
    """

    planned: int
    resumed: int
    done: int
    failed: int
    skipped: int
    ignored: int
    interrupted: bool
    failures: tuple[tuple[str, str], ...] = ()
    left: int = 0
    lost: int = 0
    ignored_kinds: tuple[tuple[str, int], ...] = ()
    taken: int = 0
    ran: frozenset[str] = field(default=frozenset(), compare=False)
    took: frozenset[str] = field(default=frozenset(), compare=False)
    stopped: bool = False
    reused: tuple[str, ...] = ()

    @staticmethod
    def of(
        cells: Sequence[Cell], store: Store, ran: Set[str], took: Set[str], *, interrupted: bool, stopped: bool,
        reused: Sequence[str] = (),
    ) -> Summary:  # fmt: skip
        """The summary of a run, or of several in a row, from the store as they left it.

        Args:
            cells: all that were to be answered.
            store: with their records.
            ran, took, interrupted, stopped, reused: see the class.
        """
        statuses = store.statuses()
        here = {cell.id: statuses.get(cell.id, "") for cell in cells}
        now = Counter(here[cell_id] for cell_id in ran)
        before = Counter(status for cell_id, status in here.items() if cell_id not in ran and cell_id not in took)
        failed = sorted((r for r in store.failed() if r.cell.id in here), key=lambda record: record.cell.id not in ran)
        ignored = kinds_of(store.ignored())
        return Summary(
            planned=len(cells),
            resumed=sum(before[status] for status in FINISHED),
            done=now["done"],
            failed=now["failed"],
            skipped=now["skipped"],
            ignored=sum(count for _, count in ignored),
            interrupted=interrupted,
            failures=tuple((describe(record.cell), record.reason) for record in failed),
            left=before["failed"],
            lost=sum(again(record) for record in failed if record.cell.id in ran),
            ignored_kinds=tuple(ignored),
            taken=len(took),
            ran=frozenset(ran),
            took=frozenset(took),
            stopped=stopped,
            reused=tuple(reused),
        )

    @property
    def exit_status(self) -> int:
        """130 when interrupted, 1 when the study has a failed cell, else 0."""
        return INTERRUPTED if self.interrupted else int(self.failed + self.left > 0)

    @property
    def sentence(self) -> str:
        """The run in one sentence, with what to do next.

        >>> Summary(5, 2, 1, 0, 0, 0, True).sentence
        'stopped: 3 of 5 cells are finished; run the same command again to go on from there'
        >>> Summary(5, 2, 1, 1, 0, 0, False, left=1).sentence
        '5 cells: 1 done, 1 failed, 2 from an earlier run, 1 failed there and left as it is; --retry-failed runs the \
2 failed again'
        >>> Summary(3, 1, 0, 2, 0, 0, False, lost=2).sentence
        '3 cells: 0 done, 2 failed, 1 from an earlier run; the same command runs the 2 that were ended from outside \
again'
        >>> Summary(3, 0, 3, 0, 0, 0, False, reused=("reports/old",)).sentence
        '3 cells: 3 done, 0 taken from reports/old'
        """
        stored = self.resumed + self.taken + self.done + self.skipped
        if self.interrupted and stored == self.planned:
            return f"stopped: all {stored} cells planned so far are finished; run the same command again to go on"
        if self.interrupted:
            return (
                f"stopped: {stored} of {self.planned} cells are finished; "
                "run the same command again to go on from there"
            )
        parts = [f"{self.done} done"]
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.resumed} from an earlier run"] if self.resumed else []
        if self.taken or self.reused:
            parts.append(f"{self.taken} taken from {'another folder' if self.taken else ' and '.join(self.reused)}")
        parts += [f"{self.left} failed there and left as {'it is' if self.left == 1 else 'they are'}"] * bool(self.left)
        text = f"{self.planned} cells: {', '.join(parts)}"
        if self.ignored:
            text += f"; {self.ignored} stored that the study no longer plans are left aside{self._ignored}"
        if self.lost:
            text += f"; the same command runs the {self.lost} that were ended from outside again"
        stays = self.failed + self.left - self.lost
        return text + (f"; --retry-failed runs the {stays} failed again" if stays else "")

    @property
    def _ignored(self) -> str:
        if not self.ignored_kinds:
            return ""
        named = [f"{name} ({count})" for name, count in self.ignored_kinds[:_NAMED]]
        more = len(self.ignored_kinds) - len(named)
        return f" ({', '.join(named)}{f' and {more} more kinds' if more else ''})"


def kinds_of(ignored: Iterable[Record]) -> list[tuple[str, int]]:
    """Records by leg and policy, the commonest first: [("utility, dp-sgd noise=0.6", 3), ...]."""
    counts = Counter(f"{record.cell.leg}, {record.cell.policy}" for record in ignored)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
