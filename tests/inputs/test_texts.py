from __future__ import annotations

import json
import math
import re
import sys
import types
from pathlib import Path

import pandas as pd
import pyarrow
import pytest
from pyarrow import parquet

from dpguard.errors import UserError
from dpguard.inputs import texts
from tests import tiny

ROWS = [{"text": f"sentence number {i}", "label": i % 3, "entities": [str(i)]} for i in range(40)]


def write(path, rows=ROWS):
    frame = pd.DataFrame(rows)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    elif path.suffix == ".csv":
        frame.drop(columns="entities", errors="ignore").to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return str(path)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_formats_give_the_same_texts(tmp_path, kind):
    found = texts.load(write(tmp_path / f"a{kind}"))
    reference = texts.load(write(tmp_path / "b.jsonl"))
    assert [(e.text, e.label) for e in found.train] == [(e.text, e.label) for e in reference.train]
    assert found.classes == 3
    assert found.held_out == ("test", "public")


def test_splits_are_disjoint_and_the_same_every_time(tmp_path):
    path = write(tmp_path / "a.jsonl")
    one, two = texts.load(path), texts.load(path)
    assert one == two
    parts = [{e.text for e in one.train}, {e.text for e in one.test}, set(one.public)]
    assert sum(map(len, parts)) == 40 == len(set().union(*parts))
    assert [e.text for e in one.train] != sorted(e.text for e in one.train), "shuffled"


def test_named_columns_and_files(tmp_path):
    renamed = [{"sentence": r["text"], "y": r["label"]} for r in ROWS]
    main, test = write(tmp_path / "a.jsonl", renamed), write(tmp_path / "t.jsonl", renamed[:5])
    public = write(tmp_path / "p.jsonl", [{"sentence": "public one"}, {"sentence": "sentence number 3"}])
    found = texts.load(main, text="sentence", label="y", test=test, public=public)
    assert len(found.train) == 40
    assert len(found.test) == 5
    assert found.public == ("public one",), "a private text is not public"


def test_entities_are_kept_where_known(tmp_path):
    found = texts.load(write(tmp_path / "a.jsonl"))
    assert all(e.entities == (e.text.split()[-1],) for e in found.train)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "label": "good"}], "a.jsonl:1: label is 'good'; expected a class index"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 1.5}], "a.jsonl:2: label is 1.5"),
        ([{"text": "a", "label": True}], "label is True"),
        ([{"text": "a", "label": -1}], "label is -1"),
        ([{"text": "a", "lable": 1}], "no column 'label'; did you mean 'lable'?"),
        ([{"txt": "a", "label": 1}], "no column 'text'; did you mean 'txt'?"),
        ([{"text": "a", "label": 0}, {"txt": "a", "label": 1}], "a.jsonl:2: no column 'text'"),
        ([{"text": "a", "label": 0.5}], "label is 0.5; expected a class index"),
        ([{"text": "a", "label": "0.5"}], "label is '0.5'; expected a class index"),
        ([{"text": "a", "label": "1" * 5000}], "expected a class index"),
        ([{"text": "a", "label": math.inf}], "label is inf; expected a class index"),
        ([{"text": "  ", "label": 1}], "text is '  '; expected a text"),
        ([], "has no rows; expected at least one text"),
    ],
)
def test_bad_rows_are_one_sentence_with_their_line(tmp_path, rows, said):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError) as error:
        texts.load(str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"no data file '.*trian\.jsonl'.*did you mean 'train\.jsonl'"):
        texts.load(str(tmp_path / "trian.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": ')
    with pytest.raises(UserError, match=r"a\.jsonl:2: is no JSON"):
        texts.load(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match=r"is a \.txt file; expected \.jsonl, \.csv or \.parquet"):
        texts.load(str(tmp_path / "a.txt"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff", "label": 1}')
    with pytest.raises(UserError, match="is not UTF-8"):
        texts.load(str(tmp_path / "b.jsonl"))
    (tmp_path / "c.parquet").write_text("not one")
    with pytest.raises(UserError, match="is no parquet file"):
        texts.load(str(tmp_path / "c.parquet"))


def test_a_text_longer_than_the_models_positions_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS[:10], {"text": "help " * 60, "label": 0}])
    with pytest.raises(UserError, match=r"a\.jsonl:11: a text of 62 tokens does not fit the model's 48 positions"):
        texts.check_lengths(texts.examples(tmp_path / "a.jsonl"), tiny.tokenizer(), 48)
    assert path


def test_cut_takes_the_first_of_a_fixed_order(tmp_path):
    found = texts.load(write(tmp_path / "a.jsonl"))
    assert found.cut(5).train == found.train[:5]
    assert found.cut(None) is found
    assert found.cut(5).fingerprint != found.fingerprint


def test_a_public_text_that_differs_from_a_private_one_in_case_or_spaces_alone_is_dropped(tmp_path):
    train, public = tmp_path / "train.jsonl", tmp_path / "public.jsonl"
    rows = [f"text number {k}" for k in range(8)]
    train.write_text("".join(json.dumps({"text": t, "label": k % 2}) + "\n" for k, t in enumerate(rows)), "utf-8")
    shouted = [f" {t.upper()}  " for t in rows]
    public.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*shouted, "another text"]), "utf-8")
    corpus = texts.load(str(train), test=str(train), public=str(public))
    assert corpus.public == ("another text",)


def test_copies_of_a_text_stand_on_one_side(tmp_path):
    """100 rows of 10 texts: the held-out ones were all in training as well, and no text was public."""
    rows = [{"text": f"report {'abcdefghij'[i % 10]}", "label": i % 2} for i in range(100)]
    found = texts.load(write(tmp_path / "a.jsonl", rows))
    parts = [{e.text for e in found.train}, {e.text for e in found.test}, set(found.public)]
    assert all(parts)
    assert sum(map(len, parts)) == 10
    assert len(found.train) + len(found.test) + len(found.public) == 100
    assert found.seen == 0
    assert found.repeated == 10 / len(found.train)


def test_held_out_texts_that_are_trained_on_are_counted(tmp_path):
    main = write(tmp_path / "a.jsonl")
    test = write(
        tmp_path / "t.jsonl", [{"text": "Sentence  number 3", "label": 0}, {"text": "another one", "label": 1}]
    )
    public = write(tmp_path / "p.jsonl", [{"text": "public one"}])
    found = texts.load(main, test=test, public=public)
    assert (found.seen, found.repeated) == (1, 0.0)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "label,text\n1,good, but long\n", "a.csv:2: has more fields than 2 columns; expected quotes"),
        ("a.csv", "text,label,text\na,1,b\n", "has two columns 'text'; expected each name once"),
        ("a.csv", 'label,text\n0,first\n1,"unclosed\n0,third\n', "expected quotes that close, or a .jsonl file"),
        ("a.tsv", 'text\tlabel\n"I came\t1\nand I saw"\t0\nlast\t1\n', "has a tab or a line break between quotes"),
        ("a.tsv", 'text\tlabel\n"hello world\t0\nit is "fine"\t1\n', "expected quotes that close, or a .jsonl file"),
    ],
)
def test_no_row_of_a_table_is_cut_or_joined_silently(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(said)):
        texts.load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "sentence,label\nit, he said,1\n", "a.csv:1: no column 'text'; expected one of: label, sentence"),
        ("a.csv", "text;label\nit, he said;1\n", "a.csv:1: looks separated by ';'; expected commas"),
        ("a.csv", "text\tlabel\na\t1\n", r"a.csv:1: looks separated by '\t'; expected commas"),
        ("a.tsv", "text,label\na,1\n", "a.tsv:1: looks separated by ','; expected tabs"),
        ("a.csv", "", "a.csv: has no rows"),
    ],
)
def test_a_missing_column_is_told_at_the_header(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(said)):
        texts.load(str(tmp_path / name))


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_whole_numbers_with_a_point_are_class_indices(tmp_path, kind):
    """pandas writes 1.0 once a label was missing."""
    rows = [{**row, "label": float(row["label"])} for row in ROWS]
    found = texts.load(write(tmp_path / f"a{kind}", rows))
    assert [e.label for e in found.train] == [e.label for e in texts.load(write(tmp_path / "b.jsonl")).train]


@pytest.mark.parametrize("stray", [9, 3])
def test_a_stray_label_is_told_with_its_line(tmp_path, stray):
    """It made a head of ten classes; wherever the row falls, it is found."""
    for line in range(1, 41):
        rows = [{**row, "label": i % 2} for i, row in enumerate(ROWS)]
        rows[line - 1]["label"] = stray
        said = rf"a\.jsonl:{line}: label is {stray}, and no text has label 2; expected class indices without gaps"
        with pytest.raises(UserError, match=said):
            texts.load(write(tmp_path / "a.jsonl", rows))


def test_a_class_of_the_test_file_alone(tmp_path):
    main = write(tmp_path / "a.jsonl", [{**row, "label": i % 2} for i, row in enumerate(ROWS)])
    test = write(tmp_path / "t.jsonl", [{"text": "one", "label": 1}, {"text": "two", "label": 2}])
    with pytest.raises(UserError, match=r"t\.jsonl:2: label is 2, and no training text has it; expected 0 or 1$"):
        texts.load(main, test=test)


def test_texts_of_one_class_are_texts(tmp_path):
    for label in (0, 1):
        found = texts.load(write(tmp_path / "a.jsonl", [{**row, "label": label} for row in ROWS]))
        assert {e.label for e in found.train} == {label}
        assert found.classes == 2


def test_a_label_that_the_models_head_has_no_class_for(tmp_path):
    rows = list(texts.examples(Path(write(tmp_path / "a.jsonl", ROWS[::-1]))))
    texts.check_labels(rows, 3)
    texts.check_labels(rows, 7)
    said = r"a\.jsonl:2: label is 2, and the model's head has 2 classes; expected 0 or 1 \(or a checkpoint without"
    with pytest.raises(UserError, match=said):
        texts.check_labels(rows[::-1], 2)
    with pytest.raises(UserError, match="head has 1 class, so it predicts a number"):
        texts.check_labels(rows, 1)


def test_only_a_near_name_is_named(tmp_path):
    for name in ("cola.jsonl", "cola.csv"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"did you mean 'cola\.jsonl'"):
        texts.load(str(tmp_path / "coal.jsonl"))
    with pytest.raises(UserError, match=r"or a hub name$"):
        texts.load(str(tmp_path / "ward.jsonl"))


def test_a_text_may_be_long(tmp_path):
    long = "word " * 40_000
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{long}{i},0\n" for i in range(4)))
    assert all(len(e.text) > 200_000 for e in texts.load(str(tmp_path / "a.csv")).train)


@pytest.mark.parametrize("nobody", [None, "", " ", float("nan")])
def test_a_text_of_nobody_is_no_persons_text(tmp_path, nobody):
    path = write(tmp_path / "a.jsonl", [{**row, "who": nobody if i == 7 else i // 4} for i, row in enumerate(ROWS)])
    with pytest.raises(UserError, match=r"a.jsonl:8: who is .*; expected who the text belongs to"):
        texts.load(path, owner="who")


def test_owners_in_a_column_of_floats_are_who_they_are(tmp_path):
    path = write(tmp_path / "a.parquet", [{**row, "who": float(i // 4)} for i, row in enumerate(ROWS)])
    assert {e.owner for e in texts.load(path, owner="who").train} <= {str(i) for i in range(10)}


def test_a_column_called_entities_that_nobody_asked_for_is_left_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**row, "entities": 3} for row in ROWS])
    assert all(e.entities is None for e in texts.load(path).train)
    with pytest.raises(UserError, match="entities is 3; expected a list of texts"):
        texts.load(path, entities="entities")
    (tmp_path / "b.csv").write_text("text,label,entities\n" + "".join(f"call {i} now,0,{i}\n" for i in range(9)))
    assert all(e.entities == (e.text.split()[1],) for e in texts.load(str(tmp_path / "b.csv")).train)


def test_files_beside_texts_that_bring_their_own_are_refused(tmp_path, monkeypatch):
    """They were left out without a word, and utility was judged on other texts than the study named."""
    extra = write(tmp_path / "t.jsonl", ROWS)
    for key in ("test", "public"):
        with pytest.raises(UserError, match=f"{key} is .*, and demo has texts of its own") as caught:
            texts.load("demo", **{key: extra})
        assert caught.value.loc == (key,)
        with pytest.raises(UserError, match=f"{key} is .*, and a hub's data set has texts of its own"):
            texts.load("glue-like", **{key: extra})


def test_other_columns_of_a_parquet_file_may_be_of_any_kind(tmp_path):
    """A time in the year 33,658 has no value in Python."""
    columns = {key: [row[key] for row in ROWS] for key in ("text", "label")}
    far = pyarrow.array([10**12] * len(ROWS), pyarrow.timestamp("s"))
    parquet.write_table(pyarrow.table({**columns, "when": far}), tmp_path / "a.parquet")
    assert len(texts.load(str(tmp_path / "a.parquet")).train) > 3
    parquet.write_table(pyarrow.table({"text": columns["text"], "label": far}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="no parquet file that can be read"):
        texts.load(str(tmp_path / "b.parquet"))


def test_of_a_hub_data_set_only_what_is_used_is_read(monkeypatch):
    """GLUE's test split has the label -1 for unknown."""
    kept = {"train": ROWS, "validation": ROWS[:4], "test": [{"text": "who knows", "label": -1}]}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("dpguard.inputs.models.hub_reachable", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name: kept))
    found = texts.load("glue-like")
    assert (len(found.test), found.held_out) == (4, ("public",))
