from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from dpguard.study.grid import describe
from dpguard.study.journal import Running
from dpguard.study.progress import Display, Event, picture
from dpguard.study.record import Record


@pytest.fixture
def events(kit):
    first, second = kit.cells()[4:6]
    failed = Record(second, "failed", "ValueError: [bold]x[/bold]", provenance={"seconds": 2.0})
    return [
        Event("started", first, None, 0, 2, (Running(first.id, describe(first), time.time() - 12),)),
        Event("finished", first, Record(first, "done"), 1, 2, remaining=130.0, best="half: rougeL 0.1"),
        Event("finished", second, failed, 2, 2, failed=1),
    ]


def shown(events, **options):
    out = io.StringIO()
    with Display(2, Console(file=out, width=100, **options)) as display:
        for event in events:
            display.show(event)
    return out.getvalue()


def test_a_line_for_every_finished_cell_and_nothing_else(events):
    assert shown(events).splitlines() == [
        "[1/2] done    utility, none, seed 0",
        "[2/2] failed  leakage at start, none, seed 0 (2.0 s): ValueError: [bold]x[/bold]",
    ]


def test_a_terminal_gets_a_live_table_and_a_line_for_what_failed(events):
    text = shown(events, force_terminal=True, color_system=None)
    assert "failed  leakage at start, none, seed 0 (2.0 s): ValueError: [bold]x[/bold]" in text
    assert "done    utility" not in text
    assert "1 done · 1 failed · 0 running · 0 left" in text


def test_the_table_fits_80_columns(events):
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    running = [Running(str(n), f"leakage at start, a policy of a long name noise={n}" * 2, 100.0) for n in range(11)]
    console.print(picture(finished=5, failed=1, total=40, running=running, remaining=7000, best="half: 0.1", at=220.0))
    rows = out.getvalue().splitlines()
    assert max(len(row) for row in rows) <= 80
    assert rows[0].rstrip() == "4 done · 1 failed · 11 running · 24 left · time remaining: about 1 h 57 min"
    assert sum("leakage at start" in row and row.rstrip().endswith("2 min") for row in rows) == 8
    assert "and 3 more" in out.getvalue()
    assert "best so far: half: 0.1" in rows[-1]


def test_quiet_says_nothing(events, capfd):
    with Display(2, quiet=True) as display:
        for event in events:
            display.show(event)
        display.say("a sentence")
    assert capfd.readouterr() == ("", "")
