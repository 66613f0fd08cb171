"""``dpguard list``: names with one line each, torch not imported."""

from __future__ import annotations

import json
from pathlib import Path

from dpguard import registry
from dpguard.cli.console import console, table
from dpguard.errors import UserError, did_you_mean

METRICS = {
    "rouge1": "leakage: unigram overlap, F-measure",
    "rouge2": "leakage: bigram overlap, F-measure",
    "rougeL": "leakage: longest common subsequence, F-measure (the default)",
    "exact_match": "leakage: every token recovered in order, or the same text in other tokens",
    "token_recall": "leakage: share of the tokens among as many of the guess, in any order",
    "entity_recall": "leakage: share of the marked entities recovered word for word",
    "accuracy": "utility: share of right predictions (the default)",
    "mcc": "utility: Matthews correlation",
    "f1": "utility: F1 of class 1, macro for more classes",
    "loss": "utility: cross-entropy; recorded, but no study leads with it",
}


def names(what: str) -> dict[str, str]:
    """Name -> meaning.

    Raises:
        UserError: no such list.
    """
    lists = {
        "policies": _policies,
        "attacks": lambda: _plugins("dpguard.attacks"),
        "families": lambda: _plugins("dpguard.inputs.families"),
        "metrics": lambda: METRICS,
        "columns": _columns,
        "keys": _keys,
        "studies": _studies,
    }
    if what not in lists:
        raise UserError(f"nothing called {what!r} to list{did_you_mean(what, lists)}")
    return lists[what]()


def print_names(what: str, *, as_json: bool) -> None:
    """Print one list."""
    found = names(what)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console().print(table(["name", "what it is"], [[name, meaning] for name, meaning in found.items()]))
    if what == "studies" and not found:
        console().print("No studies/*.yaml here: they come with the repository.", style="dim")
    if what == "policies":
        console().print("Any selector is a policy too: block[3].attention.query shares just that.", style="dim")


def _policies() -> dict[str, str]:
    from dpguard.policy.ready import READY

    return {name: ready.meaning for name, ready in READY.items()}


def _columns() -> dict[str, str]:
    from dpguard.policy.columns import COLUMNS

    return {"layers": "who: a selector or a list of selectors", **{c.name: c.meaning for c in COLUMNS.values()}}


def _keys() -> dict[str, str]:
    from dpguard.cli.keys import study_keys

    return study_keys()


def _plugins(package: str) -> dict[str, str]:
    return {name: registry.summary(path) for name, path in sorted(registry.names(package).items())}


def _studies() -> dict[str, str]:
    import yaml

    found = {}
    for path in sorted(Path("studies").glob("*.yaml")):
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
        except (yaml.YAMLError, ValueError, OSError):
            found[str(path)] = "(cannot be read: dpguard run says why)"
            continue
        found[str(path)] = str(content.get("question", "")) if isinstance(content, dict) else ""
    return found
