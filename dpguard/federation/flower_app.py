"""What a rehearsed federation does inside Flower's processes: the server's rounds, one client's turn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from safetensors.torch import save_file
from torch import Tensor

from dpguard.engine.update import Update
from dpguard.errors import UserError
from dpguard.federation import flower, rounds, views
from dpguard.federation.settings import Settings
from dpguard.federation.turn import local_training, one_client_round
from dpguard.inputs import models
from dpguard.inputs.family import slots
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Example
from dpguard.policy.table import Plan, Policy

ARRAYS, CONFIG = "arrays", "config"


@dataclass(frozen=True)
class Rehearsed:
    """What the folder says: see `flower.run`."""

    given: dict[str, Any]
    model: LoadedModel
    plan: Plan
    settings: Settings
    train: tuple[Example, ...]


@lru_cache(maxsize=1)
def rehearsed(folder: str) -> Rehearsed:
    """Read once a process.

    Raises:
        UserError: the model's name no longer loads the weights that the run began with.
    """
    torch.set_num_threads(1)
    given = json.loads((Path(folder) / flower.SPEC).read_text("utf-8"))
    model = models.load(given["model"], labels=given["labels"], seed=0)
    if model.fingerprint != given["hash"]:
        raise UserError(f"model {given['model']!r} has other weights than the run began with; expected the same")
    plan = Policy(given["rows"]).plan(slots(model.module))
    if plan.hash != given["plan"]:
        raise UserError(f"the table resolves to plan {plan.hash}; expected {given['plan']}")
    train = tuple(Example(text, label) for text, label in given["texts"])
    return Rehearsed(given, model, plan, Settings.of(given["settings"]), train)


def train(message: Message, context: Context) -> Message:
    """One client's turn."""
    folder = str(context.run_config["folder"])
    found = rehearsed(folder)
    config = message.content.config_records[CONFIG]
    client, round_ = int(config["client"]), int(config["round"])
    rounds.set_weights(found.model.module, _tensors(message.content.array_records[ARRAYS]))
    kept = Path(folder) / "state" / f"{client}.pt"
    state = flower.load_state(kept)
    update = one_client_round(
        found.model.module, views.message_plan(found.plan, found.settings),
        [found.train[i] for i in found.given["parts"][client]], found.settings,
        tokenizer=found.model.tokenizer, seed=found.given["seed"], client=client, round_=round_, state=state,
    )  # fmt: skip
    flower.save_state(kept, state)
    return Message(
        RecordDict({ARRAYS: _arrays(update.tensors), CONFIG: ConfigRecord({"client": client})}), reply_to=message
    )


def main(grid: Grid, context: Context) -> None:
    """All rounds; the last weights and the counts are written into the folder."""
    folder = Path(str(context.run_config["folder"]))
    found = rehearsed(str(folder))
    settings, given = found.settings, found.given

    def perform(round_: int, chosen: tuple[int, ...], weights: Mapping[str, Tensor]) -> list[Update]:
        return _ask(grid, settings, round_, chosen, weights)

    def on_weights(round_: int, weights: Mapping[str, Tensor], _states: object) -> None:
        if round_ in given["keep"]:
            _save(weights, folder / f"round-{round_}.safetensors")
            shutil.copytree(folder / "state", folder / f"state-{round_}")

    parts = tuple(tuple(part) for part in given["parts"])
    run = rounds.run(
        found.model.module, found.model.tokenizer, found.train, parts, found.plan, settings,
        seed=given["seed"], delta=given["delta"], on_weights=on_weights, perform=perform,
    )  # fmt: skip
    _save(run.weights, folder / flower.WEIGHTS)
    (folder / flower.RESULT).write_text(json.dumps({"taken": run.taken, "bytes": run.bytes}), "utf-8")


def _ask(
    grid: Grid, settings: Settings, round_: int, chosen: tuple[int, ...], weights: Mapping[str, Tensor]
) -> list[Update]:
    """The messages of a round, in the order of its clients.

    Raises:
        UserError: fewer nodes than clients, or a client without an answer.
    """
    nodes = sorted(grid.get_node_ids())
    if len(nodes) < settings.clients:
        raise UserError(f"{len(nodes)} nodes are connected; expected {settings.clients}, one a client")
    arrays = _arrays(weights)
    asked = [
        Message(
            RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({"client": client, "round": round_})}),
            dst_node_id=nodes[client], message_type=MessageType.TRAIN,
        )
        for client in chosen
    ]  # fmt: skip
    replies = list(grid.send_and_receive(asked))
    failed = [reply.error.reason for reply in replies if reply.has_error()]
    if failed or len(replies) < len(chosen):
        raise UserError(f"round {round_}: {len(chosen) - len(replies) + len(failed)} clients failed: {failed[:1]}")
    by_client = {int(r.content.config_records[CONFIG]["client"]): r.content.array_records[ARRAYS] for r in replies}
    delta: dict[str, Any] = {"local_steps": settings.local_steps, "training": local_training(settings)}
    return [
        Update(
            _tensors(by_client[client]), settings.batch_size, kind=settings.kind, mode="train", mask_seed=round_,
            **(delta if settings.kind == "delta" else {}),
        )
        for client in chosen
    ]  # fmt: skip


def _arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(value.detach().contiguous().numpy()) for name, value in tensors.items()})


def _tensors(record: ArrayRecord) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in record.items()}


def _save(weights: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().contiguous() for name, value in weights.items()}, path)
