"""The grammar of the demo corpus: short notes of a hospital's or a bank's message desk.

Every note says something about a problem (it goes on, or it is settled) and about the desk (it has dealt with the
message, or it has not). The label is 1, *call back today*, when the problem goes on AND nobody has dealt with it;
else 0, *can wait*. Both halves come as mirrored wordings ("has not come back" / "has come back", "is no better" /
"is no worse"), so that a bag of words says little: a reader must tie each negation to its clause and combine two
clauses. A few labels are flipped, as annotators do. Nothing in here is about a real person.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dpguard.inputs.demo import words

PROBLEMS = ("complaint", "parcel", "device")

# kind of problem -> (wordings of a problem that goes on, wordings of one that is settled), mirrored one by one.
STATES: dict[str, tuple[list[str], list[str]]] = {
    "complaint": (
        [
            "is getting worse",
            "is no better",
            "has come back",
            "has not gone down",
            "is still there",
            "keeps coming back",
            "has not stopped",
            "is worse than on {date}",
            "has not improved",
            "did not get better after {reason}",
        ],
        [
            "is getting better",
            "is no worse",
            "has not come back",
            "has gone down",
            "is no longer there",
            "stopped coming back",
            "has not started again",
            "is better than on {date}",
            "has improved",
            "did get better after {reason}",
        ],
    ),
    "parcel": (
        [
            "has not arrived",
            "is still missing",
            "never came",
            "was sent back again",
            "is not there yet",
            "did not come in on {date}",
            "has gone missing",
            "is still not right",
        ],
        [
            "has arrived",
            "is no longer missing",
            "came after all",
            "was not sent back again",
            "is there now",
            "came in on {date}",
            "has not gone missing",
            "is right now",
        ],
    ),
    "device": (
        [
            "is blocked again",
            "does not work",
            "is still not open",
            "was refused again",
            "stopped working on {date}",
            "has not been unblocked",
            "has failed again",
        ],
        [
            "is not blocked again",
            "does work",
            "is open now",
            "was not refused again",
            "started working on {date}",
            "has been unblocked",
            "has not failed again",
        ],
    ),
}

# (the message is still open, it has been dealt with), mirrored likewise.
DESK: tuple[list[str], list[str]] = (
    [
        "nobody has called {him} back",
        "{he} is still waiting for {helper}",
        "{he} has not heard from us",
        "{helper} has not looked at it",
        "the note of {date} was not answered",
        "our answer never reached {him}",
        "{he} could not get through",
        "{helper} did not call as promised",
        "{helper} missed {his} call",
        "{his} {relative} has not been told either",
    ],
    [
        "{helper} has called {him} back",
        "{he} is no longer waiting for {helper}",
        "{he} has heard from us",
        "{helper} has looked at it",
        "the note of {date} was answered",
        "our answer has reached {him}",
        "{he} could get through",
        "{helper} did call as promised",
        "{helper} did not miss {his} call",
        "{his} {relative} has been told",
    ],
)

# What the caller asks for: (when it cannot wait, when it can).
CLOSINGS: tuple[list[str], list[str]] = (
    [
        "it cannot wait",
        "{he} does not want to wait",
        "please do ring today",
        "please ring before {weekday}",
        "do not leave it until {weekday}",
        "{weekday} is too late",
        "{he} is not calm about it",
        "{he} needs an answer",
    ],
    [
        "it can wait",
        "{he} does not mind the wait",
        "please do not ring today",
        "no need to ring before {weekday}",
        "do leave it until {weekday}",
        "{weekday} is not too late",
        "{he} is calm about it",
        "{he} needs no answer",
    ],
)

SUBJECTS = {
    "complaint": [
        "the {complaint} in {name}'s {body}",
        "{name}'s {diagnosis}",
        "the {complaint} after {name}'s {diagnosis}",
        "the {diagnosis} of {name} in {ward}",
        "{name}'s {complaint}",
        "{name} in {ward} says the {complaint}",
        "{name} says that the {body} {complaint}",
        "the {complaint} of {name}",
    ],
    "parcel": [
        "{name}'s {parcel}",
        "the {parcel} for {name}",
        "the {parcel} on account {account}",
        "{name} says that the {parcel}",
        "the {parcel} of {name}",
        "the {parcel} that {name} asked for",
    ],
    "device": [
        "{name}'s {device}",
        "the {device} of {name}",
        "the {device} for account {account}",
        "{name} writes that the {device}",
        "the new {device} of {name}",
    ],
}
OPENINGS = ["", "", "", "", "{phone}: ", "call from {phone}: ", "{date}: ", "on {weekday}: ", "{ward}: "]
JOINERS = [" and ", ", and ", "; ", ", but ", " while ", ", though ", ". "]

# (the problem goes on, the message is open): the ways in which a note can wait, and how often each is written.
_WAITING = ((True, False), (False, True), (False, False))
_SHARES = (0.4, 0.4, 0.2)
SWAPPED = 0.35  # share of notes that begin with the desk
CLOSED = 0.3  # share of notes that end with what the caller asks for
AGREES = 0.8  # share of those whose caller asks for what the label says: the desk decides, not the caller
WORDS_MIN, WORDS_MAX = 6, 17

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Note:
    """One text with its label (1: call back today, 0: can wait) and the private strings that occur in it."""

    text: str
    label: int
    entities: tuple[str, ...]


class _Writer:
    """Fills the slots of one note; the person and the pronouns stay the same throughout the note."""

    def __init__(self, rng: np.random.Generator, pool: str) -> None:
        self._rng = rng
        self._pool = pool
        self._woman = bool(rng.random() < 0.5)
        self.entities: list[str] = []
        he, him, his = ("she", "her", "her") if self._woman else ("he", "him", "his")
        self._slots: dict[str, Callable[[], str]] = {
            "he": lambda: he,
            "him": lambda: him,
            "his": lambda: his,
            "name": self._name,
            "helper": self._helper,
            "phone": lambda: self._mark(f"07700 900{self._number(0, 500, 1000):03d}"),
            "account": lambda: self._mark(str(self._number(1000, 5500, 10000))),
            "date": lambda: self._mark(f"{rng.integers(1, 29)} {self.pick(words.MONTHS)}"),
            "ward": lambda: self._mark(f"ward {rng.integers(1, 20)}"),
            "diagnosis": lambda: self._mark(self.pick(words.DIAGNOSES)),
            "weekday": lambda: self.pick(words.WEEKDAYS),
            "complaint": lambda: self.pick(words.COMPLAINTS),
            "body": lambda: self.pick(words.BODY_PARTS),
            "parcel": lambda: self.pick(words.PARCELS),
            "device": lambda: self.pick(words.DEVICES),
            "relative": lambda: self.pick(words.RELATIVES),
            "reason": lambda: self.pick(words.REASONS),
            "office": lambda: self.pick(words.OFFICES),
        }

    def pick(self, options: list[str]) -> str:
        return options[int(self._rng.integers(len(options)))]

    def fill(self, wording: str) -> str:
        return _SLOT.sub(lambda slot: self._slots[slot[1]](), wording)

    def _mark(self, entity: str) -> str:
        if entity not in self.entities:
            self.entities.append(entity)
        return entity

    def _number(self, low: int, middle: int, high: int) -> int:
        """A number of the pool's own: public ones lie in [low, middle), private ones in [middle, high)."""
        low, high = (low, middle) if self._pool == "public" else (middle, high)
        return int(self._rng.integers(low, high))

    def _name(self) -> str:
        first = self.pick((words.WOMEN if self._woman else words.MEN)[self._pool])
        last = self.pick(words.SURNAMES[self._pool])
        title = "mrs" if self._woman else "mr"
        wording = int(self._rng.integers(4))
        if wording == 0:
            return f"{title} {self._mark(last)}"
        return self._mark((f"{first} {last}", first, f"{first} {last}")[wording - 1])

    def _helper(self) -> str:
        if self._rng.random() < 0.5:
            return f"the {self.pick(words.STAFF)}"
        return f"dr {self._mark(self.pick(words.DOCTORS[self._pool]))}"


def write(rng: np.random.Generator, pool: str, label: int) -> Note:
    """Write one note that truly deserves ``label``.

    Args:
        rng: the only source of chance.
        pool: whose names and numbers, "private" or "public".
        label: 1 for a note that wants a call today, 0 for one that can wait.
    """
    writer = _Writer(rng, pool)
    kind = writer.pick(list(PROBLEMS))
    goes_on, is_open = (True, True) if label else _WAITING[int(rng.choice(len(_WAITING), p=_SHARES))]
    problem = f"{writer.pick(SUBJECTS[kind])} {writer.pick(STATES[kind][0 if goes_on else 1])}"
    clauses = [problem, writer.pick(DESK[0 if is_open else 1])]
    if rng.random() < SWAPPED:
        clauses.reverse()
    wording = writer.pick(OPENINGS) + writer.pick(JOINERS).join(clauses)
    if rng.random() < CLOSED:
        urgent = label == int(rng.random() < AGREES)
        wording += writer.pick(["; ", ", ", ". "]) + writer.pick(CLOSINGS[0 if urgent else 1])
    return Note(text := writer.fill(wording) + ".", label, tuple(sorted(writer.entities, key=text.index)))


def notes(
    count: int, *, seed: int, pool: str, flip: float = 0.0, fits: Callable[[str], bool] = lambda text: True
) -> list[Note]:
    """``count`` different notes of `WORDS_MIN` to `WORDS_MAX` words; a share ``flip`` of the labels is wrong.

    Args:
        count: how many.
        seed: the only source of chance.
        pool: whose names and numbers, "private" or "public".
        flip: chance of a label being the wrong one.
        fits: a text for which this is False is not taken.

    >>> [note.text for note in notes(1, seed=0, pool="public")] == [notes(1, seed=0, pool="public")[0].text]
    True
    """
    rng = np.random.default_rng(seed)
    found: dict[str, Note] = {}
    while len(found) < count:
        label = int(rng.integers(2))
        while True:  # drawn again with the same label, so that both stay equally frequent
            note = write(rng, pool, label)
            if note.text not in found and WORDS_MIN <= len(note.text.split()) <= WORDS_MAX and fits(note.text):
                break
        flipped = bool(rng.random() < flip)
        found[note.text] = Note(note.text, 1 - label if flipped else label, note.entities)
    return list(found.values())
