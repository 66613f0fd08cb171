"""Seconds that a report takes: a made-up study of some 2,000 records, and each step's share.

    python benchmarks/report.py [--records 2000] [--targets 50] [--profile]

CPU seconds of one process are what a machine without other work would show. The last line says whether torch was
imported.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
STEPS: list[tuple[str, float, float]] = []


def timed(name: str, work: Callable[[], T]) -> T:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    STEPS.append((name, time.perf_counter() - wall, time.process_time() - cpu))
    return found


def other(result: dict[str, Any], copy: int) -> dict[str, Any]:
    """The result with scores that no other copy has, so that nothing can be computed once for all."""
    if "scores" not in result:
        return result
    scores = [
        {**score, "metrics": {name: v and v * (1 - 1e-4 * copy) for name, v in score["metrics"].items()}}
        for score in result["scores"]
    ]
    return {**result, "scores": scores}


def large(records: int, targets: int) -> Any:
    """The made-up study of the tests, copied under other names until it has so many records."""
    from tests.report.made_up_study import sample

    base = sample(targets)
    copied, policies = [], []
    for copy in range(-(-records // len(base.records))):
        for record in base.records:
            name = record.cell.policy if copy == 0 else f"{record.cell.policy} copy={copy}"
            policies.append(name)
            copied.append(replace(record, cell=replace(record.cell, policy=name), result=other(record.result, copy)))
    spec = {**base.spec, "policies": list(dict.fromkeys(policies))}
    return replace(base, study={**base.study, "spec": spec}, records=copied, texts={})


def in_browser(page: Path) -> None:
    """Seconds from opening a page until its load event, after a first opening that warms the browser."""
    from tests.report.browser import Browser, find

    path = find()
    if path is None:
        print("no Chromium here: the time to render was not measured")
        return
    with Browser(path) as browser:
        browser.open(page)
        timed("demo-sized page: opened in Chromium", lambda: browser.open(page))
    print(f"demo-sized page {page.stat().st_size:,} bytes (goal 500,000 bytes and 3 s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--targets", type=int, default=50)
    parser.add_argument("--profile", action="store_true", help="print the functions that take most of the whole")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    timed("import", lambda: __import__("dpguard.report.render"))
    from dpguard.report import pictures, views
    from dpguard.report.differences import compared
    from dpguard.report.frontier import frontier
    from dpguard.report.render import render

    study = large(given.records, given.targets)
    timed("scores as arrays", lambda: study.scores)
    table = timed("frontier: intervals of every metric", lambda: frontier(study))
    timed("paired differences", lambda: compared(study, table, "mixture"))
    timed("every policy's own part", lambda: views.policy_views(study, table))
    timed("pictures as SVG", lambda: pictures.draw_all(table))
    fresh = replace(study, records=list(study.records))
    profile = cProfile.Profile() if given.profile else None
    with tempfile.TemporaryDirectory() as folder:
        if profile:
            profile.enable()
        page = timed("THE WHOLE REPORT, from records to files", lambda: render(fresh, Path(folder)))
        if profile:
            profile.disable()
        size = page.stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        in_browser(render(large(1, given.targets), Path(folder)))
    print(f"{len(study.records)} records, {len(study.policies)} policies, {given.targets} targets; page {size:,} bytes")
    for name, wall, cpu in STEPS:
        print(f"{name:<42} {wall:7.2f} s wall {cpu:7.2f} s CPU")
    print("torch was imported" if "torch" in sys.modules else "torch was not imported")
    if profile:
        pstats.Stats(profile).sort_stats("cumtime").print_stats(40)


if __name__ == "__main__":
    main()
