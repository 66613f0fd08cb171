"""``dpguard attack``: one look at what one policy gives away."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rapidfuzz.distance import Opcodes
from rapidfuzz.distance.Levenshtein import opcodes
from rich.text import Text

from dpguard.attacks.panel import FLOOR, LATEST, PANELS, attack, in_order
from dpguard.cli.console import console, table
from dpguard.cli.naming import by_options
from dpguard.cli.progress import bar
from dpguard.errors import UserError, did_you_mean
from dpguard.inputs import models, texts
from dpguard.inputs.adapters import split
from dpguard.inputs.family import slots
from dpguard.measure import leakage
from dpguard.measure.leakage import Leak, Score
from dpguard.measure.threat import KNOWLEDGE, Threat
from dpguard.policy.table import Policy

SMALL = 50_000_000
"""Parameters below which threads cost more than they bring: they wait for each other between small layers."""
JSON_METRICS = ("exact_match", "rouge1", "rouge2", "rougeL", "token_recall")
NOTHING = "nothing"
"""What ``--know`` says where a study says ``know: []``."""


def attack_once(
    policy: str,
    model: str,
    data: str,
    *,
    targets: int,
    batch_size: int,
    seed: int,
    attacks: Sequence[str] | None,
    threat: Threat,
    text: str,
    label: str,
    as_json: bool,
) -> None:
    """Attack a few messages under one policy and print true text beside recovered text."""
    _check_closed(threat, batch_size)
    rows = Policy.load(policy)
    with by_options(text, label):
        corpus = texts.load(data, text=text, label=label)
    loaded = models.load(model, labels=corpus.classes)
    texts.check_labels((*corpus.train, *corpus.test), loaded.classes)
    plan = rows.plan(slots(loaded.module))
    if not plan.shared:
        raise UserError(f"policy {policy!r} shares nothing, so there is no message to attack")
    texts_each = batch_size * threat.clients
    if targets * texts_each > len(corpus.train):
        raise UserError(
            f"{targets} messages of {texts_each} texts are more than the {len(corpus.train)} texts of {data!r}; "
            f"expected at most {len(corpus.train)}"
        )
    messages = leakage.pick_targets(corpus, targets=targets, batch_size=texts_each, seed=seed)
    texts.check_lengths([corpus.train[i] for m in messages for i in m], loaded.tokenizer, loaded.max_tokens)
    if sum(p.numel() for p in loaded.module.parameters()) < SMALL:
        torch.set_num_threads(1)
    names = attacks_of(model, attacks, threat)
    if not as_json:
        among = f"; the text is one of {threat.candidates:,}" if threat.candidates else ""
        console().print(f"{policy} on {model}: {100 * plan.shared_fraction:.3g} % of the parameters leave{among}\n")
    best = []
    for number, indices in bar(list(enumerate(messages)), "attacking", quiet=as_json):
        started = time.perf_counter()
        leak = leakage.attack_message(
            loaded, plan, corpus, indices, attacks=names, seed=seed * 1_000_003 + number, noise_seed=seed + number,
            threat=threat,
        )  # fmt: skip
        best.append((best_of(leak, names), leak, time.perf_counter() - started))
        if not as_json:
            _print_message(*best[-1])
    if as_json:
        print(json.dumps(as_plain(best), indent=2))
    else:
        _print_means(best)


def attacks_of(model: str, asked: Sequence[str] | None, threat: Threat = Threat()) -> list[str]:  # noqa: B008 (frozen)
    """The attacks of a look: those asked for, each with its own preset, in the panel's order, else the panel's.

    Without any asked for, the demo model, with LoRA or without, gets its quicker panel; ``match`` alone is the whole of
    it there too. Where candidates are disclosed, the attack that reads them is among it.

    >>> attacks_of("demo", ["combined", "match"]), attacks_of("demo", None)
    (['match', 'combined'], ['rows', 'span', 'match:demo', 'combined'])
    """
    if asked:
        return in_order(LATEST, asked)
    panel = "demo" if split(model)[0] == "demo" else LATEST
    names = [name for name in PANELS[panel] if name != FLOOR]
    return in_order(panel, [*names, "likelihood"]) if threat.candidates else names


def knowledge(words: Sequence[str] | None) -> tuple[str, ...]:
    """What ``--know`` discloses: the count where nothing is said.

    Raises:
        UserError: a word that is unknown, or ``nothing`` beside another.

    >>> knowledge(None), knowledge(["nothing"]), knowledge(["labels", "lengths"])
    (('count',), (), ('labels', 'lengths'))
    """
    for word in words or ():
        if word not in (*KNOWLEDGE, NOTHING):
            raise UserError(f"--know: unknown knowledge {word!r}{did_you_mean(word, (*KNOWLEDGE, NOTHING))}")
    if not words or NOTHING not in words:
        return tuple(words or ("count",))
    if set(words) != {NOTHING}:
        raise UserError(f"--know {NOTHING} is said beside other knowledge, expected it alone")
    return ()


def _check_closed(threat: Threat, batch_size: int) -> None:
    """A closed world is about one text in one client's message, as in a study."""
    if threat.candidates == 1:
        raise UserError("--candidates 1 leaves nothing to find, expected 2 or more")
    if threat.candidates and (batch_size > 1 or threat.clients > 1):
        raise UserError("--candidates asks which text one message holds, expected --batch-size 1 and --clients 1")


def best_of(leak: Leak, names: Sequence[str]) -> dict[int, Score]:
    """One score a text: of the attack that was certain, else of the last that ran. Never the luckiest.

    Later attacks build on what earlier ones found; a published one does not, and counts where no other ran.
    """
    chosen: dict[int, Score] = {}
    for name in sorted(names, key=lambda name: not attack(name).published):
        for score in leak.scores:
            if score.attack == name and not (score.target in chosen and chosen[score.target].certain):
                chosen[score.target] = score
    return chosen


def as_plain(best: Sequence[tuple[dict[int, Score], Leak, float]]) -> dict[str, Any]:
    """The JSON form: mean metrics, and one entry a text."""
    scores = [(score, seconds) for chosen, _leak, seconds in best for score in chosen.values()]
    means = {
        name: float(np.mean([score.metrics[name] or 0.0 for score, _ in scores])) if scores else None
        for name in JSON_METRICS
    }
    return {
        "metrics": means,
        "targets": [
            {
                "exact_match": score.metrics["exact_match"],
                "seconds": round(seconds, 3),
                "certain": score.certain,
                "attack": score.attack,
                **{name: score.metrics[name] for name in JSON_METRICS[1:]},
            }
            for score, seconds in scores
        ],
        "skipped": {name: why for _, leak, _ in best for name, why in leak.skipped.items()},
    }


def _print_message(chosen: dict[int, Score], leak: Leak, seconds: float) -> None:
    """One message's texts, as soon as they are there."""
    out = console()
    for target, truth in leak.truths.items():
        score = chosen.get(target)
        out.print(Text("true       ", style="dim").append(truth, style="not dim"))
        if score is None or not score.guess.strip():
            why = "; ".join(f"{name}: {reason}" for name, reason in leak.skipped.items())
            out.print(Text(f"recovered  nothing{f' ({why})' if why else ''}\n", style="dim"))
            continue
        out.print(Text("recovered  ", style="dim").append_text(marked(score.guess, truth)))
        sure = "certain" if score.certain else "a guess"
        verdict = f"           {score.attack}, {sure}, ROUGE-L {score.metrics['rougeL']:.2f}, {seconds:.1f} s\n"
        out.print(Text(verdict, style="dim"))


def _print_means(best: Sequence[tuple[dict[int, Score], Leak, float]]) -> None:
    plain = as_plain(best)
    if not plain["targets"]:
        return
    rows = [[name, "-" if value is None else f"{value:.2f}"] for name, value in plain["metrics"].items()]
    mean = f"mean of {len(plain['targets'])}"
    console().print(table(["metric", mean], rows, right=[mean]))


def marked(guess: str, truth: str) -> Text:
    """The guess, right words in bold and wrong ones struck through, by a word-level edit script."""
    said, true = guess.split(), truth.split()
    steps: Opcodes = opcodes(said, true)
    out = Text()
    for step in steps:
        for word in said[step.src_start : step.src_end]:
            out.append(word, style="bold" if step.tag == "equal" else "strike dim").append(" ")
    return out
