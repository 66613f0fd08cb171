"""Words of a text, as every score and every guess counts them: in ASCII exactly those of ROUGE."""

from __future__ import annotations

import re
import unicodedata

_UNSPACED = re.compile(
    "["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "]"
)
"""Letters of scripts that put no space between words; each counts as a word."""
_ACCENTED = ("LATIN", "GREEK", "CYRILLIC", "ARABIC", "HEBREW")
"""Scripts whose marks are accents or points that people leave out; elsewhere they are vowels, and other words."""
_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> tuple[str, ...]:
    """Lower-case words without accents; letters of a script that knows no spaces one by one, each with its marks.

    Google's rouge-score drops whatever is not a to z or 0 to 9, so that a name in Cyrillic is never found; on ASCII
    text the two agree.

    >>> words("Dr. Lee won't come.")
    ('dr', 'lee', 'won', 't', 'come')
    >>> words("Café «Иванов»: палата_5, 東京")
    ('cafe', 'иванов', 'палата', '5', '東', '京')
    """
    if text.isascii():
        return tuple(_WORD.findall(text.lower()))
    parts: list[str] = []
    alone = False  # the last letter is a word of its own
    for letter in unicodedata.normalize("NFC", _bare(text)):
        if _is_mark(letter):
            parts.append(letter)
        elif letter.isalnum():
            unspaced = _UNSPACED.match(letter) is not None
            parts.append(f" {letter}" if unspaced or alone else letter)
            alone = unspaced
        else:
            parts.append(" ")
            alone = False
    return tuple(word for word in "".join(parts).lower().split() if not all(map(_is_mark, word)))


def _bare(text: str) -> str:
    """Decomposed, without accents and without joiners that only shape letters."""
    kept, accented = [], True
    for letter in unicodedata.normalize("NFKD", text):
        kind = unicodedata.category(letter)
        if kind == "Cf" or (kind == "Mn" and accented):
            continue
        if kind not in ("Mn", "Mc"):
            accented = not letter.isalpha() or unicodedata.name(letter, "").startswith(_ACCENTED)
        kept.append(letter)
    return "".join(kept)


def _is_mark(letter: str) -> bool:
    return unicodedata.category(letter) in ("Mn", "Mc")
