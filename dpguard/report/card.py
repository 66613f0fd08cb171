"""The privacy card of one policy: what was attacked, what came back, what is promised, and what is not.

One content, two places: beside a report (`write`), and in an exported project, which adds what is exported
(`dpguard.deploy.card`). The Markdown starts at the second level of headings and has no front matter, so that it can
be put into a model card as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpguard.errors import UserError, did_you_mean
from dpguard.policy.statement import NOT_COVERED
from dpguard.report import federations, files
from dpguard.report.chance import best_guess
from dpguard.report.frontier import CONTROL, FLOOR, Frontier, Row
from dpguard.report.reasons import limits
from dpguard.report.recommend import Recommendation
from dpguard.report.result import StudyResult
from dpguard.report.text import epsilon as show_epsilon
from dpguard.report.text import markdown, metric_name
from dpguard.report.words import in_words
from dpguard.stats import Interval
from dpguard.study.record import Record

SCHEMA = 1
"""Of the JSON; a field that changes its meaning raises it, a field that is added does not."""
JSON, TEXT = "card.json", "card.md"
STRONGER = "an attack that is stronger than those that were tried, wherever there is no finite epsilon"


def pick(result: StudyResult, decision: Recommendation, policy: str | None) -> str:
    """The policy that a card is about: the named one, or the recommended one.

    Raises:
        UserError: no such policy, or none is named and none is recommended.
    """
    if policy is None:
        if not decision.policy:
            raise UserError(
                f"no policy is recommended ({decision.verdict}), expected --policy with one of the study's policies"
            )
        return decision.policy
    if policy not in result.policies:
        raise UserError(f"unknown policy {policy!r}{did_you_mean(policy, result.policies)}")
    return policy


def file_name(policy: str) -> str:
    """A folder's name for a policy's card, whatever the policy is called.

    >>> file_name("dp-sgd noise=0.6"), file_name("../..").startswith("policy-")
    ('dp-sgd-noise-0.6', True)
    """
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", policy).strip("-.")
    if slug and len(slug) <= 60 and policy.isascii():
        return slug
    return f"{slug[:40] or 'policy'}-{hashlib.sha256(policy.encode('utf-8', 'replace')).hexdigest()[:8]}"


def content(result: StudyResult, found: Frontier, decision: Recommendation, policy: str) -> dict[str, Any]:
    """The card as plain data; every number is from the records.

    Args:
        result: the study and its records.
        found: its frontier.
        decision: under the caps that were asked for.
        policy: a policy of the study.
    """
    row = found.row(policy) or Row(policy)
    records = [r for r in result.records if r.cell.policy == policy]
    attacks = [r for r in records if r.cell.leg == "leakage" and r.status == "done"]
    claim = next((r.result for r in records if r.cell.leg == "guarantee" and r.status == "done"), {})
    cell = records[0].cell if records else None
    return {
        "schema": SCHEMA,
        "policy": policy,
        "study": str(result.study.get("name", "")),
        "question": str(result.study.get("question", "")),
        "model": dict(cell.model) if cell else {},
        "data": dict(cell.data) if cell else {},
        "rows": list(cell.table) if cell else [],
        "words": [*in_words(federations.treated(row)), *federations.told(row, found.rows)] if cell else [],
        "table": list(claim.get("table", [])),
        "shared_fraction": row.shared_fraction,
        "attacked": _attacked(attacks),
        "leakage": _leakage(found, row),
        "utility": {
            "metric": found.utility_metric,
            "this": _interval(row.utility),
            "without_any_defence": _interval(found.ceiling.utility if found.ceiling else None),
        },
        "guarantee": _guarantee(claim, records) | {"seen": row.saw},
        "caps": {
            "asked": decision.caps.words(),
            "verdict": decision.verdict,
            "recommended": decision.policy,
            "sentence": decision.sentence,
        },
        "gaps": [f"{gap.leg} {gap.where}: {gap.status}, {gap.reason}".replace(" :", ":") for gap in row.gaps],
        "not_protected": [*limits(found, row), *NOT_COVERED, STRONGER],
        "versions": dict(records[0].provenance.get("versions", {})) if records else {},
    }


def _leakage(found: Frontier, row: Row) -> dict[str, Any]:
    control = found.row(CONTROL)
    return {
        "metric": found.leakage_metric,
        "this": _interval(row.leakage),
        "attack": row.attack,
        "at": row.at,
        "exact_match": _interval(row.exact),
        "without_any_defence": _interval(control.leakage if control else None),
        "guess_without_a_message": _interval(found.floor),
    }


def _guarantee(claim: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    settings = next((r.cell.settings for r in records if r.cell.leg == "guarantee"), {})
    unit = "client" if any(row.get("unit") == "update" for r in records[:1] for row in r.cell.table) else "example"
    return {
        "epsilon": claim.get("epsilon"),
        "delta": claim.get("delta", settings.get("delta")),
        "steps": claim.get("steps"),
        "sampling_rate": claim.get("sampling_rate"),
        "sigma_eff": claim.get("sigma_eff"),
        "unit": unit,
        "adjacency": "zero-out",
        "statement": claim.get("statement", "No guarantee was computed."),
        "reasons": list(claim.get("reasons", [])),
        "bounds": list(claim.get("bounds", [])),
        "kappa": dict(claim.get("kappa", {})),
    }


def _attacked(done: Sequence[Record]) -> dict[str, Any]:
    """What the panel was given."""
    if not done:
        return {"what": "nothing", "targets": 0}
    settings = done[0].cell.settings
    threat, federated = settings.get("threat") or {}, settings.get("federation") or {}
    steps = int(threat.get("local_steps", 0) or federated.get("local_steps", 0))
    delta = federated.get("server") != "fedsgd" if federated else steps > 0
    panel = settings.get("panel") or {}
    return {
        "what": f"{steps}-step delta" if delta else "gradient",
        "batch_size": settings.get("batch_size"),
        "targets": sum(int(r.result.get("messages", settings.get("targets", 0))) for r in done),
        "at": sorted({str(r.cell.settings.get("at", "start")) for r in done}),
        "known_to_the_server": list(threat.get("know", ["count"])),
        "panel": {"name": panel.get("name"), "hash": panel.get("hash")},
        "attacks": sorted({str(s["attack"]) for r in done for s in r.result.get("scores", [])}),
        "skipped": {k: v for r in done for k, v in (r.result.get("skipped") or {}).items()},
    }


def write(card: Mapping[str, Any], folder: Path, words: str | None = None) -> None:
    """Write `card.json` and `card.md`; ``words`` instead of the plain card's Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / JSON, json.dumps(card, indent=1) + "\n")
    files.write(folder / TEXT, to_markdown(card) if words is None else words)


def to_markdown(card: Mapping[str, Any], *, leaves: str = "", counted: str = "") -> str:
    """The card for people.

    Args:
        card: from `content`.
        leaves: what a message is, in a sentence; of an exported project.
        counted: after how many messages epsilon holds, in words; the study's steps by default.
    """
    plan = f", plan {markdown(card['plan'])}" if card.get("plan") else ""
    shared = card["shared_fraction"]
    share = f"{100 * shared:.3g} % of the parameters leave the client." if shared is not None else ""
    model = card["model"]
    lines = [
        f"## Privacy card: {markdown(card['policy'])}",
        "",
        f"Study {markdown(card['study'])}, model {markdown(model.get('name', 'unknown'))} "
        f"({markdown(model.get('hash', '-'))}){plan}. {markdown(card['question'])}".rstrip(),
        "",
        "### What leaves",
        "",
        f"{leaves} {share}".strip() or "Not known: the guarantee was not computed.",
        *(["", markdown(" ".join(card["words"]))] if card["words"] else []),
        *_table(card["table"]),
        "",
        "### Guarantee",
        "",
        *_guarantee_lines(card["guarantee"], counted),
        "",
        "### What the attacks got",
        "",
        *_attack_lines(card["attacked"], card["leakage"]),
        "",
        "### What it costs",
        "",
        f"{metric_name(card['utility']['metric'])} {_words(card['utility']['this'])}; without any defence "
        f"{_words(card['utility']['without_any_defence'])}.",
        "",
        "### What the study recommends",
        "",
        markdown(card["caps"]["sentence"])
        + (f" Caps: {', '.join(card['caps']['asked'])}." if card["caps"]["asked"] else ""),
        *([""] + [f"- not measured: {markdown(gap)}" for gap in card["gaps"]] if card["gaps"] else []),
        "",
        "### What it does not protect",
        "",
        *(f"- {markdown(item)}" for item in card["not_protected"]),
        "",
    ]
    return "\n".join(lines)


def _table(table: Sequence[Mapping[str, Any]]) -> list[str]:
    if not table:
        return []
    head = "| part | shared | trained | clip | noise multiplier | after the noise |"
    return ["", head, "|---|---|---|---|---|---|", *(_table_row(entry) for entry in table)]


def _table_row(entry: Mapping[str, Any]) -> str:
    def yes(value: Any) -> str:
        return "yes" if value else "no"

    clip = "-" if entry["clip"] is None else f"{entry['clip']:g}"
    cells = [entry["parameters"], yes(entry["share"]), yes(entry["train"]), clip, f"{entry['noise']:g}"]
    return f"| {' | '.join(map(markdown, cells))} | {markdown(entry['release']) or '-'} |"


def _guarantee_lines(claim: Mapping[str, Any], counted: str) -> list[str]:
    if claim["epsilon"] is None:
        return [markdown(claim["statement"])]
    steps = f"{claim['steps']} noised steps" if claim["steps"] else "the whole training"
    delta = f" at delta {claim['delta']:g}" if claim["delta"] is not None else ""
    lines = [
        f"epsilon = {show_epsilon(float(claim['epsilon']))}{delta}, after {counted or steps}, per "
        f"{claim['unit']}, {claim['adjacency']} adjacency.",
        "",
        markdown(claim["statement"]),
    ]
    if claim["reasons"]:
        lines += ["", *(f"- why there is none: {markdown(reason)}" for reason in claim["reasons"])]
    bounds = [
        f"- from {claim.get('seen', 'one message')}, a record that is guessed with chance {b['kappa']:g} is "
        f"reconstructed with chance {b['success']:.3g} at most, by any attack"
        for b in claim["bounds"]
        if b.get("success") is not None
    ]
    measured = best_guess(claim, ("rougeL", "exact_match"))
    chance = [f"- the best guess without a message reaches {measured}"] if measured else []
    return [*lines, "", *chance, *bounds] if chance or bounds else lines


def _attack_lines(attacked: Mapping[str, Any], leak: Mapping[str, Any]) -> list[str]:
    if attacked["what"] == "nothing":
        return ["Nothing was attacked: what this policy leaks is not known."]
    name = metric_name(leak["metric"])
    lines = [
        f"Attacked was a {attacked['what']} of {attacked['batch_size']} text(s), {attacked['targets']} messages, at "
        f"{' and '.join(map(markdown, attacked['at']))} weights, by panel {markdown(attacked['panel']['name'])} "
        f"({markdown(attacked['panel']['hash'])}): {', '.join(map(markdown, attacked['attacks']))}. Known to the "
        f"server: {', '.join(map(markdown, attacked['known_to_the_server']))}.",
        "",
    ]
    if attacked.get("as_exported") is False:
        lines += ["**The exported message is of another kind than the one that was attacked.**", ""]
    lines += [
        "| | value |",
        "|---|---|",
        f"| {name}, {_best(leak, attacked)} | {_words(leak['this'])} |",
        f"| exact match | {_words(leak['exact_match'])} |",
        f"| {name} without any defence | {_words(leak['without_any_defence'])} |",
        f"| {name} of a guess that sees no message | {_words(leak['guess_without_a_message'])} |",
    ]
    skipped = [f"- {markdown(attack)} did not run: {markdown(why)}" for attack, why in attacked["skipped"].items()]
    return [*lines, "", *skipped] if skipped else lines


def _best(leak: Mapping[str, Any], attacked: Mapping[str, Any]) -> str:
    if set(attacked["attacks"]) <= {FLOOR}:
        return "of a guess, as no attack could run"
    return f"best attack ({markdown(leak['attack']) or '-'})"


def _interval(found: Interval | None) -> dict[str, float | int] | None:
    if found is None:
        return None
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "seeds": found.seeds}


def _words(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "not measured"
    return f"{found['value']:.3f} (95 %: {found['low']:.3f} to {found['high']:.3f}, n = {found['n']})"
