"""Records as tidy tables for one's own analysis: one row a cell and metric, or one row a target and metric.

No cell is dropped: one that failed, was skipped or has not run is a row with its status and no value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from dpguard.confusion import UTILITY_METRICS
from dpguard.errors import UserError, did_you_mean
from dpguard.report.result import TEXTLESS
from dpguard.report.scores import Scores, position
from dpguard.report.text import plain
from dpguard.report.utility import judge
from dpguard.stats import Interval
from dpguard.study.answers import wordless
from dpguard.study.record import Record
from dpguard.study.store import Store, StudyInfo

What = Literal["metrics", "scores"]
WHAT: tuple[What, ...] = ("metrics", "scores")

CELL = ["id", "leg", "policy", "entry", "seed", "at"]
FOUND = ["value", "low", "high", "n"]
METRICS = [*CELL, "attack", "metric", "status", "reason", *FOUND, "epsilon"]
COST = {"attack_seconds": "seconds", "steps": "steps", "candidates": "candidates"}
"""Column of ``scores`` -> what the record calls it."""
SCORES = [*CELL, "target", "attack", "metric", "status", "reason", "value", "certain", "inherited", *COST, "epsilon"]
AFTER = ["model", "data", "cell_seconds"]
SWEPT = "sweep_"
"""Begins the columns of sweep values: ``sweep_noise``."""
GUARANTEED = ("epsilon", "sigma_eff", "shared_fraction")

Row = dict[str, Any]
Watch = Callable[[Sequence[Record]], Iterable[Record]]


def load(folder: str | Path, what: str = "metrics", *, show_text: bool = False, watch: Watch = iter) -> pd.DataFrame:
    """The records of a study as one tidy table.

    Args:
        folder: of the study's records, whether finished or still running.
        what: ``metrics``, one row a cell and metric (and attack), with 95 % intervals over the targets or the test
            examples of that cell; or ``scores``, one row a target, attack and metric of the leakage leg.
        show_text: add the true and the recovered text to ``scores``. Never without asking: they are private.
        watch: yields the records that it is given, for a progress bar.

    Returns:
        Columns ``id`` (of the cell), ``leg``, ``policy``, ``entry`` (the policy's name without sweep values), ``seed``,
        ``at``, ``attack``, ``metric``, ``status`` (done, failed, skipped, or missing when it has not run),
        ``reason``, ``value``, ``low``, ``high``, ``n`` (targets or examples; missing where nothing is estimated),
        ``epsilon`` (of the policy; infinite without a guarantee), ``sweep_...`` (one column a sweep variable),
        ``model``, ``data`` and ``cell_seconds`` (wall time of the whole cell, the same in all its rows). ``scores``
        have ``target``, ``certain`` and ``inherited`` instead of an interval, and what the attack spent on the whole
        message: ``attack_seconds``, ``steps`` and ``candidates``; where it inherited an earlier attack's answer, 0
        seconds, and the steps and candidates of that one. Records that an earlier form of the study left are not
        in it.

    Raises:
        UserError: no records there, a store that cannot be read, an unknown table, or texts asked of ``metrics``.

    >>> import tempfile
    >>> from dpguard.study.record import Cell
    >>> cells = [Cell("utility", "none", [], {"name": "m"}, {"name": "d"}, {}, seed) for seed in (0, 1)]
    >>> found = {"metrics": {"accuracy": 0.75, "loss": 0.5}, "predictions": [0, 1, 1, 1], "labels": [0, 1, 1, 0]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Store.open(folder, create=True) as store:
    ...         store.set_study("s", "name: s", {"name": "s"}, cells)
    ...         store.put(Record(cells[0], "done", result=found))
    ...     load(folder)[["seed", "metric", "status", "value", "n"]]
       seed    metric   status  value     n
    0     0  accuracy     done   0.75     4
    1     0      loss     done   0.50     4
    2     1      <NA>  missing    NaN  <NA>
    """
    if what not in WHAT:
        raise UserError(f"what is {what!r}{did_you_mean(what, WHAT)}")
    if show_text and what != "scores":
        raise UserError("the table of metrics holds no texts, expected what='scores' (--what scores) to show them")
    with Store.open(folder) as store:
        info, planned, records = store.study(), store.planned(), {r.cell.id: r for r in store.records()}
        epsilons = _epsilons(records.values())
        rows: list[Row] = []
        textless = show_text
        for record in watch([records.get(cell.id) or Record(cell, "missing") for cell in planned]):  # type: ignore[arg-type]
            about = _about(record if show_text else wordless(record), info, epsilons)
            if what == "metrics":
                rows += [about | row for row in _metrics(record)]
            else:
                texts = {(t.target, t.attack): t.text for t in store.texts(record.cell.id)} if show_text else {}
                textless &= not texts
                rows += [about | row for row in _scores(record, texts, show_text=show_text)]
        if textless and any(r.cell.leg == "leakage" and r.status == "done" for r in records.values()):
            raise UserError(TEXTLESS.format(store.file))
    return _frame(rows, what, info, show_text=show_text)


def _frame(rows: Sequence[Row], what: str, info: StudyInfo, *, show_text: bool) -> pd.DataFrame:
    swept = dict.fromkeys(name for sweep in info.spec.get("sweeps", {}).values() for name in sweep["values"])
    texts = ["truth", "recovered"] if show_text else []
    first = METRICS if what == "metrics" else SCORES
    columns = [*first, *texts, *(SWEPT + name for name in swept), *AFTER]
    frame = pd.DataFrame(rows, columns=columns)
    for name in swept:
        frame[SWEPT + name] = _one_type(frame[SWEPT + name])
    words = ("id", "leg", "policy", "entry", "at", "attack", "metric", "status", "reason", "model", "data", *texts)
    types = dict.fromkeys(words, "string")
    types |= dict.fromkeys(("value", "low", "high", "epsilon", "attack_seconds", "cell_seconds"), "float64")
    types |= dict.fromkeys(("seed", "n", "target", "steps", "candidates"), "Int64")
    types |= dict.fromkeys(("certain", "inherited"), "boolean")
    return frame.astype({name: kind for name, kind in types.items() if name in columns})


def _one_type(values: pd.Series[Any]) -> pd.Series[Any]:
    """Sweep values as numbers where all are, else as texts, so that every format can hold them."""
    known = [value for value in values if isinstance(value, list) or not pd.isna(value)]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        return values.astype("float64")
    texts = [plain(value) if isinstance(value, list) or not pd.isna(value) else None for value in values]
    return pd.Series(texts, index=values.index, dtype="string")


def _about(record: Record, info: StudyInfo, epsilons: dict[str, float]) -> Row:
    """What all rows of a cell share."""
    cell = record.cell
    sweep = info.spec.get("sweeps", {}).get(cell.policy, {"entry": cell.policy, "values": {}})
    return {
        "id": cell.id,
        "leg": cell.leg,
        "policy": cell.policy,
        "entry": sweep["entry"],
        "seed": None if cell.leg == "guarantee" else cell.seed,
        "at": position(cell) if cell.leg == "leakage" else None,
        "status": record.status,
        "reason": record.reason or None,
        "epsilon": epsilons.get(cell.policy),
        **{SWEPT + name: value for name, value in sweep["values"].items()},
        "model": cell.model.get("name"),
        "data": cell.data.get("name"),
        "cell_seconds": record.provenance.get("seconds"),
    }


def _epsilons(records: Iterable[Record]) -> dict[str, float]:
    return {
        record.cell.policy: float(record.result["epsilon"])
        for record in records
        if record.cell.leg == "guarantee" and record.status == "done" and "epsilon" in record.result
    }


def _metrics(record: Record) -> list[Row]:
    """One row a metric (and attack) of a cell; one row without a value for a cell that has none."""
    found: list[Row] = []
    if record.status == "done":
        found = {"guarantee": _guaranteed, "leakage": _leaked, "utility": _useful}[record.cell.leg](record)
    return found or [{}]


def _row(metric: str, interval: Interval | None, **more: Any) -> Row:
    if interval is None:
        return {"metric": metric, **more}
    return {"metric": metric, "value": interval.value, "low": interval.low, "high": interval.high,
            "n": interval.n, **more}  # fmt: skip


def _guaranteed(record: Record) -> list[Row]:
    """Numbers that are computed, not estimated: without an interval."""
    result = record.result
    rows: list[Row] = [{"metric": name, "value": float(result[name])} for name in GUARANTEED if name in result]
    if result.get("bound"):
        rows.append({"metric": "bound", "value": result["bound"]["success"]})
    return rows


def _leaked(record: Record) -> list[Row]:
    """Every attack's mean over the targets, with its interval; an attack that was skipped says why."""
    scores, policy, at = Scores([record]), record.cell.policy, position(record.cell)
    options = dict.fromkeys(
        (str(s["attack"]), metric) for s in record.result.get("scores", ()) for metric in s["metrics"]
    )
    rows = [_row(metric, scores.interval(policy, metric, (attack, at)), attack=attack) for attack, metric in options]
    skipped = record.result.get("skipped") or {}
    return rows + [{"attack": name, "status": "skipped", "reason": why} for name, why in skipped.items()]


def _useful(record: Record) -> list[Row]:
    """Scores on the test examples; in a federation also those of the global model and of the worst clients."""
    result = record.result
    labels, predictions = result.get("labels"), result.get("predictions")
    rows: list[Row] = []
    for metric, value in (result.get("metrics") or {}).items():
        if metric in UTILITY_METRICS and labels and predictions:
            rows.append(_row(metric, judge([predictions], labels, metric, classes=result.get("classes")).interval()))
        else:
            rows.append({"metric": metric, "value": value, "n": len(labels) if labels else None})
    federation = result.get("federation") or {}
    personal = federation.get("personal") or {}
    for name, scores in (
        ("global", federation.get("global")),
        ("clients_mean", personal.get("mean")),
        ("worst_tenth", personal.get("worst_tenth")),
    ):
        rows += [{"metric": f"{name}_{metric}", "value": value} for metric, value in (scores or {}).items()]
    return rows + [{"metric": n, "value": federation[n]} for n in ("bytes_per_round", "bytes") if n in federation]


def _scores(record: Record, texts: dict[tuple[int, str], str], *, show_text: bool) -> list[Row]:
    """One row a target, attack and metric of a leakage cell; one without a value when it gave none."""
    if record.cell.leg != "leakage":
        return []
    rows: list[Row] = []
    for score in record.result.get("scores", ()) if record.status == "done" else ():
        target, attack = int(score["target"]), str(score["attack"])
        about: Row = {"target": target, "attack": attack}
        about |= {name: score.get(name) for name in ("certain", "inherited")}
        about |= {column: score.get(name) for column, name in COST.items()}
        if show_text:
            about |= {"truth": texts.get((target, "truth")), "recovered": texts.get((target, attack))}
        rows += [{**about, "metric": metric, "value": value} for metric, value in score["metrics"].items()]
    return rows or [{}]
