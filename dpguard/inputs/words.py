"""Words of a text, as every score and every guess counts them: in ASCII exactly those of ROUGE."""

from __future__ import annotations

import re
import unicodedata

_UNSPACED = re.compile(
    "(["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "])"
)
"""Letters of scripts that put no space between words; each counts as a word."""
_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> tuple[str, ...]:
    """Lower-case words without accents; letters of a script that knows no spaces one by one.

    Google's rouge-score drops whatever is not a to z or 0 to 9, so that a name in Cyrillic is never found; on ASCII
    text the two agree.

    >>> words("Dr. Lee won't come.")
    ('dr', 'lee', 'won', 't', 'come')
    >>> words("Café «Иванов»: палата_5, 東京")
    ('cafe', 'иванов', 'палата', '5', '東', '京')
    """
    if not text.isascii():
        apart = unicodedata.normalize("NFKD", text)
        bare = "".join(letter for letter in apart if unicodedata.category(letter) != "Mn")
        text = _UNSPACED.sub(r" \1 ", unicodedata.normalize("NFC", bare))
    return tuple(_WORD.findall(text.lower()))
