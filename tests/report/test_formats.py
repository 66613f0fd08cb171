"""LaTeX, cards and comparisons: whole, the same bytes again, and text is text in each of them."""

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dpguard.errors import UserError
from dpguard.report import card, pdf
from dpguard.report.compare import compare, difference
from dpguard.report.compared import print_to, write
from dpguard.report.frontier import frontier
from dpguard.report.latex import latex, tables
from dpguard.report.recommend import Caps, recommend
from dpguard.report.views import policy_views
from dpguard.stats import Interval
from tests.report.made_up_study import POLICIES, sample

EVIL = "\\input{/etc/passwd} $x_1^2$ & 50% #1 ~ <script>a</script> |`*[b](http://e.org)\u202e\x07\n\\\\[1em]"
NAMES = ["=1+1", "<script>alert(1)</script>", "a|b`c`*d*\n# e", "right\u202eleft", "\x1b[31m", "w" * 10_000, EVIL]


def decided(study):
    found, caps = frontier(study), Caps.read(study.spec)
    return found, recommend(
        found, max_leakage=caps.max_leakage, min_utility=caps.min_utility, max_epsilon=caps.max_epsilon
    )


def named(study, names):
    """The study with other names for its policies."""
    records = [replace(r, cell=replace(r.cell, policy=names.get(r.cell.policy, r.cell.policy))) for r in study.records]
    return replace(study, records=records, study={**study.study, "spec": {**study.spec, "policies": []}})


def renamed(study):
    """The study with hostile names, reasons, statements, question and provenance."""
    names = dict(zip([name for name in POLICIES if name != "none"], NAMES, strict=False))
    records = [
        replace(
            r,
            cell=replace(r.cell, policy=names.get(r.cell.policy, r.cell.policy)),
            reason=EVIL if r.reason else "",
            result={**r.result, "statement": EVIL, "reasons": [EVIL]} if r.cell.leg == "guarantee" else r.result,
            provenance={"versions": {EVIL: EVIL}},
        )
        for r in study.records
    ]
    told = {**study.study, "name": EVIL, "question": EVIL, "spec": {**study.spec, "policies": []}}
    return replace(study, study=told, records=records)


def check_latex(text):
    """A strict reader: braces and environments close, only known commands, nothing special outside of them."""
    known = {
        "usepackage", "begin", "end", "centering", "caption", "label", "toprule", "midrule", "bottomrule",
        "textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar", "textquotedbl",
        "textasciigrave", "textquotesingle", "textendash", "infty", "varepsilon", "dots", "linewidth",
        "footnotesize", "allowbreak", "setlength", "tabcolsep", "endfirsthead", "endhead", "endfoot", "endlastfoot",
        "multicolumn",
    }  # fmt: skip
    text = re.sub(r"(?m)^%.*$", "", text)
    assert set(re.findall(r"\\([A-Za-z]+)", text)) <= known
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    plain = re.sub(r"\\[\\{}$&#%_]", "", text)
    depth = 0
    for character in plain:
        depth += (character == "{") - (character == "}")
        assert depth >= 0
    assert depth == 0
    assert not re.search(r"[#%^~]", plain)
    assert "_" not in plain
    floating = re.findall(r"\\midrule\n([^\n]*?&.*?)\\bottomrule\n\\end{tabular}", text, re.DOTALL)
    for body in floating + re.findall(r"\\endlastfoot\n(.*?)\\end{longtable}", text, re.DOTALL):
        columns = {len(re.findall(r"(?<!\\)&", line)) for line in body.splitlines()}
        assert len(columns) == 1
        assert all(line.endswith("\\\\") for line in body.splitlines())


@pytest.mark.parametrize("hostile", [False, True])
def test_the_tables_are_latex_that_closes(hostile):
    study = renamed(sample(4)) if hostile else sample(4)
    found, decision = decided(study)
    text = tables(policy_views(study, found), found, decision)
    assert text.count("\\label") == 3
    assert [text.count(f"\\begin{{{kind}}}") for kind in ("table", "longtable")] == [2, 1]
    assert text.count("\\toprule") == 2 + 2  # a long one has its head again on every page
    assert text.count("\\bottomrule") == 3
    check_latex(text)
    assert text == tables(policy_views(study, found), found, decision)


@given(st.text(max_size=60))
def test_any_text_is_text_in_latex(words):
    check_latex(latex(words).replace(r"\$", "").replace("$", ""))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here (Debian: apt install texlive)")
@pytest.mark.parametrize("names", ["hostile", "long"])
def test_the_tables_compile(tmp_path, names):
    long = {name: f"part block={n} part=attention.output keep=0.00{n}" for n, name in enumerate(POLICIES) if n}
    study = renamed(sample(4)) if names == "hostile" else named(sample(4), long)
    found, decision = decided(study)
    body = tables(policy_views(study, found), found, decision)
    head = (
        "\\documentclass{article}\\usepackage{booktabs,longtable,textcomp}\\usepackage[T1]{fontenc}"
        "\\usepackage[textwidth=16cm]{geometry}\\begin{document}\n"
    )
    (tmp_path / "t.tex").write_text(head + body + "\\end{document}\n")
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "t.tex"], cwd=tmp_path, check=True, capture_output=True)
    said = (tmp_path / "t.log").read_text("latin-1")
    assert "Float too large" not in said  # the end of the table would be lost
    if names == "long":
        assert all(float(more) < 4 for more in re.findall(r"Overfull \\hbox \(([\d.]+)pt", said)), said


def test_the_card_says_what_was_attacked_promised_and_recommended():
    study = sample(8)
    found, decision = decided(study)
    made = card.content(study, found, decision, "dp-sgd noise=0.6")
    assert made["schema"] == card.SCHEMA
    assert made["guarantee"]["epsilon"] == 6.31
    assert made["guarantee"]["steps"] == 14
    assert made["leakage"]["this"]["value"] == found.row("dp-sgd noise=0.6").leakage.value
    assert made["leakage"]["this"]["n"] == 8
    assert made["rows"] == POLICIES["dp-sgd noise=0.6"][0]
    assert made["attacked"]["attacks"] == ["match", "prior", "span"]
    assert made["caps"]["recommended"] == decision.policy
    words = card.to_markdown(made)
    assert words.startswith("## Privacy card: dp-sgd noise=0.6\n")
    assert not words.startswith("---"), "a model card has front matter of its own"
    assert "epsilon = 6.31 at delta 1e-05, after 14 noised steps, per example" in words
    assert "What it does not protect" in words
    json.loads(json.dumps(made, allow_nan=False))


def test_a_card_of_a_policy_with_a_failed_cell_names_it():
    study = sample(4)
    found, decision = decided(study)
    words = card.to_markdown(card.content(study, found, decision, "sign"))
    assert "not measured: leakage end, seed 0: failed, out of memory" in words


def test_a_card_is_of_a_policy_that_exists():
    study = sample(50)
    _, decision = decided(study)
    assert card.pick(study, decision, None) == decision.policy
    with pytest.raises(UserError, match="did you mean 'prune'"):
        card.pick(study, decision, "prunes")
    with pytest.raises(UserError, match="no policy is recommended"):
        card.pick(study, replace(decision, policy="", verdict="no power"), None)


def test_hostile_names_are_text_in_a_card(tmp_path):
    study = renamed(sample(4))
    found, decision = decided(study)
    for name in NAMES:
        made = card.content(study, found, decision, name)
        words = card.to_markdown(made)
        assert "<script>" not in words.replace("\\<", "")
        assert not re.search("[\u202e\x07\x1b]", words)
        assert [line for line in words.splitlines() if line.startswith("# ")] == []
        folder = tmp_path / card.file_name(name)
        assert folder.parent == tmp_path
        card.write(made, folder)
        again = (folder / "card.md").read_bytes(), (folder / "card.json").read_bytes()
        card.write(card.content(study, found, decision, name), folder)
        assert again == ((folder / "card.md").read_bytes(), (folder / "card.json").read_bytes())


def changed(study, **settings):
    """The study as if its leakage cells had other settings."""
    records = [
        replace(r, cell=replace(r.cell, settings={**r.cell.settings, **settings})) if r.cell.leg == "leakage" else r
        for r in study.records
    ]
    return replace(study, records=records)


def test_equal_studies_differ_in_nothing():
    [other] = compare([("a", sample(6)), ("b", sample(6))]).others
    assert other.differs == ()
    assert len(other.pairs) == len(POLICIES)
    assert other.leakage_reasons == other.utility_reasons == ()
    assert all(pair.leakage is None or pair.leakage.value == 0 for pair in other.pairs)
    assert all(pair.leakage is None or pair.leakage.low < 0 < pair.leakage.high for pair in other.pairs)


def test_policies_are_matched_by_what_they_do_and_not_by_name():
    second = sample(6)
    records = [
        replace(r, cell=replace(r.cell, policy="five per cent")) if r.cell.policy == "prune" else r
        for r in second.records
    ]
    spec = {**second.spec, "policies": ["five per cent" if name == "prune" else name for name in POLICIES]}
    second = replace(second, study={**second.study, "spec": spec}, records=records)
    [other] = compare([("a", sample(6)), ("b", second)]).others
    assert "prune / five per cent" in [pair.name for pair in other.pairs]
    assert other.only_first == other.only_second == ()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"panel": {"name": "other", "hash": "1"}}, "another panel of attacks"),
        ({"targets": 99}, "another number of targets"),
        ({"batch_size": 4}, "another batch size"),
        ({"threat": {"know": ["labels"]}}, "another threat model"),
    ],
)
def test_what_cannot_be_compared_is_said_and_not_subtracted(settings, reason):
    found = compare([("a", sample(6)), ("b", changed(sample(6), **settings))])
    [other] = found.others
    assert reason in other.leakage_reasons
    assert all(pair.leakage is None for pair in other.pairs)
    assert any(pair.utility for pair in other.pairs)
    text = printed(found, 100)
    assert "The leakages are not comparable" in text
    assert text.index("not comparable") < text.index("clip-only")


def test_other_texts_spoil_both():
    second = sample(6)
    records = [replace(r, cell=replace(r.cell, data={**r.cell.data, "hash": "x"})) for r in second.records]
    [other] = compare([("a", sample(6)), ("b", replace(second, records=records))]).others
    assert other.differs[0] == ("data hash", "77aa01", "x")
    assert other.leakage_reasons == other.utility_reasons == ("other texts",)


def federated(study, **of_policy):
    """The study with one table for every policy, and a federation that differs by policy."""
    table = [{"layers": "all", "clip": 1.0}]

    def moved(cell):
        federation = {"clients": 10, "rounds": 40, "split": "iid", "local_steps": of_policy.get(cell.policy, 1)}
        return replace(cell, table=table, settings={**cell.settings, "federation": federation})

    return replace(study, records=[replace(r, cell=moved(r.cell)) for r in study.records], planned=())


def test_policies_of_one_table_that_differ_in_their_federation_are_all_compared():
    one, two = federated(sample(4)), federated(sample(4), sign=20)
    [other] = compare([("a", one), ("b", two)]).others
    assert [pair.name for pair in other.pairs] == list(one.policies)
    assert not other.only_first
    assert not other.only_second
    assert [row for row in other.differs if "local_steps" in row[0]] == [("federation local_steps", "1", "1, 20")]


def test_policies_of_one_table_are_told_apart_by_their_federation():
    study = federated(sample(4), sign=20)
    found, _ = decided(study)
    views = {view.row.policy: view for view in policy_views(study, found)}
    assert views["sign"].words[-1] == "There are 40 rounds of 20 local steps."
    assert views["sign"].table[-1] == ("federation", "local_steps: 20")
    assert views["none"].table[-1] == ("federation", "local_steps: 1")


def test_a_group_of_settings_that_one_study_has_is_one_line():
    [other] = compare([("a", sample(4)), ("b", federated(sample(4)))]).others
    assert other.differs[-1] == ("federation", "–", "clients 10, local_steps 1, rounds 40, split iid")


def printed(found, width):
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    for part in print_to(found, width):
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 100])
def test_hostile_names_are_text_in_a_comparison(width, tmp_path):
    first, second = renamed(sample(4)), changed(renamed(sample(6)), batch_size=EVIL)
    found = compare([(EVIL, first), ("b" * 300, second), ("c", sample(4))])
    text = printed(found, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for kind in ("html", "md"):
        write(found, tmp_path / f"compare.{kind}")
        again = (tmp_path / f"compare.{kind}").read_text("utf-8")
        write(found, tmp_path / f"compare.{kind}")
        assert (tmp_path / f"compare.{kind}").read_text("utf-8") == again
        assert not re.search("[\u202e\x07\x1b]", again)
        assert "<script" not in again.replace("\\<", "")
    assert not re.search("[\u202e\x07\x1b]", text)


def test_a_comparison_is_written_as_what_its_name_says(tmp_path):
    found = compare([("a", sample(4)), ("b", sample(4))])
    with pytest.raises(UserError, match="expected a name that ends with"):
        write(found, tmp_path / "compare.pdf")
    with pytest.raises(UserError, match="expected two or more"):
        compare([("a", sample(4))])


def test_the_difference_of_two_intervals_is_at_least_as_wide_as_each():
    one, two = Interval(0.5, 0.4, 0.7, 9), Interval(0.6, 0.5, 0.65, 12)
    found = difference(one, two)
    assert found.value == pytest.approx(0.1)
    assert found.high - found.low >= max(one.high - one.low, two.high - two.low)
    assert (found.n, difference(None, two)) == (9, None)


def test_without_a_browser_the_pdf_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(pdf.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"no Chromium or Chrome was found to make report\.pdf; open report\.html"):
        pdf.browser()
