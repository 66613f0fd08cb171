"""The floor: what a guesser scores who knows public text of the same kind and never looks at the message.

The guess is the word sequence with the highest expected ROUGE-L against public texts: it starts at the best of
the public texts themselves, of their commonest words (a unigram model) and of the likeliest chains of words
(a bigram model), and is then edited word by word. It is fitted on one half of
the public texts and has to win on the other half. The message is not read, so the floor is the same
under every policy.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from rapidfuzz import process
from rapidfuzz.distance import Indel

from dpguard.attacks.base import Budget, Capability
from dpguard.attacks.language import Corpus, public_lengths
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.presets import choose
from dpguard.inputs.words import words

Words = tuple[str, ...]

REFERENCES = 256
COMMON = 40
MINIMUM = 64
LONGEST = 20


@dataclass(frozen=True)
class Fit:
    """Guesses in order of expected score.

    Attributes:
        guesses: distinct texts, best first.
        expected: mean ROUGE-L (F-measure) of the best one on public texts held out from the fit.
        scored: candidate texts scored.
        edited: whether the best guess was written word by word (else it is a public text).
    """

    guesses: tuple[str, ...]
    expected: float
    scored: int
    edited: bool


class Prior:
    """See the module's docstring."""

    name = "prior"
    cite = "the floor of every study: no message is read"

    capability = Capability(
        "nothing: public texts of the same kind", "read the message", kinds=("gradient", "delta"), blind=True
    )

    def __init__(self) -> None:
        self.presets = {"default": Budget(steps=0, candidates=20_000)}

    def applicable(self, seen: Observation) -> str:
        """Empty unless there is no public text to guess from; the message plays no part."""
        return "" if any(text.strip() for text in seen.disclosed.public_texts) else "no public texts to guess from"

    def reconstruct(
        self, seen: Observation, *, rng: torch.Generator, budget: Budget | None = None, preset: str = ""
    ) -> Reconstruction:
        """One guess a text; a batch gets distinct guesses, because the judge pairs them one to one.

        Draws nothing from ``rng``: the best guess is one text.
        """
        _, limits = choose(self.name, self.presets, preset, budget)
        told, corpus = seen.disclosed, Corpus.of(seen.disclosed)
        count = told.texts
        fits = [
            fit(corpus, None if told.lengths is None else told.lengths[index], limits.candidates)
            for index in range(count)
        ]
        chosen: list[str] = []
        for found in fits:
            chosen.append(next((g for g in found.guesses if g not in chosen), found.guesses[0]))
        return Reconstruction(
            sequences=[list(told.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in chosen],
            certain=[False] * count,
            candidates=sum({id(found): found.scored for found in fits}.values()),
            notes={"expected_rougeL": fits[0].expected, "edited": fits[0].edited} if fits else {},
        )


@lru_cache(maxsize=256)
def fit(corpus: Corpus, length: int | None, candidates: int) -> Fit:
    """The best guesses for a text of ``length`` tokens (None: unknown), at most ``candidates`` scored.

    Public texts stand for the target: when its length is known, the eighth of them that is nearest in
    length (at least `MINIMUM`), at most `REFERENCES` of each half.
    """
    order = nearest(corpus, length)
    texts = [(corpus.texts[index], words(corpus.texts[index])) for index in order]
    train, held = texts[0::2][:REFERENCES], (texts[1::2] or texts)[:REFERENCES]
    references, judges = [w for _, w in train], [w for _, w in held]
    modelled = [(" ".join(text), text) for text in (*unigram_texts(references), *bigram_texts(references))]
    entrants = [*train, *modelled][: max(1, candidates)]
    scores = expected_score([w for _, w in entrants], references)
    ranked = [entrants[index] for index in np.argsort(-scores, kind="stable")]
    start = ranked[0][1]
    best, scored = _improve(start, references, candidates - len(entrants))
    plain, edited = expected_score([start, best], judges)
    wins = bool(edited > plain)
    guesses = ([" ".join(best)] if wins else []) + [t for t, _ in ranked]
    return Fit(tuple(dict.fromkeys(guesses)), float(max(plain, edited)), len(entrants) + scored, wins)


def unigram_texts(references: list[Words]) -> list[Words]:
    """The commonest words, commonest first, one text a length up to `LONGEST`.

    >>> unigram_texts([("a", "b"), ("a",)])
    [('a',), ('a', 'b')]
    """
    common = [word for word, _ in Counter(w for ref in references for w in ref).most_common(LONGEST)]
    return [tuple(common[:size]) for size in range(1, len(common) + 1)]


def bigram_texts(references: list[Words]) -> list[Words]:
    """The likeliest next word after each word from the likeliest first one on, one text a length.

    >>> bigram_texts([("a", "b", "c"), ("a", "b")])
    [('a',), ('a', 'b'), ('a', 'b', 'c')]
    """
    pairs: dict[str, Counter[str]] = {}
    for ref in references:
        for left, right in zip(("", *ref), ref, strict=False):
            pairs.setdefault(left, Counter())[right] += 1
    chain: list[str] = []
    out: list[Words] = []
    while len(chain) < LONGEST and (following := pairs.get(chain[-1] if chain else "")):
        chain.append(min(following, key=lambda word: (-following[word], word)))
        following[chain[-1]] = 0  # a circle goes on another way the next time
        out.append(tuple(chain))
    return out


def nearest(corpus: Corpus, length: int | None) -> list[int]:
    """Indices of public texts: the nearest in length first, or evenly spaced when it is unknown."""
    total = len(corpus.texts)
    if length is None:
        stride = max(1, total // (2 * REFERENCES))
        return list(range(total))[::stride]
    counts = public_lengths(corpus)
    near = sorted(range(total), key=lambda index: abs(counts[index] - length))
    return near[: max(MINIMUM, total // 8)]


def expected_score(candidates: list[Words], references: list[Words]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(candidates,) mean ROUGE-L F-measure against the references.

    2 LCS / (m + n) is ROUGE-L's F-measure and, exactly, the normalised similarity of insertions and
    deletions.

    >>> expected_score([("a", "b")], [("a", "b"), ("a", "c", "d", "e")])
    array([0.66666667])
    """
    table = process.cdist(candidates, references, scorer=Indel.normalized_similarity, dtype=np.float64)
    return np.asarray(table.mean(axis=1))


def _improve(start: Words, references: list[Words], candidates: int) -> tuple[Words, int]:
    """Climb by single-word edits until none helps or ``candidates`` texts were scored."""
    common = [word for word, _ in Counter(w for ref in references for w in ref).most_common(COMMON)]
    best, scored = start, 0
    best_score = float(expected_score([start], references)[0])
    while True:
        edits = _edits(best, common)
        if not edits or scored + len(edits) > candidates:
            return best, scored
        scores = expected_score(edits, references)
        scored += len(edits)
        winner = int(scores.argmax())
        if scores[winner] <= best_score + 1e-9:
            return best, scored
        best, best_score = edits[winner], float(scores[winner])


def _edits(text: Words, common: list[str]) -> list[Words]:
    """Every text one deletion, replacement or insertion of a common word away."""
    out = [text[:i] + text[i + 1 :] for i in range(len(text)) if len(text) > 1]
    for word in common:
        out += [(*text[:i], word, *text[i + 1 :]) for i in range(len(text))]
        out += [(*text[:i], word, *text[i:]) for i in range(len(text) + 1)]
    return list(dict.fromkeys(out))


PLUGIN = Prior()
