"""NVFLARE: filters through which every task and every result pass, and a controller that merges. Needs [nvflare].

The filter of results takes every kind of result and raises on what it cannot handle; NVFLARE then sends an error code
and nothing else. (A filter that declares the kinds it supports is not called for the others, which leave as they are;
NVFLARE's default transfer is full weights.) It answers with a fresh message, so that no header of the old one leaves.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.workflows.model_controller import ModelController
from safetensors.torch import save_file
from torch import Tensor

from dpguard.deploy import training
from dpguard.deploy.checks import Refused
from dpguard.deploy.rehearsal import MessageForm, Rehearsal
from dpguard.deploy.server import Server
from dpguard.deploy.site import Site, as_tensors
from dpguard.errors import UserError
from dpguard.inputs import models
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Example

FORM, PLAN = "dpguard-form", "dpguard-plan"
"""Keys of a message's meta data: how an update was made, and the table that the server says it runs."""
FRAMEWORKS_OWN = {str(key) for key in (MetaKey.CURRENT_ROUND, MetaKey.TOTAL_ROUNDS, MetaKey.JOB_ID, MetaKey.SITE_NAME)}
"""Meta data that NVFLARE itself adds, and that says nothing about texts."""
WEIGHTS = "global_weights.safetensors"
log = logging.getLogger("dpguard")


@dataclass
class Round:
    """What one client knows of the round at hand.

    Attributes:
        weights: the global weights.
        number: from 1.
        again: the message of this round exists already, so that nothing is to be trained.
    """

    weights: dict[str, Tensor]
    number: int
    again: bool


_ROUNDS: dict[tuple[str, str], Round] = {}


@dataclass(frozen=True)
class Place:
    """Where a client's things are; the same arguments for filters and executor.

    Attributes:
        folder: the exported folder at the site: its own copy, whatever the job carries.
        state: parent of the clients' state; client X keeps ledger, outbox and personal weights in ``state/X``.
        table: the site's own, stricter table, or "".
        allow_change: go on with what is left of the ledger under another table than before.
    """

    folder: str
    state: str
    table: str = ""
    allow_change: bool = False

    def open(self, fl_ctx: FLContext) -> Site:
        """This client's site."""
        name = str(fl_ctx.get_identity_name())
        state, table = Path(self.state) / name, self.table or None
        return Site(self.folder, state, client=name, table=table, allow_change=self.allow_change)


def round_of(fl_ctx: FLContext) -> Round:
    """The round that `TaskGate` let in.

    Raises:
        Refused: the filter of tasks is not there.
    """
    found = _ROUNDS.get(_key(fl_ctx))
    if found is None:
        raise Refused("no round was let in; expected TaskGate among the client's task data filters")
    return found


class _Gate(DXOFilter):  # type: ignore[misc]
    """A filter that takes whole messages, at a place."""

    def __init__(self, folder: str, state: str, table: str = "", allow_change: bool = False) -> None:
        super().__init__(supported_data_kinds=None, data_kinds_to_filter=None)
        self.folder, self.state, self.table = folder, state, table  # a job writes them down by these names
        self.allow_change = allow_change
        self.place = Place(folder, state, table, allow_change)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Unused: `process` takes the whole message."""
        raise NotImplementedError


class TaskGate(_Gate):
    """Task data filter: what the server sent is the rehearsed model, or the task is not even begun.

    Args:
        folder, state, table, allow_change: see `Place`.
    """

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Check weights, frozen layers, table and budget; keep the round for the other filter.

        Raises:
            Refused, BudgetSpent: see `Site.begin`.
        """
        _ROUNDS.pop(_key(fl_ctx), None)
        dxo = _dxo(shareable)
        if dxo.data_kind != DataKind.WEIGHTS:
            raise Refused(f"the server sent {dxo.data_kind}; expected WEIGHTS")
        weights = as_tensors(dxo.data)
        number = shareable.get_header(AppConstants.CURRENT_ROUND)
        if isinstance(number, bool) or not isinstance(number, int):
            raise Refused(f"the server's message has round {number!r}; expected a number")
        told = dxo.get_meta_prop(PLAN)
        with self.place.open(fl_ctx) as site:
            again = site.begin(weights, round_number=number + 1, plan_hash=None if told is None else str(told))
        _ROUNDS[_key(fl_ctx)] = Round(weights, number + 1, again is not None)
        return shareable


class ResultGate(_Gate):
    """Task result filter: the policy table, applied to whatever is about to leave.

    Args:
        folder, state, table, allow_change: see `Place`.
    """

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """A fresh message with what may leave.

        Raises:
            Refused, BudgetSpent: anything that is not as rehearsed; NVFLARE sends an error code then.
        """
        code = shareable.get_return_code()
        if code != ReturnCode.OK:
            return make_reply(code)  # the code alone: a failed task's content may be anything
        with self.place.open(fl_ctx) as site:
            return through(site, shareable, round_of(fl_ctx))


def through(site: Site, shareable: Shareable, begun: Round) -> Shareable:
    """One result through an open site: what `ResultGate` does.

    Raises:
        Refused, BudgetSpent: see `Site.send`.
    """
    dxo = _dxo(shareable)
    if dxo.data_kind != DataKind.WEIGHT_DIFF:
        raise Refused(f"the result is of kind {dxo.data_kind}; expected WEIGHT_DIFF")
    meta = {str(key): value for key, value in (dxo.meta or {}).items()}
    form = meta.pop(FORM, None)
    if form is None:
        raise Refused("the result does not say how its update was made; expected what offer() returns")
    metrics = {key: value for key, value in meta.items() if key not in FRAMEWORKS_OWN}
    reply = site.send(
        as_tensors(dxo.data), begun.weights, round_number=begun.number, form=MessageForm(**json.loads(str(form))),
        metrics=metrics,
    )  # fmt: skip
    fresh: Shareable = DXO(DataKind.WEIGHT_DIFF, data=as_arrays(reply.tensors), meta=dict(reply.metrics)).to_shareable()
    fresh.set_return_code(ReturnCode.OK)
    return fresh


def offer(update: Mapping[str, Tensor], form: MessageForm) -> Shareable:
    """What an executor returns: an update and how it was made. The gate is still to come."""
    dxo = DXO(DataKind.WEIGHT_DIFF, data=as_arrays(update), meta={FORM: json.dumps(asdict(form))})
    shareable: Shareable = dxo.to_shareable()
    shareable.set_return_code(ReturnCode.OK)
    return shareable


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors as NVFLARE sends them."""
    return {name: np.ascontiguousarray(value.detach().cpu().numpy()) for name, value in tensors.items()}


class PrivateExecutor(Executor):  # type: ignore[misc]
    """Trains on the site's texts. A job's own executor subclasses it and gives its own `texts`.

    Args:
        folder, state, table, allow_change: see `Place`.
        model: name of the model; the rehearsed one's when empty.

    Attributes:
        loaded: the model, from the first round on.
    """

    def __init__(self, folder: str, state: str, table: str = "", model: str = "", allow_change: bool = False) -> None:
        super().__init__()
        self.folder, self.state, self.table, self.model = folder, state, table, model
        self.allow_change = allow_change
        self.place = Place(folder, state, table, allow_change)
        self.loaded: LoadedModel | None = None

    def texts(self, fl_ctx: FLContext) -> list[Example]:
        """This site's texts.

        Raises:
            NotImplementedError: always; a job says where its texts are.
        """
        raise NotImplementedError

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """One round."""
        if task_name != AppConstants.TASK_TRAIN:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        begun = round_of(fl_ctx)
        with self.place.open(fl_ctx) as site:
            card = site.rehearsal.model
            if begun.again:
                return offer({}, site.rehearsal.message)
            if self.loaded is None:
                self.loaded = models.load(self.model or card.name, labels=card.labels, seed=0)
            try:
                training.set_weights(self.loaded.module, begun.weights)
                update, form = training.local_update(
                    site, self.loaded, self.texts(fl_ctx), round_number=begun.number
                )  # fmt: skip
            except UserError:
                raise
            except Exception as error:
                log.exception("training failed")
                raise Refused(f"training failed at the site ({type(error).__name__}); nothing leaves") from None
        return offer(update, form)


class MergingController(ModelController):  # type: ignore[misc]
    """The server's workflow: merges partial messages into the current global weights, all clients alike.

    Args:
        folder: the exported folder at the server.
        clients: how many must take part in a round.
        rounds: how many; 0 = as many as were rehearsed.
        model: name of the model; the rehearsed one's when empty.
    """

    def __init__(self, folder: str, clients: int = 2, rounds: int = 0, model: str = "") -> None:
        super().__init__(persistor_id="")
        self.folder, self.clients, self.rounds, self.model = folder, clients, rounds, model

    def run(self) -> None:
        """Rounds of sending, waiting and merging; the last weights are saved in the job's folder."""
        rehearsal = Rehearsal.read(self.folder)
        card = rehearsal.model
        loaded = models.load(self.model or card.name, labels=card.labels, seed=0)
        weights, server = training.first_weights(loaded), Server(rehearsal)
        for number in range(self.rounds or rehearsal.rounds):
            model = FLModel(
                params=as_arrays(weights), params_type=ParamsType.FULL, current_round=number,
                total_rounds=self.rounds or rehearsal.rounds, meta={PLAN: rehearsal.plan.hash},
            )  # fmt: skip
            results = self.send_model_and_wait(targets=self.sample_clients(self.clients), data=model)
            found = [result for result in results if result.params]
            if not found:
                self.panic(f"round {number + 1}: no client sent a message; see the clients' logs")
                return
            found.sort(key=lambda result: str(result.meta.get("client_name", "")))
            weights = server.step(weights, [as_tensors(result.params) for result in found])
            self._save(weights)

    def _save(self, weights: Mapping[str, Tensor]) -> None:
        place = Path(self.engine.get_workspace().get_app_dir(self.fl_ctx.get_job_id()))
        place.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, place / WEIGHTS)


def _key(fl_ctx: FLContext) -> tuple[str, str]:
    return str(fl_ctx.get_job_id()), str(fl_ctx.get_identity_name())


def _dxo(shareable: Shareable) -> DXO:
    try:
        return from_shareable(shareable)
    except ValueError as error:
        raise Refused(f"the message is no data exchange object ({error}); expected one") from None
