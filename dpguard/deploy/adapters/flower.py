"""Flower: a mod through which every message leaves, and a strategy that merges partial messages. Needs [flower].

>>> from flwr.clientapp import ClientApp
>>> app = ClientApp()
>>> @app.train(mods=[PrivacyMod(Path("exported"))])
... def train(message, context): ...

The FIRST mod of a list is the last to touch what leaves: `PrivacyMod` must be the first. A mod on ``ClientApp(mods=)``
also wraps evaluation, whose metrics then need to be allowed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from dpguard.deploy import checks
from dpguard.deploy.checks import Refused
from dpguard.deploy.node import epsilon, flag
from dpguard.deploy.rehearsal import MessageForm, Rehearsal
from dpguard.deploy.server import Server
from dpguard.deploy.site import Reply, Site, as_tensors
from dpguard.errors import UserError
from dpguard.policy.ledger import BudgetSpent

ARRAYS, METRICS, FORM = "arrays", "metrics", "dpguard"
ROUND, PLAN = "server-round", "dpguard-plan"
"""What the server's configuration of a round says."""
Next = Callable[[Message, Context], Message]
_CURRENT: ContextVar[Site] = ContextVar("dpguard site")
log = logging.getLogger("dpguard")


def open_site(context: Context, folder: str | Path | None = None) -> Site:
    """This client, from the configuration of its node.

    A SuperNode is started with ``--node-config 'dpguard-folder="/srv/exported" dpguard-state="/srv/state" ...'``:
    ``dpguard-folder`` (its own copy of the exported folder, which then holds whatever the server's app says),
    ``dpguard-state`` (ledger, outbox, personal weights), ``dpguard-client`` (its name), ``dpguard-table`` (its own,
    stricter table), ``dpguard-budget``, ``dpguard-allow-change=true`` (go on with what is left under another table).
    In a simulation the state of client k lies in ``state/client-k`` of the run
    configuration.

    Args:
        context: Flower's.
        folder: the exported folder when the node names none: the app's own.

    Raises:
        UserError: no folder, no place for the state, a budget that is no number, ``dpguard-allow-change`` neither true
            nor false, or what `Site` refuses.
    """
    node, run = context.node_config, context.run_config
    found = node.get("dpguard-folder", folder)
    if found is None:
        raise UserError("no exported folder; expected dpguard-folder in the node's configuration")
    part = node.get("partition-id")
    state = node.get("dpguard-state")
    if state is None and part is not None and run.get("state"):
        state = str(Path(str(run["state"])) / f"client-{part}")
    if state is None:
        raise UserError("no place for the ledger; expected dpguard-state in the node's configuration")
    name = node.get("dpguard-client", "client" if part is None else f"client-{part}")
    budget, change, table = "dpguard-budget", "dpguard-allow-change", node.get("dpguard-table")
    return Site(
        str(found), str(state), client=str(name), table=None if table is None else str(table),
        budget=epsilon(budget, node.get(budget)), allow_change=flag(change, node.get(change, False)),
    )  # fmt: skip


@dataclass(frozen=True)
class PrivacyMod:
    """A mod: everything that leaves this client passes the gate. An object, so that Ray can send it to a worker.

    It checks what the server sent before any training, hands the training function the open site (`current_site`),
    lets what it returns leave through the gate, and answers an asked-again round with the same message. Anything that
    is not as rehearsed raises, and Flower then sends an error and nothing else.

    Args:
        folder: the exported folder, where the node's configuration names none.
        opener: opens this client's `Site`; `open_site` when None.
    """

    folder: Path | None = None
    opener: Callable[[Context], Site] | None = None

    def __call__(self, message: Message, context: Context, call_next: Next) -> Message:
        """One message in, one out.

        Raises:
            Refused, BudgetSpent: nothing leaves. Flower sends the sentence to the server, so any other mistake, which
                may quote a text or a path of the site, is told in the site's log alone.
        """
        try:
            return self._through(message, context, call_next)
        except (Refused, BudgetSpent):
            raise
        except UserError as error:
            log.error("nothing leaves: %s", error)
            raise Refused("the site cannot take part, its own log says why; nothing leaves") from None

    def _through(self, message: Message, context: Context, call_next: Next) -> Message:
        if not message.metadata.message_type.startswith(MessageType.TRAIN):
            return self._only_allowed_metrics(_guarded(call_next, message, context), context)
        with self._open(context) as site:
            weights, config = _received(message)
            round_number = _round(config)
            told = config.get(PLAN)
            sent = site.begin(weights, round_number=round_number, plan_hash=None if told is None else str(told))
            if sent is None:
                token = _CURRENT.set(site)
                try:
                    reply = _guarded(call_next, message, context)
                finally:
                    _CURRENT.reset(token)
                update, metrics, form = _offered(reply)
                sent = site.send(update, weights, round_number=round_number, form=form, metrics=metrics)
            return Message(content(sent), reply_to=message)

    def _open(self, context: Context) -> Site:
        return open_site(context, self.folder) if self.opener is None else self.opener(context)

    def _only_allowed_metrics(self, reply: Message, context: Context) -> Message:
        """Evaluation and queries: numbers on the list leave, and nothing else."""
        if dict(reply.content.array_records) or dict(reply.content.config_records):
            raise Refused("a reply to anything but training holds arrays or configuration; expected metrics alone")
        with self._open(context) as site:
            for record in reply.content.metric_records.values():
                checks.check_metrics(dict(record), site.rehearsal.allowed)
        return reply


def current_site() -> Site:
    """The site that the mod opened, inside the training function.

    Raises:
        UserError: the mod is not there.
    """
    site = _CURRENT.get(None)
    if site is None:
        raise UserError("no site is open; expected @app.train(mods=[PrivacyMod(folder)])")
    return site


def offer(update: Mapping[str, Tensor], form: MessageForm, message: Message) -> Message:
    """What a training function returns: its update and how it was made. The gate is still to come."""
    record = RecordDict({ARRAYS: arrays(update), FORM: ConfigRecord({"form": json.dumps(asdict(form))})})
    return Message(record, reply_to=message)


def arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as Flower sends them."""
    return ArrayRecord({name: Array(value.detach().cpu().contiguous().numpy()) for name, value in tensors.items()})


def tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """The other way round."""
    return as_tensors({name: np.asarray(array.numpy()) for name, array in record.items()})


def content(reply: Reply) -> RecordDict:
    """A reply as Flower sends it: one record of arrays, and one of metrics where any are allowed."""
    record = RecordDict({ARRAYS: arrays(reply.tensors)})
    if reply.metrics:
        record[METRICS] = MetricRecord(dict(reply.metrics))
    return record


class Merging(FedAvg):  # type: ignore[misc]
    """Merges the clients' partial messages into the current global weights, all clients alike.

    Flower's own strategies replace the global model by what came back: a client that shares half of the layers would
    shrink it to that half, and zero-weighted or differently partial messages would mix differences with weights.

    Args:
        rehearsal: what was rehearsed.
        clients: how many take part in a round.
        available: how many must be connected before the first round.
    """

    def __init__(self, rehearsal: Rehearsal, *, clients: int = 2, available: int | None = None) -> None:
        super().__init__(
            fraction_train=1e-9, fraction_evaluate=0.0, min_train_nodes=clients,
            min_available_nodes=clients if available is None else available, arrayrecord_key=ARRAYS,
        )  # fmt: skip
        self.rehearsal = rehearsal
        self.server = Server(rehearsal)
        self._weights: dict[str, Tensor] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        """Sends the weights, the round and the hash of the table."""
        self._weights = tensors(arrays)
        config[PLAN] = self.rehearsal.plan.hash
        return super().configure_train(server_round, arrays, config, grid)  # type: ignore[no-any-return]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next global weights: every one, whatever the messages left out.

        Raises:
            UserError: no client sent a message (all refused, or failed).
        """
        valid, failed = self._check_and_log_replies(replies, is_train=True, validate=False)
        if not valid:
            raise UserError(
                f"round {server_round}: none of {len(failed)} clients sent a message; expected at least one (a client "
                "says why in its own log, and refuses when its budget is spent)"
            )
        # in the order of the nodes, not of their arrival: a sum of floats depends on it
        valid.sort(key=lambda reply: int(reply.metadata.src_node_id))
        messages = [tensors(reply.content.array_records[ARRAYS]) for reply in valid]
        self._weights = self.server.step(self._weights, messages)
        return arrays(self._weights), None


def _guarded(call_next: Next, message: Message, context: Context) -> Message:
    """The training function; what goes wrong in it is told at the site alone, because it may quote a text."""
    try:
        reply = call_next(message, context)
    except UserError:
        raise  # `PrivacyMod` tells the server nothing of it
    except Exception as error:
        log.exception("training failed")
        raise Refused(f"training failed at the site ({type(error).__name__}); nothing leaves") from None
    if reply.has_error():
        log.error("training failed: %s", reply.error.reason)
        raise Refused("training failed at the site; nothing leaves")
    return reply


def _received(message: Message) -> tuple[dict[str, Tensor], ConfigRecord]:
    if len(message.content.array_records) != 1 or len(message.content.config_records) != 1:
        raise Refused("the server's message holds other records than one of arrays and one of configuration")
    return tensors(next(iter(message.content.array_records.values()))), next(
        iter(message.content.config_records.values())
    )


def _round(config: ConfigRecord) -> int:
    value = config.get(ROUND)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(f"the server's configuration has {ROUND} {value!r}; expected the number of the round")
    return value


def _offered(reply: Message) -> tuple[dict[str, Tensor], dict[str, Any], MessageForm]:
    records = reply.content
    if len(records.array_records) != 1:
        raise Refused(f"the reply holds {len(records.array_records)} records of arrays; expected one")
    configs = dict(records.config_records)
    form = configs.pop(FORM, None)
    if configs:
        raise Refused(f"the reply holds configuration {sorted(configs)[0]!r}, which would leave past clip and noise")
    if form is None:
        raise Refused("the reply does not say how its update was made; expected what offer() returns")
    made = MessageForm(**json.loads(str(form["form"])))
    metrics: dict[str, Any] = {}
    for record in records.metric_records.values():
        metrics |= dict(record)
    return tensors(next(iter(records.array_records.values()))), metrics, made
