"""What a study file may say: one frozen pydantic model a section, unknown keys forbidden.

A field's ``description`` is what an error sentence says was expected, so it reads on from "expected".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from dpguard import registry
from dpguard.errors import UserError, did_you_mean

CEILING = "none"
"""The policy without any defence: what the panel recovers when nothing is done."""
FLOOR = "prior"
"""The attack that never looks at the message: what public text alone gives away."""

LeakageMetric = Literal["rouge1", "rouge2", "rougeL", "exact_match", "token_recall", "entity_recall"]
UtilityMetric = Literal["accuracy", "mcc", "f1"]
Moment = Literal["start", "tuned", "end", "rounds"]

T = TypeVar("T")


def _number(value: Any) -> Any:
    """Let nothing but numbers, and texts that say one, reach a numeric field (True is 1 to pydantic)."""
    if isinstance(value, bool):
        raise ValueError("a truth value is no number")
    return value


def _text(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("an empty text")
    return value


def _given(value: Any) -> Any:
    """A section that is named must say something: ``leakage:`` alone is not ``no leakage leg``."""
    if value is None:
        raise ValueError("an empty section")
    return value


def _listed(value: Any) -> Any:
    """A single value stands for a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values:
        raise ValueError("an empty list")
    if len(set(values)) < len(values):
        raise UserError(f"a value appears twice in {list(values)!r}, expected distinct values")
    return values


def _folder_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError("not the name of a folder")
    return value


def _attacks(names: Sequence[str]) -> tuple[str, ...]:
    """Known attacks (``match`` or, with a preset, ``match:tag``) in one order, the floor always among them."""
    known = {*registry.names("dpguard.attacks"), FLOOR}
    for name in names:
        attack = name.partition(":")[0]
        if attack not in known:
            raise UserError(f"unknown attack {attack!r}{did_you_mean(attack, known)}")
    return tuple(sorted({*names, FLOOR}))


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_text)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_number), Field(ge=0, lt=2**32)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_listed), AfterValidator(_distinct)]
Moments = Annotated[tuple[Moment, ...], BeforeValidator(_listed), AfterValidator(_distinct)]
Knowledge = Annotated[
    tuple[Literal["count", "labels", "lengths"], ...], BeforeValidator(_listed), AfterValidator(_distinct)
]
Attacks = Annotated[tuple[Text, ...], BeforeValidator(_listed), AfterValidator(_distinct), AfterValidator(_attacks)]
Names = Annotated[tuple[Text, ...], BeforeValidator(_listed), AfterValidator(_distinct)]
Rounds = Annotated[tuple[Count, ...], BeforeValidator(_listed), AfterValidator(_distinct)]
_COUNT = "a whole number above 0"
_ABOVE_0 = "a number above 0"
OWN_TRAINING = ("batch_size", "learning_rate", "epochs", "optimizer")
"""What a policy may set of the study's ``utility`` for itself."""
_SEEDS = "distinct whole numbers from 0 on, such as [0, 1, 2]"


class Section(BaseModel):
    """Base of every section: nothing unknown, nothing changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Section):
    """Where the texts come from; a plain text stands for ``path``.

    Attributes:
        path: ``demo``, a file (jsonl, csv, parquet) or a hub name.
        text, label: names of the columns.
        test: file of the held-out texts; without it, 15 % of ``path`` are held out.
        public: file of the attacker's public texts of the same kind; without it, 20 % of what is left of ``path`` are
            set apart for that and not trained on.
        entities: column of marked entities.
    """

    path: Text = Field(description="'demo', a file of texts or a hub name")
    text: Text = Field(default="text", description="the name of the column of texts")
    label: Text = Field(default="label", description="the name of the column of labels")
    test: Text | None = Field(default=None, description="a file of held-out texts")
    public: Text | None = Field(default=None, description="a file of public texts")
    entities: Text | None = Field(default=None, description="the name of the column of marked entities")


class ThreatModel(Section):
    """What the server knows besides the message, and what the message is (see `measure.threat.Threat`).

    Attributes:
        know: what is disclosed; labels and lengths tell the count too.
        mode: ``train`` = clients run with dropout.
        local_steps: 0 = the message is a gradient; k = the change of the weights after k steps of plain SGD.
        learning_rate: of those steps.
        clients: how many clients' messages the server sees only the mean of.
        candidates: 0 = the open world; M = the server knows that the text is one of M, the others being public texts.
    """

    know: Knowledge = Field(default=("count",), description="a list of count, labels and lengths")
    mode: Literal["eval", "train"] = Field(default="eval", description="eval or train")
    local_steps: Annotated[int, BeforeValidator(_number), Field(ge=0)] = Field(
        default=0, description="a whole number from 0 on"
    )
    learning_rate: Positive = Field(default=1.0e-3, description=_ABOVE_0)
    clients: Count = Field(default=1, description=_COUNT)
    candidates: Annotated[int, BeforeValidator(_number), Field(ge=0)] = Field(
        default=0, description="a whole number from 2 on, or 0"
    )


class Leakage(Section):
    """The leg that attacks what a client shares.

    Attributes:
        panel: version of the attacker.
        metric: the score that the report leads with; every metric is recorded.
        targets: messages attacked in a cell.
        batch_size: texts in one message.
        at: weights that are attacked: before (``start``) or after (``end``) the utility leg's training; those that
            the undefended control ends with at its first seed, the same for all policies (``tuned``); or those of
            the federation's ``observe`` (``rounds``), each with a message of the same record.
        seeds: one cell a seed.
        attacks: only these of the panel (``prior`` is always among them); None = the whole panel.
        threat: what the server knows, and what the message is.
    """

    panel: Text = Field(default="panel-1", description="the name of a panel, such as panel-1")
    metric: LeakageMetric = Field(default="rougeL", description="a leakage metric such as rougeL")
    targets: Count = Field(default=20, description=_COUNT)
    batch_size: Count = Field(default=1, description=_COUNT)
    at: Moments = Field(default=("start",), description="start, tuned, end, rounds or a list of them")
    seeds: Seeds = Field(default=(0,), description=_SEEDS)
    attacks: Attacks | None = Field(default=None, description="a list of attacks such as [span, match]")
    threat: ThreatModel = Field(default=ThreatModel(), description="a mapping such as {know: [count, labels]}")


class Utility(Section):
    """The leg that trains under the policy and scores on held-out texts.

    Attributes:
        metric: the score that the report leads with; every metric is recorded.
        epochs: expected passes over the training texts; steps = round(epochs / sampling rate).
        batch_size: expected size of a Poisson batch, the public divisor.
        learning_rate: step size of the optimizer; ``public`` = by `schedule.public_learning_rate`.
        optimizer: which optimizer takes the private gradient.
        seeds: one cell a seed.
        train_examples: train on the first so many texts only; None = all.
        policies: names of the policies that are trained, as written under ``policies``; None = all. The others are
            attacked and accounted for as one message, and have no utility.
    """

    metric: UtilityMetric = Field(default="accuracy", description="a utility metric such as accuracy")
    epochs: Positive = Field(default=3.0, description=_ABOVE_0)
    batch_size: Count = Field(default=256, description=_COUNT)
    learning_rate: Positive | Literal["public"] = Field(default=5.0e-4, description="a number above 0, or public")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(default="adam", description="adam, adamw or sgd")
    seeds: Seeds = Field(default=(0,), description=_SEEDS)
    train_examples: Count | None = Field(default=None, description=_COUNT)
    policies: Names | None = Field(default=None, description="names of policies, such as [none]")


class Federation(Section):
    """The utility leg as a federation would run it: see `federation.settings.Settings`, which checks it as a whole.

    Attributes:
        clients: how many there are.
        per_round: how many of them take part in a round.
        rounds: how many rounds.
        local_steps: steps of a client in a round, each on a Poisson batch of its own.
        split: ``iid``, ``dirichlet(0.5)`` (proportions of labels) or ``column(hospital)`` (whose a text is).
        split_seed: of the split; the same for all seeds of the study.
        view: ``client``: the server sees each message; ``aggregate``: their mean (secure aggregation assumed).
        may_fail: clients of a round that may drop out or collude without weakening the guarantee (``aggregate``).
        server: ``fedsgd`` (mean of gradients), ``fedavg`` (mean of changes) or ``fedadam`` (Adam on that mean).
        server_learning_rate: None = 1 for fedavg, learning_rate for fedsgd, .001 for fedadam.
        weights: of the clients in the mean, ``equal`` or by the public ``size`` of their data.
        batch_size: expected size of a client's Poisson batch, the public divisor.
        learning_rate: of the local steps.
        optimizer: of the local steps.
        momentum: of local ``sgd``.
        keep_state: moments live on into a client's next round.
        error_feedback: what pruning and quantising left out is added to the client's next message.
        personal: withheld layers are ``trained`` at home or ``frozen``.
        observe: rounds at which one record is attacked (``leakage.at: rounds``).
        engine: ``embedded``, or ``flower``: the same rounds on Flower's simulation ([flower] extra). No part of a
            cell's identity, because both give the same weights.
    """

    clients: Count = Field(description=_COUNT)
    per_round: Count = Field(description=_COUNT)
    rounds: Count = Field(description=_COUNT)
    local_steps: Count = Field(default=1, description=_COUNT)
    split: Text = Field(default="iid", description="iid, dirichlet(0.5) or column(name)")
    split_seed: Seed = Field(default=0, description="a whole number from 0 on")
    view: Literal["client", "aggregate"] = Field(default="client", description="client or aggregate")
    may_fail: Annotated[int, BeforeValidator(_number), Field(ge=0)] = Field(
        default=0, description="a whole number from 0 on"
    )
    server: Literal["fedsgd", "fedavg", "fedadam"] = Field(default="fedavg", description="fedsgd, fedavg or fedadam")
    server_learning_rate: Positive | None = Field(default=None, description=_ABOVE_0)
    weights: Literal["equal", "size"] = Field(default="equal", description="equal or size")
    batch_size: Count = Field(default=32, description=_COUNT)
    learning_rate: Positive = Field(default=0.1, description=_ABOVE_0)
    optimizer: Literal["sgd", "adam"] = Field(default="sgd", description="sgd or adam")
    momentum: Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)] = Field(
        default=0.0, description="a number from 0 up to 1"
    )
    keep_state: bool = Field(default=False, description="true or false")
    error_feedback: bool = Field(default=False, description="true or false")
    personal: Literal["trained", "frozen"] = Field(default="trained", description="trained or frozen")
    observe: Rounds = Field(default=(), description="distinct rounds such as [1, 15, 30]")
    engine: Literal["embedded", "flower"] = Field(default="embedded", description="embedded or flower")


class Privacy(Section):
    """What a guarantee is stated for: ``delta`` of (epsilon, delta)."""

    delta: Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1)] = Field(
        default=1.0e-5, description="a number above 0 and below 1"
    )


class Caps(Section):
    """What a recommended policy must keep to; None = no cap.

    Attributes:
        max_leakage: of the leakage metric, 0 to 1.
        min_utility: of the utility metric.
        max_epsilon: of the guarantee.
    """

    max_leakage: Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)] | None = Field(
        default=None, description="a number from 0 to 1"
    )
    min_utility: Annotated[float, BeforeValidator(_number), Field(ge=-1, le=1)] | None = Field(
        default=None, description="a number from -1 to 1"
    )
    max_epsilon: Positive | None = Field(default=None, description=_ABOVE_0)


class CellLimits(Section):
    """What one cell may use before it is ended; None = no limit. No part of a cell's identity.

    Attributes:
        minutes: from its start to its end.
        gigabytes: of resident memory (10^9 bytes), with the processes that it started.
    """

    minutes: Positive | None = Field(default=None, description=_ABOVE_0)
    gigabytes: Positive | None = Field(default=None, description=_ABOVE_0)


class Shared(Section):
    """What is kept beside the records of work that several cells share; no part of a cell's identity.

    Attributes:
        gigabytes: room for it (10^9 bytes); over it, what was used longest ago is dropped. 0 = keep nothing.
    """

    gigabytes: Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)] = Field(
        default=4.0, description="a number from 0 on"
    )


class StudyFile(Section):
    """The whole file. The entries under ``policies`` are read by the policy room (`spec.Study.load`)."""

    name: Annotated[Text, AfterValidator(_folder_name)] = Field(
        description="letters, digits, '-', '_' and '.', because it names the folder of the records"
    )
    question: str = Field(default="", description="a sentence")
    model: Text = Field(
        description="'demo', a folder with a model, or a hub name; +lora8 after it: inside a fresh LoRA"
    )
    data: Annotated[Source, BeforeValidator(_as_source)] = Field(
        description="'demo', a file of texts, a hub name, or a mapping with 'path'"
    )
    policies: dict[str, Any] = Field(min_length=1, description="a mapping of names to policies")
    leakage: Annotated[Leakage | None, BeforeValidator(_given)] = Field(
        default=None, description="a mapping such as {targets: 20}, or no leakage key at all"
    )
    utility: Annotated[Utility | None, BeforeValidator(_given)] = Field(
        default=None, description="a mapping such as {epochs: 3}, or no utility key at all"
    )
    federation: Annotated[Federation | None, BeforeValidator(_given)] = Field(
        default=None, description="a mapping such as {clients: 20, per_round: 10, rounds: 30}, or no federation key"
    )
    privacy: Privacy = Field(default=Privacy(), description="a mapping such as {delta: 1.0e-5}")
    recommend: Caps = Field(default=Caps(), description="a mapping such as {max_leakage: 0.2}")
    limits: CellLimits = Field(default=CellLimits(), description="a mapping such as {minutes: 60, gigabytes: 8}")
    cache: Shared = Field(default=Shared(), description="a mapping such as {gigabytes: 4}")
