from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from dpguard.documents import Document
from dpguard.errors import UserError


def read(tmp_path, content):
    path = tmp_path / "study.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Document.read(path)


# Each: what the file holds, the place after the file name, and words of the sentence.
BROKEN = {
    "empty": (b"", "", "empty, expected keys and values"),
    "only a comment": (b"# nothing\n", "", "empty, expected keys and values"),
    "a list": (b"- a\n- b\n", ":1:1", "found a list, expected keys and values"),
    "a text": (b"\n hello\n", ":2:2", "found only 'hello', expected keys and values"),
    "prose": (b"name: the answer: 42\n", ":1:17", "not valid YAML: mapping values are not allowed here"),
    "unclosed": (b"a: [1, 2\n", ":2:1", "not valid YAML: while parsing a flow sequence"),
    "a tab": (b"a:\n\tb: 1\n", ":2:1", "(indent with spaces)"),
    "two documents": (b"a: 1\n---\nb: 1\n", ":2:1", "expected a single document in the stream"),
    "a reserved character": (b"a: @b\n", ":1:4", "cannot start any token"),
    "duplicate key": (
        b"a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n",
        ":5:3",
        "key 'c' appears twice, first in line 3",
    ),
    "not UTF-8": ("a: 1\nb: é\xff".encode("latin-1"), ":2:4", "byte 0xe9 is not UTF-8"),
    "a PDF": (b"%PDF-1.4\n\x80\x81", ":2:1", "byte 0x80 is not UTF-8"),
    "a null byte": (b"a: 1\nb: x\x00y\n", ":2:5", "character 0x00 is not allowed"),
    "a boolean key": (b"a: 1\nno: 2\n", ":2:1", "key 'no' is read as no text by YAML, expected a text"),
    "a number as key": (b"1: 2\n", ":1:1", "key '1' is read as no text by YAML, expected a text"),
    "a list as key": (b"? [1]\n: 2\n", ":1:3", "found a list or a mapping as a key"),
    "a Python object": (b"a: !!python/object:os.system x\n", ":1:4", "is not supported"),
    "a set": (b"a: !!set {x}\n", ":1:4", "is not supported"),
    "an unknown alias": (b"a: *b\n", ":1:4", "undefined alias"),
    "an alias of itself": (b"a: &a [*a]\n", "", "an alias holds itself"),
    "too deep": (b"a: " + b"[" * 5000, "", "nested too deeply"),
    "a wrong number": (b"a: !!int x\n", ":1:4", "'x' is no number"),
    "an endless number": (b"a: " + b"9" * 5000, ":1:4", "is no number that can be read"),
    "a variable inside braces": (b"a: {b: ${C}/d}\n", ":1:9", "(quote ${...} inside braces)"),
    "unset variable": (b"a: x\nb: ${DPGUARD_NOT_SET}/c\n", ":2:4", "variable DPGUARD_NOT_SET is not set"),
    "no variable": (b"a: ${A-B}\n", ":1:4", "'${A-B}' names no environment variable, expected ${NAME}"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence_with_its_place(tmp_path, name):
    content, place, words = BROKEN[name]
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'study.yaml'}{place}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 250


def test_an_emoji_as_json_writes_it_is_one_character(tmp_path):
    assert read(tmp_path, '"\\ud83d\\udd12": "a \\ud83d\\udd12"\n').data == {"\U0001f512": "a \U0001f512"}
    with pytest.raises(UserError, match=r"study.yaml:1:4: .*holds half a character, expected both escapes of it"):
        read(tmp_path, 'a: "b \\ud83d"\n')


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "study.yaml").write_text("a: 1")
    with pytest.raises(UserError, match=r"stduy\.yaml: no such file; did you mean 'study\.yaml'\?"):
        Document.read(tmp_path / "stduy.yaml")
    with pytest.raises(UserError, match=r"zzzzz: no such file$"):
        Document.read(tmp_path / "zzzzz")
    (tmp_path / "33-sum.yaml").write_text("a: 1")  # near to the next for its ending alone
    with pytest.raises(UserError, match=r"nosuch\.yaml: no such file$"):
        Document.read(tmp_path / "nosuch.yaml")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        Document.read(tmp_path)


def test_aliases_may_not_unfold_without_end():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(UserError, match="more than 100,000 values"):
        Document.parse("\n".join(lines))


def test_scalars_are_read_without_surprises():
    document = Document.parse(
        "numbers: [1e-1, 1.0e-5, 3, -2, .5, 1., 1_000, '5']\n"
        "texts: [1:30, 2024-01-01, 0x1f, 'no', 1.2.3, '']\n"
        "truth: [yes, no, on, Off, true]\n"
        "nothing: [~, null]\n"
        "left_out:\n"
        "decimal: 010\n"
    )
    assert document.data == {
        "numbers": [0.1, 1e-5, 3, -2, 0.5, 1.0, 1000, "5"],
        "texts": ["1:30", "2024-01-01", "0x1f", "no", "1.2.3", ""],
        "truth": [True, False, True, False, True],
        "nothing": [None, None],
        "left_out": None,
        "decimal": 10,
    }
    assert [type(n) for n in document.data["numbers"][:4]] == [float, float, int, int]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_that_python_prints_is_read_as_that_number(number):
    assert Document.parse(f"a: {number!r}").data["a"] == number


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbfa: 1").data == {"a": 1}


def test_environment_variables_stand_in_values_and_never_in_keys():
    text = "path: ${ROOT}/a/${ROOT}\n'${ROOT}': 1\nsweep: $noise\nescaped: $${ROOT}\n"
    document = Document.parse(text, environ={"ROOT": "/data"})
    assert document.data == {
        "path": "/data/a//data",
        "${ROOT}": 1,
        "sweep": "$noise",
        "escaped": "${ROOT}",
    }
    assert document.text == text
    with pytest.raises(UserError, match="ROOT is not set"):
        Document.parse(text, environ={"ROOT": ""})


def test_an_environment_variable_may_have_a_word_in_its_place():
    text = "a: ${TASK:-cola}.jsonl\nb: ${TASK}.jsonl\nc: ${NONE:-}x\nd: $${TASK:-cola}\n"
    assert Document.parse(text, environ={"TASK": "sst2"}).data == {
        "a": "sst2.jsonl", "b": "sst2.jsonl", "c": "x", "d": "${TASK:-cola}",
    }  # fmt: skip
    assert Document.parse("a: ${TASK:-cola}.jsonl\n", environ={"TASK": ""}).data == {"a": "cola.jsonl"}
    with pytest.raises(UserError, match="names no environment variable"):
        Document.parse("a: ${A B:-c}\n", environ={})


DEEP = Document.parse(
    """\
name: x
policies:
  head: {rows: [{layers: all, clip: no}]}
  other:
    rows:
      - layers: head
        share: false
  empty:
""",
    "s.yaml",
)


@pytest.mark.parametrize(
    ("loc", "place"),
    [
        ((), "1:1"),
        (("name",), "1:7"),
        (("policies", "head", "rows", 0, "clip"), "3:37"),
        (("policies", "head", "rows", 0), "3:17"),
        (("policies", "other"), "4:3"),  # its value starts in a later line
        (("policies", "other", "rows", 0), "6:9"),
        (("policies", "other", "rows", 0, "share"), "7:16"),
        (("policies", "other", "rows", 0, "missing", "deeper"), "6:9"),
        (("policies", "empty"), "8:3"),
        (("nowhere",), "1:1"),
    ],
)
def test_where(loc, place):
    assert DEEP.where(loc) == f"s.yaml:{place}"


def test_where_of_a_key():
    assert DEEP.where(("policies", "head", "rows", 0, "clip"), key=True) == "s.yaml:3:31"


def test_an_error_gets_its_place_once():
    with pytest.raises(UserError) as caught, DEEP.locating("policies"), DEEP.locating("policies", "other"):
        raise UserError("share is wrong", loc=("rows", 0, "share"))
    assert str(caught.value) == "s.yaml:7:16: share is wrong"
    assert caught.value.loc == ("policies", "other", "rows", 0, "share")


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError), DEEP.locating("policies"):
        raise KeyError("x")


def test_a_word_that_yaml_read_as_a_boolean_is_told():
    with pytest.raises(UserError) as caught, DEEP.locating("policies", "head"):
        raise UserError("clip is False, expected a number above 0", loc=("rows", 0, "clip"))
    assert str(caught.value) == ("s.yaml:3:37: 'no' is read as False by YAML; clip is False, expected a number above 0")
    placed = DEEP.placed(UserError("share is False", loc=("policies", "other", "rows", 0, "share")))
    assert str(placed) == "s.yaml:7:16: share is False"  # it was written as `false`


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    clip: float = Field(strict=True, gt=0, description="a number above 0")
    metric: Literal["rougeL", "rouge1"] = "rougeL"


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner = Field(description="a mapping such as {clip: 1}")
    many: dict[str, Inner] = Field(default_factory=dict, description="a mapping")
    plain: str = "x"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("inner: {clpi: 1}", "1:9: inner.clpi: unknown key; did you mean 'clip'?"),
        ("iner: {clip: 1}", "1:1: iner: unknown key; did you mean 'inner'?"),
        ("inner: {}", "1:1: inner.clip: missing, expected a number above 0"),
        ("plain: y", "1:1: inner: missing, expected a mapping such as {clip: 1}"),
        ("inner: 5", "1:8: inner: found 5, expected a mapping such as {clip: 1}"),
        ("inner: {clip: no}", "1:15: inner.clip: 'no' is read as False by YAML, expected a number above 0"),
        ("inner: {clip: false}", "1:15: inner.clip: found False, expected a number above 0"),
        ("inner: {clip: -1}", "1:15: inner.clip: found -1, expected a number above 0"),
        ("inner: {clip: [1]}", "1:15: inner.clip: found a list, expected a number above 0"),
        ("inner:\n  clip:", "2:3: inner.clip: found nothing, expected a number above 0"),
        (
            "inner: {clip: 1, metric: rougel}",
            "1:26: inner.metric: unknown value 'rougel'; did you mean 'rougeL'?",
        ),
        ("inner: {clip: 1}\nmany: {a: {clop: 1}}", "2:12: many.a.clop: unknown key; did you mean 'clip'?"),
        ("inner: {clip: 1}\nplain: 5", "2:8: plain: found 5, expected input should be a valid string"),
    ],
)
def test_a_model_that_does_not_fit_is_one_sentence(text, sentence):
    with pytest.raises(UserError) as caught:
        Document.parse(text, "s.yaml").check(Outer)
    assert str(caught.value) == f"s.yaml:{sentence}"


def test_a_part_of_a_file_that_fits():
    document = Document.parse("a: {b: {clip: 2.0}}", "s.yaml")
    assert document.check(Inner, "a", "b").clip == 2
    assert document.at(("a", "b", "clip")) == 2


def test_long_values_are_cut():
    with pytest.raises(UserError) as caught:
        Document.parse(f"inner: {{clip: {'x' * 500}}}", "s.yaml").check(Outer)
    assert len(str(caught.value)) < 150
