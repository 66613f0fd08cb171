"""``dpguard fit-clips``: a policy whose clips fit the gradients of public texts."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.table import Table
from rich.text import Text

from dpguard.cli.console import console, table
from dpguard.cli.naming import by_options
from dpguard.cli.progress import bar
from dpguard.engine.fit_clips import Fitted, FittedGroup, check_fittable, check_quantile, fit
from dpguard.errors import UserError
from dpguard.inputs import models, texts
from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.demo import bundle
from dpguard.inputs.family import slots
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Example
from dpguard.policy.table import Policy

ROWS = 32
"""Texts in one pass."""
PUBLIC = "The texts must be public: the clips come from them without noise and are published with the policy."


def fit_clips(
    policy: str,
    model: str,
    data: str,
    *,
    text: str,
    label: str,
    quantile: float,
    examples: int,
    out: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Fit the clips, print one table of groups, and write the new policy (or print it)."""
    quantile = check_quantile(quantile)
    _check_out(out, policy)
    given = Policy.load(policy)
    with by_options(text, label):
        public = public_texts(data, text=text, label=label)
    loaded = models.load(model, labels=max(2, 1 + max(e.label for e in public)))
    texts.check_labels(public, loaded.classes)
    check_fittable(given.plan(slots(loaded.module)))
    chosen = random.Random(seed).sample(public, min(examples, len(public)))
    texts.check_lengths(chosen, loaded.tokenizer, loaded.max_tokens)
    fitted = fit(
        given, loaded.module, bar(batches(chosen, loaded), "gradients of public texts", quiet=as_json),
        quantile=quantile,
    )  # fmt: skip
    origin = (
        f"clips: the {quantile:g} quantile of the gradient norms of {fitted.examples} public texts on model {model}"
    )
    document = as_yaml(fitted.policy, origin)
    if out is not None:
        _write(out, document)
    if as_json:
        print(json.dumps(as_plain(fitted, model, out), indent=2))
        return
    _print(fitted, model, data)
    if out is None:
        print("\n" + document, end="")
    else:
        console().print(Text(f"\nwritten to {out}"), soft_wrap=True)


def public_texts(data: str, *, text: str, label: str) -> list[Example]:
    """The public part of the demo; every text of a file; the training texts of a hub data set.

    Raises:
        UserError: as `texts.load`.
    """
    if data == "demo":
        return list(texts.examples(bundle.paths()["public"]))
    if Path(data).is_file():
        return list(texts.examples(Path(data), text=text, label=label))
    return list(texts.load(data, text=text, label=label).train)


def batches(examples: Sequence[Example], loaded: LoadedModel) -> list[Batch]:
    """Texts of like length together: norms do not depend on it, padding does."""
    ordered = sorted(examples, key=lambda e: len(e.text))
    parts = [ordered[start : start + ROWS] for start in range(0, len(ordered), ROWS)]
    return [collate([e.text for e in part], [e.label for e in part], loaded.tokenizer) for part in parts]


def as_yaml(policy: Policy, origin: str) -> str:
    """A policy file, one line a row, with a comment on top that says where its clips come from."""
    comment = " ".join(origin.split())
    name = yaml.safe_dump({"name": policy.name}, allow_unicode=True, width=10_000)
    rows = [
        yaml.safe_dump(dict(row), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
        for row in policy.rows
    ]
    # a text with ${...} would be read as an environment variable
    body = (name + "rows:\n" + "".join(f"  - {row}" for row in rows)).replace("${", "$${")
    return f"# {comment}\n{body}"


def as_plain(fitted: Fitted, model: str, out: Path | None) -> dict[str, Any]:
    """The JSON form."""
    return {
        "policy": {"name": fitted.policy.name, "rows": [dict(row) for row in fitted.policy.rows]},
        "model": model,
        "quantile": fitted.quantile,
        "examples": fitted.examples,
        "dropped": fitted.dropped,
        "out": None if out is None else str(out),
        "groups": [
            {
                "group": group.id,
                "layers": list(group.layers),
                "norms": dict(zip(("10%", "50%", "90%"), _deciles(group), strict=True)),
                "clip_before": group.before,
                "clip": group.clip,
                "clipped": group.above,
                "kept": group.kept or None,
            }
            for group in fitted.groups
        ],
    }


def _check_out(out: Path | None, policy: str) -> None:
    """Refuse, before any work, a place that cannot be written or that `Policy.load` would not read back."""
    if out is None:
        return
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out is {str(out)!r}; expected a file that ends in .yaml")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out is {str(out)!r}; expected a file in a folder that exists")
    if out.exists() and Path(policy).exists() and out.samefile(policy):
        raise UserError(f"--out is {str(out)!r}, the policy itself; expected another file")


def _write(out: Path, document: str) -> None:
    try:
        out.write_text(document, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {str(out)!r} cannot be written: {error.strerror}") from None


def _deciles(group: FittedGroup) -> list[float]:
    return [float(f"{value:.3g}") for value in np.quantile(group.norms, [0.1, 0.5, 0.9])]


def _print(fitted: Fitted, model: str, data: str) -> None:
    left_out = f", {fitted.dropped} left out (gradient not finite)" if fitted.dropped else ""
    out = console()
    out.print(Text(f"Gradient norms of {fitted.examples} public texts ({data}) on {model}{left_out}. {PUBLIC}\n"))
    out.print(group_table(fitted))
    reasons = Counter(group.kept for group in fitted.groups if group.kept)
    for reason, count in reasons.items():
        who = "1 group keeps its clip" if count == 1 else f"{count} groups keep their clips"
        out.print(Text(f"* {who}: {reason}"))


def group_table(fitted: Fitted) -> Table:
    """One row a clip group; a star where the clip was left as it was."""
    shown = Counter(group.layers for group in fitted.groups)
    rows = [
        [
            ", ".join(group.layers) if shown[group.layers] == 1 else group.id,
            *(f"{value:.3g}" for value in _deciles(group)),
            f"{group.before:.3g}",
            f"{group.clip:.3g}" + ("*" if group.kept else ""),
            f"{100 * group.above:.1f} %",
        ]
        for group in fitted.groups
    ]
    columns = ["group", "10 %", "50 %", "90 %", "clip", "clip now", "clipped"]
    found = table(columns, rows, right=columns[1:])
    for column in found.columns[1:]:
        column.no_wrap = True  # figures stay whole, the name folds
    return found
