"""``dpguard status``, ``show`` and ``cache``: what a study is doing, what a cell left, what is kept. No torch here."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import Any

from rich.markup import escape

from dpguard.cli.console import console, table
from dpguard.errors import UserError, did_you_mean
from dpguard.report.frontier import frontier
from dpguard.report.recommend import Caps, recommend
from dpguard.report.result import StudyResult
from dpguard.study.cache import Cache
from dpguard.study.grid import describe
from dpguard.study.journal import FINISHED, INTERRUPTED, SEARCHING, Journal
from dpguard.study.lock import in_use
from dpguard.study.progress import picture
from dpguard.study.record import Cell, Record
from dpguard.study.store import Store
from dpguard.study.todo import again

_NAMED = 5  # failed cells that ``status`` names
_LISTED = 40  # cells that ``show`` lists when several match
STATUSES = ("done", "failed", "skipped", "left")
_LONG = 12  # values of a list that ``show`` prints


def best_point(store: Store) -> str:
    """The policy that would be recommended from the records so far, with its figures; "" while there is none."""
    info = store.study()
    result = StudyResult({"name": info.name, "spec": info.spec}, store.records(), planned=store.planned())
    try:
        found = frontier(result)
        caps = asdict(Caps.read(result.spec))
        kept = {name: caps[name] for name in ("max_leakage", "min_utility", "max_epsilon")}
        row = found.row(recommend(found, **kept).policy or "")
    except Exception:  # nothing measured yet that a frontier could be made of; this courtesy must stop no run
        return ""
    if row is None:
        return ""
    figures = [
        f"{name} {value.value:.2f}"
        for name, value in ((found.leakage_metric, row.leakage), (found.utility_metric, row.utility))
        if value is not None
    ]
    figures += [] if row.epsilon is None else [f"epsilon {row.epsilon:.3g}"]
    measured = sum(one.leakage is not None and one.utility is not None for one in found.rows)
    return f"{row.policy}: {', '.join(figures)} ({measured} of {len(found.rows)} policies measured)"


def print_status(folder: Path, *, as_json: bool) -> None:
    """What a study is doing, or how its last run ended."""
    with Store.open(folder) as store:
        name, planned = store.study().name, store.planned()
        statuses = store.statuses()
        failed = store.failed()
        holder, journal = in_use(folder), Journal.read(folder)
        if holder and journal and not holder.startswith(f"process {journal.pid} on {journal.host} "):
            journal = None  # of an earlier run: the one that holds the folder has not said a word yet
        best = journal.best if holder and journal else best_point(store)
    counts = Counter(statuses.get(cell.id, "left") for cell in planned)
    running = journal.running if holder and journal else ()
    waiting = counts["left"] - sum(one.id not in statuses for one in running)
    remaining = None
    if holder and journal and journal.remaining is not None:
        remaining = max(0.0, journal.remaining - (time.time() - journal.at))
    state = _state(holder, journal, counts["left"], len(planned))
    if as_json:
        at = time.time()
        plain = {
            "study": name, "state": state.partition(":")[0].partition(",")[0], "holder": holder, "cells": len(planned),
            "done": counts["done"], "skipped": counts["skipped"], "failed": counts["failed"],
            "left": waiting, "remaining_seconds": remaining, "best": best,
            "running": [{"id": one.id, "cell": one.words, "seconds": round(at - one.since)} for one in running],
            "failures": [{"id": r.cell.id, "cell": describe(r.cell), "reason": r.reason} for r in failed],
        }  # fmt: skip
        print(json.dumps(plain, indent=2))
        return
    out = console()
    out.print(f"{name} in {folder}: {state}", markup=False)
    shown = picture(
        finished=counts["done"] + counts["skipped"] + counts["failed"], failed=counts["failed"],
        skipped=counts["skipped"], total=len(planned), running=running, remaining=remaining,
        best=best, over=not holder,
    )  # fmt: skip
    out.print(shown)
    _print_failed(folder, failed)


def _state(holder: str, journal: Journal | None, left: int, planned: int) -> str:
    """How it stands, in a few words."""
    if holder:
        return f"running, {holder}"
    if journal is not None and not journal.ended:
        seen = datetime.fromtimestamp(journal.at).astimezone().isoformat(timespec="seconds")
        return (
            f"crashed: process {journal.pid} on {journal.host} ended without a word, last seen {seen}; "
            "run the same command again to go on from there"
        )
    if journal is not None and journal.ended == SEARCHING:
        return "stopped before a sweep's next value; run the same command again to go on"
    if journal is not None and journal.ended not in (FINISHED, INTERRUPTED):
        return f"stopped by an error: {journal.ended}"
    if left and journal is not None and journal.ended == FINISHED:
        return f"finished what was its own; {left} of {planned} cells are another shard's"
    return f"stopped with {left} of {planned} cells left; run the same command again to go on" if left else "finished"


def _print_failed(folder: Path, failed: list[Record]) -> None:
    out = console()
    for record in failed[:_NAMED]:
        out.print(f"failed: {describe(record.cell)} ({record.cell.id[:8]}): {record.reason}", markup=False)
    if len(failed) > _NAMED:
        out.print(f"and {len(failed) - _NAMED} more failed")
    if failed:
        lost = sum(again(record) for record in failed)
        retried = f"; {lost} of them will run again by itself" if lost else ""
        out.print(
            f"dpguard show {quote(str(folder))} {failed[0].cell.id[:8]} prints one in full; "
            f"dpguard run STUDY --retry-failed runs them again{retried}",
            style="dim", markup=False, soft_wrap=True,
        )  # fmt: skip


def print_cell(folder: Path, asked: list[str], *, as_json: bool) -> None:
    """One cell's record in full, or the cells that the words fit."""
    text = " ".join(asked)
    with Store.open(folder) as store:
        statuses = store.statuses()
        cells = {cell.id: cell for cell in (*store.planned(), *(record.cell for record in store.ignored()))}
        fitting = _fitting(text, cells, statuses)
        if len(fitting) != 1:
            if not fitting and text in STATUSES:
                told = f"no cell of {folder} is {text}"
                print("[]") if as_json else console().print(told, markup=False)
                return
            if not fitting:
                hint = did_you_mean(text, {cell.policy for cell in cells.values()})
                raise UserError(f"no cell of {str(folder)!r} is called {text!r}{hint}")
            _print_cells(fitting, statuses, as_json=as_json)
            return
        record = store.record(fitting[0].id)
    if as_json:
        left = {**asdict(Record(fitting[0], "skipped", "has not run yet")), "status": "left"}
        print(json.dumps(left if record is None else asdict(record), indent=2))
    elif record is None:
        console().print(f"{describe(fitting[0])} ({fitting[0].id}) has not run yet", markup=False)
    else:
        _print_record(record)


def _fitting(text: str, cells: dict[str, Cell], statuses: dict[str, str]) -> list[Cell]:
    """The cells whose id starts so, or whose words and status have all of these words."""
    by_id = [cell for cell_id, cell in cells.items() if len(text) >= 4 and cell_id.startswith(text.lower())]
    if by_id:
        return by_id
    exact = [cell for cell in cells.values() if describe(cell) == text]
    if exact:
        return exact
    wanted = text.lower().replace(",", " ").split()

    def fits(cell: Cell) -> bool:
        said = f"{describe(cell)} {statuses.get(cell.id, 'left')}".lower()
        return all(word in said for word in wanted)

    return [cell for cell in cells.values() if fits(cell)]


def _print_cells(cells: list[Cell], statuses: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        plain = [{"id": c.id, "status": statuses.get(c.id, "left"), "cell": describe(c)} for c in cells]
        print(json.dumps(plain, indent=2))
        return
    rows = [[cell.id[:8], statuses.get(cell.id, "left"), describe(cell)] for cell in cells[:_LISTED]]
    console().print(table(["id", "status", "cell"], rows))
    more = len(cells) - len(rows)
    console().print(f"{len(cells)} cells fit{f', {more} more than shown' if more else ''}; name one by its id")


def _print_record(record: Record) -> None:
    out = console()
    told = dict(record.provenance)
    traceback, output = told.pop("traceback", ""), told.pop("output", "")
    colour = {"failed": "bold red", "done": "bold green"}.get(record.status, "bold")
    out.print(f"[{colour}]{record.status}[/] {escape(describe(record.cell))}")
    if record.reason:
        out.print(record.reason, markup=False)
    out.print()
    rows = [["id", record.cell.id], *([name, _short(value)] for name, value in sorted(told.items()))]
    rows += [[name, _short(value)] for name, value in sorted(record.cell.settings.items())]
    rows += [[name, _short(value)] for name, value in record.result.items()]
    out.print(table(["what", "value"], rows))
    for name, text in (("traceback", traceback), ("the last of its output", output)):
        if str(text).strip():
            out.print(f"\n{name}:", style="bold")
            out.print(str(text).rstrip(), markup=False, soft_wrap=True)


def _short(value: Any) -> str:
    """A value in at most a few lines; long lists by their length."""
    if isinstance(value, list) and len(value) > _LONG:
        return f"{len(value)} values (all of them with --json)"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 600 else f"{text[:600]} ... (all of it with --json)"


def print_cache(folder: Path, *, clear: bool, size: bool) -> None:
    """What is kept of shared work, by kind; or drop it all."""
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no folder, expected the folder of a study that was run")
    cache = Cache(folder)
    entries = cache.entries()
    if clear:
        console().print(f"dropped {_bytes(cache.clear())}; whatever is needed is made again")
        return
    if size:
        print(sum(entry.bytes for entry in entries))
        return
    rows = []
    for what in sorted({entry.what for entry in entries}):
        own = [entry for entry in entries if entry.what == what]
        used = datetime.fromtimestamp(max(entry.used for entry in own)).strftime("%Y-%m-%d %H:%M")
        rows.append([what, len(own), _bytes(sum(entry.bytes for entry in own)), used])
    if rows:
        console().print(table(["what", "entries", "size", "last used"], rows, right=["entries", "size"]))
    console().print(f"{_bytes(sum(entry.bytes for entry in entries))} in {cache.folder}", markup=False)


def _bytes(count: int) -> str:
    """A size as one says it.

    >>> _bytes(999), _bytes(12_340_000), _bytes(4_000_000_000)
    ('999 B', '12.3 MB', '4.0 GB')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
