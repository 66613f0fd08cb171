"""How much of a text was recovered. Pure functions of (guess, truth), each from 0 to 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from dpguard.inputs.words import words

NAMES = ("rouge1", "rouge2", "rougeL", "exact_match", "token_recall", "entity_recall")


@cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer  # takes a second to import

    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())


class _Words:
    """What rouge-score wants of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        """A text's words."""
        return list(words(text))


def rouge(guess: str, truth: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, F-measure (Lin, 2004; Google's rouge-score, no stemming), on `words` of any script.

    >>> rouge("the cat sat", "the cat sat down")["rouge1"].__round__(3)
    0.857
    """
    found = _scorer().score(truth, guess)
    return {name: float(found[name].fmeasure) for name in ("rouge1", "rouge2", "rougeL")}


def token_recall(guess: Sequence[int], truth: Sequence[int]) -> float:
    """Share of the true tokens (with multiplicity) among as many first tokens of the guess, in any order.

    A longer guess gains nothing: one that holds all common words would have read nothing.

    >>> token_recall([1, 2, 2], [2, 2, 3, 4])
    0.5
    """
    if not truth:
        return 1.0
    return sum((Counter(guess[: len(truth)]) & Counter(truth)).values()) / len(truth)


def entity_recall(guess: str, entities: Sequence[str] | None) -> float | None:
    """Share of the marked entities whose words stand in the guess, in order and side by side.

    None where the data marks none that holds a word: a missing value is not a zero.

    >>> entity_recall("call ms. vera holt now", ["Vera Holt", "0171 22"])
    0.5
    """
    wanted = [found for entity in entities or () if (found := words(entity))]
    if not wanted:
        return None
    said = f" {' '.join(words(guess))} "
    return sum(f" {' '.join(found)} " in said for found in wanted) / len(wanted)


def score(
    guess_ids: Sequence[int],
    guess: str,
    truth_ids: Sequence[int],
    truth: str,
    entities: Sequence[str] | None,
) -> dict[str, float | None]:
    """Every metric of one guess against one true text (token ids without special tokens)."""
    return {
        **rouge(guess, truth),
        # the same text cut into other tokens is the same text
        "exact_match": float(list(guess_ids) == list(truth_ids) or guess == truth != ""),
        "token_recall": token_recall(guess_ids, truth_ids),
        "entity_recall": entity_recall(guess, entities),
    }


def assign(scores: np.ndarray) -> list[int]:
    """One-to-one assignment of guesses to true texts with the largest sum of scores.

    Args:
        scores: (texts, guesses), any number of guesses.

    Returns:
        For every text the index of its guess, -1 when there are fewer guesses than texts.

    >>> assign(np.array([[0.9, 0.8], [0.9, 0.1]]))
    [1, 0]
    """
    out = [-1] * scores.shape[0]
    if scores.size:
        for text, guess in zip(*linear_sum_assignment(scores, maximize=True), strict=True):
            out[int(text)] = int(guess)
    return out
