"""Messages that must never leave: what goes wrong in the field, and what a careless or hostile neighbour makes of it.

Every one is tried on the gate of an exported folder by its self-test. Each is refused, or handled in the one way that
its row documents.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpguard.deploy.checks import Refused
from dpguard.deploy.golden import Vectors
from dpguard.deploy.rehearsal import MessageForm
from dpguard.deploy.site import Reply, Site
from dpguard.errors import UserError
from dpguard.policy.ledger import BudgetSpent


@dataclass
class Try:
    """One call of `Site.send`, to be spoilt.

    Attributes:
        update, weights, form, metrics, round_number: its arguments.
        site: the client that is called.
    """

    site: Site
    update: dict[Any, Any]
    weights: dict[str, Any]
    form: MessageForm
    metrics: dict[str, Any] = field(default_factory=dict)
    round_number: int = 1

    @property
    def name(self) -> str:
        """The largest shared tensor: every one of its dimensions is at least 2 where any tensor's are."""
        return max(self.site.plan.shared, key=lambda n: self.site.plan[n].slot.size)

    def put(self, value: Any) -> None:
        """Replace the largest shared tensor."""
        self.update[self.name] = value

    def send(self) -> Reply:
        """Let it leave, if the gate does."""
        return self.site.send(
            self.update, self.weights, round_number=self.round_number, form=self.form, metrics=self.metrics
        )


@dataclass(frozen=True)
class Hostile:
    """One kind of message.

    Attributes:
        name: what it is.
        spoil: makes it of a good one; False when this table has no such message.
        handled: says whether a message that does leave is as documented; None = it must be refused.
        documented: what handling is documented.
    """

    name: str
    spoil: Callable[[Try], bool | None]
    handled: Callable[[Try, Reply], bool] | None = None
    documented: str = "refused"


def _rename(t: Try) -> None:
    t.update[t.name + "_orig"] = t.update.pop(t.name)


def _extra(t: Try) -> None:
    t.update["activations"] = torch.ones(4)


def _missing(t: Try) -> None:
    t.update.pop(t.name)


def _at_one(value: float) -> Callable[[Try], None]:
    def spoil(t: Try) -> None:
        spoilt = t.update[t.name].clone()
        spoilt.view(-1)[0] = value
        t.put(spoilt)

    return spoil


def _as(dtype: torch.dtype) -> Callable[[Try], None]:
    return lambda t: t.put(t.update[t.name].to(dtype))


def _counter(t: Try) -> None:
    t.update["bert.num_batches_tracked"] = torch.tensor(3)


def _frozen(t: Try) -> bool:
    frozen = [name for name, rule in t.site.plan.items() if not rule.train]
    if frozen:
        t.update[frozen[0]] = torch.zeros(t.site.plan[frozen[0]].slot.shape)
    return bool(frozen)


def _zero(t: Try) -> None:
    t.update = {name: torch.zeros_like(value) for name, value in t.update.items()}


def _diverged_is_noise(t: Try, reply: Reply) -> bool:
    """A training that diverged under a table that noises the whole update: what leaves is finite, and noise."""
    finite = all(bool(torch.isfinite(value).all()) for value in reply.tensors.values())
    return finite and t.site.content == "raw" and all(t.site.plan[n].noise for n in t.site.plan.shared)


def _zero_is_noise(t: Try, reply: Reply) -> bool:
    """Zeros before the noise are a client that drew nothing: what leaves is noise wherever the table adds any."""
    noised = [n for n in reply.tensors if t.site.plan[n].noise and t.site.plan[n].keep == 1]
    clean = [n for n in reply.tensors if not t.site.plan[n].noise and not t.site.plan[n].noise_std]
    return (
        t.site.content != "noised"
        and bool(noised or t.site.content == "clipped")
        and all(bool(reply.tensors[n].any()) for n in noised)
        and not any(bool(reply.tensors[n].any()) for n in clean)
    )


def _shape(t: Try) -> None:
    t.put(torch.zeros((*t.update[t.name].shape, 2)) + 0.01)


def _flat(t: Try) -> None:
    t.put(t.update[t.name].flatten() if t.update[t.name].dim() > 1 else t.update[t.name][:, None])


def _scalar(t: Try) -> None:
    t.put(torch.tensor(0.01))


def _full(scale: float) -> Callable[[Try], None]:
    def spoil(t: Try) -> None:
        t.update = {name: scale * (t.weights[name] + value) for name, value in t.update.items()}

    return spoil


def _one_full(t: Try) -> bool:
    t.put(t.weights[t.name].clone())
    return True


def _list(t: Try) -> None:
    t.put(t.update[t.name].tolist())


def _sparse(t: Try) -> None:
    t.put(t.update[t.name].to_sparse())


def _pairs(t: Try) -> None:
    t.update = list(t.update.items())  # type: ignore[assignment]


def _empty(t: Try) -> None:
    t.update = {}


def _metric(name: str, value: Any) -> Callable[[Try], bool]:
    def spoil(t: Try) -> bool:
        t.metrics[name] = value
        return t.site.rehearsal.allowed.get(name, 0.0) is not None  # a site may have let it through, and said so

    return spoil


def _other_model(t: Try) -> None:
    t.weights = {name.replace(".", ".encoder.", 1): value for name, value in t.weights.items()}


def _other_weights(t: Try) -> None:
    t.weights = {name: value + 1.0 for name, value in t.weights.items()}


def _nan_weights(t: Try) -> None:
    t.weights[t.name] = torch.full_like(t.weights[t.name], torch.nan)


def _made(**changes: Any) -> Callable[[Try], None]:
    def spoil(t: Try) -> None:
        more = {name: change(getattr(t.form, name)) for name, change in changes.items()}
        t.form = replace(t.form, **more)

    return spoil


def _spent(t: Try) -> bool:
    ledger = t.site.ledger
    left = ledger.left(t.site.mechanism, "federation")
    if left == float("inf"):
        return False
    if left:
        ledger.spend(t.site.mechanism, ("federation", ledger.next_number("federation")), count=int(left))
    return True


def _withheld(t: Try) -> bool:
    if t.site.content == "clipped" or not t.site.plan.withheld:
        return False
    for name in t.site.plan.withheld:
        t.update[name] = torch.full(t.site.plan[name].slot.shape, 0.5)
    return True


def _unclipped(t: Try) -> bool:
    if t.site.content != "clipped" or t.site.plan.unit == "update" or not t.site.plan.groups:
        return False
    size = sum(t.site.plan[name].slot.size for name in t.site.plan.trained)
    clips = sum(group.clip for group in t.site.plan.groups.values())
    worst = 10 * clips * t.form.examples
    source = torch.Generator().manual_seed(0)
    for name, value in t.update.items():
        t.update[name] = torch.randn(value.shape, generator=source) * worst * max(1.0, size**-0.5)
    return True


def _clean(t: Try) -> bool:
    if t.site.content != "noised" or not any(t.site.plan[n].noise for n in t.site.plan.shared):
        return False
    for name in t.site.plan.shared:
        kept = t.update[name].clone()
        kept.view(-1)[: max(1, kept.numel() // 2)] = 0.0  # rows of absent tokens, without noise
        t.update[name] = kept
    return True


_AS_NOISE = "before the noise: leaves as noise alone; else refused"
FLEET = (
    Hostile("renamed tensor", _rename),
    Hostile("extra tensor", _extra),
    Hostile("missing tensor", _missing),
    Hostile("empty message", _empty),
    Hostile("NaN", _at_one(torch.nan), _diverged_is_noise, _AS_NOISE),
    Hostile("infinity", _at_one(torch.inf), _diverged_is_noise, _AS_NOISE),
    Hostile("int64", _as(torch.int64)),
    Hostile("truth values", _as(torch.bool)),
    Hostile("float16", _as(torch.float16)),
    Hostile("bfloat16", _as(torch.bfloat16)),
    Hostile("float64", _as(torch.float64)),
    Hostile("integer buffer", _counter),
    Hostile("frozen tensor", _frozen),
    Hostile("zero norm", _zero, _zero_is_noise, _AS_NOISE),
    Hostile("another shape", _shape),
    Hostile("flattened", _flat),
    Hostile("a scalar to be broadcast", _scalar),
    Hostile("full weights instead of a difference", _full(1.0)),
    Hostile("full weights, scaled", _full(0.01)),
    Hostile("one tensor of full weights", _one_full),
    Hostile("a list of numbers", _list),
    Hostile("a sparse tensor", _sparse),
    Hostile("pairs instead of a mapping", _pairs),
    Hostile("loss beside the update", _metric("train_loss", 0.7)),
    Hostile("accuracy beside the update", _metric("accuracy", 0.9)),
    Hostile("a private count beside the update", _metric("num-examples", 17)),
    Hostile("another model", _other_model),
    Hostile("other first weights", _other_weights),
    Hostile("weights that are not finite", _nan_weights),
    Hostile("another batch size", _made(batch_size=lambda b: b + 1)),
    Hostile("a higher sampling rate", _made(sampling_rate=lambda q: 2 * q)),
    Hostile("other local steps", _made(local_steps=lambda k: k + 1)),
    Hostile("another learning rate", _made(learning_rate=lambda r: 2 * r)),
    Hostile("a gradient for a difference", _made(kind=lambda k: "delta" if k == "gradient" else "gradient")),
    Hostile("budget spent", _spent),
    Hostile("a sum that was not clipped", _unclipped),
    Hostile("a difference without the noise it should have", _clean),
    Hostile(
        "withheld tensors along",
        _withheld,
        lambda t, reply: set(reply.tensors) == set(t.site.plan.shared),
        "left out: they stay at the site",
    ),
)  # fmt: skip


def attempt(row: Hostile, vectors: Vectors, folder: Path) -> str:
    """Try one kind of message on a fresh site of the miniature model in ``folder``.

    Returns:
        ``refused``, ``handled``, or ``not applicable`` where this table has no such message.

    Raises:
        UserError: it was passed through.
    """
    exported, state = folder / "exported", folder / "state"
    exported.mkdir(parents=True, exist_ok=True)
    vectors.rehearsal.write(exported)
    with Site(exported, state, client="self-test", generator=vectors.generator()) as site:
        if site.plan.withheld:
            site.keep_personal({name: vectors.base[name] for name in site.plan.withheld})
        good = Try(site, dict(vectors.update), dict(vectors.base), vectors.rehearsal.message)
        if row.spoil(good) is False:
            return "not applicable"
        before = site.ledger.messages
        try:
            reply = good.send()
        except (Refused, BudgetSpent):
            if site.ledger.messages != before or (state / "outbox.safetensors").exists():
                raise UserError(f"hostile message {row.name!r}: refused, and yet it was entered or kept") from None
            return "refused"
        if row.handled is None or not row.handled(good, reply):
            raise UserError(f"hostile message {row.name!r} was passed through; expected: {row.documented}")
        return "handled"


def try_all(vectors: Vectors) -> Mapping[str, str]:
    """Every row of `FLEET` on one exported table: name -> outcome.

    Raises:
        UserError: one was passed through.
    """
    found = {}
    for row in FLEET:
        with tempfile.TemporaryDirectory() as folder:
            found[row.name] = attempt(row, vectors, Path(folder))
    return found


def good_leaves(vectors: Vectors) -> dict[str, Tensor]:
    """The unspoilt message, sent: a gate that refuses everything protects nothing worth having.

    Raises:
        Refused: it was refused.
    """
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "exported"
        exported.mkdir()
        vectors.rehearsal.write(exported)
        with Site(exported, Path(folder) / "state", client="self-test", generator=vectors.generator()) as site:
            if site.plan.withheld:
                site.keep_personal({name: vectors.base[name] for name in site.plan.withheld})
            return Try(site, dict(vectors.update), dict(vectors.base), vectors.rehearsal.message).send().tensors
