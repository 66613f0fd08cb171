"""The small table fits the terminal, whatever the policies are called."""

import io

import pytest
from rich.console import Console

from dpguard.report.frontier import Frontier, Row, frontier
from dpguard.report.terminal import terminal_table
from dpguard.stats import Interval
from tests.report.made_up_study import POLICIES, sample


def printed(table, width):
    stream = io.StringIO()
    Console(file=stream, width=200, color_system=None).print(terminal_table(table, width))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 60])
def test_it_fits_the_width(width):
    lines = printed(frontier(sample(10)), width)
    assert max(len(line.rstrip()) for line in lines) <= width
    assert len(lines) >= len(POLICIES) + 3
    assert "".join(lines[len(POLICIES) + 2 :]).startswith("* on the Pareto front")


def test_it_says_what_the_frontier_says():
    table = frontier(sample(10))
    line = next(line for line in printed(table, 100) if "dp-sgd noise=0.6" in line)
    row = table.row("dp-sgd noise=0.6")
    assert f"{row.leakage.value:.2f}" in line
    assert "6.31" in line
    assert line.startswith("*")
    assert any("floor" in line for line in printed(table, 100))
    sign = next(line for line in printed(table, 100) if "sign" in line)
    assert "–" in sign


def test_hostile_names_and_markup_are_text():
    rows = [
        Row("[b]" + "y" * 300 + "[/b]", leakage=Interval(0.5, 0.4, 0.6, 9), epsilon=float("inf")),
        Row("\x1b[31m\u202ez", epsilon=70333.0),
    ]
    lines = printed(Frontier(tuple(rows), "rougeL", "mcc"), 80)
    assert lines[1].lstrip().startswith("[b]yy")
    assert "yy[/b] " in lines[1]
    assert "[U+001B][31m[U+202E]z" in lines[2]
    assert max(len(line.rstrip()) for line in lines) <= 80
