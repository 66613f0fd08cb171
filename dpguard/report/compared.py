"""A comparison for the terminal, as a page and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dpguard.errors import UserError
from dpguard.report import files
from dpguard.report.compare import Against, Comparison
from dpguard.report.page import dress, template
from dpguard.report.text import epsilon, metric_name, name, number, span, visible
from dpguard.stats import Interval

KINDS = {".html": ("compare.html.j2", True), ".md": ("compare.md.j2", False)}


def check_name(path: Path) -> None:
    """Refuse a name for the comparison's file that says no kind.

    Raises:
        UserError: it ends with neither .html nor .md.
    """
    if path.suffix not in KINDS:
        raise UserError(f"{str(path)!r} ends with {path.suffix!r}, expected a name that ends with .html or .md")


def write(found: Comparison, path: Path) -> None:
    """Write the comparison as the kind of file that the name ends with.

    Raises:
        UserError: see `check_name`.
    """
    check_name(path)
    file, escape = KINDS[path.suffix]
    context = {
        "first": found.label,
        "others": found.others,
        "leakage_metric": found.leakage_metric,
        "utility_metric": found.utility_metric,
        **dress(found.label, [], 0),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, template(file, escape=escape).render(context))


def print_to(found: Comparison, width: int = 100) -> Iterator[str | Table]:
    """Parts for the terminal, no wider than ``width`` (at least 60) characters."""
    for other in found.others:
        yield f"{name(found.label)} and {name(other.label)}"
        for words, reasons in (("leakages", other.leakage_reasons), ("utilities", other.utility_reasons)):
            if reasons:
                yield f"The {words} are not comparable: {', '.join(reasons)}."
        if other.differs:
            yield _differs(found, other, width)
        else:
            yield "Nothing differs: same texts, model, settings and versions."
        yield ""
        yield _pairs(found, other, width) if other.pairs else "No policy has the same table in both."
        for label, names in ((found.label, other.only_first), (other.label, other.only_second)):
            if names:
                yield f"only in {name(label)}: {', '.join(map(name, names))}"
        yield ""


def _differs(found: Comparison, other: Against, width: int) -> Table:
    room = max((width - 28) // 2 - 2, 12)
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("differs", no_wrap=True, overflow="ellipsis", max_width=26)
    for label in (found.label, other.label):
        table.add_column(Text(visible(label, limit=room)), no_wrap=True, overflow="ellipsis", max_width=room)
    for what, one, two in other.differs:
        table.add_row(*(Text(visible(words, limit=60)) for words in (what, one, two)))
    return table


def _pairs(found: Comparison, other: Against, width: int) -> Table:
    room = max(width - 72, 10)
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("policy", no_wrap=True, overflow="ellipsis", max_width=room)
    for metric in (found.leakage_metric, found.utility_metric):
        short = "MCC" if metric == "mcc" else metric_name(metric)[:13]
        table.add_column(short, no_wrap=True, justify="right")
        table.add_column("differs by", no_wrap=True, justify="right")
    table.add_column("epsilon", no_wrap=True, justify="right")
    for pair in other.pairs:
        first, second = pair.first, pair.second
        table.add_row(
            Text(visible(pair.name, limit=room)),
            _both(first.leakage, second.leakage),
            _gap(pair.leakage),
            _both(first.utility, second.utility),
            _gap(pair.utility),
            f"{epsilon(first.epsilon)} {epsilon(second.epsilon)}",
        )
    return table


def _both(one: Interval | None, two: Interval | None) -> str:
    return " ".join(number(found.value if found else None) for found in (one, two))


def _gap(found: Interval | None) -> str:
    return f"{number(found.value)} ({span(found).replace(' – ', '…')})" if found else "–"
