"""Words and numbers as a report prints them: hostile characters made visible, one way to round each quantity."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from rapidfuzz.distance import Levenshtein

from dpguard.stats import Interval

METRIC_NAMES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "exact_match": "exact match",
    "token_recall": "token recall",
    "entity_recall": "entity recall",
    "mcc": "Matthews correlation",
    "f1": "F1",
}
AT_NAMES = {"start": "first weights", "tuned": "fine-tuned weights", "end": "last weights", "rounds": "several rounds"}

NAME_LENGTH = 80
"""Longer policy names are cut where they stand in line with others, and printed in full in their own part."""

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-]?inf")
_MARKDOWN = re.compile(
    r"[\\`*\[\]<>|#~&$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # between letters an underscore means nothing
    r"|^[-+=]|(?<=^\d)[.)](?=\s|$)"  # lists and underlines begin a line
    r"|(?<=:)//|(?<=www)\."  # addresses become links by themselves
)
_TOKEN = re.compile(r"\w+|[^\w\s]")


def visible(text: Any, *, limit: int | None = None) -> str:
    """Text with every control, direction and other invisible character shown as its code.

    A name or a recovered text can then neither reorder the line it stands in nor hide part of itself.
    Newlines and tabs become single spaces.

    >>> visible("a" + chr(0x202E) + "b" + chr(7))
    'a[U+202E]b[U+0007]'
    >>> visible("abcdef", limit=4)
    'abc…'
    """
    plain = str(text)
    if not plain.isprintable():  # almost every text is, and a report holds 100,000 of them
        plain = "".join(_shown(c) for c in plain.replace("\r\n", " "))
    return plain if limit is None or len(plain) <= limit else plain[: limit - 1] + "…"


def name(text: Any) -> str:
    """A policy's name where it stands in line with others."""
    return visible(text, limit=NAME_LENGTH)


def short(text: Any, limit: int) -> str:
    """A name cut in the middle: what tells the policies of a sweep apart often stands at its end.

    >>> short("only part=block[0].attention.query", 20)
    'only p…tention.query'
    >>> short("dp-sgd", 20)
    'dp-sgd'
    """
    plain = visible(text)
    if len(plain) <= limit:
        return plain
    head = (limit - 1) // 3
    return f"{plain[:head]}…{plain[head + 1 - limit :]}"


def visible_lines(text: Any) -> str:
    """As `visible`, but newlines stay: for a file that is printed as it is."""
    return "\n".join(visible(line.replace("\t", "    ")) for line in str(text).splitlines())


def _shown(character: str) -> str:
    if character in "\n\r\t":
        return " "
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"[U+{ord(character):04X}]"
    return character


def csv_cell(text: Any) -> str:
    """Text for one CSV cell: what a spreadsheet would run as a formula gets a leading apostrophe.

    Plain numbers, negative ones too, stay numbers.

    >>> csv_cell("=1+1"), csv_cell("-0.5"), csv_cell("dp-sgd")
    ("'=1+1", '-0.5', 'dp-sgd')
    """
    shown = visible(text)
    starts = shown.lstrip()[:1]
    return f"'{shown}" if starts and starts in "=+-@" and not _NUMBER.fullmatch(shown) else shown


def number(value: float | None, digits: int = 2) -> str:
    """A score with fixed digits; a missing one is an en dash, a true minus sign for negative ones.

    >>> number(0.5), number(None), number(-0.004)
    ('0.50', '–', '0.00')
    """
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    text = text.removeprefix("-") if not text.strip("-0.") else text
    return text.replace("-", "−")


def span(interval: Interval | None, digits: int = 2) -> str:
    """The ends of an interval.

    >>> span(Interval(0.5, 0.4, 0.6, 10))
    '0.40 – 0.60'
    """
    return "" if interval is None else f"{number(interval.low, digits)} – {number(interval.high, digits)}"


def apart(interval: Interval | None) -> str:
    """The ends of the interval of a difference, with as many digits as tell on which side of 0 each lies.

    >>> apart(Interval(-0.05, -0.1, -0.004, 9)), apart(Interval(-0.05, -0.1, 0.0, 9))
    ('−0.100 – −0.004', '−0.10 – 0.00')
    """
    if interval is None:
        return ""
    ends = (interval.low, interval.high)
    digits = next((d for d in (2, 3) if all(end == 0 or number(end, d).strip("−0.") for end in ends)), 4)
    return span(interval, digits)


def signed(interval: Interval | None) -> str:
    """The value of a difference, with its sign.

    >>> signed(Interval(0.5, 0.4, 0.6, 10)), signed(Interval(-0.001, -0.1, 0.1, 10)), signed(None)
    ('+0.50', '0.00', '–')
    """
    shown = number(interval.value if interval else None)
    return f"+{shown}" if interval and interval.value > 0 and shown != "0.00" else shown


def epsilon(value: float | None) -> str:
    """Epsilon to three digits, infinity as the sign for it; a missing one is an en dash.

    >>> epsilon(4.876), epsilon(70333.2), epsilon(float("inf")), epsilon(0.0)
    ('4.88', '70,333', '∞', '0')
    """
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share in per cent, never rounded to a false 0 or 100.

    >>> percent(0.25), percent(0.0003), percent(1.0), percent(None)
    ('25 %', '< 0.1 %', '100 %', '–')
    """
    if share is None:
        return "–"
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    digits = 0 if 0.1 <= share <= 0.99 or share in (0, 1) else 1
    return f"{100 * share:.{digits}f} %"


def markdown(text: Any) -> str:
    """Text that Markdown shows as it is: punctuation that means something there gets a backslash.

    >>> print(markdown("a|b <d>"))
    a\\|b \\<d\\>
    """
    return _MARKDOWN.sub(r"\\\g<0>", visible(text).strip())


def fence(text: str) -> str:
    """A code fence longer than any run of backticks in the text.

    >>> fence("a ```` b")
    '`````'
    """
    return "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))


def count(n: int, one: str, many: str = "") -> str:
    """A number with its noun.

    >>> count(1, "seed"), count(2500, "target")
    ('1 seed', '2,500 targets')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def metric_name(metric: str) -> str:
    """A metric's name in words."""
    return METRIC_NAMES.get(metric, visible(metric).replace("_", " "))


def unbroken(text: str) -> str:
    """Text of a headline, in which no line ends inside a metric's name.

    >>> unbroken("0.96 ROUGE-L") == "0.96 ROUGE" + chr(0x2011) + "L"
    True
    """
    return re.sub(r"\bROUGE-(?=[12L]\b)", "ROUGE\N{NON-BREAKING HYPHEN}", text)


def at_name(at: str) -> str:
    """Where in the training the message was taken, in words."""
    return AT_NAMES.get(at, visible(at))


def plain(value: Any) -> str:
    """A value of a policy's row as it is written in YAML: ``true``, ``[a, b]``, ``1.0``.

    >>> plain(True), plain(["a", "b"]), plain({"quantile": 0.5})
    ('true', 'a, b', 'quantile: 0.5')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{visible(key)}: {plain(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else visible(value)


@dataclass(frozen=True)
class Piece:
    """A run of a diff: ``kept`` (in both), ``missed`` (only in the truth) or ``added`` (only recovered)."""

    kind: str
    text: str


def diff(truth: str, recovered: str) -> tuple[Piece, ...]:
    """Word by word, what of the truth was recovered, missed, and what was made up. Case does not count.

    >>> [(p.kind, p.text) for p in diff("Call Ann today", "call Bob today")]
    [('kept', 'Call'), ('missed', 'Ann'), ('added', 'Bob'), ('kept', 'today')]
    """
    true_words, other_words = list(_TOKEN.finditer(truth)), list(_TOKEN.finditer(recovered))
    moves = Levenshtein.opcodes([w.group().casefold() for w in true_words], [w.group().casefold() for w in other_words])
    pieces = []
    for move in moves:
        if move.src_end > move.src_start:
            text = truth[true_words[move.src_start].start() : true_words[move.src_end - 1].end()]
            pieces.append(Piece("kept" if move.tag == "equal" else "missed", visible(text)))
        if move.tag != "equal" and move.dest_end > move.dest_start:
            text = recovered[other_words[move.dest_start].start() : other_words[move.dest_end - 1].end()]
            pieces.append(Piece("added", visible(text)))
    return tuple(pieces)
