"""Every key that a study file may have, with its meaning and default, read from the models that check the file."""

from __future__ import annotations

import inspect
import re
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dpguard.study.sections import StudyFile

_ENTRY = re.compile(r"    (\w+(?:, \w+)*): (.+)")
_MORE = re.compile(r"        +(.+)")


def study_keys() -> dict[str, str]:
    """Key such as ``leakage.targets`` -> its meaning, then its default in brackets.

    >>> study_keys()["leakage.targets"]
    'messages attacked in a cell [20]'
    """
    return _keys(StudyFile, "")


def _keys(model: type[BaseModel], above: str) -> dict[str, str]:
    found: dict[str, str] = {}
    meanings = attributes(inspect.getdoc(model) or "")
    for name, field in model.model_fields.items():
        key = f"{above}{name}"
        inner = _section(field.annotation)
        found[key] = f"{meanings.get(name, field.description or '').rstrip('.')} [{_default(field, inner)}]"
        if inner is not None:
            found |= _keys(inner, f"{key}.")
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, looked for in unions."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(_section, get_args(annotation)) if found is not None), None)


def _default(field: FieldInfo, inner: type[BaseModel] | None) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default in ("", ()):
        return "none"
    if inner is not None:
        return "see its keys"
    if isinstance(field.default, tuple):
        return ", ".join(map(str, field.default))
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def attributes(docstring: str) -> dict[str, str]:
    """Name -> meaning, of the attributes in a docstring; names that share a line share its meaning.

    >>> attributes("What.\\n\\nAttributes:\\n    a, b: one\\n        more.\\n    c: two.")
    {'a': 'one more.', 'b': 'one more.', 'c': 'two.'}
    """
    found: dict[str, str] = {}
    names: list[str] = []
    for line in docstring.partition("Attributes:\n")[2].splitlines():
        if entry := _ENTRY.fullmatch(line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif more := _MORE.fullmatch(line):
            found |= {name: f"{found[name]} {more[1]}" for name in names}
    return {name: meaning.replace("`", "") for name, meaning in found.items()}
