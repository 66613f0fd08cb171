"""YAML files that remember where everything stands, so that a mistake is told with file, line and column.

Reading differs from plain YAML 1.1 where that surprises: ``1e-1`` is a number, ``1:30``, ``010`` and
``2024-01-01`` are not turned into something else, a duplicate key is an error, and ``${VAR}`` inside a
value stands for the environment variable, ``${VAR:-word}`` for it or a word where it is not set (``$${VAR}`` for
the text itself). ``yes``/``no``/``on``/``off``
stay booleans, as YAML 1.1 has it; where a number was expected, the sentence says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dpguard.errors import UserError, did_you_mean, nearest_name

Loc = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

# Far above any study; stops aliases of aliases that would unfold into millions of values.
_MOST_VALUES = 100_000
_TAG = "tag:yaml.org,2002:"
_VARIABLE = re.compile(r"(\$?)\$\{([^}]*)\}")


@dataclass(frozen=True)
class Mark:
    """Where one value stands, lines and columns counted from 1.

    Attributes:
        line, column: of the value.
        key_line, key_column: of its key (of the value itself for a list item).
        raw: a scalar as it was written, "" for a mapping or a list.
    """

    line: int
    column: int
    key_line: int
    key_column: int
    raw: str = ""


@dataclass(frozen=True)
class Document:
    """A YAML mapping with the position of every value.

    Attributes:
        path: the file as the user named it; it opens every sentence about the file.
        text: the file as written, environment variables not replaced.
        data: plain data, environment variables replaced.
        marks: path of keys -> `Mark`.

    >>> study = Document.parse("name: x\\nleakage: {targets: no}\\n", "study.yaml")
    >>> study.data["leakage"], study.where(("leakage", "targets"))
    ({'targets': False}, 'study.yaml:2:20')
    """

    path: str
    text: str
    data: dict[str, Any]
    marks: Mapping[Loc, Mark]

    @classmethod
    def read(cls, path: str | Path) -> Document:
        """Read a file.

        Raises:
            UserError: no such file, not UTF-8, not YAML, empty, not a mapping, a duplicate key, an unset
                environment variable.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"no such file{_near(path)}", where=str(path)) from None
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror}), expected a YAML file", where=str(path)) from None
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            where = f"{path}:{_end(content[: error.start].decode('utf-8-sig'))}"
            sentence = f"byte {content[error.start]:#04x} is not UTF-8, expected a YAML text file"
            raise UserError(sentence, where=where) from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, path: str = "<text>", environ: Mapping[str, str] | None = None) -> Document:
        """As `read`, from a text; ``environ`` stands in for the process's environment.

        Raises:
            UserError: as `read`.
        """
        reader = _Reader(path, os.environ if environ is None else environ)
        data = reader.mapping(text)
        return cls(path, text, data, reader.marks)

    def where(self, loc: Loc, *, key: bool = False) -> str:
        """``file:line:column`` of the value at ``loc``, or of the nearest thing above it that exists.

        The key is named instead of the value when ``key`` is set, when the value starts on a later line,
        and when ``loc`` itself does not exist.
        """
        depth = len(loc)
        while loc[:depth] not in self.marks:
            depth -= 1
        mark = self.marks[loc[:depth]]
        if key or depth < len(loc) or mark.line != mark.key_line:
            return f"{self.path}:{mark.key_line}:{mark.key_column}"
        return f"{self.path}:{mark.line}:{mark.column}"

    def at(self, loc: Loc) -> Any:
        """The value at a path of keys that exists."""
        value: Any = self.data
        for step in loc:
            value = value[step]
        return value

    @contextmanager
    def locating(self, *prefix: str | int) -> Iterator[None]:
        """Give every UserError raised inside its place in this file; its ``loc`` counts from ``prefix``.

        Raises:
            UserError: the same sentence with ``where``; one that already has a place passes unchanged.
        """
        try:
            yield
        except UserError as error:
            raise self.placed(error, prefix) from error

    def placed(self, error: UserError, prefix: Loc = ()) -> UserError:
        """``error`` with ``where`` filled in from ``prefix`` and its own ``loc``."""
        if error.where:
            return error
        loc = (*prefix, *error.loc)
        note = "" if "YAML" in error.sentence else self._read_as(loc)
        sentence = f"{note}; {error.sentence}" if note else error.sentence
        return UserError(sentence, loc=loc, where=self.where(loc))

    def check(self, model: type[Model], *prefix: str | int) -> Model:
        """The part of the file under ``prefix`` as a pydantic model.

        Raises:
            UserError: the first thing that does not fit (unknown keys before anything else).
        """
        try:
            return model.model_validate(self.at(prefix))
        except ValidationError as error:
            raise self.explained(error, model, prefix) from None

    def explained(self, error: ValidationError, model: type[BaseModel], prefix: Loc = ()) -> UserError:
        """One sentence for a pydantic error. A field's ``description`` is what the sentence expects."""

        def rank(item: Mapping[str, Any]) -> tuple[bool, int, int]:
            # A misspelt key explains the missing one that pydantic reports beside it.
            mark = self.marks.get((*prefix, *item["loc"]), Mark(0, 0, 0, 0))
            return item["type"] != "extra_forbidden", mark.key_line, mark.key_column

        first = min(error.errors(), key=rank)
        loc = (*prefix, *first["loc"])
        while first["type"] != "missing" and loc and loc not in self.marks:
            loc = loc[:-1]  # one of the types that a value may be of; item 0 of a single value for a list of one
        owner, field = _schema_at(model, first["loc"])
        name = ".".join(str(step) for step in loc) or "the file"
        expected = field.description if field and field.description else ""
        if first["type"] == "extra_forbidden":
            problem = f"unknown key{did_you_mean(str(loc[-1]), owner.model_fields)}"
            return UserError(f"{name}: {problem}", loc=loc, where=self.where(loc, key=True))
        if first["type"] == "missing":
            problem = f"missing, expected {expected}" if expected else "missing"
        elif isinstance(cause := first.get("ctx", {}).get("error"), UserError):
            problem = cause.sentence
        elif first["type"] == "literal_error" and isinstance(first["input"], str) and field:
            problem = f"unknown value {first['input']!r}{did_you_mean(first['input'], _choices(field))}"
        else:
            found = self._read_as(loc) or f"found {_shown(first['input'])}"
            problem = f"{found}, expected {expected or _lower(first['msg'])}"
        return UserError(f"{name}: {problem}", loc=loc, where=self.where(loc))

    def _read_as(self, loc: Loc) -> str:
        """A clause for a word that YAML 1.1 turned into a boolean, else ""."""
        mark = self.marks.get(loc)
        if mark is None or not mark.raw or mark.raw.lower() in ("true", "false"):
            return ""
        value = self.at(loc)
        return f"{mark.raw!r} is read as {value} by YAML" if isinstance(value, bool) else ""


class _Loader(yaml.SafeLoader):
    """Composes nodes with fewer surprises: see the module's docstring."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute


for _kind, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?i:yes|no|true|false|on|off)", list("yYnNtTfFoO")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?i:inf)|\.(?i:nan)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern})$"), _first)


class _Reader:
    """Turns composed nodes into plain data and collects their marks."""

    def __init__(self, path: str, environ: Mapping[str, str]) -> None:
        self.path = path
        self.environ = environ
        self.marks: dict[Loc, Mark] = {}

    def mapping(self, text: str) -> dict[str, Any]:
        """The whole file as a mapping."""
        try:
            root = yaml.compose(text, Loader=_Loader)
            if root is None:
                raise UserError("empty, expected keys and values", where=self.path)
            if not isinstance(root, yaml.MappingNode):
                found = "a list" if isinstance(root, yaml.SequenceNode) else f"only {_shown(root.value)}"
                raise self._error(f"found {found}, expected keys and values ('name: ...')", root)
            data: dict[str, Any] = self._value(root, (), root)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            hint = "(indent with spaces)" if "'\\t'" in str(error.problem) else ""
            if mark and any("${" in line[: mark.column + 1] for line in text.splitlines()[mark.line : mark.line + 1]):
                hint = "(quote ${...} inside braces)"
            story = ", ".join(part for part in (error.context, error.problem) if part)
            sentence = " ".join(f"not valid YAML: {story} {hint}".split())
            where = f"{self.path}:{mark.line + 1}:{mark.column + 1}" if mark else self.path
            raise UserError(sentence, where=where) from None
        except yaml.reader.ReaderError as error:
            where = f"{self.path}:{_end(text[: error.position])}"
            sentence = f"not valid YAML: character {error.character:#04x} is not allowed"
            raise UserError(sentence, where=where) from None
        except RecursionError:
            raise UserError("nested too deeply, or an alias holds itself", where=self.path) from None
        return data

    def _error(self, sentence: str, node: yaml.Node) -> UserError:
        mark = node.start_mark
        return UserError(sentence, where=f"{self.path}:{mark.line + 1}:{mark.column + 1}")

    def _value(self, node: yaml.Node, loc: Loc, key: yaml.Node) -> Any:
        raw = node.value if isinstance(node, yaml.ScalarNode) else ""
        # A value left out (`dp-sgd:`) has no place of its own.
        start, above = (key if node.start_mark.index == node.end_mark.index else node).start_mark, key.start_mark
        self.marks[loc] = Mark(start.line + 1, start.column + 1, above.line + 1, above.column + 1, raw)
        if len(self.marks) > _MOST_VALUES:
            raise self._error(f"more than {_MOST_VALUES:,} values, counting aliases", node)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._entries(node, loc)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._value(item, (*loc, index), item) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise self._error(f"tag {node.tag!r} is not supported, expected plain data", node)

    def _entries(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error("found a list or a mapping as a key, expected a text", key)
            name = self._whole(key.value, key)
            if key.tag != _TAG + "str":
                raise self._error(f"key {name!r} is read as no text by YAML, expected a text: quote it", key)
            if name in data:
                line = self.marks[(*loc, name)].key_line
                raise self._error(f"key {name!r} appears twice, first in line {line}", key)
            data[name] = self._value(value, (*loc, name), key)
        return data

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        raw = node.value
        match node.tag.removeprefix(_TAG):
            case "str":
                return self._whole(_VARIABLE.sub(lambda found: self._variable(found, node), raw), node)
            case "null":
                return None
            case "bool" if raw.lower() in ("yes", "no", "true", "false", "on", "off"):
                return raw.lower() in ("yes", "true", "on")
            case "int" | "float" as kind:
                try:
                    digits = raw.replace("_", "").replace(".inf", "inf").replace(".nan", "nan")
                    return int(digits) if kind == "int" else float(digits)
                except ValueError:
                    raise self._error(f"{_shown(raw)} is no number that can be read", node) from None
        raise self._error(f"tag {node.tag!r} is not supported, expected plain data", node)

    def _whole(self, text: str, node: yaml.Node) -> str:
        """A text whose halves of characters are joined: JSON writes one beyond 16 bits as two escapes."""
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            shown = text.encode("ascii", "backslashreplace").decode()
            raise self._error(f"{_shown(shown)} holds half a character, expected both escapes of it", node) from None

    def _variable(self, found: re.Match[str], node: yaml.ScalarNode) -> str:
        escaped, name = found.groups()
        if escaped:
            return f"${{{name}}}"
        name, default, instead = name.partition(":-")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise self._error(f"{found.group()!r} names no environment variable, expected ${{NAME}}", node)
        if not self.environ.get(name) and not default:
            raise self._error(f"environment variable {name} is not set; set it or write its value", node)
        return self.environ.get(name) or instead


def _schema_at(model: type[BaseModel], loc: Loc) -> tuple[type[BaseModel], FieldInfo | None]:
    """The model that owns the last key of ``loc``, and the deepest field on the way."""
    owner, field = model, None
    for step in loc:
        if isinstance(step, str) and step in owner.model_fields:
            field = owner.model_fields[step]
            owner = _model_in(field.annotation) or owner
    return owner, field


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _choices(field: FieldInfo) -> list[str]:
    def words(annotation: Any) -> list[str]:
        if get_origin(annotation) is Literal:
            return [str(word) for word in get_args(annotation)]
        return [word for part in get_args(annotation) for word in words(part)]

    return words(field.annotation)


def _shown(value: Any) -> str:
    """A value as a sentence shows it: one line, not too long."""
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _end(text: str) -> str:
    """``line:column`` of what follows ``text``."""
    return f"{text.count(chr(10)) + 1}:{len(text) - text.rfind(chr(10))}"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _near(path: Path) -> str:
    """A clause naming the YAML file in the same folder that is spelt most alike, or ""."""
    folder = path.parent
    return nearest_name(path.name, [file.name for file in folder.glob("*.y*ml")] if folder.is_dir() else [])
