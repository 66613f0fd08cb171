"""A search that is stuck: one word off by a place, words that no picture names, pieces in the wrong order."""

from __future__ import annotations

import pytest
import torch

from dpguard.attacks import span_shift
from dpguard.attacks.span_evidence import gather, usable
from dpguard.attacks.span_search import Search
from dpguard.attacks.span_sites import Probe, left_as_found, sites_of
from dpguard.attacks.span_slope import steepest
from dpguard.attacks.vocabulary import allowed_tokens, frame_of
from tests import messages, tiny

TEXT = "please call her about the card and thank you for help with his test result today"
ROLES = ("query", "key", "value", "attention.output", "mlp.in", "mlp.out")


def _stuck(role: str, words: str, **more):
    """A search on one weight of an inner block, standing at a text; and the true ids."""
    model = tiny.loaded("bert")
    name = role if "." in role else f"attention.{role}"
    rows = [{"layers": "all", "share": False}, {"layers": f"block[1].{name}", "share": True}]
    seen, batch = messages.observe(model, rows, [TEXT], [1], tell=())
    probe, tokens = Probe(seen.model), allowed_tokens(model.tokenizer, 200).nonzero().flatten()
    evidence = gather(seen, usable(seen, sites_of(seen.model))[0], causal=False, most=1)[0]
    ids = torch.tensor(model.tokenizer(words)["input_ids"])
    held = torch.tensor(frame_of(model.tokenizer).wrap([-1] * (len(ids) - 2))) >= 0
    search = Search(probe, evidence, held, 10**6, **more)
    return seen, search, search.start(ids[None]), tokens[tokens < len(probe.embedding)], batch.input_ids[0].tolist()


@pytest.mark.parametrize("role", ROLES)
def test_a_word_too_many_and_one_too_few_is_one_edit(role: str) -> None:
    wrong = TEXT.replace("her about", "about").replace("test result", "test test result")
    seen, search, trail, tokens, true = _stuck(role, wrong)
    assert trail.ids.tolist() != true
    assert len(trail.ids) == len(true)
    with left_as_found(seen.model):
        assert span_shift.realign(search, trail, tokens)
    assert (trail.ids.tolist(), trail.certain) == (true, True)


def test_a_lost_last_word_comes_back_from_the_frequent_ones() -> None:
    wrong = TEXT.replace("call her", "call call her").removesuffix(" today")
    seen, search, trail, _, true = _stuck("mlp.out", wrong, common=[tiny.tokenizer()("today")["input_ids"][1]])
    none = torch.full((len(true), 1), int(trail.ids[1]))
    with left_as_found(seen.model):
        search.run(trail, none, none[:1, 0], levels=2)
    assert trail.ids.tolist() == true


def test_where_nothing_helps_the_text_stays() -> None:
    seen, search, trail, tokens, true = _stuck("value", TEXT)
    energy = trail.energy
    with left_as_found(seen.model):
        assert not span_shift.realign(search, trail, tokens)
        assert not search.relocate(trail)
    assert (trail.ids.tolist(), trail.energy) == (true, energy)


def test_the_budget_bounds_a_shift() -> None:
    seen, search, trail, tokens, _ = _stuck("value", TEXT.replace("her about", "about").replace("today", "today today"))
    search.limit = search.probe.scored + 10
    with left_as_found(seen.model):
        span_shift.realign(search, trail, tokens)
    assert search.probe.scored <= search.limit


@pytest.mark.parametrize("role", ROLES)
def test_the_derivative_names_most_wrong_words(role: str) -> None:
    """Of 60 words or so, the right one is among the first third where one word of the text is wrong."""
    good = 0
    places = (2, 5, 8, 11, 14)
    for place in places:
        words = TEXT.split()
        words[place - 1] = "nine"
        seen, search, trail, tokens, true = _stuck(role, " ".join(words))
        with left_as_found(seen.model):
            asked = steepest(search.probe, search.evidence, trail.ids, tokens, len(tokens) // 3)[place].tolist()
        good += true[place] in asked
    assert good >= 4


def test_pieces_in_the_wrong_order_are_exchanged() -> None:
    words = TEXT.split()
    seen, search, trail, _, true = _stuck("value", " ".join([*words[:3], *words[9:13], *words[3:9], *words[13:]]))
    with left_as_found(seen.model):
        assert search.relocate(trail)
    assert (trail.ids.tolist(), trail.certain) == (true, True)
