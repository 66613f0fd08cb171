"""Candidates scored by the exact likelihood of everything shared: the strongest reading of a noisy message.

Closed world (candidates are disclosed): the posterior over them, labels averaged out. Open world: candidates grown
from public text by a discrete search on likelihood plus a bigram prior, see `likelihood_search`. One text a message.

Certain of a candidate when the evidence could not have come about otherwise at level `ALPHA`: in the closed world by
likelihood ratios, against every other candidate and (Markov: a ratio of r has probability at most 1 / r without a
signal) against no text at all, together with a residual that the noise explains; without noise when the
candidate's gradient is the message, entry by entry, and no neighbour's is (`match_proof`). In the open world under
noise it is never certain, because a text that was never scored may be likelier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpguard.attacks.base import Budget, Capability
from dpguard.attacks.labels import labels_of
from dpguard.attacks.language import Corpus, content_ids
from dpguard.attacks.likelihood_channels import channels
from dpguard.attacks.likelihood_replay import Replay, Terms
from dpguard.attacks.likelihood_texts import is_message, score
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.presets import choose
from dpguard.inputs.family import family_of

ALPHA = 1e-6
"""Probability that a certain answer may be wrong, by the model of the noise."""
SIGMAS = 5.0
"""Largest misfit, in standard deviations, that the noise explains."""


class Likelihood:
    """See the module's docstring."""

    name = "likelihood"
    cite = "Gaussian likelihood; closed world: Hayes, Mahloujifar, Balle (arXiv 2302.07225); open world: this project"

    capability = Capability(
        "any tensor; candidates, or public texts to grow them from",
        "several texts, updates, models that predict tokens, release operations without a likelihood; certainty in the "
        "open world under noise",
        several=False,
        tokens=False,
    )

    def __init__(self) -> None:
        self.presets = {
            "default": Budget(steps=0, candidates=32_000),
            "quick": Budget(steps=0, candidates=3_000),
        }

    def applicable(self, seen: Observation) -> str:
        """Empty for the gradient of one text with a tensor that can be compared, else the reason."""
        told = seen.disclosed
        if not seen.message:
            return "the message holds no tensor"
        if told.kind != "gradient":
            return f"the message is a {told.kind}; the likelihood replays one gradient step of one client"
        if told.texts != 1:
            return "the message holds several texts (or their number is unknown); the likelihood scores one text"
        if not channels(seen)[0]:
            return "nothing to compare: only tensors after release operations without a likelihood, or empty ones"
        if not told.candidates and not any(content_ids(Corpus.of(told))):
            return "neither candidates nor public texts (with a word of the tokenizer's) to grow candidates from"
        return ""

    def reconstruct(
        self, seen: Observation, *, rng: torch.Generator, budget: Budget | None = None, preset: str = ""
    ) -> Reconstruction:
        """The likeliest text. ``notes``: ``world``, ``loglik``, ``misfit`` (standard deviations), ``label``,
        ``compared`` and ``ignored`` tensors; in the closed world ``posterior`` and ``unscored`` candidates.

        Raises:
            UserError: no such preset.
        """
        _, limits = choose(self.name, self.presets, preset, budget)
        if seen.disclosed.candidates:
            return closed_world(seen, limits)
        from dpguard.attacks.likelihood_open import open_world

        return open_world(seen, limits, rng)


def closed_world(seen: Observation, budget: Budget) -> Reconstruction:
    """The posterior over the disclosed candidates, uniform before the message; at most the budget's are scored."""
    ids = [tuple(row) for row in seen.disclosed.tokenizer(list(seen.disclosed.candidates))["input_ids"]]
    longest = family_of(seen.model).max_tokens(seen.model.config)
    texts = [row for row in dict.fromkeys(ids) if len(row) <= longest]
    if seen.disclosed.lengths is not None:
        texts = [row for row in texts if len(row) == seen.disclosed.lengths[0]] or texts
    labels = labels_of(seen)
    scored = texts[: max(1, budget.candidates // len(labels))]
    replay = Replay(seen)
    found = [score(replay, scored, label, seen.disclosed.tokenizer.pad_token_id) for label in labels]
    table = torch.stack([terms.loglik for terms in found])  # (labels, candidates)
    joint = table.logsumexp(0) - math.log(len(labels))
    best = int(joint.argmax())
    label = int(table[:, best].argmax())
    terms = Terms(found[label].dots[:, best : best + 1], found[label].squares[:, best : best + 1])
    complete = len(scored) == len(texts) and len(texts) > 1
    certain = complete and _proved(seen, replay, scored[best], labels[label], terms, joint)
    return Reconstruction(
        sequences=[list(scored[best])],
        certain=[certain],
        candidates=table.numel(),
        notes={
            "world": "closed",
            "posterior": float((joint - joint.logsumexp(0)).exp()[best]),
            "unscored": len(texts) - len(scored),
            "loglik": float(joint[best]),
            "misfit": float(terms.misfit[0]),
            "label": labels[label],
            "compared": len(replay.channels),
            "ignored": replay.ignored,
        },
    )


def _proved(seen: Observation, replay: Replay, text: Sequence[int], label: int, terms: Terms, joint: Tensor) -> bool:
    """Whether the closed world's best candidate is certain, see the module's docstring."""
    if any(channel.clean for channel in replay.channels):
        return is_message(seen, text, label)
    if seen.disclosed.mode != "eval" or any(not c.gain or seen.disclosed.plan[c.name].bits for c in replay.channels):
        return False  # no exact likelihood to rely on
    needed = math.log(len(joint) / ALPHA)
    second = float(joint.topk(2).values[1])
    ahead = float(joint.max()) - second >= needed and float(terms.loglik[0]) >= needed
    return ahead and abs(float(terms.misfit[0])) <= SIGMAS


PLUGIN = Likelihood()
