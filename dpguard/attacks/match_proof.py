"""The proof that a text is the right one: its own message, pruned and rounded as the client did, is the one seen.

Without noise and with dropout off a message is a function of its text, so equality entry by entry proves the text.
Float32 sums differ in their last digits from machine to machine; an entry may therefore differ where it lies at a
threshold (the smallest entry kept, a rounding boundary, a sign of almost nothing), and nowhere else.

That proves a text only where another text's message is another one. Where a message barely depends on a word (a last
layer alone, weights that nobody trained) the texts nearest to the right one would pass as well, so that a text is
proven when none of its `neighbours` comes near to passing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpguard.attacks.observation import Observation
from dpguard.attacks.vocabulary import TokenTable, content
from dpguard.engine import wire
from dpguard.engine.gradients import gradient
from dpguard.inputs.batch import Batch
from dpguard.policy.table import Rule

TOLERANCE = 1e-4
"""What rounding in float32 can move an entry by, relative to the largest (entries) or to the norm (tensors)."""
DOUBT = 1e-3
"""A neighbour that is nearer than this casts doubt: the few that are tried stand for many others."""
ENTRIES = 1000
"""Fewest entries that can prove a text: a handful of values may fit several texts."""
NEGLIGIBLE = 1e-6
"""A tensor this much smaller than the largest holds rounding errors (a key's bias) and proves nothing."""
NEIGHBOURS = 16
"""Neighbours of each of three sorts: two words swapped side by side, or further apart, and one word replaced."""


def is_message(seen: Observation, text: Sequence[int], label: int) -> bool:
    """Whether a text's own message equals the one seen on every tensor that can tell, and no neighbour's does.

    False where the message is not `provable`. The model must be in eval mode.

    Args:
        seen: the message of one text.
        text: token ids with special tokens.
        label: class index.
    """
    if not provable(seen):
        return False
    with _wanting_gradients(seen.model, seen.disclosed.plan.trained):
        return _sends(seen, text, label, TOLERANCE) and not any(
            _sends(seen, other, label, DOUBT) for other in neighbours(seen, text)
        )


def provable(seen: Observation) -> bool:
    """Whether enough of a message can tell: one text's gradient, without noise or an unknown release operation.

    Not in train mode (the dropout masks are unknown), nor deltas, several texts or clients.
    """
    told = seen.disclosed
    if told.mode != "eval" or told.kind != "gradient" or told.texts != 1 or told.clients != 1:
        return False
    return sum(int((seen.message[name] != 0).sum()) for name in _exact(seen)) >= ENTRIES


def _exact(seen: Observation) -> dict[str, Rule]:
    """Rules of the tensors on the wire that are a function of the text."""
    told = seen.disclosed
    rules = {name: told.plan[name] for name in seen.message if name in told.plan}
    return {name: rule for name, rule in rules.items() if not rule.std(told.batch_size) and not rule.release}


@torch.no_grad()
def neighbours(seen: Observation, text: Sequence[int]) -> list[list[int]]:
    """Other texts that change the embeddings least: words swapped, or one replaced by the word nearest to it.

    Args:
        seen: gives the embeddings and what a text can hold.
        text: token ids with special tokens.
    """
    tokenizer, row = seen.disclosed.tokenizer, [int(token) for token in text]
    words = set(content(tokenizer, row))
    places = [place for place, token in enumerate(row) if token in words]
    if not places:
        return []
    table = TokenTable(seen.model.get_input_embeddings().weight, tokenizer)  # type: ignore[operator]
    own = table.weight[[row[place] for place in places]].float()
    gaps = torch.cdist(own, own).tolist()
    pairs = [(i, j) for i in range(len(places)) for j in range(i) if row[places[i]] != row[places[j]]]
    pairs.sort(key=lambda pair: gaps[pair[0]][pair[1]])
    beside = [pair for pair in pairs if pair[0] - pair[1] == 1]
    apart = [pair for pair in pairs if pair[0] - pair[1] > 1]
    out = []
    for i, j in beside[:NEIGHBOURS] + apart[:NEIGHBOURS]:
        other = list(row)
        other[places[i]], other[places[j]] = row[places[j]], row[places[i]]
        out.append(other)
    near = table.nearest(own, 2).tolist()
    instead = [next((t for t in few if t != row[place]), few[0]) for few, place in zip(near, places, strict=True)]
    moved = (table.weight[instead].float() - own).norm(dim=1).argsort()
    for index in moved[:NEIGHBOURS].tolist():
        place = places[index]
        out.append([*row[:place], instead[index], *row[place + 1 :]])
    return [other for other in out if other != row]


@contextmanager
def _wanting_gradients(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Gradients of the named parameters alone, and of those that wanted them afterwards."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    chosen = set(names)
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


def _sends(seen: Observation, text: Sequence[int], label: int, tolerance: float) -> bool:
    """Whether a text's own message is the one seen, to ``tolerance``."""
    told, plan = seen.disclosed, seen.disclosed.plan
    rules = _exact(seen)
    ids = torch.tensor([list(text)], device=next(iter(seen.message.values())).device)
    batch = Batch(ids, torch.ones_like(ids), torch.tensor([label], device=ids.device))
    found = gradient(seen.model, batch, plan.trained)
    clipped = wire.clip_and_sum({name: g[None] for name, g in found.items()}, plan)
    sums = wire.clip_update(clipped.sums, plan, told.batch_size)
    means = {name: sums[name].float() / told.batch_size for name in rules}
    largest = max((float(mean.norm()) for mean in means.values()), default=0.0)
    telling = [name for name in rules if float(means[name].norm()) > NEGLIGIBLE * largest]
    if sum(int((seen.message[name] != 0).sum()) for name in telling) < ENTRIES:
        return False
    return all(_same(name, rules[name], means[name], seen, tolerance) for name in telling)


def _same(name: str, rule: Rule, own: Tensor, seen: Observation, tolerance: float) -> bool:
    """Whether a tensor of a text's own gradient was released as what arrived, up to entries at a threshold."""
    plan, arrived = seen.disclosed.plan, seen.message[name].float()
    sent = wire.released_tensor(name, own, plan, mask_seed=seen.disclosed.mask_seed)
    if rule.bits is None and rule.keep >= 1:
        return float((sent - arrived).norm()) <= tolerance * float(sent.norm())
    slack = tolerance * float(own.abs().max())
    close = (sent - arrived).abs() <= slack
    return bool((close | _at_threshold(rule, own, sent, slack)).all())


def _at_threshold(rule: Rule, own: Tensor, sent: Tensor, slack: float) -> Tensor:
    """Entries that rounding in float32 may have sent to the other side of a threshold."""
    out = torch.zeros_like(own, dtype=torch.bool)
    if rule.keep < 1 and rule.prune == "magnitude":
        out |= (own.abs() - own[sent != 0].abs().min()).abs() <= slack if bool((sent != 0).any()) else True
    if rule.bits == 1:
        out |= own.abs() <= slack
    elif rule.bits is not None:
        step = float(own.abs().max()) / (2 ** (rule.bits - 1) - 1)
        out |= ((own / step).frac().abs() - 0.5).abs() * step <= slack
    return out


def without_noise(seen: Observation) -> bool:
    """Whether no tensor on the wire carries noise."""
    plan = seen.disclosed.plan
    return all(plan[name].std(seen.disclosed.batch_size) == 0 for name in seen.message if name in plan)
