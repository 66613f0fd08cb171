"""Which classes the text of a message may have: the disclosed one, the one that the head gives away, or all.

The gradient of the logits is p - y: only the entry of the text's own class is negative, and so is its entry of the
head's bias. Row c of the head's weight is (p - y)_c times one vector, so that with three classes or more the row
that points against all others is the class (iDLG, Zhao et al., arXiv 2001.02610, section 3).
"""

from __future__ import annotations

from torch import Tensor

from dpguard.attacks.observation import Observation
from dpguard.inputs.family import slots


def labels_of(seen: Observation) -> list[int]:
    """Classes that the text may have, where the model is a classifier; see the module's docstring."""
    if seen.disclosed.labels is not None:
        return [seen.disclosed.labels[0]]
    classes = int(seen.model.config.num_labels)  # type: ignore[union-attr, arg-type]
    shown = given_away(seen, classes)
    return list(range(classes)) if shown is None else [shown]


def given_away(seen: Observation, classes: int) -> int | None:
    """The class of the one text, where the head's gradient came without noise and says which; else None."""
    if seen.disclosed.texts != 1:
        return None
    way = 1 if seen.disclosed.kind == "gradient" else -1  # a step goes against the gradient
    for slot in slots(seen.model):
        if slot.role != "head" or slot.shape[0] != classes or slot.name not in seen.message:
            continue
        if seen.noise_std(slot.name) or not seen.disclosed.plan[slot.name].whole:
            continue
        value = way * seen.message[slot.name].detach().double()
        found = _by_sign(value) if value.dim() == 1 else _by_direction(value)
        if found is not None:
            return found
    return None


def _by_sign(bias: Tensor) -> int | None:
    """The only negative entry."""
    marked = (bias < 0).nonzero()[:, 0].tolist()
    return int(marked[0]) if len(marked) == 1 else None


def _by_direction(weight: Tensor) -> int | None:
    """The only row against which all others point; two rows point against each other and say nothing."""
    products = weight @ weight.T
    products.fill_diagonal_(-1.0)
    marked = (products < 0).all(1).nonzero()[:, 0].tolist()
    return int(marked[0]) if len(marked) == 1 else None
