"""The tables of a report for a paper: LaTeX with booktabs rules, through pandas; any text in them is just text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import pandas as pd

from dpguard.report.frontier import CONTROL, FLOOR, Frontier, Row
from dpguard.report.recommend import Recommendation
from dpguard.report.text import count, metric_name, percent, visible
from dpguard.report.text import epsilon as show_epsilon
from dpguard.report.views import AttackRow, PolicyView
from dpguard.stats import Interval

NAME_LENGTH = 60
PAGE = 40
"""Lines that fit a page: a longer table would lose its end as a float, so it goes on over pages."""
SMALL = "\\footnotesize\\setlength{\\tabcolsep}{3pt}"
WRAPPED = {"policy": 0.2, "layers": 0.25, "what is done": 0.42}
"""Columns whose words wrap -> their share of the line."""
LETTERS = 110
"""Letters of `SMALL` in a line of 16 cm."""
EXACT = "exact_match"
_SPECIAL = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
    "–": r"\textendash{}", "−": "$-$", "∞": r"$\infty$", "ε": r"$\varepsilon$", "…": r"\dots{}",
})  # fmt: skip
_LIGATURE = re.compile(r"([-,])(?=\1)")
_BREAK = re.compile(r"(?<=[=.:\])])(?=[\w\[])")
"""Where a word may go on in the next line: names of policies and layers are long words."""
_ARGUMENT = re.compile(r"^\s*([\[*])")


def latex(words: str) -> str:
    """Text that LaTeX sets as it is; hostile characters are shown by their code.

    >>> print(latex("50 % of a_b {c} & $d"), latex("[x] --"))
    50 \\% of a\\_b \\{c\\} \\& \\$d {[}x] -{}-
    """
    shown = _LIGATURE.sub(r"\1{}", visible(words).translate(_SPECIAL))
    return _ARGUMENT.sub(r"{\1}", shown)  # after the end of a row these two are arguments


def _wrapping(words: str) -> str:
    r"""A cell whose long words may be broken.

    >>> _wrapping("block[1].mlp")
    'block[1].\\allowbreak{}mlp'
    """
    return "\\allowbreak{}".join(latex(part) for part in _BREAK.split(visible(words)))


def tables(views: Sequence[PolicyView], frontier: Frontier, decision: Recommendation) -> str:
    """The text of tables.tex: the frontier, the policies and every attack's own row, each a ``table`` of its own.

    Where one is longer than a page it is a ``longtable``.

    Args:
        views: of every policy.
        frontier: of the study.
        decision: names the recommended policy.
    """
    scored = "llrlrr" if frontier.leakage_metric == EXACT else "llrlrlrr"
    parts = [
        "% for lines of 16 cm\n% \\usepackage{booktabs}\n% \\usepackage{longtable}  % tables of more than a page\n"
        "% \\usepackage{textcomp}  % quotes, for engines before 2020\n",
        _table(_frontier_rows(frontier, decision), _columns("r", "policy", "rlrlrr"), _caption(frontier, decision),
               "tab:frontier"),
        _table(_policy_rows(views), _columns("r", *WRAPPED), "The policies: what is done to which layers.",
               "tab:policies"),
        _table(_attack_rows(views, frontier), _columns("policy", scored), _attacks_caption(frontier), "tab:attacks"),
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _columns(*parts: str) -> str:
    """Column specification: names of `WRAPPED` become paragraphs of their width.

    >>> _columns("r", "policy", "rl")
    'rp{0.2\\\\linewidth}rl'
    """
    return "".join(f"p{{{WRAPPED[part]:g}\\linewidth}}" if part in WRAPPED else part for part in parts)


def _table(rows: list[dict[str, str]], columns: str, caption: str, label: str) -> str:
    """Rows as a table; every cell and caption is set as it is."""
    if not rows:
        return ""
    frame = pd.DataFrame(
        [{key: (_wrapping if key in WRAPPED else latex)(value) for key, value in row.items()} for row in rows]
    )
    frame.columns = pd.Index([latex(key).strip() for key in rows[0]])
    styled, caption = frame.style.hide(axis="index"), latex(caption)
    if sum(map(_lines, rows)) > PAGE:
        long = styled.to_latex(
            column_format=columns, hrules=True, caption=caption, label=label, environment="longtable"
        )
        return f"{{{SMALL}\n{long}}}\n"
    floating = styled.to_latex(
        column_format=columns, hrules=True, caption=caption, label=label, position="tbp", position_float="centering"
    )
    return floating.replace("\\centering\n", f"\\centering{SMALL}\n", 1)


def _lines(row: Mapping[str, str]) -> int:
    """How many lines a row takes, about."""
    return max(math.ceil(len(row[key]) / (share * LETTERS)) for key, share in WRAPPED.items() if key in row) or 1


def _frontier_rows(frontier: Frontier, decision: Recommendation) -> list[dict[str, str]]:
    leakage, utility = metric_name(frontier.leakage_metric), metric_name(frontier.utility_metric)
    rows = [
        {
            "#": str(number),
            "policy": _name(row.policy) + (" *" if row.on_front else "") + (" (recommended)" * _is(row, decision)),
            leakage: _value(row.leakage),
            "interval": _ends(row.leakage),
            utility: _value(row.utility),
            "interval ": _ends(row.utility),
            "ε": show_epsilon(row.epsilon),
            "shared": percent(row.shared_fraction),
        }
        for number, row in enumerate(frontier.rows, 1)
    ]
    floor = frontier.floor
    if floor and rows:
        empty = dict.fromkeys(rows[0], "")
        rows.append({**empty, "policy": f"floor ({FLOOR})", leakage: _value(floor), "interval": _ends(floor)})
    return rows


def _policy_rows(views: Sequence[PolicyView]) -> list[dict[str, str]]:
    return [
        {
            "#": str(view.number) if place == 0 else "",
            "policy": _name(view.row.policy) if place == 0 else "",
            "layers": layers[:120],
            "what is done": columns[:400] or "–",
        }
        for view in views
        for place, (layers, columns) in enumerate(view.table or (("all", "shared as it is"),))
    ]


def _attack_rows(views: Sequence[PolicyView], frontier: Frontier) -> list[dict[str, str]]:
    leakage, alone = metric_name(frontier.leakage_metric), frontier.leakage_metric == EXACT

    def row(view: PolicyView, attack: AttackRow, first: bool) -> dict[str, str]:
        return {
            "policy": _name(view.row.policy) if first else "",
            "attack": attack.attack,
            "message from": attack.at,
            leakage: _value(attack.leakage),
            "interval": _ends(attack.leakage),
            **({} if alone else {"exact match": _value(attack.exact), "interval ": _ends(attack.exact)}),
            "certain": str(attack.certain),
            "scores": str(attack.scores),
        }

    return [row(view, attack, place == 0) for view in views for place, attack in enumerate(view.attacks)]


def _caption(frontier: Frontier, decision: Recommendation) -> str:
    n = max((row.leakage.n for row in frontier.rows if row.leakage), default=0)
    missing = [row.policy for row in frontier.rows if any(gap.status != "skipped" for gap in row.gaps)]
    told = (
        f"Leakage is the largest mean {metric_name(frontier.leakage_metric)} that any attack reached at any position "
        f"({count(n, 'target')}); intervals are at 95 %; * marks the front; {CONTROL} has no defence. "
    )
    if missing:
        told += f"Cells failed or are missing for {', '.join(_name(policy) for policy in missing[:6])}"
        told += f" and {len(missing) - 6} more. " if len(missing) > 6 else ". "
    return told + visible(decision.sentence)


def _attacks_caption(frontier: Frontier) -> str:
    both = "" if frontier.leakage_metric == EXACT else " and exact match, each"
    return f"Every attack's own scores: {metric_name(frontier.leakage_metric)}{both} with its interval."


def _is(row: Row, decision: Recommendation) -> bool:
    return row.policy == decision.policy


def _name(policy: str) -> str:
    return visible(policy, limit=NAME_LENGTH)


def _value(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.value:.2f}"


def _ends(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.2f}–{interval.high:.2f}"
