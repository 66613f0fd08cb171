"""The floor knows public text and nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from dpguard.attacks import prior
from dpguard.attacks.language import Corpus
from dpguard.inputs.words import words
from tests import messages, tiny

ENDINGS = ("soon", "today", "tomorrow", "now", "late", "yet")
PUBLIC = tuple(
    f"the {who} {did} about {whose} {what} {when}"
    for when in ENDINGS
    for what in ("test", "result", "card", "arm", "money")
    for who in ("nurse", "doctor", "patient")
    for did in ("called", "wrote", "asked")
    for whose in ("her", "his")
)


def _run(seen):
    return prior.PLUGIN.reconstruct(seen, rng=torch.Generator().manual_seed(0))


def test_rouge_l_is_the_one_of_the_reference_implementation() -> None:
    source = random.Random(0)
    texts = [" ".join(source.choice(tiny.WORDS) for _ in range(source.randint(1, 9))) for _ in range(40)]
    scorer = RougeScorer(["rougeL"])
    for left, right in zip(texts[:20], texts[20:], strict=True):
        wanted = scorer.score(right, left)["rougeL"].fmeasure
        assert prior.expected_score([words(left)], [words(right)])[0] == pytest.approx(wanted)


def test_the_guess_beats_public_texts_on_text_that_it_never_saw() -> None:
    shuffled = list(PUBLIC)
    random.Random(1).shuffle(shuffled)
    known, held = shuffled[:300], [words(t) for t in shuffled[300:]]
    found = prior.fit(Corpus(tuple(known), tiny.tokenizer()), None, 20_000)
    best = prior.expected_score([words(found.guesses[0])], held)[0]
    others = prior.expected_score([words(t) for t in known], held)
    assert best > others.mean() + 0.02
    assert best >= others.max() - 0.02
    assert found.expected == pytest.approx(best, abs=0.05)


def test_the_message_plays_no_part() -> None:
    model = tiny.loaded("bert")
    seen, _ = messages.observe(model, [], [tiny.SENTENCES[0]], [1], public=PUBLIC, tell=())
    other, _ = messages.observe(
        model, [{"layers": "all", "clip": 1.0, "noise": 2.0}], [tiny.SENTENCES[1]], [0], public=PUBLIC, tell=()
    )
    assert _run(seen).sequences == _run(other).sequences == _run(replace(seen, message={})).sequences
    assert prior.PLUGIN.applicable(replace(seen, message={})) == ""


def test_a_known_length_moves_the_guess_to_texts_of_that_length() -> None:
    model = tiny.loaded("bert")
    public = (*PUBLIC, *(f"{end} please" for end in ENDINGS * 40))
    guesses = []
    for text in ("card lost", "the nurse called about her arm today"):
        seen, _ = messages.observe(model, [], [text], [1], public=public, tell=("lengths",))
        guesses.append(len(_run(seen).sequences[0]))
    assert guesses[0] < guesses[1]


def test_a_batch_gets_distinct_guesses_and_nothing_is_certain() -> None:
    seen, _ = messages.observe(tiny.loaded("bert"), [], tiny.SENTENCES, [1, 0, 1], public=PUBLIC, tell=())
    found = _run(seen)
    assert len({tuple(ids) for ids in found.sequences}) == 3
    assert found.certain == [False] * 3


def test_without_public_text_it_says_so() -> None:
    seen, _ = messages.observe(tiny.loaded("bert"), [], tiny.SENTENCES[:1], [1])
    assert "public" in prior.PLUGIN.applicable(seen)


def test_texts_without_a_latin_word_do_not_break_the_fit() -> None:
    assert prior.fit(Corpus(("это", "так", "да"), tiny.tokenizer()), None, 1000).guesses


def test_fits_are_kept() -> None:
    corpus = Corpus(PUBLIC, tiny.tokenizer())
    assert prior.fit(corpus, 7, 5000) is prior.fit(Corpus(tuple(PUBLIC), tiny.tokenizer()), 7, 5000)
