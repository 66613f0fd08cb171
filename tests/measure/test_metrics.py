from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from sklearn import metrics as oracle

from dpguard.measure import metrics, utility


def test_rouge_of_known_pairs():
    same = metrics.rouge("the cat sat", "the cat sat")
    assert set(same.values()) == {1.0}
    swapped = metrics.rouge("sat cat the", "the cat sat")
    assert swapped == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": pytest.approx(1 / 3)}
    assert metrics.rouge("", "the cat")["rouge1"] == 0.0


def test_words_of_every_script_count():
    truth = "Пациент Иванов, палата 5"
    assert metrics.rouge("Пациент Иванов палата", truth)["rougeL"] == pytest.approx(6 / 7)
    assert metrics.rouge("5", truth)["rouge1"] == pytest.approx(2 / 5)
    assert metrics.rouge("東京に行く", "東京に行きます")["rouge1"] == pytest.approx(2 * 4 / (5 + 7))
    assert metrics.rouge("cafe", "Café")["rouge1"] == 1.0
    assert metrics.entity_recall("к доктору иванову и Иванов", ["ИВАНОВ"]) == 1.0


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_on_ascii_the_scores_are_those_of_rouge_score(guess, truth):
    theirs = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"]).score(truth, guess)
    assert metrics.rouge(guess, truth) == {name: found.fmeasure for name, found in theirs.items()}


def test_token_recall_counts_multiplicity():
    assert metrics.token_recall([5, 5, 5], [5, 6]) == 0.5
    assert metrics.token_recall([], [1]) == 0.0


def test_entity_recall_wants_whole_words_in_order():
    assert metrics.entity_recall("call vera holt on 0171 22 33", ["Vera Holt", "0171-22-33"]) == 1.0
    assert metrics.entity_recall("holt vera", ["Vera Holt"]) == 0.0
    assert metrics.entity_recall("verandah", ["vera"]) == 0.0
    assert metrics.entity_recall("anything", None) is None
    assert metrics.entity_recall("anything", []) is None


def test_one_guess_serves_one_text():
    scores = np.array([[0.9, 0.2], [0.8, 0.1], [0.7, 0.0]])
    assert metrics.assign(scores) == [-1, 1, 0] or sum(
        scores[i, j] for i, j in enumerate(metrics.assign(scores)) if j >= 0
    ) == pytest.approx(1.0)
    assert metrics.assign(np.zeros((2, 0))) == [-1, -1]


@pytest.mark.parametrize("classes", [2, 4])
def test_utility_metrics_agree_with_an_independent_library(classes):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 300)
    said = np.where(rng.random(300) < 0.6, labels, rng.integers(0, classes, 300))
    found = utility.scores(said, labels, 0.5)
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(labels, said))
    assert found["mcc"] == pytest.approx(oracle.matthews_corrcoef(labels, said))
    average = "binary" if classes == 2 else "macro"
    assert found["f1"] == pytest.approx(oracle.f1_score(labels, said, average=average))


def test_f1_of_a_client_with_one_class_means_what_it_means_for_the_others():
    assert utility.scores([0, 0], [0, 0], 0.5)["f1"] == 0.0
    assert utility.scores([0, 1], [0, 1], 0.5, classes=3)["f1"] == 1.0  # as scikit-learn: over the classes that occur
    assert utility.scores([0, 2], [0, 1], 0.5, classes=3)["f1"] == pytest.approx(1 / 3)


def test_a_constant_prediction_has_no_correlation():
    assert utility.scores([1, 1, 1], [0, 1, 0], 0.5)["mcc"] == 0.0
    assert utility.scores([0, 0, 0], [0, 1, 0], 0.5)["f1"] == 0.0


def test_the_same_text_in_other_tokens_is_the_same_text():
    assert metrics.score([5, 6], "the cat", [7], "the cat", None)["exact_match"] == 1.0
    assert metrics.score([5, 6], "the cat", [7], "the cats", None)["exact_match"] == 0.0
    assert metrics.score([], "", [7], "", None)["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("text", "other", "shared"),
    [
        ("दादा", "दादी", 0.0),  # grandfather, grandmother: a vowel sign is a letter there
        ("दाल", "दिल्ली", 0.0),
        ("हिन्दी में किताब", "हिन्दी में लेख", 2 / 3),
        ("かき", "がぎ", 0.0),  # persimmon, key: the voicing mark is part of the letter
        ("க்ஷ", "க்\u200cஷ", 1.0),  # a joiner shapes letters only
        ("dé\u00adjà vu", "deja vu", 1.0),
        ("שָׁלוֹם", "שלום", 1.0),  # points are left out in ordinary writing
        ("مُحَمَّد", "محمد", 1.0),
    ],
)
def test_words_of_other_scripts_are_told_apart(text, other, shared):
    assert metrics.rouge(text, other)["rouge1"] == pytest.approx(shared)
