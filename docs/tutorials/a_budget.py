"""Tutorial 3: two tables with the same epsilon, what one message can give away under each, and what they share.

python docs/tutorials/a_budget.py
"""

from __future__ import annotations

import dpguard
from dpguard.inputs import models

slots = dpguard.slots(models.load("demo").module)
training = {"sampling_rate": 1.0, "steps": 1, "delta": 1e-5}

tables = {
    "flat": dpguard.Policy([{"layers": "all", "clip": 0.1}]),
    "twice the noise below": dpguard.Policy(
        [
            {"layers": ["embeddings", "block[0:50%]"], "clip": 0.1, "noise": 2.0},
            {"layers": ["block[50%:]", "pooler", "head"], "clip": 0.1, "noise": 1.0},
        ]
    ),
}
for name, table in tables.items():
    policy = table.calibrate(slots, epsilon=3, **training)  # one factor on all noise columns
    promised = dpguard.guarantee(policy.plan(slots), **training)
    multipliers = [row["noise"] for row in policy.rows]
    print(f"{name}: noise {multipliers}, epsilon {promised.epsilon:.2f}, sigma_eff {promised.sigma_eff:.2f}")
    # whoever would guess a text with chance 1 % without the message guesses it with at most this chance after it
    print(f"  at most {promised.bound(0.01):.3f} where a guess alone has 0.01")
