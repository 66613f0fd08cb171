"""Plugins by file: one new file in a room's folder is one new name, and listing names imports none of them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType

from dpguard.errors import UserError, did_you_mean


def names(package: str, *, without: frozenset[str] = frozenset()) -> dict[str, Path]:
    """Plugin name -> file for every public module of ``package``; nothing is imported but its parents.

    A module is a plugin when it assigns the upper-case name ``PLUGIN`` at its top level.

    >>> sorted(names("dpguard.inputs.families"))[:2]
    ['bert', 'distilbert']
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(package)
    found = {}
    for folder in spec.submodule_search_locations:
        for module in pkgutil.iter_modules([folder]):
            path = Path(folder) / f"{module.name}.py"
            if module.name not in without and path.is_file() and _is_plugin(path):
                found[module.name] = path
    return found


def _is_plugin(path: Path) -> bool:
    return any(line.startswith(("PLUGIN =", "PLUGIN:")) for line in path.read_text("utf-8").splitlines())


def summary(path: Path) -> str:
    """First line of a module's docstring, read without importing it."""
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return doc.partition("\n")[0]


def load(package: str, name: str, kind: str) -> ModuleType:
    """Import the plugin module called ``name``.

    Raises:
        UserError: no such plugin; the sentence names the nearest one.
    """
    known = names(package)
    if name not in known:
        raise UserError(f"unknown {kind} {name!r}{did_you_mean(name, known)}")
    return importlib.import_module(f"{package}.{name}")
