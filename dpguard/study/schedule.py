"""How long a training is, and its step size by a rule that looks at public numbers only. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpguard.errors import UserError

if TYPE_CHECKING:
    from dpguard.study.sections import Utility

PUBLIC = "public"
"""``learning_rate: public``: by `public_learning_rate`."""
REACH = 5.0e-4 * math.sqrt(202)
"""Learning rate * sqrt(steps) of the published run that `public_learning_rate` is anchored in."""


@dataclass(frozen=True)
class Schedule:
    """A training's sampling.

    Attributes:
        sampling_rate: public batch size / number of examples.
        steps: round(epochs / sampling rate).
    """

    sampling_rate: float
    steps: int

    @staticmethod
    def of(utility: Utility, examples: int) -> Schedule:
        """The schedule of a utility section over ``examples`` training texts.

        Raises:
            UserError: a batch larger than the data, or less than one step; ``loc`` is in the section.
        """
        if utility.batch_size > examples:
            raise UserError(
                f"utility.batch_size: {utility.batch_size} is more than the {examples} training examples, "
                f"expected at most {examples}",
                loc=("batch_size",),
            )
        sampling_rate = utility.batch_size / examples
        steps = round(utility.epochs / sampling_rate)
        if steps < 1:
            raise UserError(
                f"utility.epochs: {utility.epochs:g} is less than one step, expected at least {sampling_rate:.2g}",
                loc=("epochs",),
            )
        return Schedule(sampling_rate, steps)


def public_learning_rate(steps: int) -> float:
    """A step size for Adam under noise that depends on the number of steps alone, rounded to two digits.

    The optimal fixed step of a stochastic gradient method over T steps is D / (G sqrt(T)), D the distance to go and
    G the size of a step's gradient (Nemirovski et al. 2009, SIAM J. Optim. 19(4); under clipped and noised gradients
    Bassily, Smith, Thakurta 2014, arXiv 1405.7085). Adam divides each entry by its own size, so G is 1 whatever
    clip, noise, batch size and dimension are, and what is left is `REACH` / sqrt(T). `REACH` is that of a published
    private fine-tuning: SST-2 at epsilon 8, batch 1,000, three epochs (202 steps), learning rate 5e-4 (the script
    ``bert_dpsgd/myrun.sh`` beside the code of Yu et al. 2022, arXiv 2110.06500). No private text or label is read.

    Args:
        steps: number of steps, at least 1.

    >>> public_learning_rate(202), public_learning_rate(25), public_learning_rate(2000)
    (0.0005, 0.0014, 0.00016)
    """
    if steps < 1:
        raise ValueError(f"Expected steps={steps} of at least 1")
    return float(f"{REACH / math.sqrt(steps):.2g}")


def training(utility: Utility, examples: int) -> dict[str, Any]:
    """What decides a training, as plain data, with the learning rate as a number.

    Raises:
        UserError: as `Schedule.of`; the public rule with an optimizer that it is not for.
    """
    kept = utility.model_dump(mode="json", include={"epochs", "batch_size", "learning_rate", "optimizer"})
    if utility.learning_rate == PUBLIC:
        if utility.optimizer not in ("adam", "adamw"):
            raise UserError(
                f"utility.learning_rate: the public rule is Adam's, expected a number with {utility.optimizer}",
                loc=("learning_rate",),
            )
        kept["learning_rate"] = public_learning_rate(Schedule.of(utility, examples).steps)
    return {**kept, "train_examples": examples}
