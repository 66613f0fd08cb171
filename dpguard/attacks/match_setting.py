"""The presets of gradient matching: what they compare, how they start, how they step.

dlg, tag, lamp and partial share the loop of the last one's paper (arXiv 2406.00999, which took it from LAMP): Adam at
.01, times .89 every 50 steps, 2,000 steps. They differ in what their papers are about:

    dlg: squared distance of gradients, one random start (arXiv 1906.08935; there with L-BFGS)
    tag: squared plus .01 times absolute distance (arXiv 2103.06819, without its weights by layer)
    lamp: mean cosine distance, token norms near the table's mean, 500 starts, 500 orders, orders scored with a
        language model's help (arXiv 2202.08827)
    partial: the same on any subset of tensors, token norms near 1.4
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Setting:
    """What makes a preset, besides its budget.

    Attributes:
        aware: replay the policy on the candidates and whiten noise (see `Objective`).
        learning_rate: Adam's step size; multiplied by ``decay`` every ``decay_every`` steps.
        starts: random starts scored for each label guess.
        permutations: orders of the best starts scored.
        burn_in: fraction of the steps before the first reordering.
        every: steps between reorderings.
        proposals: orders scored at a reordering.
        order_prior: weight of the bigram loss (nats a token) in an order's score.
        norm_weight: weight of (mean token norm - ``norm``)².
        norm: token norm that starts have and the penalty asks for; None takes the table's mean.
        check: steps between looks at the projected tokens; without noise the search ends when their
            distance is at zero. 0 = never look.
        substitutes: nearest tokens tried at each position in the discrete search at the end; 0 = none.
        distance: of gradients: "cosine" (whitened under noise where ``aware``), "l2" or "l1", see `objective`.
        soft: begin with what soft spans and cheaper attacks say, and search discretely from there.
    """

    aware: bool = True
    learning_rate: float = 0.01
    decay: float = 0.89
    decay_every: int = 50
    starts: int = 64
    permutations: int = 64
    burn_in: float = 0.1
    every: int = 75
    proposals: int = 100
    order_prior: float = 0.05
    norm_weight: float = 1.0
    norm: float | None = None
    check: int = 10
    substitutes: int = 8
    distance: str = "cosine"
    soft: bool = False


_LAMP = Setting(aware=False, starts=500, permutations=500, proposals=200, order_prior=0.2, check=0, substitutes=0)
_PLAIN = replace(_LAMP, starts=1, permutations=1, proposals=0, norm_weight=0.0)

SETTINGS = {
    "default": Setting(learning_rate=0.03, decay=0.93, every=50, soft=True),
    "dlg": replace(_PLAIN, distance="l2"),
    "tag": replace(_PLAIN, distance="l1"),
    "lamp": _LAMP,
    "partial": replace(_LAMP, norm=1.4),
    "demo": Setting(learning_rate=0.15, decay=0.8, decay_every=6, starts=16, permutations=8, every=10, proposals=8),
}
