"""A policy's table in plain English: what a reader is told who has never seen one. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpguard.report.text import plain, visible

WHOLE = "Everything is trained and shared as it is."
_BLOCK = re.compile(r"block\[(\d+)\](?:\.([a-z.]+))?")
_RANGE = re.compile(r"block\[(\d+):(\d+)\](?:\.([a-z.]+))?")
_SHARE = re.compile(r"block\[(?:0?:(\d+)%|(\d+)%:)\](?:\.([a-z.]+))?")
_EACH = {"block": "block", "role": "kind of layer", "tensor": "tensor"}
_NAMED = ("embeddings", "head", "pooler", "norms", "biases", "adapters")


def in_words(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A policy's rows as sentences, in the order of the rows: later ones override earlier ones.

    Args:
        rows: as written in the policy.

    >>> " ".join(in_words([{"layers": "all", "clip": 1.0, "noise": 0.6}]))
    "Everything is shared. Each example's gradient is scaled down to norm 1, and noise of 0.6 times that is added \
to the sum."
    >>> in_words([])
    ['Everything is trained and shared as it is.']
    """
    told, general = [], dict[str, Any]()
    for row in rows:
        told += _sentences(row, general)
        if _everything(row):
            general |= {name: value for name, value in row.items() if name != "layers"}
    return _shares(rows, general) + told if rows else [WHOLE]


def _shares(rows: Sequence[Mapping[str, Any]], general: Mapping[str, Any]) -> list[str]:
    """What holds where no row says anything of sharing; it comes first."""
    if {"share", "train"} & set(general):
        return []
    limited = any(row.get("share") is False or row.get("train") is False for row in rows)
    return ["Everything is shared, except as follows." if limited else "Everything is shared."]


def _sentences(row: Mapping[str, Any], general: Mapping[str, Any]) -> list[str]:
    """The sentences of one row: who trains and shares, clip and noise, what happens after the noise.

    Args:
        row: the row.
        general: the columns that earlier rows set for everything.
    """
    who = "everything" if _everything(row) else _named(row)
    place = "" if _everything(row) else f"in {who}"
    instead = bool({"clip", "noise", "noise_std", "keep", "bits", "release"} & set(row) & set(general))
    start = f"{place} instead, " if place and instead else f"{place}, " if place else ""
    moved = [_moved(row, who)] if {"share", "train"} & set(row) else []
    done = [start + words for words in (_clipped(row, general), _noised(row), *_sent(row)) if words]
    return [words[0].upper() + words[1:] + "." for words in (*moved, *done)]


def _moved(row: Mapping[str, Any], who: str) -> str:
    share, train = row.get("share"), row.get("train")
    if who == "everything" and share is False:
        return f"nothing is {'trained or ' if train is False else ''}shared, except as follows"
    if share is not None and share == train:
        return f"{who}: trained and shared" if share else f"{who}: neither trained nor shared"
    told = {
        ("share", True): "shared",
        ("share", False): "not shared, so that what is trained there stays with the client",
        ("train", True): "trained",
        ("train", False): "frozen, so that there is nothing of it to share",
    }
    return f"{who}: " + " and ".join(told[name, row[name]] for name in ("train", "share") if name in row)


def _clipped(row: Mapping[str, Any], general: Mapping[str, Any]) -> str:
    """The clip, and the noise that is measured by it."""
    if "clip" not in row:
        return ""
    update, clip = row.get("unit") == "update", row["clip"]
    what = "the client's whole update" if update else "each example's gradient"
    how = "scaled to exactly" if row.get("mode") == "normalise" else "scaled down to"
    norm = f"norm {plain(clip)}" if not isinstance(clip, Mapping) else _follows(clip)
    each = _EACH.get(str(row.get("per", "row")), "")
    words = f"{what} is {how} {norm}" + (f", for every {each} by itself" if each else "")
    noise = row.get("noise", general.get("noise"))  # a row that sets another clip keeps the noise multiplier
    if not noise:
        return words + (", and no noise is added" if "noise" in row else "")
    return f"{words}, and noise of {plain(noise)} times that is added to {'it' if update else 'the sum'}"


def _follows(clip: Mapping[str, Any]) -> str:
    start, noise = clip.get("start", 1.0), clip.get("count_noise", 10.0)
    return (
        f"a norm that is moved so that a share of {plain(clip.get('quantile'))} of the examples is below it (from "
        f"{plain(start)}, at rate {plain(clip.get('rate', 0.2))}, by counts with noise of {plain(noise)} examples)"
    )


def _noised(row: Mapping[str, Any]) -> str:
    """Noise that is not said with a clip of the same row."""
    told = []
    if "noise" in row and "clip" not in row:
        amount = plain(row["noise"])
        told.append(f"noise of {amount} times the clipped norm is added" if row["noise"] else "no noise is added")
    if row.get("noise_std"):
        told.append(
            f"noise of standard deviation {plain(row['noise_std'])} is added to every number sent, which by itself "
            "guarantees nothing"
        )
    elif "noise_std" in row:
        told.append("no noise of a fixed size is added")
    return " and ".join(told)


def _sent(row: Mapping[str, Any]) -> list[str]:
    """What happens to the numbers after the noise."""
    told = []
    if row.get("keep", 1) != 1:
        share = f"{100 * float(row['keep']):.3g} %"
        random = row.get("prune") == "random"
        told.append(f"only a random {share} of the numbers are sent, picked in public" if random
                    else f"only the largest {share} of the numbers are sent")  # fmt: skip
    elif "keep" in row:
        told.append("every number is sent")
    if row.get("bits") is not None:
        bits = int(row["bits"])
        told.append("of each number only the sign is sent" if bits == 1 else f"each number is sent in {bits} bits")
    if "release" in row:
        told.append(f"before it is sent it goes through {plain(row['release'])}")
    return told


def _everything(row: Mapping[str, Any]) -> bool:
    return row.get("layers", "all") in ("all", ["all"])


def _named(row: Mapping[str, Any]) -> str:
    layers = row["layers"]
    names = [_part(item) for item in (layers if isinstance(layers, list | tuple) else [layers])]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _part(selector: Any) -> str:
    """A selector in words where it has any; others as they are written.

    >>> _part("embeddings"), _part("block[1].attention.query"), _part("block[0:3]"), _part("block[-1].mlp")
    ('the embeddings', 'attention.query of block 1', 'blocks 0 to 2', 'block[-1].mlp')
    """
    name = str(selector)
    if name in _NAMED:
        return f"the {name}"
    if found := _BLOCK.fullmatch(name):
        return _inside(found[2], f"block {found[1]}")
    if (found := _RANGE.fullmatch(name)) and int(found[2]) > int(found[1]) + 1:
        return _inside(found[3], f"blocks {found[1]} to {int(found[2]) - 1}")
    if found := _SHARE.fullmatch(name):
        share = f"the lower {found[1]} %" if found[1] else f"the upper {100 - int(found[2])} %"
        return _inside(found[3], f"{share} of the blocks")
    if name.startswith("block[*]"):
        return _inside(visible(name[9:]), "every block")
    return visible(name)


def _inside(part: str | None, block: str) -> str:
    return f"{part} of {block}" if part else block
