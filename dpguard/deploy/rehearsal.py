"""What was rehearsed, as an exported folder holds it: the table, the model it was tried on, the message, the budget.

`policy.yaml` is the table; `rehearsal.json` is everything else that a message is checked against. Neither holds a
seed, a text or a weight.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from dpguard.deploy.checks import Content, Refused
from dpguard.documents import Document
from dpguard.errors import UserError, did_you_mean
from dpguard.inputs.family import identity, slots
from dpguard.inputs.models import LoadedModel
from dpguard.policy.guarantee import Sampling, plain_epsilon
from dpguard.policy.layers import Slot
from dpguard.policy.table import Plan, Policy

FORMAT = "dpguard rehearsal"
VERSION = 1
TABLE, REHEARSAL = "policy.yaml", "rehearsal.json"
NUM_EXAMPLES = "num-examples"
"""A metric of this name (dashes or underscores) may only say the public number of examples."""


@dataclass(frozen=True)
class Weight:
    """One parameter of the rehearsed model: its slot, its type, and a digest of its first weights."""

    slot: Slot
    dtype: str
    digest: str


@dataclass(frozen=True)
class ModelCard:
    """The model that was rehearsed, without its weights.

    Attributes:
        name: as the study named it.
        hash: `LoadedModel.fingerprint` at the first weights.
        kind: `inputs.family.identity`: type, names and shapes; what a ledger knows a model by.
        labels: number of classes.
        weights: its parameters.
    """

    name: str
    hash: str
    kind: str
    labels: int
    weights: tuple[Weight, ...]

    @staticmethod
    def of(model: LoadedModel, labels: int) -> ModelCard:
        """The card of a model as it is loaded."""
        named = dict(model.module.named_parameters(remove_duplicate=False))
        weights = tuple(
            Weight(slot, str(named[slot.name].dtype).removeprefix("torch."), digest(named[slot.name]))
            for slot in slots(model.module)
        )
        return ModelCard(model.name, model.fingerprint, identity(model.module), labels, weights)

    @property
    def slots(self) -> list[Slot]:
        """For `Policy.plan`."""
        return [weight.slot for weight in self.weights]

    @property
    def dtype(self) -> torch.dtype:
        """The one type of its parameters."""
        return getattr(torch, self.weights[0].dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MessageForm:
    """How a message is made. Public; a client that makes it otherwise is refused.

    Attributes:
        kind: ``gradient`` of one batch, or ``delta``: weights after the local steps minus weights before them.
        batch_size: the PUBLIC batch size.
        sampling_rate: probability that an example is in a batch; a client may sample more rarely, not more often.
        sampling: ``poisson`` or ``shuffle``.
        local_steps: of a delta.
        learning_rate: of the client's own steps.
        optimizer: of the same, ``sgd`` or ``adam``.
        momentum: of the same.
        examples: the public number of examples that the guarantee was stated for.
        server: how the server steps on the mean message: ``fedsgd``, ``fedavg``, ``fedadam`` (`federation.server`), or
            ``adam`` or ``adamw`` on the mean gradient, as a training in one place does.
        server_rate: of that step.
    """

    kind: Literal["gradient", "delta"]
    batch_size: int
    sampling_rate: float
    learning_rate: float
    optimizer: str
    examples: int
    sampling: Sampling = "poisson"
    local_steps: int = 1
    momentum: float = 0.0
    server: str = "fedavg"
    server_rate: float = 1.0


@dataclass(frozen=True)
class Budget:
    """What the rehearsed guarantee allows.

    Attributes:
        delta: of (epsilon, delta).
        epsilon: of all messages together; infinity when there is no guarantee.
        messages: noised messages (local steps, where every one of them is noised) that it was stated for.
    """

    delta: float
    epsilon: float
    messages: int

    @property
    def limit(self) -> float | None:
        """The ledger's budget: None without a guarantee; an epsilon of 0 is the smallest that a ledger takes."""
        return None if self.epsilon == math.inf else max(self.epsilon, sys.float_info.min)


@dataclass(frozen=True)
class Rehearsal:
    """Everything that a message is held against.

    Attributes:
        study, policy: names in the records.
        rows: the table.
        model, message, budget: see there.
        metrics: names that may leave beside the tensors, past clip and noise.
    """

    study: str
    policy: str
    rows: tuple[dict[str, Any], ...]
    model: ModelCard
    message: MessageForm
    budget: Budget
    metrics: tuple[str, ...] = ()
    _plan: Plan | None = field(default=None, repr=False, compare=False)

    @property
    def plan(self) -> Plan:
        """The table resolved against the rehearsed model."""
        return self._plan or Policy([dict(row) for row in self.rows], self.policy).plan(self.model.slots)

    @property
    def content(self) -> Content:
        """What a client hands to the gate."""
        return content_of(self.plan, self.message.kind)

    @property
    def rounds(self) -> int:
        """Rounds that the budget allows."""
        return max(1, self.budget.messages // self.messages_a_round)

    @property
    def messages_a_round(self) -> int:
        """How many messages the ledger counts a round: every noised local step, or one where the whole is noised."""
        return self.message.local_steps if self.content == "noised" else 1

    @property
    def allowed(self) -> dict[str, float | None]:
        """Metric -> the only value that it may have, None for any."""
        same = NUM_EXAMPLES.replace("-", "_")
        return {n: float(self.message.examples) if n.replace("-", "_") == same else None for n in self.metrics}

    def write(self, folder: Path) -> None:
        """`policy.yaml` and `rehearsal.json`."""
        table = {"name": self.policy, "rows": [dict(row) for row in self.rows]}
        (folder / TABLE).write_text(yaml.safe_dump(table, sort_keys=False, default_flow_style=None), "utf-8")
        plain: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "study": self.study,
            "policy": self.policy,
            "plan": self.plan.hash,
            "message": asdict(self.message),
            "budget": asdict(self.budget) | {"epsilon": plain_epsilon(self.budget.epsilon)},
            "metrics": list(self.metrics),
            "model": asdict(replace(self.model, weights=()))
            | {"weights": [{**asdict(w.slot), "dtype": w.dtype, "digest": w.digest} for w in self.model.weights]},
        }  # fmt: skip
        (folder / REHEARSAL).write_text(json.dumps(plain, indent=1) + "\n", "utf-8")

    @staticmethod
    def read(folder: str | Path) -> Rehearsal:
        """What `write` wrote.

        Raises:
            Refused: the table no longer is the one that was rehearsed.
            UserError: files that are missing, damaged, or of another version.
        """
        folder = Path(folder)
        plain = _json(folder / REHEARSAL)
        try:
            found, wanted = _from_plain(plain, Document.read(folder / TABLE).data), plain["plan"]
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{folder / REHEARSAL} is damaged ({error!r}); expected the file as exported") from None
        if found.plan.hash != wanted:
            raise Refused(
                f"{folder / TABLE} is not the table that was rehearsed; expected plan {wanted} (a site's own, "
                "stricter table goes into a file of its own)"
            )
        return found


def content_of(plan: Plan, kind: str) -> Content:
    """What a client hands to the gate under a table: a clipped sum, a noised difference, or a raw one."""
    if kind == "gradient":
        return "clipped"
    return "noised" if any(group.unit == "example" for group in plan.groups.values()) else "raw"


def digest(tensor: Tensor) -> str:
    """16 hex digits of a tensor's bytes."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def check_model(card: ModelCard, module: nn.Module) -> None:
    """The module is the rehearsed one, whatever its weights are now.

    Raises:
        Refused: another type, other names or shapes.
    """
    if identity(module) != card.kind:
        raise Refused(
            f"the model is not the rehearsed {card.name!r}; expected the same type, parameter names and shapes"
        )


def check_weights(card: ModelCard, weights: Mapping[str, Any], plan: Plan, *, first: bool) -> dict[str, Tensor]:
    """The global weights of a round: the rehearsed names, shapes and type, finite; frozen tensors as they always were.

    Args:
        card: the rehearsed model.
        weights: what the server sent: every parameter; second names of tied tensors may be there.
        plan: the table.
        first: at the first round the trained tensors too must be those that were rehearsed.

    Returns:
        Parameter name -> tensor, in the model's order, tied ones once.

    Raises:
        Refused: anything else.
    """
    from dpguard.deploy.checks import check_names, check_tensor

    own = [w for w in card.weights if not w.slot.tied_to]
    check_names(weights, [w.slot.name for w in own], [w.slot.name for w in card.weights if w.slot.tied_to])
    out = {}
    for weight in own:
        name, value = weight.slot.name, weights[weight.slot.name]
        check_tensor(name, value, weight.slot.shape, card.dtype)
        frozen = not plan[name].train
        if (frozen or first) and digest(value) != weight.digest:
            raise Refused(
                f"{name!r} has other weights than the rehearsed model"
                + (", and the policy freezes it" if frozen else " at the first round")
                + "; expected those of the rehearsal"
            )
        out[name] = value
    return out


def _json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected an exported folder") from None
    except ValueError:
        raise UserError(f"{path} is damaged; expected the file as exported") from None
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise UserError(f"{path} is no rehearsal of dpguard; expected the file as exported")
    if plain.get("version") != VERSION:
        raise UserError(f"{path} has version {plain.get('version')!r}, expected {VERSION}: another dpguard wrote it")
    return plain


def _from_plain(plain: Mapping[str, Any], table: Mapping[str, Any]) -> Rehearsal:
    model = dict(plain["model"])
    weights = []
    for row in model.pop("weights"):
        own = dict(row)
        dtype, mark = own.pop("dtype"), own.pop("digest")
        weights.append(Weight(Slot(**own | {"shape": tuple(own["shape"])}), dtype, mark))
    unknown = [key for key in table if key not in ("name", "rows")]
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r} in {TABLE}{did_you_mean(unknown[0], ['name', 'rows'])}")
    budget = dict(plain["budget"])
    return Rehearsal(
        study=plain["study"],
        policy=plain["policy"],
        rows=tuple(dict(row) for row in table["rows"]),
        model=ModelCard(**model | {"weights": tuple(weights)}),
        message=MessageForm(**plain["message"]),
        budget=Budget(**budget | {"epsilon": float(budget["epsilon"])}),
        metrics=tuple(plain["metrics"]),
    )
