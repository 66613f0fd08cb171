"""``dpguard run``: from a study file to records, and to their report."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpguard.cli import searching
from dpguard.cli.console import console
from dpguard.cli.estimating import print_estimate
from dpguard.cli.planning import Ground, Planned, plan_on, read_ground
from dpguard.cli.rehearsing import print_plan
from dpguard.cli.reporting import render_report
from dpguard.cli.warned import warnings
from dpguard.cli.watching import best_point
from dpguard.errors import UserError
from dpguard.study import runner
from dpguard.study.devices import chosen as chosen_devices
from dpguard.study.lock import in_use
from dpguard.study.ray_cells import RayCells, exposed, place_of, reach
from dpguard.study.record import Cell
from dpguard.study.resume import check_inputs, check_subset
from dpguard.study.reuse import known
from dpguard.study.search import chosen, searches
from dpguard.study.selection import of_policies
from dpguard.study.shards import Shard
from dpguard.study.spec import Study
from dpguard.study.todo import Todo
from dpguard.study.workers import warm_up

if TYPE_CHECKING:
    from dpguard.study.executor import Executor
    from dpguard.study.store import Store
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
class Asked:
    """How a study is to be run, as asked for on the command line; ``dpguard run --help`` explains each."""

    out: Path | None = None
    workers: int | None = None
    threads: int = 1
    dry_run: bool = False
    retry_failed: bool = False
    show_text: bool = False
    shard: str | None = None
    only: Sequence[str] = ()
    reuse: Sequence[Path] = ()
    ray: str | None = None
    devices: str = "none"

    @property
    def part(self) -> Shard | None:
        """The shard, None for the whole study."""
        return Shard.parse(self.shard) if self.shard is not None else None

    def folder(self, study: Study) -> Path:
        """Where the records go."""
        part = self.part
        return self.out or Path("reports") / (
            f"{study.name}-shard-{part.index}-of-{part.count}" if part else study.name
        )

    def check(self, study: Study) -> None:
        """Refuse options that cannot go together.

        Raises:
            UserError: the first of them.
        """
        runner.check_workers(self.workers)
        if self.ray is not None:
            place_of(self.ray)
        if self.ray and self.devices not in ("auto", "none"):
            raise UserError("--devices names GPUs of this machine, expected a run without --ray")
        if self.only and self.out is None:
            raise UserError("--only: some policies are a report of their own, expected --out with a folder for it")
        if self.part and searches(study):
            raise UserError(
                "--shard: a sweep of the study asks for each value after the last, expected a run without it"
            )
        for folder in self.reuse:
            if folder.resolve() == self.folder(study).resolve():
                raise UserError(f"--reuse: {str(folder)!r} is where this run writes, expected another study's folder")


def run_study(path: Path, asked: Asked) -> int:
    """Run a study, or a part of it, and print its decision; the exit status says whether a cell failed."""
    gpus = chosen_devices(asked.devices, os.environ)
    study = Study.load(path)
    asked.check(study)
    reusable, folder = known(asked.reuse), asked.folder(study)
    if not asked.dry_run:
        _make_ready(folder, asked)
    with console().status("reading model and texts") if console().is_terminal else _Nothing():
        ground = read_ground(study)
    study = study.on(ground.slots)
    for warning in warnings(study, ground):
        print(warning, file=sys.stderr)
    if asked.only:
        study = chosen(study, asked.only)
    plan = _planner(ground, folder, asked)
    if asked.dry_run:
        _rehearse(searching.settle(study, folder, plan), folder, asked, reusable, gpus)
        return 0
    settled, summary = searching.run(study, folder, plan, _goer(folder, asked, gpus))
    _tell(settled, summary, folder, asked.part)
    return summary.exit_status


def _rehearse(
    settled: searching.Settled, folder: Path, asked: Asked, reusable: frozenset[str], gpus: Sequence[str]
) -> None:
    """Print what a run would do, and how long it would take."""
    own = _own(asked.part, settled.planned)
    todo = Todo.ahead(own, folder, retry_failed=asked.retry_failed, known=reusable)
    print_plan(settled, folder, own, todo)
    if todo.cells:
        print_estimate(todo.cells, EXECUTE, settled.planned.context, asked.workers, asked.threads, PRELOAD, gpus)


def _planner(ground: Ground, folder: Path, asked: Asked) -> Callable[[Study], Planned]:
    """Makes the plan of a study, or of its chosen policies, on model and texts that were read."""

    def plan(found: Study) -> Planned:
        planned = plan_on(ground, found, folder, epsilons=asked.dry_run)
        planned.context["need_device"] = asked.devices not in ("auto", "none")
        if not asked.only:
            return planned
        planned = _only(planned, asked.only)
        check_subset(folder, planned.cells)
        return planned

    return plan


def _goer(folder: Path, asked: Asked, gpus: Sequence[str]) -> Callable[[Planned, Store, bool], Summary]:
    """Runs a plan; failed cells run again in the first of several runs only."""

    def go(planned: Planned, store: Store, first: bool) -> Summary:
        check_inputs(planned.study, folder, planned.cells)
        return runner.run(
            planned.study, folder, planned.cells, execute=EXECUTE, context=planned.context, workers=asked.workers,
            threads=asked.threads, preload=PRELOAD, retry_failed=asked.retry_failed and first,
            show_text=asked.show_text, best=best_point, only={cell.id for cell in _own(asked.part, planned)},
            reuse=asked.reuse, executor=_on_ray(asked.ray, planned, asked.threads), devices=gpus, held=store,
        )  # fmt: skip

    return go


def _make_ready(folder: Path, asked: Asked) -> None:
    """See that the folder is free and the cluster there, and start what takes its time."""
    if holder := in_use(folder):  # told at once, not after reading model and texts
        raise UserError(f"{str(folder)!r} is in use by {holder}, expected a folder that no other run writes to")
    if asked.ray:
        reach(asked.ray)
        if warning := exposed(asked.ray, os.environ):
            print(warning, file=sys.stderr)
    else:
        warm_up(PRELOAD, asked.threads)  # the worker server imports torch while this process reads model and texts


def _on_ray(ray: str | None, planned: Planned, threads: int) -> Callable[[], Executor] | None:
    """Makes the executor of a cluster; None where the cells run on this machine."""
    if ray is None:
        return None
    limits = runner.limits_of(planned.study)
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
    """The plan of some policies; its study keeps the names of the others."""
    cells = of_policies(planned.cells, labels)
    shown = {cell.policy for cell in cells}
    policies = tuple(named for named in planned.study.policies if named.label in shown)
    left_out = tuple(named.label for named in planned.study.policies if named.label not in shown)
    return replace(planned, cells=cells, study=replace(planned.study, policies=policies, left_out=left_out))


def _own(part: Shard | None, planned: Planned) -> list[Cell]:
    return part.cells(planned.cells) if part else planned.cells


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None
