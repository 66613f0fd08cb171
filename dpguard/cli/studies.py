"""``dpguard run``: from a study file to records, and to their report."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpguard.cli import searching
from dpguard.cli.console import console, table
from dpguard.cli.estimating import print_estimate
from dpguard.cli.reporting import render_report
from dpguard.cli.watching import best_point
from dpguard.errors import UserError
from dpguard.study import runner
from dpguard.study.calibration import Kept, calibrated
from dpguard.study.devices import chosen as chosen_devices
from dpguard.study.grid import NEEDS, plan_table
from dpguard.study.lock import in_use
from dpguard.study.ray_cells import RayCells, exposed, reach
from dpguard.study.record import Cell
from dpguard.study.resume import check_inputs
from dpguard.study.reuse import known
from dpguard.study.search import chosen, searches
from dpguard.study.selection import of_policies
from dpguard.study.shards import Shard
from dpguard.study.spec import Study
from dpguard.study.store import Store
from dpguard.study.workers import warm_up

if TYPE_CHECKING:
    from dpguard.policy.layers import Slot
    from dpguard.study.executor import Executor
    from dpguard.study.summary import Summary

EXECUTE = "dpguard.study.legs:execute"
# transformers loads its model code on first use: a second or two that every worker would pay
PRELOAD = (
    "dpguard.study.legs",
    "rouge_score.rouge_scorer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
)


@dataclass(frozen=True)
class Planned:
    """A study made ready to run on this machine.

    Attributes:
        study: with the noise that its target epsilons take.
        cells: everything to run, in order.
        context: plain data for the workers.
        epsilons: policy label -> epsilon after the whole training.
        refused: policy label -> why the federation cannot run it; known with the epsilons.
    """

    study: Study
    cells: list[Cell]
    context: dict[str, Any]
    epsilons: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ground:
    """Model and texts of a study, read once.

    Attributes:
        corpus: the texts.
        data: what `inputs.texts` was asked for.
        slots: the model's parameters.
        model_id, data_id: what identifies them in a cell.
    """

    corpus: Any
    data: dict[str, Any]
    slots: Sequence[Slot]
    model_id: dict[str, Any]
    data_id: dict[str, Any]


def run_study(
    path: Path,
    out: Path | None,
    *,
    workers: int | None,
    threads: int = 1,
    dry_run: bool,
    retry_failed: bool = False,
    show_text: bool,
    shard: str | None = None,
    only: Sequence[str] = (),
    reuse: Sequence[Path] = (),
    ray: str | None = None,
    devices: str = "none",
) -> int:
    """Run a study, or a part of it, and print its decision; the exit status says whether a cell failed."""
    part = Shard.parse(shard) if shard is not None else None
    gpus = chosen_devices(devices, os.environ)
    study = Study.load(path)
    _check_asked(study, out, part, only, ray, devices)
    runner.check_workers(workers)
    folder = out or Path("reports") / (f"{study.name}-shard-{part.index}-of-{part.count}" if part else study.name)
    reusable = known(_others(reuse, folder))
    if not dry_run:
        _make_ready(folder, ray, threads)
    with console().status("reading model and texts") if console().is_terminal else _Nothing():
        ground = read_ground(study)
    if only:
        study = chosen(study, only)

    def plan(found: Study) -> Planned:
        planned = plan_on(ground, found, folder, epsilons=dry_run)
        planned.context["need_device"] = devices not in ("auto", "none")
        return _only(planned, only) if only else planned

    if dry_run:
        settled = searching.settle(study, folder, plan)
        left = _print_plan(settled, folder, _own(part, settled.planned), _finished(folder) | reusable)
        cells = [cell for cell in settled.planned.cells if cell.id in left]
        if cells:
            print_estimate(cells, EXECUTE, settled.planned.context, workers, threads, PRELOAD, gpus)
        return 0

    def go(planned: Planned, first: bool) -> Summary:
        check_inputs(planned.study, folder, planned.cells)
        return runner.run(
            planned.study, folder, planned.cells, execute=EXECUTE, context=planned.context, workers=workers,
            threads=threads, preload=PRELOAD, retry_failed=retry_failed and first, show_text=show_text,
            best=best_point, only=_own(part, planned), executor=_on_ray(ray, study, planned, threads), devices=gpus,
            reuse=reuse,
        )  # fmt: skip

    settled, summary = searching.run(study, folder, plan, go)
    _tell(settled, summary, folder, part)
    return summary.exit_status


def _check_asked(
    study: Study, out: Path | None, part: Shard | None, only: Sequence[str], ray: str | None, devices: str
) -> None:
    """Refuse options that cannot go together."""
    if ray and devices not in ("auto", "none"):
        raise UserError("--devices names GPUs of this machine, expected a run without --ray")
    if only and out is None:
        raise UserError("--only: some policies are a report of their own, expected --out with a folder for it")
    if part and searches(study):
        raise UserError("--shard: a sweep of the study asks for each value after the last, expected a run without it")


def _others(folders: Sequence[Path], own: Path) -> Sequence[Path]:
    """The folders to reuse, none of them the run's own."""
    for folder in folders:
        if folder.resolve() == own.resolve():
            raise UserError(f"--reuse: {str(folder)!r} is where this run writes, expected another study's folder")
    return folders


def _make_ready(folder: Path, ray: str | None, threads: int) -> None:
    """See that the folder is free and the cluster there, and start what takes its time."""
    if holder := in_use(folder):  # told at once, not after reading model and texts
        raise UserError(f"{str(folder)!r} is in use by {holder}, expected a folder that no other run writes to")
    if ray:
        reach(ray)
        if warning := exposed(ray, os.environ):
            print(warning, file=sys.stderr)
    else:
        warm_up(PRELOAD, threads)  # the worker server imports torch while this process reads model and texts


def _on_ray(ray: str | None, study: Study, planned: Planned, threads: int) -> Callable[[], Executor] | None:
    """Makes the executor of a cluster; None where the cells run on this machine."""
    if ray is None:
        return None
    limits = runner.limits_of(study)
    return lambda: RayCells(ray, EXECUTE, planned.context, limits=limits, threads=threads, preload=PRELOAD)


def _tell(settled: searching.Settled, summary: Summary, folder: Path, part: Shard | None) -> None:
    """Print what ran and what failed, and the report of a run that has all its cells."""
    console().print(summary.sentence, markup=False)
    for cell, reason in summary.failures:
        console().print(f"failed: {cell}: {reason}", style="bold", markup=False)
    for sentence in settled.sentences:
        console().print(sentence, markup=False)
    if part:
        planned = settled.planned
        missing = len(planned.cells) - len(_own(part, planned))
        told = f"shard {part}: {missing} of the study's {len(planned.cells)} cells are not its own; dpguard merge OUT"
        console().print(f"{told} {folder} DIR... joins it with the others", markup=False, soft_wrap=True)
    elif not summary.interrupted:
        render_report(folder)


def merge_shards(out: Path, folders: list[Path]) -> int:
    """Merge folders of one study and report; the exit status says whether a cell failed or is missing."""
    from dpguard.study.merge import merge

    merged = merge(out, folders)
    console().print(merged.sentence, markup=False)
    render_report(out)
    return merged.exit_status


def _only(planned: Planned, labels: Sequence[str]) -> Planned:
    """The plan of some policies."""
    cells = of_policies(planned.cells, labels)
    shown = {cell.policy for cell in cells}
    policies = tuple(named for named in planned.study.policies if named.label in shown)
    return replace(planned, cells=cells, study=replace(planned.study, policies=policies))


def _own(part: Shard | None, planned: Planned) -> frozenset[str]:
    return frozenset(cell.id for cell in (part.cells(planned.cells) if part else planned.cells))


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def plan_study(study: Study, folder: Path, *, epsilons: bool = False) -> Planned:
    """Load model and texts, resolve every policy, and list the cells: every mistake shows here.

    Raises:
        UserError: anything in the study, the data or the model that cannot be meant, with its place.
    """
    return plan_on(read_ground(study), study, folder, epsilons=epsilons)


def read_ground(study: Study) -> Ground:
    """Load model and texts.

    Raises:
        UserError: what cannot be read, with its place in the study.
    """
    from dpguard.inputs import models, texts
    from dpguard.inputs.family import slots
    from dpguard.study.ground import corpus_of

    data = {**study.data.model_dump(), "beside": str(Path(study.document.path).parent), "owner": study.owner_column}
    with study.locating("data"), _asked_by_split(study):
        corpus = corpus_of({"data": data})
    with study.locating("model"):
        loaded = models.load(study.model, labels=corpus.classes, seed=0)
    texts.check_lengths((*corpus.train, *corpus.test), loaded.tokenizer, loaded.max_tokens)
    _check_candidates(study, len(set(corpus.public)))
    model_id = {"name": study.model, "hash": loaded.fingerprint, "reading": loaded.reading}
    data_id = {
        "name": study.data_name, "hash": corpus.fingerprint, "train": len(corpus.train), "test": len(corpus.test),
    }  # fmt: skip
    return Ground(corpus, data, slots(loaded.module), model_id, data_id)


def plan_on(ground: Ground, study: Study, folder: Path, *, epsilons: bool = False) -> Planned:
    """As `plan_study`, with model and texts in hand.

    Raises:
        UserError: as `plan_study`.
    """
    from dpguard.attacks.panel import attack, in_order, panel_hash
    from dpguard.study import guarantee_leg

    study = calibrated(study, ground.slots, ground.data_id, _kept(folder, made=not epsilons))
    plans = study.plans(ground.slots)
    panel: dict[str, Any] | None = None
    if study.leakage:
        name = study.leakage.panel
        with study.locating("leakage", "panel"):
            digest = panel_hash(name)
        with study.locating("leakage", "attacks"):
            for asked in study.leakage.attacks or ():
                attack(asked)  # an unknown preset shows now, not in every cell
        panel = {"name": name, "hash": digest, "attacks": in_order(name, study.leakage.attacks)}
    cells = study.cells(ground.model_id, ground.data_id, panel)
    with study.locating("federation"):
        guarantee_leg.check_split(cells, ground.corpus)
    needed = {c.settings[NEEDS] for c in cells if NEEDS in c.settings}
    context = {
        "model": study.model,
        "data": ground.data,
        "folder": str(folder),
        "keep_weights": sorted(needed),
        "keep_rounds": list(study.federation.observe) if study.federation else [],
        "engine": _engine(study),
        "cache_gigabytes": study.cache.gigabytes,
        "plans": {label: plan.hash for label, plan in plans.items()},
        "trained": {c.id: asdict(c) for c in cells if c.id in needed},
    }
    if not epsilons:
        return Planned(study, cells, context, {})
    promised = {
        c.policy: guarantee_leg.epsilon(c, plans[c.policy], ground.corpus) for c in cells if c.leg == "guarantee"
    }
    found = {label: epsilon for label, (epsilon, _) in promised.items()}
    return Planned(study, cells, context, found, {label: why for label, (_, why) in promised.items() if why})


@contextmanager
def _asked_by_split(study: Study) -> Iterator[None]:
    """The texts know their columns, not who asked for them: a client's column is asked for by the split."""
    try:
        yield
    except UserError as error:
        column = study.owner_column
        if column is None or not error.sentence.startswith(f"no column {column!r}"):
            raise
        raise UserError(f"{error.sentence} (asked for by federation.split)", where=error.where) from None


def _check_candidates(study: Study, public: int) -> None:
    """A closed world takes as many public texts as it has candidates."""
    if study.leakage and study.leakage.threat.candidates > public:
        with study.locating("leakage", "threat", "candidates"):
            raise UserError(
                f"leakage.threat.candidates: {study.leakage.threat.candidates} is more than the {public} public texts, "
                f"expected at most {public}"
            )


def _kept(folder: Path, *, made: bool) -> Kept:
    """Calibrated tables kept beside the records, so that resuming takes no time; a dry run makes no folder."""
    from dpguard.study.cache import Cache
    from dpguard.study.provenance import versions

    if not made and not folder.is_dir():
        return lambda key, make: make()
    return lambda key, make: Cache(folder).plain({"what": "table", **key, "versions": versions()}, make)


def _engine(study: Study) -> str:
    """Who runs a federation's rounds; an extra that is missing shows before anything runs."""
    from dpguard.federation import superlink

    engine = study.federation.engine if study.federation else "embedded"
    if engine == "flower" and not superlink.installed():
        with study.locating("federation", "engine"):
            raise UserError("Flower is not installed; expected pip install 'dpguard[flower]', or engine: embedded")
    return engine


def _print_plan(
    settled: searching.Settled, folder: Path, own: frozenset[str], finished: frozenset[str]
) -> frozenset[str]:
    """Print the grid; the ids of the cells that are left."""
    planned = settled.planned
    _print_grid(planned, own, finished)
    left = frozenset(own - finished)
    console().print("The columns after epsilon count cells.", style="dim")
    total = f"{len(planned.cells)} cells" if len(own) == len(planned.cells) else f"{len(own)} cells of this shard"
    console().print(f"{total}, {len(left)} to run; records in {folder}", markup=False)
    for label, why in planned.refused.items():
        console().print(f"{label} will not run: {why}", markup=False)
    for search in searches(settled.study):
        auto = search.auto
        told = f"up to {auto.values} values between {auto.low:g} and {auto.high:g}, each after the last is measured"
        console().print(f"{search.label}: {auto.variable} for {auto.target} {auto.aim:g}: {told}", markup=False)
    for sentence in settled.sentences:
        console().print(sentence, markup=False)
    return left


def _finished(folder: Path) -> frozenset[str]:
    """Ids of the cells that a folder's store holds; none where there is no store."""
    if not (folder / "records.sqlite").exists():
        return frozenset()
    with Store.open(folder) as store:
        return frozenset(store.done_ids())


def _print_grid(planned: Planned, own: frozenset[str], finished: frozenset[str]) -> None:
    cells = [cell for cell in planned.cells if cell.id in own]
    rows = []
    for row in plan_table(planned.study, cells, epsilons=planned.epsilons, finished=finished):
        legs = [row.cells[leg] for leg in ("guarantee", "utility", "leakage")]
        rows.append([row.policy, "inf" if math.isinf(row.epsilon) else f"{row.epsilon:.3g}", *legs, row.finished])
    columns = ["policy", "epsilon", "guarantee", "utility", "leakage", "finished"]
    console().print(table(columns, rows, right=columns[1:]))
