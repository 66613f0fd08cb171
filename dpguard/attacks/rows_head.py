"""Next tokens from the rows of a language model's head: which tokens were labels, and how often.

Under next-token loss row v of the head's weight receives the sum over positions t of (p_t(v) - [label_t = v]) h_t,
and its bias the sum of p_t(v) - [label_t = v]. So only rows of labels point against the mean hidden state, and only
their biases are negative (the sign rule of iDLG, Zhao et al., arXiv 2001.02610, section 3, for tokens instead of
classes). The first token of a text is never a label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import norm
from torch import Tensor

from dpguard.attacks.observation import Observation
from dpguard.attacks.rows_noise import Noise
from dpguard.inputs.family import bare

TURNS = 8
"""Rounds in which the mean hidden state and the rows that point against it are told apart."""


@dataclass(frozen=True)
class NextTokens:
    """The labels of a message.

    Attributes:
        counts: token id -> how often it was a label (1 where that is not known).
        sure: the message came without noise, pruning and rounding, so that signs are exact.
    """

    counts: dict[int, int]
    sure: bool

    @property
    def bag(self) -> list[int]:
        """Token ids with multiplicity."""
        return [token for token, count in self.counts.items() for _ in range(count)]


def head_tables(seen: Observation) -> tuple[str | None, str | None]:
    """Names on the wire of the vocabulary head's weight (maybe that of the token table) and bias."""
    head = bare(seen.model).get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return None, None
    owned = {id(p): part for part, p in head.named_parameters()}
    found = {owned[id(p)]: name for name in seen.message if id(p := seen.model.get_parameter(name)) in owned}
    return found.get("weight"), found.get("bias")


def next_tokens(seen: Observation, false_alarms: float) -> NextTokens | None:
    """The labels that the head's rows show; None when neither weight nor bias is on the wire.

    Args:
        seen: the message.
        false_alarms: expected number of rows of a table that pure noise lets through.
    """
    weight, bias = head_tables(seen)
    way = 1 if seen.disclosed.kind == "gradient" else -1  # a step goes against the gradient
    if bias is not None:
        value, std = way * seen.message[bias].double(), seen.noise_std(bias)
        marked = value < 0
        if std:
            marked &= Noise.of(seen, bias).before(value.abs() / std) > norm.isf(false_alarms / len(value))
        return NextTokens(_counts(-value, marked.nonzero()[:, 0]), _exact(seen, bias))
    if weight is None:
        return None
    table, std = way * seen.message[weight].double(), seen.noise_std(weight)
    marked = _loud(table, Noise.of(seen, weight).loud(table / std, false_alarms)) if std else _against(table)
    tied = any(seen.model.get_parameter(weight) is p for p in _inputs(seen))
    return NextTokens(dict.fromkeys(marked.nonzero()[:, 0].tolist(), 1), _exact(seen, weight) and not tied)


def _inputs(seen: Observation) -> list[Tensor]:
    return list(bare(seen.model).get_input_embeddings().parameters())  # type: ignore[operator]


def _exact(seen: Observation, name: str) -> bool:
    rule = seen.disclosed.plan[name]
    one_step = seen.disclosed.kind == "gradient" or seen.disclosed.local_steps == 1
    return one_step and not seen.noise_std(name) and rule.whole


def _counts(strength: Tensor, tokens: Tensor) -> dict[int, int]:
    """How often each token was a label, in units of the rarest (probabilities are small beside 1)."""
    if not len(tokens):
        return {}
    values = strength[tokens]
    return {t: max(1, round(float(v / values.min()))) for t, v in zip(tokens.tolist(), values, strict=True)}


def _against(table: Tensor) -> Tensor:
    """(V,) bool, rows that point against the sum of the others: labels, where nothing but rounding disturbs."""
    size = table.norm(dim=1)
    marked: Tensor = size > size.median()
    for _ in range(TURNS):
        mean = table[~marked].sum(0)
        now = table @ mean < 0
        if torch.equal(now, marked) or bool(now.all()):
            break
        marked = now
    return marked


def _loud(table: Tensor, loud: Tensor) -> Tensor:
    """(V,) bool, the rows of more energy than noise has (``loud``) that point one way."""
    against: Tensor = table @ table[loud].sum(0) > 0
    both: Tensor = loud & against
    return both
