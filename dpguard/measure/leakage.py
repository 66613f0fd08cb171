"""What a policy leaks: make the message that would be sent, run the panel on it, judge the guesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpguard.attacks.observation import Disclosed, Observation, Reconstruction
from dpguard.attacks.panel import Outcome, run_panel
from dpguard.attacks.vocabulary import content
from dpguard.engine.update import Update
from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Corpus, Example
from dpguard.measure import metrics
from dpguard.measure.threat import Threat
from dpguard.measure.truth import Truth
from dpguard.policy.table import Plan


@dataclass(frozen=True)
class Score:
    """One attack on one text.

    Attributes:
        target: index of the text in the corpus's training order.
        attack: the attack's name in the panel.
        metrics: see `metrics.NAMES`; entity recall is None where nothing is marked.
        certain: the attack knew that it was right.
        inherited: a cheaper attack was certain, so this one did not run.
        seconds: wall time of the attack on the whole message.
        steps, candidates: what it spent.
        guess: the recovered text.
    """

    target: int
    attack: str
    metrics: dict[str, float | None]
    certain: bool
    inherited: bool
    seconds: float
    steps: int
    candidates: int
    guess: str

    def plain(self) -> dict[str, Any]:
        """The record's form, without the text."""
        return {
            "target": self.target,
            "attack": self.attack,
            "metrics": self.metrics,
            "certain": self.certain,
            "inherited": self.inherited,
            "seconds": round(self.seconds, 4),
            "steps": self.steps,
            "candidates": self.candidates,
        }


@dataclass(frozen=True)
class Leak:
    """Everything about one message.

    Attributes:
        scores: one a text and attack.
        skipped: attack -> why it could not run on this message.
        truths: target -> its text as the tokenizer gives it back.
    """

    scores: tuple[Score, ...]
    skipped: dict[str, str]
    truths: dict[int, str] = field(default_factory=dict)


def pick_targets(corpus: Corpus, *, targets: int, batch_size: int, seed: int) -> list[list[int]]:
    """Indices into ``corpus.train`` of the texts of every message; disjoint while there are enough texts."""
    total = len(corpus.train)
    first = seed * targets * batch_size
    flat = [(first + i) % total for i in range(targets * batch_size)]
    return [flat[i : i + batch_size] for i in range(0, len(flat), batch_size)]


def encode(model: LoadedModel, examples: Sequence[Example]) -> Batch:
    """The texts as the client feeds them to the model."""
    return collate([e.text for e in examples], [e.label for e in examples], model.tokenizer)


def observation(
    model: LoadedModel,
    plan: Plan,
    update: Update,
    *,
    public: Sequence[str] = (),
    sequences: int | None = 1,
    labels: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    candidates: Sequence[str] = (),
) -> Observation:
    """What the server holds after one message; labels, lengths, candidates only where the threat model gives them."""
    training = update.training
    disclosed = Disclosed(
        tokenizer=model.tokenizer,
        plan=plan,
        batch_size=update.batch_size,
        sequences=sequences,
        kind=update.kind,
        mode=update.mode,
        public_texts=tuple(public),
        labels=None if labels is None else tuple(labels),
        lengths=None if lengths is None else tuple(lengths),
        candidates=tuple(candidates),
        mask_seed=update.mask_seed,
        local_steps=update.local_steps,
        learning_rate=training.learning_rate if training and training.optimizer == "sgd" else None,
        clients=update.clients,
        momentum=training.momentum if training and training.optimizer == "sgd" else 0.0,
    )
    return Observation(update.tensors, model.module, disclosed)


def attack_message(
    model: LoadedModel,
    plan: Plan,
    corpus: Corpus,
    indices: Sequence[int],
    *,
    attacks: Sequence[str],
    seed: int,
    noise_seed: int | None,
    threat: Threat = Threat(),  # noqa: B008 (frozen)
) -> Leak:
    """One message of some training texts, attacked and judged.

    Args:
        model: at the weights that the client uses.
        plan: the policy.
        corpus: where the texts come from.
        indices: the texts of the message, the first client's first.
        attacks: the panel's attacks, cheapest first.
        seed: of the attacks.
        noise_seed: of the client's noise.
        threat: what the message is, and what else is disclosed.
    """
    examples = [corpus.train[i] for i in indices]
    each = len(examples) // threat.clients
    batches = [encode(model, examples[i : i + each]) for i in range(0, len(examples), each)]
    update = threat.message(model, plan, batches, noise_seed=noise_seed)
    lengths = [int(n) for batch in batches for n in batch.attention_mask.sum(1)]
    seen = observation(
        model, plan, update,
        public=corpus.public, sequences=len(examples) if threat.knows("count") else None,
        labels=[e.label for e in examples] if threat.knows("labels") else None,
        lengths=lengths if threat.knows("lengths") else None,
        candidates=threat.disclosed_candidates(examples[0].text, corpus.public, seed),
    )  # fmt: skip
    truth = Truth.of(examples, model.tokenizer)
    outcomes = run_panel(seen, attacks, seed)
    scores = [
        score for o in outcomes if o.reconstruction is not None for score in judge(o, truth, indices, model.tokenizer)
    ]
    skipped = {o.attack: o.skipped for o in outcomes if o.reconstruction is None}
    return Leak(tuple(scores), skipped, dict(zip(indices, truth.texts(model.tokenizer), strict=True)))


def judge(outcome: Outcome, truth: Truth, indices: Sequence[int], tokenizer: Any) -> list[Score]:
    """Scores of one attack's guesses, each true text matched with one guess at most."""
    if outcome.reconstruction is None:
        return []
    found = outcome.reconstruction
    guesses = [tuple(content(tokenizer, ids)) for ids in found.sequences]
    texts = [str(tokenizer.decode(ids, clean_up_tokenization_spaces=True)) for ids in guesses]
    true_texts = truth.texts(tokenizer)
    table = [
        [
            metrics.score(g, text, truth.tokens[i], true_texts[i], truth.examples[i].entities)
            for g, text in zip(guesses, texts, strict=True)
        ]
        for i in range(len(truth.examples))
    ]
    matched = metrics.assign(np.array([[_closeness(cell) for cell in row] for row in table]).reshape(len(table), -1))
    out = []
    for i, index in enumerate(indices):
        j = matched[i]
        missing = metrics.score((), "", truth.tokens[i], true_texts[i], truth.examples[i].entities)
        out.append(
            Score(
                target=index,
                attack=outcome.attack,
                metrics=table[i][j] if j >= 0 else missing,
                certain=bool(j >= 0 and found.certain[j]),
                inherited=outcome.inherited,
                seconds=outcome.seconds,
                steps=found.steps,
                candidates=found.candidates,
                guess=texts[j] if j >= 0 else "",
            )
        )
    return out


def _closeness(scores: Mapping[str, float | None]) -> float:
    """What the assignment maximises: ROUGE-L, exact matches first."""
    return float(scores["rougeL"] or 0.0) + float(scores["exact_match"] or 0.0)


__all__ = ["Leak", "Reconstruction", "Score", "attack_message", "encode", "judge", "observation", "pick_targets"]
