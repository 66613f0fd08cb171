"""kappa: what a guess scores without the message, measured on public text; the start of every reconstruction bound.

For a score between 0 and 1 and a mu-Gaussian release, the expected score of any attack is at most
Phi(Phi^-1(kappa) + mu), kappa being the best expected score of a guess that never saw the message (Kulynych et al.,
arXiv 2507.06969, for events; a score is the mean of the events "score above t", and the bound is concave in kappa).
The measured kappa is that of the prior attack, a lower limit on the best one: so the bound is conditional on this
prior, and the upper limit of the measurement is what it starts from.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dpguard import stats
from dpguard.attacks import prior
from dpguard.attacks.language import Corpus
from dpguard.inputs.words import words
from dpguard.measure import metrics

CONFIDENCE = 0.95
SAMPLE = 64
"""Texts on which the guesses compete."""
TRIED = 3
"""Guesses of the prior attack among those that compete for each metric."""
LENGTHS = 2, 4, 6, 9, 12, 16, 20
"""Words of the guesses that the word models write."""
METRICS = tuple(name for name in metrics.NAMES if name != "entity_recall")


@dataclass(frozen=True)
class Kappa:
    """One metric's kappa.

    Attributes:
        value: mean score of the best guess on texts that it was not chosen on.
        upper: upper confidence limit of that mean (95 %, one-sided).
        texts: public texts that it was measured on.
    """

    value: float
    upper: float
    texts: int


@lru_cache(maxsize=4)
def measure(public: tuple[str, ...], tokenizer: Any, lengths: bool = False) -> dict[str, Kappa]:
    """Metric -> kappa, cross-fitted: a guess is chosen on one half of the public texts and judged on the other.

    Entity recall is left out (public texts have no marked entities). Empty without public texts.

    Args:
        public: public texts of the same kind; the first 20,000 are used. From fewer than `stats.PUBLIC_WANTED` the
            upper limits are wide, and a report says so.
        tokenizer: the public tokenizer, for exact match and token recall.
        lengths: whether the guesser is told a text's number of tokens; then each length has guesses of its own.
    """
    texts = tuple(text for text in public if text.strip())  # copies count: a guess has them right too
    texts = texts[: 2 * stats.PUBLIC_WANTED]
    if len(texts) < 4:
        return {}
    halves = texts[0::2], texts[1::2]
    scores: dict[str, list[float]] = {name: [] for name in METRICS}
    for chosen_on, judged_on in (halves, halves[::-1]):
        alike = _by_length(chosen_on, tokenizer, lengths)
        for length, judged_of in _by_length(judged_on, tokenizer, lengths).items():
            guesses = _guesses(chosen_on, tokenizer, length)
            trial = _table(guesses, _trial(chosen_on, tokenizer, length), tokenizer)
            best = {name: guesses[int(np.argmax(trial[name].mean(1)))] for name in METRICS}
            best["exact_match"] = _commonest(alike.get(length) or chosen_on)  # too rare to show on a sample
            for guess in dict.fromkeys(best.values()):
                judged = _table([guess], judged_of, tokenizer)
                for name in METRICS:
                    scores[name] += judged[name][0].tolist() if best[name] == guess else []
    found = {name: Kappa(float(np.mean(s)), upper_limit(s), len(s)) for name, s in scores.items()}
    if not lengths:
        return found
    blind = measure(public, tokenizer)  # who is told may also not listen
    return {name: max(found[name], blind[name], key=lambda k: k.upper) for name in METRICS}


def with_repeats(found: dict[str, Kappa], share: float) -> dict[str, Kappa]:
    """The same where one private text is a share of all of them, which public texts disjoint from them cannot show.

    A guess that says it has every score 1 that often; on the others it is no better than the best one.

    >>> with_repeats({"rougeL": Kappa(0.1, 0.2, 50)}, 0.5)["rougeL"]
    Kappa(value=0.55, upper=0.6, texts=50)
    """
    return {
        name: Kappa(share + (1 - share) * k.value, share + (1 - share) * k.upper, k.texts) for name, k in found.items()
    }


def _by_length(texts: Sequence[str], tokenizer: Any, told: bool) -> dict[int | None, list[str]]:
    """Tokens with special tokens -> the texts of that length; all under None where lengths are not told."""
    if not told:
        return {None: list(texts)}
    found: dict[int | None, list[str]] = {}
    for text, ids in zip(texts, tokenizer(list(texts))["input_ids"], strict=True):
        found.setdefault(len(ids), []).append(text)
    return found


def _commonest(texts: Sequence[str]) -> str:
    """The text that stands there most often: no other guess is right as often."""
    return Counter(texts).most_common(1)[0][0]


def _trial(texts: tuple[str, ...], tokenizer: Any, length: int | None) -> list[str]:
    """Texts on which the guesses compete: evenly spread, or the nearest in length."""
    if length is None:
        return list(texts[:: max(1, len(texts) // SAMPLE)])
    return [texts[index] for index in prior.nearest(Corpus(texts, tokenizer), length)[:SAMPLE]]


def _guesses(texts: tuple[str, ...], tokenizer: Any, length: int | None) -> list[str]:
    """Candidates for the best guess: the prior attack's best, and what its word models say."""
    found = prior.fit(Corpus(texts, tokenizer), length, 20_000)
    references = [words(text) for text in _trial(texts, tokenizer, length)] if length is not None else []
    references = references or [words(text) for text in texts[: prior.REFERENCES]]
    written = (*prior.unigram_texts(references), *prior.bigram_texts(references))
    modelled = [" ".join(words) for words in written if len(words) in LENGTHS]
    return list(dict.fromkeys([*found.guesses[:TRIED], *modelled]))


def _table(guesses: Sequence[str], texts: Sequence[str], tokenizer: Any) -> dict[str, np.ndarray]:
    """Metric -> (guesses, texts) scores."""
    ids = [tokenizer(list(side), add_special_tokens=False)["input_ids"] for side in (guesses, texts)]
    said, true = ([str(tokenizer.decode(i, clean_up_tokenization_spaces=True)) for i in side] for side in ids)
    out = {name: np.zeros((len(guesses), len(texts))) for name in METRICS}
    for i, (guess_ids, guess) in enumerate(zip(ids[0], said, strict=True)):
        for j, (true_ids, truth) in enumerate(zip(ids[1], true, strict=True)):
            found = metrics.score(guess_ids, guess, true_ids, truth, None)
            for name in METRICS:
                out[name][i, j] = found[name] or 0.0
    return out


def upper_limit(scores: Sequence[float]) -> float:
    """One-sided upper confidence limit of a mean of scores from 0 to 1.

    Exact for zeros and ones (Clopper and Pearson); else the empirical Bernstein bound (Maurer and Pontil,
    arXiv 0907.3740, theorem 4), which needs no shape of the distribution.

    >>> round(upper_limit([0.0] * 10_000), 5)
    0.0003
    """
    n, mean = len(scores), float(np.mean(scores))
    if set(scores) <= {0.0, 1.0}:
        return stats.binomial(round(sum(scores)), n, confidence=1 - 2 * (1 - CONFIDENCE)).high
    log = math.log(2 / (1 - CONFIDENCE))
    spread = math.sqrt(2 * float(np.var(scores, ddof=1)) * log / n)
    return min(1.0, mean + spread + 7 * log / (3 * (n - 1)))
