"""The same table with other clips: rows that form several clip groups become one row a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpguard.errors import UserError, did_you_mean
from dpguard.policy.cascade import Cascade, acts
from dpguard.policy.columns import COLUMNS
from dpguard.policy.covering import Selectors
from dpguard.policy.layers import Slot, select
from dpguard.policy.table import Plan, Policy

_Names = frozenset[str]
_OF_THE_CLIP = ("clip", "per", "mode", "unit")
"""Columns that mean something only where the row's clip counts."""


def with_group_clips(policy: Policy, slots: Sequence[Slot], clips: Mapping[str, float]) -> Policy:
    """A policy whose plan is the same but for the clips of some groups (and for the groups' ids).

    ``clip`` is one number a row, so a row whose ``per`` makes several groups is replaced, where it stands, by
    one row a group, each with every other column. What the row says about layers whose clip comes from
    another row goes to a row of its own, without a clip.

    Args:
        policy: the table.
        slots: of the model that it is split for: the new rows name that model's parts.
        clips: clip group (``plan.groups``) -> bound; other groups keep theirs.

    Raises:
        UserError: an unknown group, or a table that rows cannot say (tied tensors that two rows name
            differently), with the row in ``loc``.

    >>> model = [Slot("a", (2,), "query", 0), Slot("b", (2,), "query", 1), Slot("c", (2,), "head")]
    >>> policy = Policy([{"layers": "all", "clip": 1.0, "per": "block", "noise": 0.8}])
    >>> found = with_group_clips(policy, model, {"row 1 block[0]": 0.2, "row 1 head": 3})
    >>> for row in found.rows:
    ...     print(row)
    {'layers': 'block[0]', 'clip': 0.2, 'noise': 0.8}
    {'layers': 'block[1]', 'clip': 1.0, 'noise': 0.8}
    {'layers': 'head', 'clip': 3, 'noise': 0.8}
    """
    cascade = Cascade(policy, slots)
    plan = cascade.plan()
    known = plan.groups
    for key in clips:
        if key not in known:
            raise UserError(f"no clip group is called {key!r}{did_you_mean(key, known)}")
    selectors = Selectors(slots)
    made = [_rows(cascade, plan, index, clips, selectors) for index in range(len(policy.rows))]
    origin = [index for index, rows in enumerate(made) for _ in rows]
    found = Policy([row for rows in made for row in rows], policy.name)
    try:
        after = found.plan(slots)
    except UserError as error:
        new = error.loc[1] if len(error.loc) > 1 else 0
        raise _intricate(policy, origin[new if isinstance(new, int) else 0], error.sentence) from None
    _check_same(cascade, plan, after, clips)
    return found


def _rows(
    cascade: Cascade, plan: Plan, index: int, clips: Mapping[str, float], selectors: Selectors
) -> list[dict[str, Any]]:
    """What stands for one row of the table."""
    row, read = dict(cascade.policy.rows[index]), cascade.policy._read[index]
    groups = _groups(cascade, plan, index)
    if not any(key in clips for key in groups):
        return [row]
    others = {column: value for column, value in row.items() if column not in ("layers", "per")}
    chosen = {slot.name for selector in read.layers for slot in select(selector, cascade.slots)}
    left = {column: value for column, value in others.items() if column not in _OF_THE_CLIP}
    rest = frozenset(
        name
        for name in chosen.difference(*groups.values())
        if any(_counts(cascade, plan, index, cascade.tensor[name], column) for column in left)
    )
    out = []
    for key, names in groups.items():
        whole = len(groups) == 1 and not rest
        layers = row["layers"] if whole or read.per == "row" else _listed(selectors.cover(names))
        out.append({"layers": layers, **others, **({"clip": clips[key]} if key in clips else {})})
    # a row that makes one group keeps its layers, whoever has the last word about some of them
    if rest and read.per != "row":
        out.append({"layers": _listed(selectors.cover(rest)), **left})
    return out


def _listed(selectors: tuple[str, ...]) -> str | list[str]:
    return selectors[0] if len(selectors) == 1 else list(selectors)


def _groups(cascade: Cascade, plan: Plan, index: int) -> dict[str, _Names]:
    """Clip groups whose clip a row sets -> the names by which the row takes their tensors."""
    out: dict[str, _Names] = {}
    alive = plan.groups
    for tensor, rule in plan.items():
        last, _, names = cascade.last.get((tensor, "clip"), (-1, None, frozenset()))
        if last == index and rule.group in alive:
            out[rule.group] = out.get(rule.group, frozenset()) | names
    return out


def _counts(cascade: Cascade, plan: Plan, index: int, tensor: str, column: str) -> bool:
    """Whether a column of a row has the last word on a tensor, and can change anything about it."""
    return cascade.last.get((tensor, column), (-1,))[0] == index and acts(column, plan[tensor])


def _check_same(cascade: Cascade, before: Plan, after: Plan, clips: Mapping[str, float]) -> None:
    """Every rule is the same but for clip and group, and the groups hold the same trained tensors."""
    of_old: dict[str, set[str]] = {}
    of_new: dict[str, set[str]] = {}
    for name, rule in before.items():
        new = after[name]
        # what does nothing on this tensor (keep on one that is withheld, all but share on a frozen one) may change
        idle = {column: getattr(new, column) for column in COLUMNS if column != "per" and not acts(column, rule)}
        clip = {"clip": clips.get(rule.group, rule.clip), "quantile": rule.quantile if rule.train else new.quantile}
        same = new == replace(rule, **{**clip, "group": new.group, **idle})
        if rule.train:
            of_old.setdefault(rule.group, set()).add(new.group)
            of_new.setdefault(new.group, set()).add(rule.group)
            same = same and len(of_old[rule.group]) == len(of_new[new.group]) == 1
        if not same:
            row = cascade.last.get((name, "clip"), (0,))[0]
            raise _intricate(cascade.policy, row, f"{name!r} would change in more than its clip")


def _intricate(policy: Policy, index: int, why: str) -> UserError:
    selected = ", ".join(policy._read[index].layers)
    return UserError(
        f"row {index + 1} ({selected}) cannot get one clip a group: {why}; expected each tied tensor to be named "
        "by one row, or per: row",
        loc=("rows", index),
    )
