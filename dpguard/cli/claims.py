"""``dpguard guarantee`` and ``dpguard layers``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from dpguard.cli.console import console, table
from dpguard.engine.accounting import guarantee
from dpguard.inputs import models
from dpguard.inputs.family import slots
from dpguard.policy.guarantee import Guarantee, Sampling
from dpguard.policy.table import Plan, Policy


def print_guarantee(
    policy: str,
    model: str,
    *,
    sampling_rate: float,
    steps: int,
    delta: float,
    examples: int | None,
    shuffle: bool,
    kappa: float,
    as_json: bool,
    target_epsilon: float | None = None,
) -> None:
    """Epsilon, effective noise multiplier, statement and bound of one policy on one model.

    With a target epsilon, of the policy whose noise is calibrated to it.
    """
    table_, found_slots = Policy.load(policy), slots(models.load(model).module)
    sampling: Sampling = "shuffle" if shuffle else "poisson"
    if target_epsilon is not None:
        table_ = table_.calibrate(
            found_slots, epsilon=target_epsilon, delta=delta, sampling_rate=sampling_rate, steps=steps,
            sampling=sampling, examples=examples,
        )  # fmt: skip
    plan = table_.plan(found_slots)
    found = guarantee(plan, sampling_rate=sampling_rate, steps=steps, delta=delta, sampling=sampling, examples=examples)
    bound = found.bound(kappa)
    if as_json:
        calibrated = {} if target_epsilon is None else {"rows": [dict(row) for row in table_.rows]}
        print(json.dumps(as_plain(found, plan, kappa) | calibrated, indent=2))
        return
    epsilon = "inf (no formal guarantee)" if not found.formal else f"{found.epsilon:.3g} at delta {delta:g}"
    rows: list[list[object]] = [
        ["epsilon", epsilon],
        ["sigma_eff", f"{found.sigma_eff:.3g} a step" if found.formal else "-"],
        ["leaves", f"{100 * plan.shared_fraction:.3g} % of the parameters"],
        ["bound", "none" if bound is None else f"from one message, a record guessed with chance {kappa:g} is "
                                               f"reconstructed with chance {bound:.3g} at most"],
    ]  # fmt: skip
    if target_epsilon is not None:
        rows += [[f"row {i + 1}", _row_in_words(row)] for i, row in enumerate(table_.rows)]
    console().print(table(["", policy], rows))
    console().print(Text("\n" + found.statement))


def _row_in_words(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in row.items())


def as_plain(found: Guarantee, plan: Plan, kappa: float) -> dict[str, Any]:
    """JSON form; infinity is the string "inf"."""
    return {
        "epsilon": found.epsilon if found.formal else "inf",
        "sigma_eff": "inf" if found.sigma_eff == float("inf") else found.sigma_eff,
        "delta": found.delta,
        "sampling_rate": found.sampling_rate,
        "steps": found.steps,
        "statement": found.statement,
        "reasons": list(found.reasons),
        "bound": {"kappa": kappa, "success": found.bound(kappa)},
        "shared_fraction": plan.shared_fraction,
    }


def print_layers(model: str, *, as_json: bool) -> None:
    """Every part and role of a model, what selects it, and its share of the parameters."""
    loaded = models.load(model)
    rows = layer_rows(Policy([]).plan(slots(loaded.module)))
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    total = sum(int(row["parameters"]) for row in rows)
    console().print(f"{model}: {loaded.family.name} family, {total:,} parameters, {loaded.max_tokens} tokens at most")
    cells = [
        [r["selector"], r["role"], r["tensors"], f"{r['parameters']:,}", f"{100 * r['fraction']:.2f} %"] for r in rows
    ]
    columns = ["selector", "role", "tensors", "parameters", "share"]
    console().print(table(columns, cells, right=columns[2:]))


_SELECTORS = {
    "token_embedding": "embeddings.token", "position_embedding": "embeddings.position",
    "type_embedding": "embeddings.type", "embedding_norm": "embeddings.norm", "pooler": "pooler", "head": "head",
    "query": "attention.query", "key": "attention.key", "value": "attention.value", "qkv": "attention.qkv",
    "attention_output": "attention.output", "mlp_in": "mlp.in", "mlp_gate": "mlp.gate", "mlp_out": "mlp.out",
    "norm": "norms", "adapter_a": "adapters", "adapter_b": "adapters",
}  # fmt: skip


def layer_rows(plan: Plan) -> list[dict[str, Any]]:
    """One row a part and role: selector, tensors, parameters and their fraction of the model."""
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    total = sum(rule.slot.size for rule in plan.values())
    for rule in plan.values():
        slot = rule.slot
        inside = _SELECTORS[slot.role]
        selector = f"{slot.part}.{inside}" if slot.block is not None else inside
        row = merged.setdefault(
            (slot.part, slot.role),
            {"selector": selector, "role": slot.role, "tensors": 0, "parameters": 0, "fraction": 0.0},
        )
        row["tensors"] += 1
        row["parameters"] += slot.size
        row["fraction"] += slot.size / total
    return list(merged.values())
