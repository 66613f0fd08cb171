"""Draws what each attack got from the same messages, as a heat map of policies and attacks."""

from __future__ import annotations

import seaborn
from matplotlib.axes import Axes

from dpguard.report.attacks_content import Attacks
from dpguard.report.draw_cells import Written, draw_cell, grid
from dpguard.report.marks import NAME_LENGTH
from dpguard.report.style import INK
from dpguard.report.text import short


def draw_attacks(ax: Axes, content: Attacks, *, narrow: bool) -> None:
    """The heat map onto axes; on a phone policies have their row's number instead of a name."""
    shades = seaborn.color_palette("rocket_r", as_cmap=True)
    for y, (_, policy) in enumerate(content.policies):
        for x, attack in enumerate(content.attacks):
            draw_cell(ax, x, y, _written(content, policy, attack, narrow), (0.0, 1.0), shades)
    names = [str(number) if narrow else short(policy, NAME_LENGTH) for number, policy in content.policies]
    grid(ax, [attack if narrow else attack.replace(":", ":\n") for attack in content.attacks], names, narrow=narrow)
    ax.set_title(f"{content.metric} of each attack", color=INK, loc="left")


def _written(content: Attacks, policy: str, attack: str, narrow: bool) -> Written:
    answer = content.answers.get((policy, attack))
    if answer is None:
        if policy not in content.whole:
            return Written("–" if narrow else "not measured")
        return Written("×" if narrow else "could not run")
    if answer.taken_over == answer.scores:
        return Written("=" if narrow else "taken over")
    most = max(found.scores for (named, _), found in content.answers.items() if named == policy)
    notes = [f"{answer.taken_over} of {answer.scores} taken over"] if answer.taken_over else []
    notes += [f"could run on {answer.scores} of {most}"] if answer.scores < most else []
    return Written("", answer.value, "*" * bool(notes) if narrow else ", ".join(notes))
