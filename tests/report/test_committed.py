"""Findings that the documentation quotes are those of the committed records."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from dpguard.report.frontier import frontier
from dpguard.report.result import StudyResult
from dpguard.study.store import Store

ROOT = Path(__file__).parents[2]
REPORTS = sorted(path.parent for path in (ROOT / "reports").glob("*/five-sentences.md"))
PAGES = [ROOT / "README.md", ROOT / "docs" / "reference-studies.md"]
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


def utility_metric(folder: Path) -> str:
    """What the report's study judges a training by, as its page prints the study file."""
    study = re.search(r"(?ms)^```yaml\n(.*?)^```", (folder / "report.md").read_text("utf-8"))[1]
    return (yaml.safe_load(study).get("utility") or {}).get("metric", "accuracy")


@pytest.mark.parametrize("folder", REPORTS, ids=lambda path: path.name)
def test_the_frontier_is_the_records(folder):
    table = pd.read_csv(folder / "frontier.csv").set_index("policy")
    scores = pd.read_parquet(folder / "scores.parquet")
    [metric] = set(table.leakage_metric)
    means = scores[scores.metric == metric].groupby(["policy", "attack", "at"]).value.mean()
    strongest = means.groupby("policy").max()
    short = set(scores[scores.status == "missing"].policy)  # a policy with a cell to run has no leakage yet
    assert set(strongest.index) - short == set(table.index[table.leakage.notna()])
    for policy, row in table[table.leakage.notna()].iterrows():
        assert row.leakage == pytest.approx(strongest[policy], abs=1e-6), policy
        assert means[policy, row.attack].max() == pytest.approx(row.leakage, abs=1e-6), (policy, row.attack)
    metrics = pd.read_parquet(folder / "metrics.parquet")
    judged = metrics[(metrics.leg == "utility") & (metrics.metric == utility_metric(folder))]
    worth = judged.groupby("policy").value.mean()
    assert set(worth.index) == set(table.index[table.utility.notna()])
    assert table.utility.dropna().to_dict() == pytest.approx(worth.to_dict(), abs=1e-6)
    epsilons = metrics[metrics.metric == "epsilon"].set_index("policy").value
    assert table.epsilon.to_dict() == pytest.approx(epsilons.to_dict(), rel=1e-5)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_interval_of_a_page_is_a_committed_report_s(page):
    """Where a line or paragraph names reports, it is one of theirs."""
    everywhere = {folder.name: intervals(folder) for folder in REPORTS}
    text = page.read_text("utf-8")
    blocks = re.split(r"\n(?=\| )|\n\n", text)
    for block in blocks:
        named = [name for name in everywhere if re.search(rf"reports/{name}\b(?!-)", block)]
        held = [row for name in named or everywhere for row in everywhere[name]]
        for figures in QUOTED.findall(block):
            assert any(all(map(near, figures, row)) for row in held), (figures, named)
    assert len(QUOTED.findall(text)) >= 10


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


def counted(folder: str) -> pd.DataFrame:
    """Exact or not, for every reconstruction that was made from a message of a committed study."""
    scores = pd.read_parquet(ROOT / "reports" / folder / "scores.parquet")
    scores = scores[scores.status == "done"]
    # an answer that a later attack took over is the same reconstruction
    own = (scores.attack != "prior") & ~scores.inherited.astype(bool)
    return scores[own & (scores.metric == "exact_match")]


def counts() -> dict[str, tuple[int, int]]:
    """What the maps and their headline say in counts: (how many, of how many)."""
    found = {}
    for task, before in (("cola", ""), ("rotten_tomatoes", "reviews, ")):
        exact = counted(f"which-part-leaks-{task}")
        one = exact[exact.sweep_part.notna()].groupby("at").value
        sure = exact[exact.certain.astype(bool)]
        assert (sure.value == 1).all()
        found |= {
            f"{before}pretrained": (one.sum()["start"], one.size()["start"]),
            f"{before}fine-tuned": (one.sum()["tuned"], one.size()["tuned"]),
            f"{before}certain": (len(sure), len(exact)),
        }
    for size in (1, 2, 4):
        exact = counted(f"which-part-leaks-headline-cola-batch-{size}")
        best = exact.groupby(["policy", "attack"]).value.agg(["sum", "size"]).groupby("policy").max()
        read = best[best["sum"] > 0]
        found[f"batch {size}"] = (read["sum"].sum(), read["size"].sum())
    return {name: (int(some), int(every)) for name, (some, every) in found.items()}


COUNT = re.compile(r"\b([\d,]*\d) of (?:all |the |its )?([\d,]*\d)\b|\b[Aa]ll ([\d,]*\d)\b")


def quoted_counts(page: Path) -> set[tuple[int, int]]:
    """Every "297 of 300" and "all 500" of a page, as (how many, of how many)."""
    found = COUNT.findall(" ".join(page.read_text("utf-8").split()))
    return {tuple(int(n.replace(",", "")) for n in (some or every, of or every)) for some, of, every in found}


def test_the_counts_of_the_map_study_are_its_records():
    held = counts()
    said = {page.name: quoted_counts(page) for page in PAGES}
    for page, found in said.items():
        known = {(some, of) for some, of in found if of in {of for _, of in held.values()}}
        assert known <= set(held.values()), page
        assert held["pretrained"] in found, page
    assert set(held.values()) <= said["reference-studies.md"]
    assert re.search(rf"\b{held['fine-tuned'][0]}\b", PAGES[0].read_text("utf-8"))
    five = quoted_counts(ROOT / "reports/which-part-leaks-cola/five-sentences.md")
    assert {held[name] for name in ("pretrained", "fine-tuned", "certain")} <= five
    five = quoted_counts(ROOT / "reports/which-part-leaks-rotten_tomatoes/five-sentences.md")
    assert {held[f"reviews, {name}"] for name in ("pretrained", "fine-tuned", "certain")} <= five
    for size in (1, 4):
        path = ROOT / f"reports/which-part-leaks-headline-cola-batch-{size}/five-sentences.md"
        assert held[f"batch {size}"] in quoted_counts(path)


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


@pytest.mark.parametrize("folder", [f for f in REPORTS if (f / "answers.sqlite").is_file()], ids=lambda path: path.name)
def test_the_answers_that_go_with_a_report_give_its_frontier_and_hold_no_text(folder, tmp_path):
    shutil.copy(folder / "answers.sqlite", tmp_path)
    with Store.open(tmp_path) as store:
        result = StudyResult.read(store)
        assert not any(store.texts(record.cell.id) for record in result.records)
    assert frontier(result).to_csv() == (folder / "frontier.csv").read_text("utf-8")


def test_the_paper_s_attack_tells_no_defence_from_none_and_the_panel_reads_all():
    folder = ROOT / "reports/clip-prune-withhold-partial-cola"
    scores = pd.read_parquet(folder / "scores.parquet")
    exact = scores[scores.metric == "exact_match"].groupby(["policy", "attack"]).value.mean().unstack()
    assert len(exact) == 6
    assert (exact.drop(columns=["match:partial", "prior"]).max(axis=1) == 1).all()
    partial = scores[(scores.metric == "rougeL") & (scores.attack == "match:partial")].groupby("policy").value.mean()
    assert partial.drop("none").between(0.5, 0.65).all()
    assert 0.5 < partial["none"] < 0.65
    assert not scores[scores.attack == "match:partial"].inherited.any()
