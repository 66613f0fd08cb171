"""Checks S, E, N on the real thing: texts through a `Client`, whatever way it gets its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dpguard.engine import noise as noises
from dpguard.engine.audit.noise import Draws, spread
from dpguard.engine.audit.report import Row, Step, counted, judged
from dpguard.engine.audit.sensitivity import Worst, neighbour
from dpguard.engine.audit.subject import noise_classes, sensitivity
from dpguard.engine.client import Client
from dpguard.inputs import texts
from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.models import LoadedModel
from dpguard.policy.table import Group, Plan

TOLERANCE = 1e-5
BATCHES, ROWS = 2, 3
ROUNDS = 3
EPS = 2.0**-23
"""Spacing of float32, in which a client computes."""


def steps(loaded: LoadedModel, plan: Plan, *, batch_size: int, seed: int) -> list[Step]:
    """Checks of real batches of the bundled corpus through a `Client`.

    Args:
        loaded: the model and its tokenizer.
        plan: resolved against it.
        batch_size: the public batch size.
        seed: of the noise.
    """
    if not plan.trained:
        return []

    def fresh() -> Client:
        return Client(loaded.module, plan, seed=seed, batch_size=batch_size)

    client, found = fresh(), real_batches(loaded)

    def empty() -> list[Row]:
        noised = client.message(found[0].rows(slice(0, 0)), noises.source(seed)).noised
        return [_empty(plan, noised, batch_size)]

    out: list[Step] = [empty, lambda: _rounds(client, found[0], batch_size, seed)]
    if plan.groups:
        out += [lambda: _removal(client, found, batch_size, seed), lambda: _memory(fresh, found, batch_size, seed)]
    return out


def real_batches(loaded: LoadedModel) -> list[Batch]:
    """A few batches of the bundled corpus, cut to what the model can read."""
    labels = getattr(loaded.module.config, "num_labels", 2)
    examples = texts.load("demo").train[: BATCHES * ROWS]
    out = []
    for start in range(0, len(examples), ROWS):
        part = examples[start : start + ROWS]
        batch = collate([e.text for e in part], [e.label % labels for e in part], loaded.tokenizer)
        longest = min(loaded.max_tokens, batch.input_ids.shape[1])
        out.append(Batch(batch.input_ids[:, :longest], batch.attention_mask[:, :longest], batch.labels))
    return out


def _distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor], group: Group) -> float:
    """L2 distance of a group's tensors, less what rounding to float32 alone can make of equal ones."""
    total = rounding = 0.0
    for name in group.names:
        total += float((first[name].double() - second[name].double()).square().sum())
        rounding += 2 * EPS**2 * float(first[name].double().square().sum())
    return math.sqrt(max(0.0, total - rounding))


def _removal(client: Client, found: list[Batch], batch_size: int, seed: int) -> list[Row]:
    worst = Worst()
    groups = client.plan.groups
    units = {group.unit for group in groups.values()}
    for number, batch in enumerate(found):
        here = client.message(batch, noises.source(seed + number)).noised
        for index in range(len(batch)):
            there = {}
            if "update" in units:
                there["empty"] = batch.rows(slice(0, 0))
            if "example" in units:
                there[f"without {index}"] = batch.rows(torch.tensor([i for i in range(len(batch)) if i != index]))
            noised = {key: client.message(b, noises.source(seed + number)).noised for key, b in there.items()}
            for key, group in groups.items():
                moved = _distance(here, noised[neighbour(index, group)], group)
                worst.see(moved, sensitivity(group, batch_size), key)
    return [
        worst.row(
            f"{BATCHES * ROWS} real texts, each removed, {counted(len(groups), 'group')}",
            "<= C (1 + 1e-5)",
            "C",
            TOLERANCE,
        )
    ]


def _empty(plan: Plan, noised: Mapping[str, Tensor], batch_size: int) -> Row:
    """A message of no text is noise alone, in the model's own shapes."""
    what = "no text through the model"
    wrong = [n for n in plan.trained if n not in noised or tuple(noised[n].shape) != plan[n].slot.shape]
    silent = [n for n in plan.trained if plan[n].std(batch_size) == 0 and n in noised and bool(noised[n].any())]
    if wrong or silent:
        figure = f"{wrong[0]} has another shape" if wrong else f"{silent[0]} is not zero"
        return judged("E", what, figure, "noise alone", False)
    pooled = []
    for found in noise_classes(plan, batch_size):
        draws = Draws()
        for name in found.names:
            squares = float((noised[name].double() / found.std).square().sum())
            draws = draws.plus(Draws(noised[name].numel(), squares))
        pooled.append((found.label, draws))
    return spread("E", what, pooled) if pooled else judged("E", what, "zeros", "zeros", True)


def _memory(fresh: Callable[[], Client], found: list[Batch], batch_size: int, seed: int) -> list[Row]:
    """Three rounds in which a text takes part in the first alone: a client at fixed weights has no past.

    A client whose local weights move between rounds belongs here too, in its own rows: what its later rounds
    may depend on is its noised state, which the guarantee counts.
    """
    here, there = fresh(), fresh()
    rounds = [found[number % len(found)] for number in range(ROUNDS)]
    plan, moved = here.plan, 0.0
    first = rounds[0].rows(slice(0, 0) if plan.unit == "update" else slice(1, None))
    for number, batch in enumerate(rounds):
        source = noises.source(seed + number), noises.source(seed + number)
        one = here.message(batch, source[0]).noised
        other = there.message(batch if number else first, source[1]).noised
        if number:
            for group in plan.groups.values():
                moved = max(moved, _distance(one, other, group) / sensitivity(group, batch_size))
    what = f"{ROUNDS} rounds of one client, text only in the first"
    return [judged("S", what, f"later rounds moved {moved:.3g} C", "0", moved <= TOLERANCE)]


def _rounds(client: Client, batch: Batch, batch_size: int, seed: int) -> list[Row]:
    """Rounds of one client on one batch and from one source of noise: fresh noise every time."""
    classes = noise_classes(client.plan, batch_size)
    names = [name for found in classes for name in found.names]
    if not names:
        return []
    std = {name: found.std for found in classes for name in found.names}
    generator = noises.source(seed)
    noised = [client.message(batch, generator).noised for _ in range(ROUNDS + 1)]
    pooled = []
    for found in classes:
        draws = Draws()
        for name in found.names:
            rows = torch.stack([message[name].flatten() for message in noised]).double()
            residuals = (rows - rows.mean(0)) / std[name]
            draws = draws.plus(Draws(ROUNDS * rows.shape[1], float(residuals.square().sum())))
        pooled.append((found.label, draws))
    return [spread("N", f"{ROUNDS + 1} rounds of one client: noise std", pooled)]
