"""``dpguard report``, ``recommend``, ``card`` and ``compare``: from records to pages and decisions. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from dpguard.cli.console import console
from dpguard.errors import UserError
from dpguard.report.again import left_out
from dpguard.report.files import meant
from dpguard.report.frontier import Frontier, frontier
from dpguard.report.missing import missing
from dpguard.report.recommend import Caps, Recommendation, moved_cap, recommend
from dpguard.report.result import StudyResult
from dpguard.report.terminal import terminal_table
from dpguard.report.text import count
from dpguard.study.store import Store


def read_result(folder: Path, *, show_text: bool | None = None) -> StudyResult:
    """The records of a folder, with private texts only where they may be shown."""
    with Store.open(folder) as store:
        return StudyResult.read(store, show_text=show_text)


def render_report(
    folder: Path,
    *,
    metric: str | None = None,
    pdf: bool = False,
    show_text: bool | None = None,
    out: Path | None = None,
) -> Path:
    """Render the report and its files into ``out`` (the folder itself); print decision, frontier and path.

    Args:
        folder: of the records.
        metric: leakage metric instead of the study's.
        pdf: print report.pdf as well, through an installed Chromium.
        show_text: show private texts, or not, whatever was said when the study was run.
        out: where to write.
    """
    from dpguard.report.pdf import browser, to_pdf
    from dpguard.report.render import render

    if pdf:
        browser()  # a missing one is said before anything is made
    result = read_result(folder, show_text=show_text)
    with _writing(out or folder):
        page = render(result, out or folder, metric=metric)
    found = frontier(result, metric=metric)
    decision = _decide(found, Caps.read(result.spec))
    screen = console()
    screen.print()
    screen.print(terminal_table(found, screen.width))
    screen.print()
    screen.print(decision.sentence, style="bold", markup=False)
    lacking = missing(found, decision, left_out(result))
    if lacking.left_out:
        screen.print(lacking.left_out, markup=False)
    if lacking.results:
        screen.print(f"{count(lacking.results, 'result')} missing or failed: the report says which.", markup=False)
    if note := moved_cap(result.spec, found.leakage_metric, decision.caps):
        screen.print(note, markup=False)
    screen.print(f"report: {page}", markup=False, soft_wrap=True)
    if pdf:
        screen.print(f"PDF: {to_pdf(page)}", markup=False, soft_wrap=True)
    return page


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Say in a sentence why something cannot be written."""
    try:
        yield
    except OSError as error:
        named = meant(str(error.filename or place))
        raise UserError(
            f"{named!r} cannot be written ({error.strerror}), expected a folder that can be written to; --out names "
            "another"
        ) from None


def _decide(found: Frontier, caps: Caps) -> Recommendation:
    return recommend(found, max_leakage=caps.max_leakage, min_utility=caps.min_utility, max_epsilon=caps.max_epsilon)


def print_recommendation(
    folder: Path,
    *,
    max_leakage: float | None,
    min_utility: float | None,
    max_epsilon: float | None,
    as_json: bool,
) -> None:
    """Recommend under the caps given here; each that is not given is the study's."""
    result = read_result(folder)
    found = frontier(result)
    given = {"max_leakage": max_leakage, "min_utility": min_utility, "max_epsilon": max_epsilon}
    asked = {name: value for name, value in given.items() if value is not None}
    of_study = {name: value for name, value in asdict(Caps.read(result.spec)).items() if name not in asked}
    free = {name: None for name, value in asked.items() if value == math.inf}
    decision = _decide(found, Caps(**(of_study | asked | free)))
    if as_json:
        plain = {
            "verdict": decision.verdict, "policy": decision.policy, "sentence": decision.sentence,
            "caps": asdict(decision.caps),
        }  # fmt: skip
        print(json.dumps(plain, indent=2))
        return
    out = console()
    if kept := Caps(**of_study).words() if asked else []:
        out.print(f"The study's own caps hold beside yours: {', '.join(kept)}.", markup=False)
    out.print(decision.sentence, style="bold", markup=False)
    if others := missing(found, decision, left_out(result)).left_out:
        out.print(others, markup=False)
    for line in (*decision.why, *decision.limits, *decision.sensitivity):
        out.print(f"- {line}", markup=False)
    out.print()
    out.print(terminal_table(found, out.width))


def write_card(folder: Path, policy: str | None, out: Path | None, *, as_json: bool) -> None:
    """Write the privacy card of a policy, the recommended one by default, and print where it is."""
    from dpguard.report import card

    result = read_result(folder)
    found = frontier(result)
    decision = _decide(found, Caps.read(result.spec))
    chosen = card.pick(result, decision, policy)
    made = card.content(result, found, decision, chosen)
    target = out or folder / "cards" / card.file_name(chosen)
    with _writing(target):
        card.write(made, target)
    if as_json:
        print(json.dumps(made, indent=2))
        return
    console().print(f"{chosen}: {target / card.TEXT}, {target / card.JSON}", markup=False)


def compare_studies(folders: Sequence[Path], out: Path | None) -> None:
    """Print studies side by side; with ``out`` write the comparison as a page or as Markdown as well."""
    from dpguard.report.compare import compare
    from dpguard.report.compared import check_name, print_to, write

    if out:
        check_name(out)
    labels = _labels(folders)
    found = compare([(label, read_result(folder)) for label, folder in zip(labels, folders, strict=True)])
    screen = console()
    for part in print_to(found, screen.width):
        screen.print(part, markup=False) if isinstance(part, str) else screen.print(part)
    if out:
        with _writing(out):
            write(found, out)
        screen.print(f"comparison: {out}", markup=False)


def _labels(folders: Sequence[Path]) -> list[str]:
    """Folders by their last part where that tells them apart, else in full."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
