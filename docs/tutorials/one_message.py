"""Tutorial 1: one text, one message, and what the panel makes of it under three policies.

python docs/tutorials/one_message.py
"""

from __future__ import annotations

from dpguard.inputs import models, texts
from dpguard.inputs.family import slots
from dpguard.measure.leakage import attack_message
from dpguard.policy.table import Policy

model = models.load("demo")  # or a folder with your own model
corpus = texts.load("demo")  # or a jsonl, csv or parquet file

policies = {
    "everything as it is": Policy.load("none"),
    "one matrix": Policy.load("block[0].attention.query"),
    "clipped and noised": Policy([{"layers": "all", "clip": 1.0, "noise": 1.0}]),
}
for name, policy in policies.items():
    plan = policy.plan(slots(model.module))
    leak = attack_message(
        model, plan, corpus, indices=[0], attacks=["prior", "rows", "span"], seed=0, noise_seed=0
    )  # the client makes the message, the attacks see nothing else
    best = max(leak.scores, key=lambda score: score.metrics["rougeL"] or 0.0)
    print(f"{name}: {plan.shared_fraction:.1%} of the parameters leave")
    print(f"  true:      {leak.truths[0]}")
    print(f"  recovered: {best.guess}")
    print(f"  ROUGE-L {best.metrics['rougeL']:.2f} by {best.attack}, certain: {best.certain}")
