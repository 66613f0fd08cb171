"""A made-up study, built in memory: thirteen policies with figures of a plausible shape, and its texts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dpguard.policy.gaussian import success_bound
from dpguard.report.result import StudyResult
from dpguard.study.record import Cell, Record, TextRow

MODEL = {"name": "demo", "hash": "5f0c1d"}
DATA = {"name": "demo", "hash": "77aa01", "train": 1200, "test": 400}
YAML = """name: sample
question: What may a client of the clinic share, and what does it cost?
model: demo
data: demo
policies:
  dp-sgd: {sweep: {noise: [0.3, 0.6, 1.0, 2.0]}, rows: [{layers: all, clip: 1.0, noise: $noise}]}
recommend: {max_leakage: 0.25, min_utility: 0.7, max_epsilon: 20}
"""
# policy: rows, (recovered share at the start, at the end), accuracy, epsilon, shared fraction
POLICIES: dict[str, tuple[list[dict[str, Any]], tuple[float, float], float | None, float, float]] = {
    "none": ([{"layers": "all", "share": True}], (1.0, 0.98), 0.93, math.inf, 1.0),
    "dp-sgd noise=0.3": ([{"layers": "all", "clip": 1.0, "noise": 0.3}], (0.46, 0.4), 0.90, 41.2, 1.0),
    "dp-sgd noise=0.6": ([{"layers": "all", "clip": 1.0, "noise": 0.6}], (0.06, 0.04), 0.86, 6.31, 1.0),
    "dp-sgd noise=1.0": ([{"layers": "all", "clip": 1.0, "noise": 1.0}], (0.0, 0.0), 0.78, 2.44, 1.0),
    "dp-sgd noise=2.0": ([{"layers": "all", "clip": 1.0, "noise": 2.0}], (0.0, 0.0), 0.56, 0.87, 1.0),
    "clip-only": ([{"layers": "all", "clip": 1.0}], (1.0, 0.98), 0.915, math.inf, 1.0),
    "prune": ([{"layers": "all", "keep": 0.05, "prune": "magnitude"}], (0.62, 0.55), 0.90, math.inf, 1.0),
    "upper-blocks": (
        [{"layers": ["embeddings", "block[0:2]"], "share": False, "train": False}],
        (0.9, 0.84), 0.905, math.inf, 0.41,
    ),
    "no-embeddings": ([{"layers": "embeddings", "share": False}], (0.96, 0.94), None, math.inf, 0.52),
    "block[1].attention.query": (
        [{"layers": "all", "share": False, "train": False},
         {"layers": "block[1].attention.query", "share": True, "train": True}],
        (0.82, 0.8), 0.74, math.inf, 0.011,
    ),
    "head-only": (
        [{"layers": "all", "share": False, "train": False}, {"layers": "head", "share": True, "train": True}],
        (0.0, 0.0), 0.66, math.inf, 0.0004,
    ),
    "mixture": (
        [
            {"layers": "all", "clip": 1.0, "noise": 0.8, "per": "block"},
            {"layers": "embeddings", "share": False, "train": False},
            {"layers": "head", "clip": 0.5, "noise": 0.4},
        ],
        (0.0, 0.02), 0.84, 9.7, 0.48,
    ),
    "sign": (
        [{"layers": "all", "clip": 1.0, "noise": 0.3}, {"layers": "all", "bits": 1}],
        (0.2, 0.18), 0.83, 41.2, 1.0,
    ),
}  # fmt: skip
SIGMAS = {"dp-sgd noise=0.3": 0.3, "dp-sgd noise=0.6": 0.6, "dp-sgd noise=1.0": 1.0, "dp-sgd noise=2.0": 2.0,
          "mixture": 0.65, "sign": 0.3}  # fmt: skip
CHANCES = {"rouge1": 0.16, "rouge2": 0.08, "rougeL": 0.14, "exact_match": 0.001, "token_recall": 0.16}
STATEMENT = (
    "Covered: one training example, added or zeroed out, of 1200, in each client's message. "
    "Poisson sampling at rate 0.213, 14 steps, delta 1e-05. Not covered: the choice of hyperparameters, "
    "floating-point attacks on the sampler, and several examples of one person."
)
NAMES = ("Ada Moreau", "Ilse Brandt", "Tomas Reyes", "Noor Haddad", "Petra Vance")
ILLS = ("asthma", "type 2 diabetes", "migraine", "a fractured wrist", "atrial fibrillation")


def sentence(target: int) -> str:
    name, ill = NAMES[target % 5], ILLS[target // 5 % 5]
    return f"{name}, seen on {target % 28 + 1} March for {ill}, can be reached at 555-{1000 + 37 * target}."


def damaged(text: str, share: float, rng: np.random.Generator) -> str:
    fill = ("the", "was", "on", "patient", "of", "with", "reported")
    return " ".join(w if rng.random() < share else fill[int(rng.integers(7))] for w in text.lower().split())


def scores_of(target: int, attack: str, rate: float, rng: np.random.Generator) -> tuple[dict[str, Any], str]:
    truth = sentence(target)
    whole = attack != "prior" and rng.random() < rate
    kept = 1.0 if whole else 0.12 if attack == "prior" else 0.1 + 0.25 * rate
    text = truth if whole else damaged(truth, kept, rng)
    level = 1.0 if whole else float(np.clip(kept + rng.normal(0, 0.04), 0, 0.95))
    metrics = {name: round(level * f, 4) for name, f in
               (("rouge1", 1), ("rouge2", 1 if whole else 0.5), ("rougeL", 1), ("token_recall", 1))}  # fmt: skip
    metrics |= {"exact_match": float(whole), "entity_recall": None if target % 9 == 4 else round(level, 2)}
    score = {"target": target, "attack": attack, "metrics": metrics, "certain": whole, "inherited": False,
             "seconds": 0.8, "steps": 300, "candidates": 50}  # fmt: skip
    return score, text


def leakage(policy: str, at: str, rate: float, targets: int, seed: int = 0) -> tuple[Record, list[TextRow]]:
    rows, _, _, _, share = POLICIES[policy]
    rng = np.random.default_rng([sum(map(ord, policy)), seed, at == "end"])
    cell = Cell("leakage", policy, rows, MODEL, DATA, {"at": at, "targets": targets, "metric": "rougeL"}, seed)
    scores, texts = [], [TextRow(t, "truth", sentence(t)) for t in range(targets)]
    for attack in ("prior", "span", "match"):
        for target in range(targets):
            score, text = scores_of(target, attack, rate * (0.7 if attack == "match" else 1), rng)
            scores.append(score)
            texts.append(TextRow(target, attack, text))
    result = {"at": at, "kappa_floor": 0.01, "scores": scores, "skipped": {}, "shared_fraction": share,
              "defence": {"clip": {"all": [0.998, 1.0]},
                          "noise": {"block 0": [0.0601, 0.06], "head": [0.0598, 0.06]}}}  # fmt: skip
    return Record(cell, "done", result=result, provenance=provenance(3.2)), texts


def utility(policy: str, accuracy: float, seed: int, examples: int = 400) -> Record:
    rows = POLICIES[policy][0]
    rng = np.random.default_rng([sum(map(ord, policy)), seed])
    labels = (np.arange(examples) % 9 < 4).astype(int)
    right = np.random.default_rng(3).permutation(examples) < round(accuracy * examples)
    right ^= rng.random(examples) < 0.01
    predictions = np.where(right, labels, 1 - labels)
    metrics = {"accuracy": float(right.mean()), "mcc": 0.7, "f1": 0.8, "loss": 0.41}
    cell = Cell("utility", policy, rows, MODEL, DATA, {"metric": "accuracy", "epochs": 3}, seed)
    result = {"metrics": metrics, "predictions": predictions.tolist(), "labels": labels.tolist(), "steps": 14,
              "sampling_rate": 0.213, "clipped_fraction": 0.83, "train_seconds": 2.1}  # fmt: skip
    return Record(cell, "done", result=result, provenance=provenance(2.4))


def guarantee(policy: str, epsilon: float) -> Record:
    rows, _, _, _, share = POLICIES[policy]
    formal = math.isfinite(epsilon)
    sigma = SIGMAS.get(policy, 0.0)
    result = {
        "epsilon": epsilon if formal else "inf", "sigma_eff": sigma, "delta": 1e-5,
        "sampling_rate": 0.213, "steps": 14, "shared_fraction": share,
        "statement": STATEMENT if formal else "No formal guarantee: epsilon is infinite.",
        "reasons": [] if formal else ["what is shared carries no noise"],
        "bound": {"kappa": 0.01, "success": success_bound(0.01, 1 / sigma)} if formal else None,
        "kappa": {
            metric: {"value": 0.95 * upper, "upper": upper, "texts": 3000,
                     "bound": success_bound(upper, 1 / sigma) if formal else None}
            for metric, upper in CHANCES.items()
        },
        "table": [
            {"parameters": part, "fraction": size, "share": True, "train": True, "clip": 1.0 if formal else None,
             "group": "all" if formal else None, "noise": 0.6 if formal else 0.0, "std": 0.6 if formal else 0.0,
             "release": ""}
            for part, size in (("embeddings", 0.48), ("block 0", 0.26), ("block 1", 0.2596), ("head", 0.0004))
        ],
    }  # fmt: skip
    cell = Cell("guarantee", policy, rows, MODEL, DATA, {"delta": 1e-5})
    return Record(cell, "done", result=result, provenance=provenance(0.1))


def provenance(seconds: float) -> dict[str, Any]:
    versions = {"dpguard": "0.1.0", "opacus": "1.6.0", "torch": "2.13.0"}
    return {
        "versions": versions,
        "device": "cpu",
        "seconds": seconds,
        "peak_mb": 512.0,
        "started": "2026-01-02T10:00:00Z",
    }


def sample(targets: int = 50, *, show_text: bool = False, synthetic: bool = True) -> StudyResult:
    """Thirteen policies, complete but for one that central training cannot judge and one failed cell."""
    records, texts = [], {}
    for policy, (rows, rates, accuracy, epsilon, _) in POLICIES.items():
        records.append(guarantee(policy, epsilon))
        for at, rate in zip(("start", "end"), rates, strict=True):
            record, found = leakage(policy, at, rate, targets)
            if policy == "sign" and at == "end":
                record = Record(record.cell, "failed", reason="out of memory: 3.1 GB asked for, 1.9 GB free")
            else:
                texts[record.cell.id] = found
            records.append(record)
        for seed in range(3):
            if accuracy is None:
                cell = Cell("utility", policy, rows, MODEL, DATA, {"metric": "accuracy", "epochs": 3}, seed)
                reason = "it trains layers that it withholds: utility needs the federation"
                records.append(Record(cell, "skipped", reason=reason))
            else:
                records.append(utility(policy, accuracy, seed))
    spec = {
        "name": "sample", "data": {"path": "demo" if synthetic else "notes.jsonl"}, "policies": list(POLICIES),
        "leakage": {"metric": "rougeL", "targets": targets, "at": ["start", "end"]},
        "utility": {"metric": "accuracy", "seeds": [0, 1, 2]},
        "recommend": {"max_leakage": 0.32, "min_utility": 0.7, "max_epsilon": 20},
    }  # fmt: skip
    study = {"name": "sample", "question": "What may a client of the clinic share, and what does it cost?",
             "yaml": YAML, "spec": spec, "show_text": show_text}  # fmt: skip
    return StudyResult(study, records, texts)
