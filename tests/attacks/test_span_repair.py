"""Drafts of texts: the nearest first, each in its turns, until it fits or its turns are over."""

from __future__ import annotations

import pytest
import torch

from dpguard.attacks import span_repair
from dpguard.attacks.span_evidence import gather
from dpguard.attacks.span_repair import Repairs
from dpguard.attacks.span_sites import Probe, left_as_found, sites_of
from dpguard.attacks.vocabulary import frame_of
from tests import messages, tiny

TEXTS = (*tiny.SENTENCES[:2], "please call her", "the card is lost and found")
NOBODY = torch.tensor([], dtype=torch.int64)


@pytest.fixture
def line():
    """An empty line of drafts on a rounded message's MLP output, and the true texts."""
    model = tiny.loaded("bert", width=96)
    seen, batch = messages.observe(model, [], TEXTS, [0, 1, 0, 1])
    sites = sites_of(model.module)
    name = sites.find(0, "mlp_out").name
    seen.message[name].copy_(seen.message[name].bfloat16().float())
    with left_as_found(model.module):
        evidence = gather(seen, [sites.find(0, "mlp_out")], causal=False, most=1)[0]
        lengths = batch.attention_mask.sum(1).tolist()
        true = [ids[:n].tolist() for ids, n in zip(batch.input_ids, lengths, strict=True)]
        yield Repairs(Probe(model.module), evidence, frame_of(model.tokenizer)), true


def _options(true: list[list[int]], text: list[int]) -> torch.Tensor:
    """Substitutes: a place's word in any of the texts."""
    return torch.tensor([[t[p] if p < len(t) else t[-2] for t in true] for p in range(len(text))])


def _wrong(text: list[int], *places: int) -> list[int]:
    return [text[1] if p in places else t for p, t in enumerate(text)]


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_draft_with_a_wrong_word_becomes_its_text(line, which: int) -> None:
    repairs, true = line
    repairs.add(_wrong(true[which], 2), _options(true, true[which]))
    assert repairs.turn([], NOBODY, 20000) == true[which]


def test_the_draft_nearest_to_the_message_comes_first(line) -> None:
    repairs, true = line
    repairs.add(_wrong(true[0], 2, 3, 4), _options(true, true[0]))
    repairs.add(_wrong(true[1], 3), _options(true, true[1]))
    assert repairs.turn([], NOBODY, 20000) == true[1]


def test_a_draft_of_an_accepted_text_waits(line) -> None:
    repairs, true = line
    repairs.add(_wrong(true[1], 3), _options(true, true[1]))
    repairs.add(_wrong(true[0], 2, 3), _options(true, true[0]))
    assert len(repairs.turn([true[1]], NOBODY, 20000)) == len(true[0])


def test_a_draft_has_a_few_turns_and_each_a_few_candidates(line, monkeypatch) -> None:
    monkeypatch.setattr(span_repair, "TRIES", (5, 5, 5))
    repairs, true = line
    alone = torch.tensor(true[0])[:, None].repeat(1, 4)
    for _ in range(2):  # the second time it is in line already
        repairs.add(_wrong(true[0], 2, 3, 4, 5, 6), alone)
    turns, before = 0, repairs.probe.scored
    while repairs.turn([], NOBODY, 20000) is not None:
        turns += 1
    assert turns == 3
    assert repairs.probe.scored - before <= 3 * (5 + 2)  # and two certificates at most


def test_nothing_is_edited_beyond_the_limit(line) -> None:
    repairs, true = line
    repairs.add(_wrong(true[0], 2), _options(true, true[0]))
    assert repairs.turn([], NOBODY, repairs.probe.scored) is None
    assert repairs.turn([], NOBODY, repairs.probe.scored + 1) is not None
