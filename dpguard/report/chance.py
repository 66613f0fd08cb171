"""What a guess scores without a message, in words: what was measured, and on how many public texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpguard.report.text import metric_name
from dpguard.stats import PUBLIC_WANTED


def measured_on(texts: int) -> str:
    """On how many public texts chance was measured, and whether they are fewer than an estimate wants; 0 is not known.

    >>> measured_on(20_000)
    'measured on 20,000 public texts'
    >>> measured_on(800)
    'measured on 800 public texts, where an estimate wants 10,000 or more'
    >>> measured_on(0)
    'measured on a number of public texts that is not on record'
    """
    if not texts:
        return "measured on a number of public texts that is not on record"
    few = f", where an estimate wants {PUBLIC_WANTED:,} or more" if texts < PUBLIC_WANTED else ""
    return f"measured on {texts:,} public texts{few}"


def public_texts(promises: Iterable[Mapping[str, Any]]) -> int:
    """The fewest public texts that some guarantee record's chance was measured on; 0 where none says."""
    known = (each.get("texts", 0) for promise in promises for each in (promise.get("kappa") or {}).values())
    return min((int(texts) for texts in known if texts), default=0)


def best_guess(promise: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Measured chance of some metrics, with the upper limit that bounds start from; empty where it was not measured.

    >>> best_guess({"kappa": {"rougeL": {"value": 0.21, "upper": 0.23, "texts": 800}}}, ["rougeL", "exact_match"])
    'ROUGE-L 0.21 (at most 0.23), measured on 800 public texts, where an estimate wants 10,000 or more'
    """
    texts, kappa = public_texts([promise]), promise.get("kappa") or {}
    each = [
        f"{metric_name(name)} {kappa[name]['value']:.2g} (at most {kappa[name]['upper']:.2g})"
        for name in dict.fromkeys(metrics)
        if name in kappa
    ]
    return f"{', '.join(each)}, {measured_on(texts)}" if each else ""
