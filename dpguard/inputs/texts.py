"""Texts with labels: the bundled corpus, jsonl, csv or parquet files, hub data sets through the [data] extra.

Every example remembers its file and line, so that a mistake in the data is told with its place.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from dpguard.errors import UserError, nearest_name
from dpguard.inputs import fields, tables
from dpguard.inputs.demo import bundle

SPLIT_SEED = 20
"""Seed of the order of the training texts and of what is held out; public, the same for everybody."""
HELD_OUT = 0.15
PUBLIC = 0.2


@dataclass(frozen=True)
class Example:
    """One text.

    Attributes:
        text: not empty.
        label: class index from 0.
        entities: marked entities (names, numbers, dates ...), or None when the data marks none.
        where: ``file:line``.
        owner: value of the column that says whose text it is, None when no such column was asked for.
    """

    text: str
    label: int
    entities: tuple[str, ...] | None = None
    where: str = ""
    owner: str | None = None


@dataclass(frozen=True)
class Corpus:
    """The texts of a study.

    Attributes:
        name: as the user wrote it.
        train: the clients' texts, in a fixed shuffled order; targets of attacks come from here.
        test: held-out texts for utility.
        public: texts of the same kind that anybody has; disjoint from ``train``.
        synthetic: True for the bundled corpus, whose texts may be shown.
        held_out: which of ``test`` and ``public`` were cut from the training file.
    """

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    public: tuple[str, ...]
    synthetic: bool = False
    held_out: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes of the texts, at least 2; a model's head may have more (`models.LoadedModel.classes`)."""
        return max(2, 1 + max(e.label for e in (*self.train, *self.test)))

    @property
    def repeated(self) -> float:
        """Share of the training texts that are the commonest one, up to case and spaces; 0 where none stands twice."""
        (_, count), *_ = Counter(_alike(e.text) for e in self.train).most_common(1)
        return count / len(self.train) if count > 1 else 0.0

    @property
    def seen(self) -> int:
        """How many held-out texts are training texts as well, up to case and spaces."""
        trained = {_alike(e.text) for e in self.train}
        return sum(_alike(e.text) in trained for e in self.test)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of every text and label in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(json.dumps([[e.text, e.label, e.entities] for e in part]).encode())
            if any(e.owner is not None for e in part):
                digest.update(json.dumps([e.owner for e in part]).encode())
        digest.update(json.dumps(self.public).encode())
        return digest.hexdigest()[:16]

    def cut(self, count: int | None) -> Corpus:
        """The same corpus with the first ``count`` training texts of its fixed order."""
        return self if count is None else replace(self, train=self.train[:count])


def load(
    path: str,
    *,
    text: str = "text",
    label: str = "label",
    test: str | None = None,
    public: str | None = None,
    entities: str | None = None,
    owner: str | None = None,
    locate: Callable[[str], Path] = Path,
) -> Corpus:
    """Read a corpus.

    Args:
        path: ``demo``, a jsonl, csv or parquet file, or a hub name.
        text: name of the column of texts.
        label: name of the column of labels.
        test: file of held-out texts; without it 15 % of ``path`` are held out.
        public: file of public texts (column ``text`` is enough); without it 20 % of ``path`` are set apart.
        entities: column of lists of marked entities; ``entities`` is used when it is there.
        owner: column whose value says whose text it is; of the training and the held-out texts.
        locate: turns a file named in a study into a path.

    Raises:
        UserError: a missing or empty file, a missing column, a label that is no class index, classes that no
            training text has, an empty text, an unreachable hub; with file and line.
    """
    if path == "demo":
        _refuse("demo", {"test": test, "public": public})
        files = bundle.paths()
        return replace(
            _read_all("demo", files["train"], files["test"], files["public"], text, label, entities, owner),
            synthetic=True,
        )
    main = locate(path)
    if not _is_file(main):
        if not _is_hub_name(path, main):
            _missing(path, main, "path")
        _refuse("a hub's data set", {"test": test, "public": public, "entities": entities})
        return _from_hub(path, text, label, owner)
    extra = {
        key: None if name is None else _existing(name, locate(name), key)
        for key, name in (("test", test), ("public", public))
    }
    return _read_all(path, main, extra["test"], extra["public"], text, label, entities, owner)


def _read_all(
    name: str,
    main: Path,
    test: Path | None,
    public: Path | None,
    text: str,
    label: str,
    entities: str | None,
    owner: str | None,
) -> Corpus:
    train = list(examples(main, text=text, label=label, entities=entities, owner=owner))
    held = list(examples(test, text=text, label=label, entities=entities, owner=owner)) if test else None
    known = list(_texts(public, text)) if public else None
    return _assemble(name, train, held, known)


def _assemble(name: str, train: list[Example], test: list[Example] | None, public: list[str] | None) -> Corpus:
    """Shuffle once, set apart what no file gives, and keep public and private texts disjoint.

    All copies of a text go to one side.
    """
    _check_classes(train, test or ())
    random.Random(SPLIT_SEED).shuffle(train)
    held_out = []
    if test is None:
        test, train = _apart(train, HELD_OUT)
        held_out.append("test")
    if public is None:
        known, train = _apart(train, PUBLIC)
        public = [e.text for e in known]
        held_out.append("public")
    if not train:
        raise UserError(f"data {name!r} has too few different texts; expected at least 3")
    private = {_alike(e.text) for e in train}
    public = [t for t in public if _alike(t) not in private]
    return Corpus(name, tuple(train), tuple(test), tuple(public), held_out=tuple(held_out))


def _check_classes(train: Sequence[Example], test: Sequence[Example]) -> None:
    """Refuse a class that no training text has: a stray label would make a head of as many classes."""
    known = {example.label for example in train}
    gap = next((index for index in range(max(known, default=0)) if index not in known), None)
    if gap is not None and known != {1}:  # one class alone may be either of two
        first = next(example for example in train if example.label > gap)
        raise UserError(
            f"label is {first.label}, and no text has label {gap}; expected class indices without gaps (0, 1, 2, ...)",
            where=first.where,
        )
    if strange := next((example for example in test if example.label not in known), None):
        said = f"label is {strange.label}, and no training text has it; expected {_any_of(known)}"
        raise UserError(said, where=strange.where)


def _any_of(labels: Iterable[int]) -> str:
    """Class indices without gaps in words.

    >>> _any_of(range(2)), _any_of({0, 1, 2, 3, 4})
    ('0 or 1', '0 to 4')
    """
    known = sorted(labels)
    return " or ".join(map(str, known)) if len(known) < 3 else f"{known[0]} to {known[-1]}"


def _apart(items: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """The first ``share`` of the texts with every later copy of them, and the rest."""
    keys = [_alike(e.text) for e in items]
    count, copies = max(1, round(share * len(items))), Counter(keys)
    chosen: set[str] = set()
    taken = 0
    for key in copies:  # in the order in which they first stand
        if taken >= count:
            break
        chosen.add(key)
        taken += copies[key]
    first = [item for item, key in zip(items, keys, strict=True) if key in chosen]
    rest = [item for item, key in zip(items, keys, strict=True) if key not in chosen]
    return first, rest


def _alike(text: str) -> str:
    """What two texts share that differ in case and spaces only: many tokenizers make the same tokens of both.

    >>> _alike("A  film ") == _alike("a film")
    True
    """
    return " ".join(text.casefold().split())


def examples(
    path: Path, *, text: str = "text", label: str = "label", entities: str | None = None, owner: str | None = None
) -> Iterator[Example]:
    """The examples of one file, in its order.

    Raises:
        UserError: see `load`.
    """
    asked = [text, label, *(column for column in (entities, owner) if column)]
    for where, row in tables.rows(path, asked, ["entities"]):
        yield Example(
            text=fields.text(row[text], text, where),
            label=fields.label(row[label], label, where),
            entities=fields.entities(row.get(entities or "entities"), where, asked=entities is not None),
            where=where,
            owner=None if owner is None else fields.owner(row[owner], owner, where),
        )


def _texts(path: Path, column: str) -> Iterator[str]:
    for where, row in tables.rows(path, [column]):
        yield fields.text(row[column], column, where)


def _refuse(what: str, given: Mapping[str, str | None]) -> None:
    """Nobody is judged on other texts than the study names."""
    for key, value in given.items():
        if value is not None:
            raise UserError(f"{key} is {value!r}, and {what} has texts of its own; expected files for all", loc=(key,))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than a file system takes
        return False


def _existing(name: str, path: Path, key: str) -> Path:
    if not _is_file(path):
        _missing(name, path, key)
    return path


def _missing(name: str, path: Path, key: str) -> NoReturn:
    folder = path.parent if path.parent.is_dir() else Path()
    near = nearest_name(path.name, [p.name for p in folder.iterdir() if p.is_file()]) if path.parent.is_dir() else ""
    sentence = f"no data file {name!r}; expected 'demo', a .jsonl, .csv or .parquet file, or a hub name"
    raise UserError(sentence + near, loc=(key,))


def _is_hub_name(name: str, path: Path) -> bool:
    return not path.suffix and not name.startswith((".", "/", "~")) and name.count("/") <= 1


def _from_hub(name: str, text: str, label: str, owner: str | None) -> Corpus:
    from dpguard.inputs.models import hub_reachable

    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"no data file {name!r}, and hub data sets need the [data] extra; expected 'demo' or a .jsonl, .csv "
            "or .parquet file"
        )
    if not hub_reachable():
        raise UserError(f"data {name!r} is no local file and no hub can be reached; expected 'demo' or a local file")
    import datasets

    try:
        found = datasets.load_dataset(name)
    except (FileNotFoundError, ValueError, OSError) as error:
        raise UserError(f"data {name!r} cannot be loaded from the hub: {str(error).splitlines()[0]}") from None
    if "train" not in found:
        raise UserError(f"data {name!r} has splits {', '.join(found)}; expected one called 'train'")
    held = next((key for key in ("validation", "test") if key in found), None)  # GLUE's test has no labels
    train, test = (
        list(_hub_rows(name, key, found[key], text, label, owner)) if key else None for key in ("train", held)
    )
    return _assemble(name, train or [], test, None)


def _hub_rows(name: str, split: str, rows: Any, text: str, label: str, owner: str | None) -> Iterator[Example]:
    for index, row in enumerate(rows, 1):
        where = f"{name}/{split}:{index}"
        tables.check_columns((text, label, *([owner] if owner else [])), list(row), where)
        whose = None if owner is None else fields.owner(row[owner], owner, where)
        yield Example(fields.text(row[text], text, where), fields.label(row[label], label, where), None, where, whose)


def check_labels(items: Iterable[Example], classes: int) -> None:
    """Refuse texts of a class that the model's head does not have: another head would make it another model.

    Args:
        items: the texts.
        classes: of the head (`models.LoadedModel.classes`).

    Raises:
        UserError: the first such text, with file and line; or a head of one class.
    """
    if classes < 2:
        raise UserError(
            f"the model's head has {classes} class, so it predicts a number; expected a head of at least two classes, "
            "or a checkpoint without a head"
        )
    beyond = [example for example in items if example.label >= classes]
    if beyond:
        first = min(beyond, key=lambda example: (len(example.where), example.where))  # in the file's order
        raise UserError(
            f"label is {first.label}, and the model's head has {classes} classes; expected {_any_of(range(classes))} "
            "(or a checkpoint without a head)",
            where=first.where,
        )


def unread(items: Sequence[Example], tokenizer: Any, most: int = 2000) -> float:
    """Share of the tokens of texts that stand for words which the tokenizer does not know; 0 where it knows all.

    Args:
        items: the texts.
        tokenizer: the model's.
        most: how many of them are looked at, the first ones.
    """
    unknown = tokenizer.unk_token_id
    rows: list[list[int]] = tokenizer([e.text for e in items[:most]], add_special_tokens=False)["input_ids"]
    return sum(row.count(unknown) for row in rows) / max(sum(map(len, rows)), 1)


def too_long(tokens: int, most: int) -> str:
    """What is wrong with a text of more tokens than the model has positions, special tokens included."""
    return f"a text of {tokens} tokens does not fit the model's {most} positions; expected at most {most}"


def check_lengths(items: Iterable[Example], tokenizer: Any, most: int) -> None:
    """Refuse a text that does not fit the model's positions, or that its tokenizer makes nothing of.

    Raises:
        UserError: the first such text, with file, line and token count.
    """
    listed, empty = list(items), tokenizer.num_special_tokens_to_add()
    for example, ids in zip(listed, tokenizer([e.text for e in listed])["input_ids"], strict=True):
        if len(ids) > most:
            raise UserError(too_long(len(ids), most), where=example.where)
        if len(ids) <= empty:
            raise UserError("a text that the tokenizer makes no token of; expected words", where=example.where)
