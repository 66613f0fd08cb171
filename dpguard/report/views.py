"""What a page says about each policy, as plain data: its table, guarantee, attack rows, evidence and cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpguard.report import federations
from dpguard.report.again import just
from dpguard.report.chance import best_guess
from dpguard.report.evidence import Evidence, evidence
from dpguard.report.frontier import Frontier, Row
from dpguard.report.result import StudyResult
from dpguard.report.scores import Scores, position
from dpguard.report.text import at_name, metric_name, number, percent, plain, visible
from dpguard.report.words import in_words
from dpguard.stats import Interval
from dpguard.study.record import Record

PRINTED = ("parameters", "fraction", "share", "train", "clip", "group", "noise", "std", "release")
"""Order of the columns of a resolved table; others follow."""
CHECKS = 12
"""Lines of the defence-effect check printed for each policy."""


@dataclass(frozen=True)
class AttackRow:
    """One attack at one position: means over targets and seeds, and what the numbers rest on.

    Attributes:
        attack: its name.
        at: the position in words.
        leakage: the study's leakage metric.
        exact: exact match; as a proportion never narrower than the exact interval.
        recall: mean token recall, or None.
        entities: mean entity recall, or None where no entities are marked.
        certain: how many reconstructions the attack was certain of.
        inherited: how many were taken over from a cheaper attack that was certain.
        scores: how many scores there are.
    """

    attack: str
    at: str
    leakage: Interval | None
    exact: Interval | None
    recall: float | None
    entities: float | None
    certain: int
    inherited: int
    scores: int


@dataclass(frozen=True)
class Check:
    """What was measured on a message before it left, beside what the table claims.

    Attributes:
        what: "one example moved" (a clip group, by a norm), for a change of the weights "all texts and steps moved", or
            "noise std of" (a part of the model).
        part: the clip group or the part of the model.
        measured: in wire units.
        claimed: the bound C for a clip group, the std for noise.
    """

    what: str
    part: str
    measured: str
    claimed: str


@dataclass(frozen=True)
class PolicyView:
    """Everything that the page says about one policy.

    Attributes:
        number: its row in the frontier table, from 1.
        row: its figures.
        words: the same table in plain English; empty where it is not known.
        table: the rows of the policy as written: (layers, the columns set).
        groups: the same resolved against the model, for print.
        guarantee: facts of the guarantee leg: (name, value).
        statement: the guarantee in words.
        reasons: why epsilon is infinite.
        attacks: one row for every attack and position.
        skipped: attacks that could not run: (attack, position in words, reason).
        checks: what was measured of clip and noise on the message.
        more_checks: how many such lines there was no room for.
        utility: facts of the utility leg: (name, value).
        evidence: worst targets, empty when texts are hidden.
        more_evidence: how many targets are not shown.
        again: words after the study's command that run this policy alone, "" for one that is not plain (`again.just`).
    """

    number: int
    row: Row
    words: tuple[str, ...]
    table: tuple[tuple[str, str], ...]
    groups: tuple[Mapping[str, str], ...]
    guarantee: tuple[tuple[str, str], ...]
    statement: str
    reasons: tuple[str, ...]
    attacks: tuple[AttackRow, ...]
    skipped: tuple[tuple[str, str, str], ...]
    checks: tuple[Check, ...]
    more_checks: int
    utility: tuple[tuple[str, str], ...]
    evidence: tuple[Evidence, ...]
    more_evidence: int
    again: str


def policy_views(result: StudyResult, frontier: Frontier) -> list[PolicyView]:
    """The view of every policy, in the study's order."""
    return [_view(number, row, result, frontier, result.scores) for number, row in enumerate(frontier.rows, 1)]


def _view(number: int, row: Row, result: StudyResult, frontier: Frontier, scores: Scores) -> PolicyView:
    records = [record for record in result.records if record.cell.policy == row.policy]
    known = bool(records) or any(cell.policy == row.policy for cell in result.planned)
    done = [record for record in records if record.status == "done"]
    promise = next((r.result for r in done if r.cell.leg == "guarantee"), {})
    attacked = [record for record in done if record.cell.leg == "leakage"]
    shown, more = evidence(attacked, result, frontier.leakage_metric) if result.shows_text else ((), 0)
    return PolicyView(
        number,
        row,
        (*in_words(federations.treated(row)), *federations.told(row, frontier.rows)) if known else (),
        (*table_rows(row.table), *federations.line(row, frontier.rows)),
        tuple(_printed(group) for group in promise.get("table", ())),
        tuple(_guarantee_facts(promise, row, frontier.leakage_metric)),
        visible(promise.get("statement", "")),
        tuple(visible(reason) for reason in promise.get("reasons", ())),
        tuple(_attack_rows(row.policy, frontier.leakage_metric, scores)),
        tuple(_skipped(attacked)),
        *_checks(attacked, promise.get("table", ())),
        tuple(_utility_facts([r for r in done if r.cell.leg == "utility"])),
        shown,
        more,
        just([row.policy]),
    )


def table_rows(table: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """A policy's rows for print: which layers, and the columns that the row sets.

    >>> table_rows([{"layers": ["embeddings", "head"], "share": False, "clip": 1.0}])
    [('embeddings, head', 'share: false, clip: 1')]
    """
    return [(plain(row.get("layers", "all")), plain({k: v for k, v in row.items() if k != "layers"})) for row in table]


def _printed(group: Mapping[str, Any]) -> dict[str, str]:
    """One resolved row; what is not set is empty, the share of the parameters is in per cent."""
    shown = {}
    order = {key: place for place, key in enumerate(PRINTED)}
    for key, value in sorted(group.items(), key=lambda item: order.get(item[0], len(order))):
        text = percent(value) if key == "fraction" else "" if value is None else visible(plain(value), limit=240)
        shown[visible(key)] = text
    return shown


def _guarantee_facts(promise: Mapping[str, Any], row: Row, metric: str) -> list[tuple[str, str]]:
    names = (("delta", "delta"), ("sampling_rate", "sampling rate"), ("steps", "steps"))
    facts = [(name, plain(promise[key])) for key, name in names if promise.get(key) is not None]
    if promise.get("sigma_eff"):
        facts.insert(0, ("effective noise multiplier", f"{float(promise['sigma_eff']):.3g}"))
    return facts + _bounds(promise, row, dict.fromkeys((metric, "exact_match")))


def _bounds(promise: Mapping[str, Any], row: Row, metrics: Collection[str]) -> list[tuple[str, str]]:
    """What the best guess was measured to reach, what any attack can make of it, and the bound of one given chance.

    That chance is an example in the open world, and exact in the closed one. Nothing without a guarantee.
    """
    facts: list[tuple[str, str]] = []
    bound = promise.get("bound")
    if not bound:
        return facts
    measured = "" if row.candidates else best_guess(promise, tuple(metrics))
    if measured:
        known = {name: row.measures[name].bound for name in metrics if name in row.measures}
        given = [f"{metric_name(name)} {bound:.2g}" for name, bound in known.items() if bound is not None]
        facts.append(("chance of the best guess without a message", measured))
        if given:
            facts.append(
                (f"the most that any attack reaches in the mean from {row.saw}, given that chance", ", ".join(given))
            )
    chance = f"{float(bound['kappa']):.2g}"
    where = (
        f"a guess among {row.candidates:,} texts succeeds with chance {chance}" if row.candidates
        else f"for example, where a guess succeeds with chance {chance}"
    )  # fmt: skip
    return [*facts, (f"bound on exact recovery from {row.saw}", f"{float(bound['success']):.3g} ({where})")]


def _federation_facts(trained: Sequence[Record]) -> list[tuple[str, str]]:
    """What a federation's utility cells add: the global and the personal models, bytes, every client's epsilon."""
    found = [record.result["federation"] for record in trained if record.result.get("federation")]
    if not found:
        return []

    def mean(values: Sequence[float]) -> str:
        return number(sum(values) / len(values), 3)

    facts = [("global model, accuracy", mean([f["global"]["accuracy"] for f in found]))]
    for key, words in (("mean", "clients' own models, mean accuracy"), ("worst_tenth", "worst tenth of the clients")):
        facts.append((words, mean([f["personal"][key]["accuracy"] for f in found])))
    first = found[0]
    facts.append(("bytes of a message", f"{int(first['bytes_per_message']):,}"))
    facts.append(("bytes sent in a round, in all", f"{int(first['bytes_per_round']):,}, {int(first['bytes']):,}"))
    epsilons = [tuple(float(f["epsilon"][key]) for key in ("max", "median")) for f in found]
    worst, median = (max(values) for values in zip(*epsilons, strict=True))
    return [*facts, ("epsilon of the clients, worst and median", f"{number(worst, 3)}, {number(median, 3)}")]


def _attack_rows(policy: str, metric: str, scores: Scores) -> list[AttackRow]:
    return [_attack_row(policy, option, metric, scores) for option in scores.options(policy)]


def _attack_row(policy: str, option: tuple[str, str], metric: str, scores: Scores) -> AttackRow:
    attack, at = option
    block = scores.blocks[policy]
    return AttackRow(
        visible(attack, limit=60),
        at_name(at),
        scores.interval(policy, metric, option),
        scores.interval(policy, "exact_match", option),
        scores.mean(policy, option, "token_recall"),
        scores.mean(policy, option, "entity_recall"),
        block.certain[option],
        block.inherited[option],
        block.scores[option],
    )


def _skipped(attacked: Sequence[Record]) -> list[tuple[str, str, str]]:
    told = {
        (visible(attack, limit=60), at_name(position(record.cell)), visible(reason))
        for record in attacked
        for attack, reason in (record.result.get("skipped") or {}).items()
    }
    return sorted(told)


def _checks(attacked: Sequence[Record], groups: Sequence[Mapping[str, Any]]) -> tuple[tuple[Check, ...], int]:
    """The defence-effect check of the first leakage cell that has one, and how many lines there was no room for.

    Parts of which nothing leaves are left out: they are no part of the message.
    """
    home = {group["parameters"] for group in groups} - {group["parameters"] for group in groups if group["share"]}
    defence: Mapping[str, Any] = next((r.result["defence"] for r in attacked if r.result.get("defence")), {})
    moved = "all texts and steps moved" if "change" in defence.get("judged", "") else "one example moved"
    found = [
        Check(words, visible(part), f"{float(measured):.4g}", f"{float(claimed):.4g}")
        for key, words in (("clip", moved), ("noise", "noise std of"))
        for part, (measured, claimed) in (defence.get(key) or {}).items()
        if part not in home
    ]
    return tuple(found[:CHECKS]), max(len(found) - CHECKS, 0)


def _utility_facts(trained: Sequence[Record]) -> list[tuple[str, str]]:
    if not trained:
        return []
    facts = []
    for name in trained[0].result.get("metrics", {}):
        values = [float(record.result["metrics"][name]) for record in trained]
        each = f" ({', '.join(number(value, 3) for value in values)})" if len(values) > 1 else ""
        facts.append((metric_name(name), number(sum(values) / len(values), 3) + each))
    first = trained[0].result
    facts.append(("test texts", f"{len(first['labels']):,}"))
    facts.append(("seeds", str(len(trained))))
    if first.get("clipped_fraction") is not None:
        shares = [float(record.result["clipped_fraction"]) for record in trained]
        told = "clipped, of the pairs of example and clip group (private, not covered by epsilon)"
        facts.append((told, number(sum(shares) / len(shares))))
    return facts + _federation_facts(trained)
