"""Sentences about what a study will do that its author may not expect; nothing is refused."""

from __future__ import annotations

from dpguard.cli.planning import Ground
from dpguard.errors import UserError
from dpguard.study.spec import Study

UNREAD = 0.02
"""Share of unknown tokens from which leakage is another thing than the reader thinks."""


def warnings(study: Study, ground: Ground) -> list[str]:
    """All of them that apply, one sentence each."""
    found = (
        unkept(study, ground),
        overlap(ground),
        alone(study, ground),
        unscored(study, ground),
        unread(ground),
    )
    return [sentence for sentence in found if sentence]


def unkept(study: Study, ground: Ground) -> str:
    """A sentence when trained weights that are attacked are too large for the study's cache, else ""."""
    from dpguard.study.cache import Cache

    attacked = set(study.leakage.at) - {"start"} if study.leakage else set()
    size = sum(4 * slot.size for slot in ground.slots if not slot.tied_to)
    if not attacked or Cache("", study.cache.gigabytes).keeps(size):
        return ""
    return (
        f"cache.gigabytes is {study.cache.gigabytes:g}: trained weights ({size / 1e9:.2g} GB) are kept up to half of "
        f"it, so each cell that attacks them trains them again; {2.2 * size / 1e9:.2g} or more would keep them"
    )


def overlap(ground: Ground) -> str:
    """A sentence when held-out texts are trained on, else ""."""
    seen, held = ground.corpus.seen, len(ground.corpus.test)
    if not seen:
        return ""
    what = "1 is a training text" if seen == 1 else f"{seen} are training texts"
    return f"of the {held:,} held-out texts {what} as well: utility is judged on {'it' if seen == 1 else 'them'} too"


def alone(study: Study, ground: Ground) -> str:
    """A sentence when a model is trained on texts of one class only, else ""."""
    labels = {example.label for example in ground.corpus.train}
    if study.utility is None or len(labels) > 1:
        return ""
    return (
        f"all {len(ground.corpus.train):,} training texts have label {min(labels)}: a model that always answers it "
        "learned them, so utility says nothing about a policy"
    )


def unread(ground: Ground) -> str:
    """A sentence when much of the texts is one token to the model, else ""."""
    if ground.unread < UNREAD:
        return ""
    return (
        f"{ground.unread:.0%} of the texts' tokens are unknown to the model's tokenizer and all one to it: a guess of "
        "that token counts as recovered, so leakage says little about the words"
    )


def unscored(study: Study, ground: Ground) -> str:
    """A sentence when a closed world has more candidates than its attack scores, else ""."""
    from dpguard.attacks.panel import attack, in_order

    if study.leakage is None or not study.leakage.threat.candidates or "labels" in study.leakage.threat.know:
        return ""
    count, classes = study.leakage.threat.candidates, ground.classes
    try:
        attacks = [attack(name) for name in in_order(study.leakage.panel, study.leakage.attacks)]
    except UserError:
        return ""  # the plan tells it with its place
    for name, most in ((each.name, each.budget.candidates // classes) for each in attacks):
        if name.partition(":")[0] == "likelihood" and most < count:
            return (
                f"leakage.threat.candidates is {count:,}: where the class cannot be read off a message, {name} scores "
                f"{most:,} of them under each of {classes} classes, and a text that was not scored counts as not named"
            )
    return ""
