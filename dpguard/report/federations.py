"""What a policy's own federation changes, for print: policies of one table may differ in nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpguard.report.board import Row
from dpguard.report.text import count, plain, visible

FROZEN = "frozen"


def own(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """The settings of the policy's federation that are not the same for every policy.

    >>> one, two = Row("a", federation={"rounds": 40, "local_steps": 1}), Row("b", federation={"rounds": 40})
    >>> own(one, (one, two)), own(two, (one, two))
    ({'local_steps': 1}, {})
    """
    others = [other.federation for other in rows if other.federation]
    return {name: value for name, value in row.federation.items() if any(other.get(name) != value for other in others)}


def treated(row: Row) -> list[Mapping[str, Any]]:
    """The policy's rows as its clients run them: withheld layers are frozen where the federation says so.

    >>> treated(Row("a", table=({"layers": "head", "share": False},), federation={"personal": "frozen"}))
    [{'layers': 'head', 'share': False, 'train': False}]
    """
    frozen = row.federation.get("personal") == FROZEN
    return [{**line, "train": False} if frozen and line.get("share") is False else line for line in row.table]


def told(row: Row, rows: Sequence[Row]) -> list[str]:
    """The policy's own federation in words, beside what its table says.

    >>> each = {"view": "client", "per_round": 5, "local_steps": 1, "rounds": 40}
    >>> one, two = Row("a", federation=each), Row("b", federation={**each, "view": "aggregate", "local_steps": 20})
    >>> told(two, (one, two))
    ['The server sees the mean of 5 messages.', 'There are 40 rounds of 20 local steps.']
    """
    found, all_of_it, words = own(row, rows), row.federation, []
    if "view" in found:
        mean = f"the mean of {count(int(all_of_it.get('per_round', 0)), 'message')}"
        words.append(f"The server sees {mean if found['view'] == 'aggregate' else 'every message'}.")
    if {"local_steps", "rounds"} & set(found):
        steps, rounds = (int(all_of_it.get(name, 0)) for name in ("local_steps", "rounds"))
        words.append(f"There are {count(rounds, 'round')} of {count(steps, 'local step')}.")
    return words


def line(row: Row, rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    """One more line for the table of a policy: its own federation; empty where there is nothing to tell apart."""
    found = own(row, rows)
    return (("federation", visible(plain(found))),) if found else ()
