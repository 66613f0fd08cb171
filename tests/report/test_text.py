"""Hostile characters are shown, numbers never round to a lie, formulas are disarmed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpguard.report import text
from dpguard.stats import Interval


@given(st.text())
def test_visible_text_has_nothing_invisible(raw):
    shown = text.visible(raw)
    assert all(c.isprintable() or c.isspace() for c in shown)
    assert not any(c in shown for c in "\n\r\t\u202e\u2066\u200f\x00\x1b\ud800")


def test_visible_keeps_ordinary_text_in_any_script():
    assert text.visible("naïve 患者 пациент 🙂") == "naïve 患者 пациент 🙂"
    assert text.visible("a\tb\r\nc") == "a b c"
    assert text.visible("x" * 10_000) == "x" * 10_000
    assert len(text.visible("x" * 10_000, limit=80)) == 80


def test_visible_lines_keeps_lines():
    assert text.visible_lines("a: 1\n\tb: \x1b[31m2\n") == "a: 1\n    b: [U+001B][31m2"


@pytest.mark.parametrize("formula", ["=1+1", "+SUM(A1)", "-2+3", "@cmd", "=HYPERLINK(1)", " =1+1", "-", "\t=1"])
def test_formulas_get_an_apostrophe(formula):
    assert text.csv_cell(formula).startswith("'")


@pytest.mark.parametrize("plain", ["-0.5", "+3", "1e-5", "-inf", "dp-sgd", "a=b", "", "block[3]"])
def test_numbers_and_names_stay(plain):
    assert text.csv_cell(plain) == plain


@given(st.text())
def test_no_csv_cell_starts_like_a_formula_unless_it_is_a_number(raw):
    cell = text.csv_cell(raw)
    if cell[:1] in ("=", "@") or cell[:1] in ("+", "-"):
        float(cell)


@given(st.floats(0, 1))
def test_a_share_is_never_rounded_to_none_or_all(share):
    shown = text.percent(share)
    assert (shown == "0 %") == (share == 0)
    assert (shown == "100 %") == (share == 1)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.8712, "0.871"), (4.0, "4"), (99.96, "100"), (1234.5, "1,234"), (6.307, "6.31"), (None, "–")]
)
def test_epsilon_has_three_digits(value, shown):
    assert text.epsilon(value) == shown


def test_interval_and_negative_numbers():
    assert text.span(Interval(0.0, -0.1, 0.1, 5)) == "−0.10 – 0.10"
    assert text.span(None) == ""


def test_diff_is_by_word_and_blind_to_case_and_spaces():
    kinds = [(p.kind, p.text) for p in text.diff("Call Ann, 555-1000.", "call  bob , 555 - 1000 .")]
    assert kinds == [("kept", "Call"), ("missed", "Ann"), ("added", "bob"), ("kept", ", 555-1000.")]
    assert text.diff("", "made up") == (text.Piece("added", "made up"),)
    assert text.diff("all lost", "") == (text.Piece("missed", "all lost"),)
    assert text.diff("", "") == ()


@given(st.text(alphabet="ab ,.", max_size=30), st.text(alphabet="ab ,.", max_size=30))
def test_diff_holds_every_word_of_both(truth, guess):
    def words(kinds):
        return "".join(p.text for p in text.diff(truth, guess) if p.kind in kinds).replace(" ", "")

    assert words({"kept", "missed"}) == truth.replace(" ", "")
    assert words({"kept", "added"}) == guess.replace(" ", "")


def test_markdown_cannot_leave_its_cell():
    assert text.markdown("a|b\n# c <img> [x](y) `z`") == r"a\|b \# c \<img\> \[x\](y) \`z\`"
