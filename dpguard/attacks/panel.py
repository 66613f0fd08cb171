"""The fixed panel: which attacks run on a message, in which order, under which budgets.

Listing panels and hashing them reads files only; torch is imported when an attack runs.
"""

from __future__ import annotations

import ast
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dpguard import registry
from dpguard.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

    from dpguard.attacks.base import Attack, Budget
    from dpguard.attacks.observation import Observation, Reconstruction

PACKAGE = "dpguard.attacks"
FLOOR, JUDGE = "prior", "combined"
"""The attack that never reads the message, and the one that weighs the answers of all others."""

PANELS: dict[str, tuple[str, ...]] = {
    "panel-1": ("prior", "rows", "span", "match", "likelihood", "combined"),
    "demo": ("prior", "rows", "span", "match:demo", "combined"),
}
"""Panel -> attacks, cheapest first, each a name or ``name:preset``. A stronger panel is a new name.

``demo`` is what the bundled study runs: the same attacks as far as seconds allow.
"""
LATEST = "panel-1"
"""The panel of a look and of a study that names none."""


@dataclass(frozen=True)
class BoundAttack:
    """An attack together with one of its presets.

    Attributes:
        name: as it was asked for, e.g. ``span`` or ``match:partial``.
        preset: the preset's name.
        plugin: the attack.
    """

    name: str
    preset: str
    plugin: Attack

    @property
    def cite(self) -> str:
        """Where the attack comes from."""
        return self.plugin.cite

    @property
    def budget(self) -> Budget:
        """What one reconstruction may spend."""
        return self.plugin.presets[self.preset]

    @property
    def published(self) -> bool:
        """Whether it is a published attack, which answers for itself alone."""
        return self.preset in self.plugin.capability.published

    def applicable(self, seen: Observation) -> str:
        """Empty when the attack can say something about this message, else the reason why it cannot."""
        return self.plugin.capability.reason(seen) or self.plugin.applicable(seen)

    def reconstruct(
        self,
        seen: Observation,
        *,
        rng: torch.Generator | None = None,
        seed: int = 0,
        budget: Budget | None = None,
    ) -> Reconstruction:
        """Propose texts for one message.

        Args:
            seen: what the adversary holds.
            rng: source of every draw; by default one made of ``seed`` and the attack's name.
            seed: used when ``rng`` is None.
            budget: instead of the preset's.
        """
        source = generator(seed, self.name) if rng is None else rng
        return self.plugin.reconstruct(seen, rng=source, budget=budget, preset=self.preset)


@dataclass(frozen=True)
class Outcome:
    """One attack of a panel on one message.

    Attributes:
        attack: its name in the panel.
        reconstruction: what it proposes; None when it was skipped.
        inherited: an earlier attack was certain of every text, so this one did not run and has its answer.
        skipped: why it could not run, "" when it ran or inherited.
        seconds: wall time it took here; 0 when it did not run.
    """

    attack: str
    reconstruction: Reconstruction | None
    inherited: bool = False
    skipped: str = ""
    seconds: float = 0.0


def generator(seed: int, name: str) -> torch.Generator:
    """A source of draws that depends on the seed and the attack's name alone, so that none disturbs another."""
    import torch

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def attack(name: str) -> BoundAttack:
    """An attack by name, with a preset after a colon: ``span``, ``match:partial``.

    Raises:
        UserError: no such attack or preset; the sentence names the nearest one.
    """
    word, colon, preset = name.partition(":")
    plugin: Attack = registry.load(PACKAGE, word, "attack").PLUGIN
    if colon and preset not in plugin.presets:
        raise UserError(f"attack {word!r} has no preset {preset!r}{did_you_mean(preset, plugin.presets)}")
    return BoundAttack(name, preset or next(iter(plugin.presets)), plugin)


def in_order(panel: str, asked: Sequence[str] | None) -> list[str]:
    """The attacks that a study asks for, as the panel orders them; None = the whole panel.

    A name without a preset takes the panel's preset, one with a preset stands in its attack's place. Attacks that the
    panel lacks come before those that read the others' answers.

    >>> in_order("panel-1", ["combined", "likelihood:quick", "span"])
    ['span', 'likelihood:quick', 'combined']
    """
    whole = PANELS[panel]
    if asked is None:
        return list(whole)
    places = {name.partition(":")[0]: place for place, name in enumerate(whole)}
    bound = {name.partition(":")[0]: name for name in whole}
    last = places.get(JUDGE, len(whole)) - 0.5
    ordered = sorted(dict.fromkeys(asked), key=lambda name: places.get(name.partition(":")[0], last))
    return list(dict.fromkeys(name if ":" in name else bound.get(name, name) for name in ordered))


def run_panel(seen: Observation, names: Sequence[str], seed: int) -> list[Outcome]:
    """Every attack of a panel on one message, the floor first.

    The floor runs whether it is named or not; each attack is told what the ones before it proposed. When an attack
    is certain of every text of the message, the later ones that could run inherit its answer: one that could not has no
    score on any message, instead of a mean over those that were easy for another. A published attack neither inherits
    nor is told anything, and its answer is told to none: its score is its own, and the panel is as strong without it.

    Args:
        seen: what the adversary holds.
        names: attacks in order, e.g. ``PANELS["panel-1"]``.
        seed: of every attack's draws.

    Raises:
        UserError: an unknown attack or preset, before any attack runs.
    """
    attacks = [attack(name) for name in (FLOOR, *(name for name in dict.fromkeys(names) if name != FLOOR))]
    outcomes: list[Outcome] = []
    answer: Reconstruction | None = None
    for each in attacks:
        reason = each.applicable(seen)
        if reason:
            outcomes.append(Outcome(each.name, None, skipped=reason))
            continue
        if answer is not None and not each.published:
            outcomes.append(Outcome(each.name, answer, inherited=True))
            continue
        started = time.perf_counter()
        found = each.reconstruct(replace(seen, earlier=()) if each.published else seen, seed=seed)
        outcomes.append(Outcome(each.name, found, seconds=time.perf_counter() - started))
        if each.published:
            continue
        seen = replace(seen, earlier=(*seen.earlier, (each.name, found)))
        if _complete(found, seen):
            answer = found
    return outcomes


def _complete(found: Reconstruction, seen: Observation) -> bool:
    """Whether every text of the message was recovered with certainty (their number has to be known)."""
    return bool(found.certain) and all(found.certain) and len(found.certain) == seen.disclosed.sequences


def panel_hash(name: str) -> str:
    """16 hex digits that change when a panel's attacks, presets, budgets or any source file behind them change.

    Presets and budgets are part of the source files.

    Raises:
        UserError: no such panel, or an attack of it that does not exist.
    """
    if name not in PANELS:
        raise UserError(f"unknown panel {name!r}{did_you_mean(name, PANELS)}")
    files = registry.names(PACKAGE)
    digest = hashlib.sha256(repr(PANELS[name]).encode())
    sources: set[Path] = set()
    for entry in (FLOOR, *PANELS[name]):
        word = entry.partition(":")[0]
        if word not in files:
            raise UserError(f"unknown attack {word!r}{did_you_mean(word, files)}")
        sources |= source_files(files[word])
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def source_files(path: Path) -> frozenset[Path]:
    """A module of this room and every module of it that it imports, directly or not; nothing is imported."""
    found, waiting = {path}, [path]
    files = set(path.parent.iterdir())  # a disk that ignores case would find observation.py under Observation.py too
    while waiting:
        tree = ast.parse(waiting.pop().read_text("utf-8"))
        for module in _imported(tree):
            other = path.with_name(f"{module.rpartition('.')[2]}.py")
            if module.startswith(f"{PACKAGE}.") and other in files - found:
                found.add(other)
                waiting.append(other)
    return frozenset(found)


def _imported(tree: ast.AST) -> list[str]:
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            out += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
    return out
