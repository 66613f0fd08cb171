"""The frontier as a small table for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from dpguard.report.frontier import Frontier
from dpguard.report.text import epsilon, metric_name, number, short, span
from dpguard.stats import Interval


def terminal_table(frontier: Frontier, width: int = 80) -> Table:
    """The frontier, one line a policy, no wider than ``width`` (at least 60) characters.

    An asterisk marks the Pareto front, as the line below says; a dash stands for what was not measured.
    """
    legend = "* on the Pareto front: no other policy leaks less and is worth more"
    table = Table(
        box=None, pad_edge=False, padding=(0, 1), collapse_padding=True,
        caption=legend if any(row.on_front for row in frontier.rows) else None,
        caption_justify="left", caption_style="dim",
    )  # fmt: skip
    room = max(width - 55, 12)
    table.add_column("policy", no_wrap=True, overflow="ellipsis", max_width=room)
    table.add_column(metric_name(frontier.leakage_metric), no_wrap=True, justify="right")
    table.add_column("interval", no_wrap=True, justify="right", style="dim")
    table.add_column(_short(frontier.utility_metric), no_wrap=True, justify="right")
    table.add_column("interval", no_wrap=True, justify="right", style="dim")
    table.add_column("epsilon", no_wrap=True, justify="right")
    for row in frontier.rows:
        mark = "*" if row.on_front else " "
        name = Text(mark + short(row.policy, room - 1), style="bold" if row.on_front else "")
        table.add_row(name, _value(row.leakage), _ends(row.leakage), _value(row.utility), _ends(row.utility),
                      epsilon(row.epsilon))  # fmt: skip
    if frontier.floor:
        table.add_row(Text(" (floor: a guess)", style="dim"), _value(frontier.floor), _ends(frontier.floor), "", "", "")
    return table


def _short(metric: str) -> str:
    return "MCC" if metric == "mcc" else metric_name(metric)


def _value(interval: Interval | None) -> Text:
    return Text(number(interval.value if interval else None))


def _ends(interval: Interval | None) -> Text:
    return Text(span(interval).replace(" – ", "–"))
