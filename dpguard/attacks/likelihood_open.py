"""The open world, all of it: which label and length, the search under each, and the exact likelihood at the end."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from dpguard.attacks.base import Budget
from dpguard.attacks.labels import labels_of
from dpguard.attacks.likelihood_evolve import Evolution
from dpguard.attacks.likelihood_guide import Guide
from dpguard.attacks.likelihood_prior import Neighbours
from dpguard.attacks.likelihood_replay import Replay
from dpguard.attacks.likelihood_search import Row, Search
from dpguard.attacks.likelihood_setting import Spent
from dpguard.attacks.likelihood_texts import is_message, score
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.precision import search_dtype
from dpguard.inputs.family import family_of

SAMPLE = 1000
"""Public texts that say which label and which length are likely."""
LENGTHS = 3
"""Lengths that are tried when it is unknown."""
FAINT = 16.0
"""Energy of a public text over the noise, in nats, below which no search is made: the message then tells at most half
of it about the text, which no more than the choice among public texts can use."""
PRECISE = 0.1
"""The last part of the budget goes by the exact likelihood, in float32: bfloat16 can't tell hundredths apart."""
RESTARTS = 4
"""Searches from elsewhere when the first ones end before the budget does."""
STRETCH = 3
"""Words that the text may grow or shrink by in the end, when its length is unknown."""
FINAL = 64
"""Best texts of every search that the exact likelihood decides between."""


def open_world(seen: Observation, budget: Budget, rng: torch.Generator) -> Reconstruction:
    """The likeliest text that a search of ``budget.candidates`` finds; see `likelihood_search`.

    With label or length unknown the most promising ones share a third of the budget, and the best goes on alone.
    """
    exact = Replay(seen)
    table = exact.model.get_input_embeddings().weight  # type: ignore[operator]
    dtype = search_dtype(table)
    quick = exact if dtype is torch.float32 else Replay(seen, dtype=dtype)
    words = Neighbours(seen.disclosed, len(table), family_of(seen.model).max_tokens(seen.model.config))
    spent = Spent(max(1, budget.candidates))
    starts = [*words.rows, *_proposed(seen, words)]
    ways = _ways(seen, quick, starts, spent, rng)
    searches = []
    for label, length in ways:
        guide = Guide(quick, label, seen.disclosed.tokenizer.pad_token_id, _near(words, length))
        draws = random.Random(int(torch.randint(2**62, (1,), generator=rng)))
        searches.append(Search(guide, words, length, rng, draws, spent))
    begun, share = spent.candidates, (spent.limit - spent.candidates) // 3 if len(ways) > 1 else 0
    for index, search in enumerate(searches):
        search.start([row for row in starts if len(row) == search.length])
        if len(ways) > 1 and search.guide.energy > FAINT:
            Evolution(search).run(begun + share * (index + 1) // len(ways))
    if all(search.guide.energy <= FAINT for search in searches):
        return _answer(seen, exact, searches, spent)
    _, lead = max((_decide(exact, search)[1], -index) for index, search in enumerate(searches))
    search = searches[-lead]
    rest = spent.limit - spent.candidates
    found = Evolution(search)
    found.run(spent.limit - int(PRECISE * rest))
    ended = found.explained()
    guide = Guide(exact, search.guide.label, search.guide.padding, _near(words, search.length), plain=True)
    searches.append(search.refined(guide, FINAL))
    if seen.disclosed.lengths is None:
        searches += _other_lengths(searches[-1], spent)
    searches[-1].run(spent.limit)
    for _ in range(0 if ended or spent.over else RESTARTS):
        searches.append(_afresh(searches[-1], exact, spent))
    return _answer(seen, exact, searches, spent)


def _proposed(seen: Observation, words: Neighbours) -> list[Row]:
    """What cheaper attacks proposed, with the special tokens that this attack's texts have."""
    found: dict[Row, None] = {}
    unknown = seen.disclosed.tokenizer.unk_token_id
    for ids in seen.proposals:
        body = [
            token for token in ids if token == unknown or (token < len(words.allowed) and bool(words.allowed[token]))
        ]
        if body:
            found[tuple(words.frame.wrap(body))] = None
    return [row for row in found if row not in set(words.rows)]


def _near(words: Neighbours, length: int) -> list[Row]:
    """Public texts, the nearest in length first."""
    return sorted(words.rows, key=lambda row: abs(len(row) - length))


def _afresh(search: Search, exact: Replay, spent: Spent) -> Search:
    """Another search of the same label and length, from drawn words: short texts leave budget for it."""
    guide, words, length = search.guide, search.words, search.length
    quick = Guide(exact, guide.label, guide.padding, _near(words, length))
    other = Search(quick, words, length, search.source, search.draws, spent, search.setting)
    other.start([])
    Evolution(other).run(spent.limit)
    other = other.refined(guide, FINAL)
    other.run(spent.limit)
    return other


def _other_lengths(search: Search, spent: Spent) -> list[Search]:
    """Searches one word shorter or longer, for as long as that makes the text likelier; the last one is to go on."""
    found: list[Search] = []
    guide, words = search.guide, search.words
    longest = family_of(guide.replay.model).max_tokens(guide.replay.model.config)
    for _ in range(STRETCH):
        row, posterior = _decide(guide.replay, search)
        rows = [other for other in search.resized(row) if len(other) <= longest]
        rows = rows[: spent.take(len(rows))]
        if not rows:
            break
        loglik = score(guide.replay, rows, guide.label, guide.padding).loglik.tolist()
        prior = {other: words.log_prior([other])[0] for other in rows}
        best = max(range(len(rows)), key=lambda index: loglik[index] + prior[rows[index]])
        if loglik[best] + prior[rows[best]] <= posterior:
            break
        search = Search(guide, words, len(rows[best]), search.source, search.draws, spent, search.setting)
        search.score([other for other in rows if len(other) == search.length])
        Evolution(search).run(spent.candidates + (spent.limit - spent.candidates) // 2)
        found.append(search)
    return found


def _ways(
    seen: Observation, quick: Replay, starts: Sequence[Row], spent: Spent, rng: torch.Generator
) -> list[tuple[int, int]]:
    """(label, length) pairs to try, the most promising first: by how likely public texts make them."""
    told, labels = seen.disclosed, labels_of(seen)
    longest = family_of(seen.model).max_tokens(seen.model.config)
    if told.lengths is not None and len(labels) == 1:
        return [(labels[0], told.lengths[0])]
    rows = [row for row in starts if len(row) <= longest]
    order = torch.randperm(len(rows), generator=rng).tolist()
    sample = [rows[i] for i in order][: spent.take(min(SAMPLE, spent.limit // (4 * len(labels))))]
    if not sample:
        return [(labels[0], told.lengths[0] if told.lengths else len(starts[0]))]
    table = {}
    for label in labels:
        spent.take(len(sample))
        table[label] = score(quick, sample, label, told.tokenizer.pad_token_id).loglik
    label = max(labels, key=lambda each: float(table[each].topk(min(50, len(sample))).values.mean()))
    if told.lengths is not None:
        return [(label, told.lengths[0])]
    return [(label, length) for length in _lengths(sample, table[label])]


def _lengths(sample: Sequence[Row], loglik: torch.Tensor) -> list[int]:
    """The lengths whose public texts explain the message best, by the mean of the best few of each."""
    by_length: dict[int, list[float]] = {}
    for row, value in zip(sample, loglik.tolist(), strict=True):
        by_length.setdefault(len(row), []).append(value)
    means = {
        length: sum(sorted(values, reverse=True)[:5]) / min(5, len(values))
        for length, values in by_length.items()
        if len(values) >= min(5, len(sample))
    }
    return sorted(means or by_length, key=lambda length: -means.get(length, -torch.inf))[:LENGTHS]


def _decide(exact: Replay, search: Search) -> tuple[Row, float]:
    """The likeliest of a search's best texts and its log-posterior, by the exact likelihood in float32."""
    if not search.pool:
        return (), -torch.inf
    rows = search.top(FINAL, search.guide.nats)
    found = score(exact, rows, search.guide.label, search.guide.padding).loglik
    found = found + torch.tensor([search.prior[row] for row in rows], dtype=found.dtype)
    best = int(found.argmax())
    return rows[best], float(found[best])


def _answer(seen: Observation, exact: Replay, searches: Sequence[Search], spent: Spent) -> Reconstruction:
    ends = [_decide(exact, search) for search in searches]
    which = max(range(len(ends)), key=lambda index: ends[index][1])
    (row, posterior), search = ends[which], searches[which]
    terms = score(exact, [row], search.guide.label, search.guide.padding)
    return Reconstruction(
        sequences=[list(row)],
        certain=[is_message(seen, row, search.guide.label)],
        candidates=spent.candidates,
        notes={
            "world": "open",
            "loglik": float(terms.loglik[0]),
            "log_posterior": posterior,
            "misfit": float(terms.misfit[0]),
            "score": search.pool[row],
            "label": search.guide.label,
            "lengths": [each.length for each in searches],
            "compared": len(exact.channels),
            "ignored": exact.ignored,
        },
    )
