"""Findings that the documentation quotes are those of the committed records."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
REPORTS = sorted(path.parent for path in (ROOT / "reports").glob("*/five-sentences.md"))
QUOTED = re.compile(r"(1\.00|\.\d\d+)\s+\[(\.\d\d+|1\.00),\s+(\.\d\d+|1\.00)\]")


def near(quoted: str, value: float) -> bool:
    """Whether a figure is the value, rounded to as many digits as it has."""
    return abs(float(quoted) - value) <= 0.5001 * 10 ** -len(quoted.partition(".")[2])


def intervals(folder: Path) -> list[tuple[float, float, float]]:
    """Every value with its interval that the report holds: leakage, utility and paired differences."""
    table = pd.read_csv(folder / "frontier.csv")
    found = []
    for name in ("leakage", "utility"):
        columns = table[[name, f"{name}_low", f"{name}_high"]].dropna()
        found += [tuple(map(float, row)) for row in columns.itertuples(index=False)]
    page = (folder / "report.md").read_text("utf-8").replace("−", "-")
    number = r"([+-]?\d\.\d+)"
    for value, low, high in re.findall(rf"\| {number} \| {number} – {number} (?=\|)", page):
        found += [(float(value), float(low), float(high)), (-float(value), -float(high), -float(low))]
    return found


@pytest.mark.parametrize("folder", REPORTS, ids=lambda path: path.name)
def test_every_interval_of_the_five_sentences_is_the_report_s(folder):
    held = intervals(folder)
    quoted = QUOTED.findall((folder / "five-sentences.md").read_text("utf-8"))
    assert len(quoted) >= 5
    for figures in quoted:
        assert any(all(map(near, figures, row)) for row in held), figures


def test_the_table_of_the_identification_study_is_its_frontier():
    table = pd.read_csv(ROOT / "reports/does-dp-protect-identify-cola/frontier.csv").set_index("policy")
    page = (ROOT / "docs/reference-studies.md").read_text("utf-8")
    rows = re.findall(r"(?m)^\| (\.?\d) \| ([\d.]+) \| (.+?) \| (.+?) \| [\d.]+ \|$", page)
    assert [row[0] for row in rows] == [".1", ".2", ".3", ".5", "1", "2"]
    for noise, epsilon, whole, query in rows:
        for name, cell in (("whole", whole), ("query", query)):
            held = table.loc[f"{name} noise={float(noise):g}"]
            [figures] = QUOTED.findall(cell) or [re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", cell).groups()]
            assert all(map(near, figures, (held.leakage, held.leakage_low, held.leakage_high))), (noise, name)
            assert near(epsilon, held.epsilon)


def test_the_counts_of_the_map_study_are_its_records():
    scores = pd.read_parquet(ROOT / "reports/which-part-leaks-cola/scores.parquet")
    # an answer that a later attack took over is the same reconstruction
    exact = scores[(scores.metric == "exact_match") & (scores.attack != "prior") & ~scores.inherited.astype(bool)]
    one = exact[exact.sweep_part.notna()].groupby("at").value.agg(["sum", "count"])
    sure = exact[exact.certain.astype(bool)]
    counts = {
        "pretrained": f"{one.loc['start', 'sum']:.0f} of {one.loc['start', 'count']:.0f}",
        "fine-tuned": f"{one.loc['tuned', 'sum']:.0f} of {one.loc['tuned', 'count']:.0f}",
        "certain": f"{len(sure):,} of {len(exact):,}",
    }
    assert (sure.value == 1).all()
    said = (ROOT / "reports/which-part-leaks-cola/five-sentences.md").read_text("utf-8")
    assert all(count in said for count in counts.values()), counts
    for page in ("README.md", "docs/reference-studies.md"):
        text = " ".join((ROOT / page).read_text("utf-8").split())
        assert counts["pretrained"] in text
        assert counts["fine-tuned"] in text


def test_the_eleven_messages_without_noise_are_read_whole_in_the_records():
    scores = pd.read_parquet(ROOT / "reports/clip-prune-withhold-cola/scores.parquet")
    exact = scores[(scores.metric == "exact_match") & scores.epsilon.isin([float("inf")])]
    best = exact.groupby(["policy", "attack"]).value.agg(["sum", "count"]).groupby("policy").max()
    whole = set(best.index[(best["sum"] == 5) & (best["count"] == 5)]) - {"none"}
    assert len(whole) == 11
    assert set(best.index) - whole == {"none", "head-only", "prune keep=0.001", "round bits=2"}
    for page in ("README.md", "docs/reference-studies.md", "reports/clip-prune-withhold-cola/five-sentences.md"):
        assert "eleven" in (ROOT / page).read_text("utf-8")


def test_none_of_the_ten_texts_is_read_through_noise_in_the_records():
    scores = pd.read_parquet(ROOT / "reports/does-dp-protect-rotten_tomatoes/scores.parquet")
    exact = scores[scores.metric == "exact_match"].groupby(["policy", "attack"]).value.agg(["sum", "count"])
    best = exact.groupby("policy").max()
    noises, epsilons = (0.01, 0.1, 0.5), (1, 3, 8, 20)
    assert set(best.index) == {"none", *(f"paper noise={n}" for n in noises), *(f"dp epsilon={e}" for e in epsilons)}
    assert (best["count"] == 10).all()
    assert best["sum"].to_dict() == {policy: 10.0 * (policy == "none") for policy in best.index}
