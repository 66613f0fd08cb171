"""The privacy card of an exported policy: what was attacked, what came back, what is promised, and what is not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpguard.deploy.rehearsal import Rehearsal
from dpguard.policy.statement import NOT_COVERED
from dpguard.report.frontier import CONTROL, Row, frontier
from dpguard.report.recommend import Caps, Recommendation
from dpguard.report.result import StudyResult
from dpguard.report.text import epsilon as show_epsilon
from dpguard.report.text import metric_name, visible
from dpguard.stats import Interval
from dpguard.study.record import Record

JSON, TEXT = "card.json", "card.md"
IN_THE_FIELD = (
    "a server that sends weights made to draw out a text: the first weights and the frozen layers are checked, weights "
    "that were trained since are not",
    "a server whose app is other code than this: keep the exported folder at the site and read what is run",
    "that a client answers, refuses or stays away, and when: a refusal tells the server one bit",
    "an attack that is stronger than those that were tried, wherever there is no finite epsilon",
    "whatever else leaves the site: logs, evaluation metrics, the exported state folder",
)


def make(result: StudyResult, rehearsal: Rehearsal, decision: Recommendation) -> dict[str, Any]:
    """The card as plain data; every number from the records, none computed anew but intervals.

    Args:
        result: the study and its records.
        rehearsal: what is exported.
        decision: under the study's caps.
    """
    found = frontier(result)
    row = found.row(rehearsal.policy) or Row(rehearsal.policy)
    records = [r for r in result.records if r.cell.policy == rehearsal.policy]
    attacks = [r for r in records if r.cell.leg == "leakage"]
    claims = [r for r in records if r.cell.leg == "guarantee" and r.status == "done"]
    claim = claims[0].result if claims else {}
    message = rehearsal.message
    control = found.row(CONTROL)
    return {
        "policy": rehearsal.policy,
        "plan": rehearsal.plan.hash,
        "study": rehearsal.study,
        "question": str(result.study.get("question", "")),
        "model": {"name": rehearsal.model.name, "hash": rehearsal.model.hash},
        "table": list(claim.get("table", [])),
        "shared_fraction": rehearsal.plan.shared_fraction,
        "message": {
            "kind": message.kind, "local_steps": message.local_steps if message.kind == "delta" else 0,
            "batch_size": message.batch_size, "sampling_rate": message.sampling_rate, "examples": message.examples,
            "rounds": rehearsal.rounds,
        },
        "attacked": _attacked(attacks, message.kind, message.local_steps),
        "leakage": {
            "metric": found.leakage_metric,
            "this": _interval(row.leakage),
            "attack": row.attack,
            "at": row.at,
            "exact_match": _interval(row.exact),
            "without_any_defence": _interval(control.leakage if control else None),
            "guess_without_a_message": _interval(found.floor),
        },
        "utility": {"metric": found.utility_metric, "this": _interval(row.utility),
                    "without_any_defence": _interval(control.utility if control else None)},
        "guarantee": {
            "epsilon": _plain(rehearsal.budget.epsilon), "delta": rehearsal.budget.delta,
            "messages": rehearsal.rounds, "noised_steps": rehearsal.budget.messages,
            "sigma_eff": claim.get("sigma_eff"),
            "unit": "client" if rehearsal.plan.unit == "update" else "example",
            "adjacency": "zero-out", "sampling": message.sampling,
            "statement": claim.get("statement", "No guarantee was computed."),
            "reasons": list(claim.get("reasons", [])),
            "bounds": list(claim.get("bounds", [])),
            "kappa": dict(claim.get("kappa", {})),
        },
        "caps": {"asked": decision.caps.words(), "verdict": decision.verdict, "recommended": decision.policy,
                 "sentence": decision.sentence},
        "gaps": [f"{gap.leg} {gap.where}: {gap.status}, {gap.reason}".replace(" :", ":") for gap in row.gaps],
        "metrics_past_the_gate": list(rehearsal.metrics),
        "not_protected": [*NOT_COVERED, *IN_THE_FIELD,
                          *(f"metric {name!r}: it leaves past clip and noise" for name in rehearsal.metrics)],
        "versions": dict(records[0].provenance.get("versions", {})) if records else {},
    }  # fmt: skip


def _attacked(attacks: Sequence[Record], kind: str, local_steps: int) -> dict[str, Any]:
    """What the panel was given, and whether that is the kind of message that is exported."""
    done = [r for r in attacks if r.status == "done"]
    if not done:
        return {"what": "nothing", "as_exported": False, "targets": 0}
    settings = done[0].cell.settings
    threat = settings.get("threat") or {}
    steps = int(threat.get("local_steps", 0) or (settings.get("federation") or {}).get("local_steps", 0))
    federated = settings.get("federation") or {}
    what = (
        ("delta" if federated.get("server") != "fedsgd" else "gradient")
        if federated
        else "delta"
        if steps
        else "gradient"
    )
    same = what == kind and (kind == "gradient" or steps == local_steps)
    panel = settings.get("panel") or {}
    return {
        "what": "gradient" if what == "gradient" else f"{steps}-step delta",
        "as_exported": same,
        "batch_size": settings.get("batch_size"),
        "targets": sum(int(r.result.get("messages", 0)) for r in done),
        "at": sorted({str(r.cell.settings.get("at", "start")) for r in done}),
        "known_to_the_server": list(threat.get("know", ["count"])),
        "panel": {"name": panel.get("name"), "hash": panel.get("hash")},
        "attacks": sorted({str(s["attack"]) for r in done for s in r.result.get("scores", [])}),
        "skipped": {k: v for r in done for k, v in (r.result.get("skipped") or {}).items()},
    }  # fmt: skip


def write(card: Mapping[str, Any], folder: Path) -> None:
    """`card.json` and `card.md`."""
    (folder / JSON).write_text(json.dumps(card, indent=1) + "\n", "utf-8")
    (folder / TEXT).write_text(to_markdown(card), "utf-8")


def to_markdown(card: Mapping[str, Any]) -> str:
    """The card for people."""
    message, leak, claim, attacked = card["message"], card["leakage"], card["guarantee"], card["attacked"]
    lines = [
        f"# Privacy card: {visible(card['policy'])}",
        "",
        f"Study {visible(card['study'])}, model {visible(card['model']['name'])} ({card['model']['hash']}), plan "
        f"{card['plan']}.",
        "",
        "## What leaves",
        "",
        f"{_message_words(message)} {100 * card['shared_fraction']:.3g} % of the parameters leave the client.",
        "",
        "| part | shared | trained | clip | noise multiplier | after the noise |",
        "|---|---|---|---|---|---|",
        *(_table_row(entry) for entry in card["table"]),
        "",
        "## Guarantee",
        "",
        f"epsilon = {_epsilon(claim['epsilon'])} at delta {claim['delta']:g}, after {_count_words(claim)}, per "
        f"{claim['unit']}, {claim['adjacency']} adjacency.",
        "",
        visible(claim["statement"]),
        *(
            [""] + [f"- why there is none: {visible(reason)}" for reason in claim["reasons"]]
            if claim["reasons"]
            else []
        ),
        *_bounds(claim["bounds"]),
        "",
        "## What the attacks got",
        "",
        *_attack_lines(attacked, leak),
        "",
        "## What it costs",
        "",
        f"{metric_name(card['utility']['metric'])} {_words(card['utility']['this'])}; without any defence "
        f"{_words(card['utility']['without_any_defence'])}.",
        "",
        "## What the study recommends",
        "",
        visible(card["caps"]["sentence"])
        + (f" Caps: {', '.join(card['caps']['asked'])}." if card["caps"]["asked"] else ""),
        *([""] + [f"- not measured: {visible(gap)}" for gap in card["gaps"]] if card["gaps"] else []),
        "",
        "## What it does not protect",
        "",
        *(f"- {visible(item)}" for item in card["not_protected"]),
        "",
    ]
    return "\n".join(lines)


def _attack_lines(attacked: Mapping[str, Any], leak: Mapping[str, Any]) -> list[str]:
    if attacked["what"] == "nothing":
        return ["Nothing was attacked: what this policy leaks is not known."]
    name = metric_name(leak["metric"])
    first = (
        f"Attacked was a {attacked['what']} of {attacked['batch_size']} text(s), {attacked['targets']} messages, at "
        f"{' and '.join(attacked['at'])} weights, by panel {visible(attacked['panel']['name'])} "
        f"({visible(attacked['panel']['hash'])}): {', '.join(map(visible, attacked['attacks']))}. Known to the server: "
        f"{', '.join(attacked['known_to_the_server'])}."
    )
    lines = [first, ""]
    if not attacked["as_exported"]:
        lines += ["**The exported message is of another kind than the one that was attacked.**", ""]
    lines += [
        "| | value |",
        "|---|---|",
        f"| {name}, best attack ({visible(leak['attack']) or '-'}) | {_words(leak['this'])} |",
        f"| exact match | {_words(leak['exact_match'])} |",
        f"| {name} without any defence | {_words(leak['without_any_defence'])} |",
        f"| {name} of a guess that sees no message | {_words(leak['guess_without_a_message'])} |",
    ]
    lines += [f"- {visible(attack)} did not run: {visible(why)}" for attack, why in attacked["skipped"].items()]
    return lines


def _bounds(bounds: Sequence[Mapping[str, Any]]) -> list[str]:
    told = [
        f"- from one message, a record that is guessed with chance {b['kappa']:g} is reconstructed with chance "
        f"{b['success']:.3g} at most, by any attack"
        for b in bounds
        if b.get("success") is not None
    ]
    return ["", *told] if told else []


def _count_words(claim: Mapping[str, Any]) -> str:
    """How many messages, and of how many noised steps where one message is made of several."""
    messages, steps = claim["messages"], claim["noised_steps"]
    words = f"{messages} message{'' if messages == 1 else 's'}"
    kind = "local" if math.isinf(float(claim["epsilon"])) else "noised"
    return words if steps == messages else f"{words} ({steps} {kind} steps)"


def _message_words(message: Mapping[str, Any]) -> str:
    size, rounds = message["batch_size"], message["rounds"]
    batch = (
        f"Poisson batch of {size} text{'' if size == 1 else 's'} on average (sampling rate "
        f"{message['sampling_rate']:.4g})"
    )
    ending = f"{rounds} round{'' if rounds == 1 else 's'}."
    if message["kind"] == "gradient":
        return f"A message is the gradient of one {batch}; {ending}"
    steps = message["local_steps"]
    each = f"one local step on a {batch}" if steps == 1 else f"{steps} local steps, each on its own {batch}"
    return f"A message is the change of the weights after {each}; {ending}"


def _table_row(entry: Mapping[str, Any]) -> str:
    def yes(value: Any) -> str:
        return "yes" if value else "no"

    clip = "-" if entry["clip"] is None else f"{entry['clip']:g}"
    cells = [entry["parameters"], yes(entry["share"]), yes(entry["train"]), clip, f"{entry['noise']:g}"]
    return f"| {' | '.join(map(visible, cells))} | {visible(entry['release']) or '-'} |"


def _interval(found: Interval | None) -> dict[str, float] | None:
    return None if found is None else {"value": found.value, "low": found.low, "high": found.high}


def _words(found: Mapping[str, float] | None) -> str:
    return (
        "not measured" if found is None else f"{found['value']:.3f} (95 %: {found['low']:.3f} to {found['high']:.3f})"
    )


def _plain(value: float) -> float | str:
    return "inf" if math.isinf(value) else value


def _epsilon(value: float | str) -> str:
    return show_epsilon(float(value))


def caps_of(result: StudyResult) -> Caps:
    """The study's caps."""
    return Caps.read(result.spec)
