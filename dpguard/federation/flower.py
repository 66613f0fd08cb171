"""The same federation on Flower: `rounds.run` in a ServerApp, its clients' turns in ClientApps. Needs [flower].

Same seeds, same split, same functions (`turn.one_client_round`, `server.server_step`), so that the global weights are
those of the embedded engine. A client's own state (layers at home, moments) stays in a folder of its node.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpguard.engine.local import LocalState
from dpguard.errors import UserError
from dpguard.federation import rounds, views
from dpguard.federation.settings import Settings
from dpguard.federation.split import Parts
from dpguard.federation.superlink import simulate
from dpguard.inputs.adapters import absolute
from dpguard.inputs.models import READY, LoadedModel
from dpguard.inputs.texts import Example
from dpguard.policy.ledger import Ledger
from dpguard.policy.table import Plan

SPEC, WEIGHTS, RESULT = "rehearsal.json", "weights.safetensors", "result.json"
APP = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "rehearsal"
version = "1.0.0"
description = "A rehearsed federation"
license = "MIT"
dependencies = []

[tool.flwr.app]
publisher = "dpguard"

[tool.flwr.app.components]
serverapp = "rehearsal.apps:server"
clientapp = "rehearsal.apps:client"

[tool.flwr.app.config]
folder = ""
state = ""
""",
    "rehearsal/__init__.py": "",
    "rehearsal/apps.py": """\
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from dpguard.federation import flower_app

client = ClientApp()
server = ServerApp()
client.train()(flower_app.train)
server.main()(flower_app.main)
""",
}
"""The app's files: all that it does is importable, so that Ray can send it to workers."""


def run(
    model: LoadedModel,
    train: Sequence[Example],
    parts: Parts,
    plan: Plan,
    settings: Settings,
    *,
    labels: int,
    seed: int,
    delta: float = 1e-5,
    keep: Collection[int] = (),
    on_weights: rounds.OnWeights = lambda round_, weights, states: None,
    cpus: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> rounds.Run:
    """Train ``model`` in place on Flower's simulation engine; as `rounds.run`.

    Args:
        model: at its first weights; every process loads it anew by its name.
        train, parts, plan, settings, seed, delta: as `rounds.run`.
        labels: number of classes.
        keep: rounds before which ``on_weights`` is called, after the whole run.
        on_weights: as `rounds.run`.
        cpus: processor cores for the clients together.
        say: called with every line that Flower logs.

    Raises:
        UserError: Flower is not installed, the model has other weights than its name loads, or the run fails.
    """
    views.check(plan, settings)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dpg") as place:
        folder = Path(place)
        _write_app(folder)

        def prepare() -> None:
            _write(folder, model, train, parts, plan, settings, labels=labels, seed=seed, delta=delta, keep=keep)

        simulate(
            folder / "app", nodes=settings.clients, cpus=cpus, say=say, scratch=[folder], prepare=prepare,
            settings=[f"folder={json.dumps(str(folder))}", "state=\"\""],
        )  # fmt: skip
        if not (folder / RESULT).is_file():
            raise UserError("Flower's run left no result; expected one, see what it logged")
        result = json.loads((folder / RESULT).read_text("utf-8"))
        for round_ in sorted(keep):
            on_weights(
                round_, load_file(folder / f"round-{round_}.safetensors"), states(folder / f"state-{round_}", settings)
            )
        weights, own = load_file(folder / WEIGHTS), states(folder / "state", settings)
    rounds.set_weights(model.module, weights)
    model.module.eval()
    return rounds.Run(
        weights, own, _ledgers(plan, settings, parts, result["taken"], delta), tuple(result["taken"]),
        tuple(result["bytes"]), time.perf_counter() - started,
    )  # fmt: skip


def _write_app(folder: Path) -> None:
    for file, text in APP.items():
        path = folder / "app" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def _write(
    folder: Path,
    model: LoadedModel,
    train: Sequence[Example],
    parts: Parts,
    plan: Plan,
    settings: Settings,
    **more: Any,
) -> None:
    """What the app's processes need to know, texts among it; nothing of it outlives the run."""
    (folder / "state").mkdir()
    known = {
        "model": absolute(model.name, READY), "hash": model.fingerprint,
        "rows": [dict(row) for row in plan.rows], "plan": plan.hash,
        "settings": asdict(settings), "parts": [list(part) for part in parts],
        "texts": [[e.text, e.label] for e in train], **more, "keep": sorted(more["keep"]),
    }  # fmt: skip
    (folder / SPEC).write_text(json.dumps(known), "utf-8")


def _ledgers(plan: Plan, settings: Settings, parts: Parts, taken: Sequence[int], delta: float) -> tuple[Ledger, ...]:
    """What every client has spent, from the rounds that it took part in."""
    out, each = [], views.messages_a_round(plan, settings)
    for client, count in enumerate(taken):
        ledger = Ledger(f"client {client}", plan.hash, delta)
        if count:
            ledger.spend(views.mechanism(plan, settings, len(parts[client]), count), ("rounds", 1), count=count * each)
        out.append(ledger)
    return tuple(out)


def save_state(path: Path, state: LocalState) -> None:
    """Keep what stays with a client; replaced in one step."""
    draft = path.with_suffix(".part")
    torch.save({"personal": state.personal, "moments": state.moments, "residual": state.residual}, draft)
    draft.replace(path)


def load_state(path: Path) -> LocalState:
    """What `save_state` kept; an empty state where nothing was."""
    if not path.is_file():
        return LocalState()
    found: Mapping[str, Any] = torch.load(path, weights_only=True)
    personal: dict[str, Tensor] = dict(found["personal"])
    return LocalState(personal, found["moments"], dict(found["residual"]))


def states(folder: Path, settings: Settings) -> tuple[LocalState, ...]:
    """Every client's state."""
    return tuple(load_state(folder / f"{client}.pt") for client in range(settings.clients))
