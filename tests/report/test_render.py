"""The whole report: self-contained, escaped, the same bytes again, and honest on its first screen."""

import csv
import hashlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dpguard.report.evidence import SHOWN
from dpguard.report.page import digest as digest_of
from dpguard.report.render import render
from dpguard.study.record import Record, TextRow
from tests.report.made_up_study import POLICIES, leakage, sample, sentence

PICTURES = ("tradeoff", "sandwich", "over_noise", "attacks", "map", "map_end", "map_utility")
ROOT = Path(__file__).parents[2]
EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "=HYPERLINK(1)",
    "{{ 7*7 }}{% raw %}",
    "right\u202eto left\u2066",
    "bell\x07\x1b[31m\x00",
    "long" * 2500,
    "a|b`c`*d*\n# e",
]


class Page(HTMLParser):
    """Tags, ids, links and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.words, self.open = [], [], [], [], []
        self.attributes = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


@pytest.fixture(scope="module")
def study():
    return sample()


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert render(study, folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A study whose policy names, question, reasons, texts and file are all hostile."""
    study = sample(4)
    names = dict(zip([name for name in POLICIES if name != "none"], EVIL, strict=False))
    records = []
    for record in study.records:
        cell = replace(record.cell, policy=names.get(record.cell.policy, record.cell.policy))
        reason = EVIL[0] + EVIL[4] + EVIL[6] if record.reason else ""
        result = record.result
        if record.cell.leg == "guarantee":
            result = {**result, "statement": " ".join(EVIL), "reasons": EVIL}
        records.append(Record(cell, record.status, reason, result, {"versions": {EVIL[0]: EVIL[1]}}))
    texts = {
        cell: [TextRow(row.target, row.attack, EVIL[n % 8] + row.text) for n, row in enumerate(rows)]
        for cell, rows in study.texts.items()
    }
    spec = {**study.spec, "policies": []}
    told = {**study.study, "name": EVIL[0], "question": EVIL[1] + EVIL[4], "yaml": "\n".join(EVIL), "spec": spec}
    folder = tmp_path_factory.mktemp("hostile")
    render(replace(study, study=told, records=records, texts=texts), folder)
    return folder


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_report_is_a_few_files_and_small(folder):
    assert set(digest(folder)) == {
        "report.html", "report.md", "tables.tex", "frontier.csv", "card.json", "card.md",
        *(f"figures/{name}.{kind}" for name in PICTURES for kind in ("svg", "png", "pdf")),
    }  # fmt: skip
    assert (folder / "report.html").stat().st_size <= 500_000


def test_the_page_asks_for_nothing(folder, page):
    text = (folder / "report.html").read_text("utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    for tag, source in (("style", "style-src"), ("script", "script-src")):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert f"{source} '{digest_of(content)}';" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert not [link for link in page.links if not link.startswith("#")], "the page must be whole when passed on alone"
    assert not {"link", "iframe", "object", "img"} & set(page.tags)
    assert page.tags.count("script") == 1
    assert "style" not in page.attributes
    assert not re.search(r"url\((?!#)|@import", text)
    assert not [name for name in page.attributes if name.startswith("on")]


def test_every_link_leads_somewhere_and_ids_are_unique(page):
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_rebuilding_gives_the_same_bytes_in_another_process(folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.report.made_up_study import sample;"
        "from dpguard.report.render import render; render(sample(), Path(sys.argv[1]));"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=False, cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path) == digest(folder)
    assert not {"torch", "opacus", "transformers"} & set(done.stdout.split())


def test_the_decision_comes_first(page):
    text = page.text
    assert text.index("What may a client of the clinic share") < text.index("Use dp-sgd noise=0.6")
    assert text.index("Use dp-sgd noise=0.6") < text.index("What it does not protect") < text.index("The frontier")


def test_failed_and_skipped_cells_are_on_the_first_screen(page):
    first = page.text[: page.text.index("What leaks, and what it is worth")]
    assert "1 result missing from this report" in first
    assert "leakage failed for sign (end, seed 0): out of memory: 3.1 GB asked for" in first
    assert "utility skipped for no-embeddings (seeds 0, 1, 2)" in first
    assert "needs the federation" in first


def test_no_line_of_the_headline_ends_inside_a_metric_s_name(tmp_path):
    study = sample(8)
    weak = [r for r in study.records if not (r.cell.leg == "leakage" and r.cell.policy == "none")]
    weak += [leakage("none", at, 0.0, 8)[0] for at in ("start", "end")]
    text = render(replace(study, records=weak), tmp_path).read_text("utf-8")
    headline = re.search(r'<h2 id="decision" class="answer">(.*?)</h2>', text)[1]
    assert "ROUGE\N{NON-BREAKING HYPHEN}L" in headline
    assert "ROUGE-" not in headline


def test_every_policy_has_its_table_statement_and_attacks(page):
    for number, name in enumerate(POLICIES, 1):
        assert f"policy-{number}" in page.ids
        assert f"{number} · {name}" in page.text
    assert "block[1].attention.query" in page.text
    assert "clip: 1, noise: 0.8, per: block" in page.text
    assert "No formal guarantee: epsilon is infinite." in page.text
    assert "Covered: one training example" in page.text


def test_chance_is_said_with_the_public_texts_that_it_was_measured_on(page, folder):
    few = "measured on 3,000 public texts, where an estimate wants 10,000 or more"
    assert f"what a guess scores that saw no message, {few}" in page.text
    assert few in (folder / "report.md").read_text("utf-8")
    assert few in (folder / "card.md").read_text("utf-8")


def test_a_chance_that_was_measured_on_nobody_knows_how_many_texts_says_that(tmp_path):
    study = sample(4)
    records = [
        replace(r, result={**r.result, "kappa": {m: {**k, "texts": 0} for m, k in r.result["kappa"].items()}})
        if r.cell.leg == "guarantee"
        else r
        for r in study.records
    ]
    render(replace(study, records=records), tmp_path)
    text = Page((tmp_path / "report.html").read_text("utf-8")).text
    assert "that saw no message, measured on a number of public texts that is not on record." in text


def test_a_utility_without_power_is_said_in_the_decision(tmp_path):
    study = sample(20)
    records = [
        replace(r, result={**r.result, "labels": [0] * 400}) if r.cell.leg == "utility" and r.status == "done" else r
        for r in study.records
    ]
    spec = {**study.spec, "recommend": {"max_leakage": 0.01}}
    render(replace(study, study={**study.study, "spec": spec}, records=records), tmp_path)
    told = "(all test texts are of one class). What is chosen would not be shown to have learnt anything."
    text = Page((tmp_path / "report.html").read_text("utf-8")).text
    assert text.count(told) == 1
    assert text.index("None qualifies") < text.index(told) < text.index("Utility has no power here, whatever the caps.")
    assert told.replace("(", "").partition(".")[2] in (tmp_path / "report.md").read_text("utf-8")


def test_what_was_measured_on_the_message_is_beside_the_claim(page):
    assert "one example moved all" in page.text
    assert "noise std of block 0" in page.text
    assert "0.0601" in page.text


def test_synthetic_texts_are_shown_and_marked(page):
    assert "synthetic text" in page.text
    assert sentence(0) in page.text
    assert page.text.count("target 0 ·") <= len(POLICIES)
    assert f"{50 - SHOWN} targets more in the records" in page.text


def test_private_texts_are_nowhere_unless_asked_for(tmp_path):
    private = sample(6, synthetic=False)
    render(private, tmp_path / "hidden")
    for path in (tmp_path / "hidden").rglob("*.*"):
        assert not any(sentence(target)[:12].encode() in path.read_bytes() for target in range(6)), path
    assert "Private texts are not in this page" in (tmp_path / "hidden" / "report.html").read_text("utf-8")
    render(sample(6, synthetic=False, show_text=True), tmp_path / "shown")
    shown = (tmp_path / "shown" / "report.html").read_text("utf-8")
    assert sentence(0) in shown
    assert "synthetic text" not in shown


def test_a_diff_can_be_read_without_colour(page, folder):
    html = (folder / "report.html").read_text("utf-8")
    assert '<del><span class="hidden">not recovered: </span>' in html
    assert '<ins><span class="hidden">made up: </span>' in html


def test_hostile_text_is_text(hostile):
    page = Page((hostile / "report.html").read_text("utf-8"))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}{% raw %}" in page.text
    assert "right[U+202E]to left[U+2066]" in page.text
    assert "bell[U+0007][U+001B][31m[U+0000]" in page.text
    for path in hostile.rglob("*.*"):
        if path.suffix not in (".png", ".pdf"):
            assert not re.search("[\u202e\u2066\x07\x1b\x00]", path.read_text("utf-8")), path


def test_hostile_names_break_neither_csv_nor_markdown(hostile):
    with (hostile / "frontier.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(POLICIES)
    assert "'=HYPERLINK(1)" in [row["policy"] for row in rows]
    assert not any(value.startswith(("=", "@", "+")) for row in rows for value in row.values())
    lines = (hostile / "report.md").read_text("utf-8").splitlines()
    header = next(n for n, line in enumerate(lines) if line.startswith("| # |"))
    table = lines[header : header + len(POLICIES) + 2]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {10}
    assert not [line for line in lines if re.search(r"(?<!\\)<script", line) and not line.startswith("<script")]
    assert "# e" in lines[lines.index(next(line for line in lines if line.endswith("yaml"))) :]


def test_every_policy_has_the_command_that_runs_it_alone(folder, page, hostile):
    commands = re.findall(r"^Again, with the control: `(.*)`$", (folder / "report.md").read_text("utf-8"), re.MULTILINE)
    asked = [shlex.split(command) for command in commands]
    assert [words[words.index("--only") + 1] for words in asked] == list(POLICIES)
    assert all(words[:2] == ["dpguard", "run"] and "--out" in words for words in asked)
    assert all(command in page.text for command in commands)
    assert "--only '<" not in (hostile / "report.html").read_text("utf-8")


def test_nothing_concluded_is_said_in_place_of_a_decision(tmp_path):
    study = sample(8)
    spec = {**study.spec, "recommend": {"max_leakage": 0.2, "min_utility": 0.99}}
    render(replace(study, study={**study.study, "spec": spec}), tmp_path)
    text = Page((tmp_path / "report.html").read_text("utf-8")).text
    assert "None qualifies" in text
    assert "The nearest miss is" in text
    lost = [r for r in study.records if not (r.cell.policy == "none" and r.cell.leg == "leakage")]
    render(replace(study, records=lost), tmp_path)
    text = Page((tmp_path / "report.html").read_text("utf-8")).text
    assert "nothing can be concluded" in text
    assert "leakage missing for none (end, seed 0; start, seed 0)" in text


def test_a_broken_bound_is_a_red_banner(tmp_path):
    study = sample(20)
    records = [
        replace(r, result={**r.result, "kappa": {"exact_match": {"value": 0.0, "upper": 0.001, "bound": 0.02}}})
        if r.cell.leg == "guarantee" and r.cell.policy == "dp-sgd noise=0.3"
        else r
        for r in study.records
    ]
    render(replace(study, records=records), tmp_path)
    text = Page((tmp_path / "report.html").read_text("utf-8")).text
    assert "dp-sgd noise=0.3 gave away more than its guarantee allows" in text
    assert "Recommended under" not in text
    assert text.index("gave away more") < text.index("Nothing is recommended: dp-sgd noise=0.3")


def test_a_report_without_any_record_is_still_a_report(tmp_path):
    study = sample(3)
    render(replace(study, records=[], texts={}), tmp_path)
    text = Page((tmp_path / "report.html").read_text("utf-8")).text
    assert "13 results missing from this report" in text
    assert "nothing can be concluded" in text


def test_a_study_without_a_utility_leg_has_no_empty_picture_or_column(tmp_path):
    study = sample(6)
    records = [record for record in study.records if record.cell.leg != "utility"]
    planned = [cell for cell in study.planned if cell.leg != "utility"]
    render(replace(study, records=records, planned=planned), tmp_path)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "tradeoff" not in page.ids
    assert "what it is worth" not in page.text
    assert "accuracy, interval" not in page.text
    assert not list((tmp_path / "figures").glob("tradeoff*"))
    words = (tmp_path / "report.md").read_text("utf-8")
    assert "tradeoff.svg" not in words
    assert "| strongest attack | epsilon | shared |" in words


def test_two_thousand_records(tmp_path):
    base = sample(10)
    records, policies = [], []
    for copy in range(26):
        for record in base.records:
            name = record.cell.policy if copy == 0 else f"{record.cell.policy} copy={copy}"
            policies.append(name)
            records.append(replace(record, cell=replace(record.cell, policy=name)))
    assert len(records) >= 2000
    spec = {**base.spec, "policies": list(dict.fromkeys(policies))}
    render(replace(base, study={**base.study, "spec": spec}, records=records, texts={}), tmp_path)
    text = Page((tmp_path / "report.html").read_text("utf-8")).text
    assert "policies off the front had no room here" in text


def test_where_only_the_control_is_trained_the_map_leads(tmp_path):
    whole = sample(8)
    kept = [r for r in whole.records if r.cell.leg != "utility" or r.cell.policy == "none"]
    result = replace(whole, records=kept, planned=[r.cell for r in kept])
    page = render(result, tmp_path).read_text("utf-8")
    found = Page(page)
    assert "tradeoff" not in found.ids
    assert not (tmp_path / "figures" / "tradeoff.svg").exists()
    assert found.ids.index("map") < found.ids.index("frontier") < found.ids.index("leaks")
    assert found.ids.count("map") == 1
    links = [link for link in found.links if link in ("#map", "#frontier", "#leaks")]
    assert links.index("#map") < links.index("#frontier") < links.index("#leaks")
    assert "on the front" not in page  # one policy of several beats nothing that was measured
    assert "figures/tradeoff" not in (tmp_path / "report.md").read_text("utf-8")


def test_differences_show_what_was_measured_and_no_empty_columns(study, tmp_path):
    render(replace(study, records=[r for r in study.records if r.cell.leg != "utility"]), tmp_path)
    section = (tmp_path / "report.html").read_text().partition('<h2 id="differences">')[2].partition("</section>")[0]
    assert section.count('<th role="columnheader"') == 3 * section.count("<table")
    assert "Accuracy" not in section
