from __future__ import annotations

import io

import pytest
from rich.console import Console

from dpguard.study.progress import Display, Event
from dpguard.study.record import Record


@pytest.fixture
def events(kit):
    first, second = kit.cells()[4:6]
    failed = Record(second, "failed", "ValueError: [bold]x[/bold]", provenance={"seconds": 2.0})
    return [
        Event("started", first, None, 0, 2, (first,)),
        Event("finished", first, Record(first, "done"), 1, 2),
        Event("finished", second, failed, 2, 2),
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


def test_a_terminal_gets_a_bar_and_a_line_for_what_failed(events):
    text = shown(events, force_terminal=True, color_system=None)
    assert "failed  leakage at start, none, seed 0 (2.0 s): ValueError: [bold]x[/bold]" in text
    assert "done  " not in text
    assert "2/2" in text


def test_quiet_says_nothing(events, capfd):
    with Display(2, quiet=True) as display:
        for event in events:
            display.show(event)
        display.say("a sentence")
    assert capfd.readouterr() == ("", "")
