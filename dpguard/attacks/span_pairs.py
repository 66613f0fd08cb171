"""A batch from the first block's fused query-key-value weight: words and places give one another's order away.

There a decoder's inputs know no context. Behind a layer norm a word w at place t enters as a (e_w + p_t) + b, so a
batch that holds w and v at places t and u in three of the four ways spans the fourth as well: the span gives the
sets of words and of places, and no more. But both being known, the gradient divides among them: it is the sum over
words of A_w e_w and over places of B_t p_t, each A_w the sum of what the layer's outputs at the word's places were
graded with.

Attention then tells whose neighbours they are. A position's query is graded with a combination of the keys of its
own text up to there (the coefficients sum to zero, softmax ignoring a shift), and its key with one of the queries
from there on; keys and queries of words are public. So the query part of an A_w, of a word of one text only, is a
sparse combination of the words and places left of its last place, the key part one of those right of its first, and
as a key is made of its word and its place in equal parts, a word has the very coefficients, in every head, of its
place. Words are found by orthogonal matching pursuit over all heads at once (Tropp, Gilbert and Strauss 2006); it
may pick as many wrong ones as there are dimensions to spare, since these then have the coefficient zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor, nn

from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.span_cache import Extender
from dpguard.attacks.span_evidence import Evidence, gather, usable
from dpguard.attacks.span_last import with_last_tokens
from dpguard.attacks.span_rank import SPARE
from dpguard.attacks.span_sites import Probe, Site, Sites
from dpguard.attacks.span_spectrum import by_gap
from dpguard.attacks.vocabulary import Frame
from dpguard.inputs.family import slots

ROUGH = 1e-2
"""Squared residual that single precision tells from a true one's."""
EXACT = 1e-9
"""Squared residual of a combination that rounding explains (measured: at most 1e-13; with one wrong word 1e-2)."""
EQUAL = 1e-3
"""Relative distance of two coefficients that are the same."""
ZERO = 1e-4
"""Coefficients relative to the largest that are none."""
TWICE = 6
"""How many places a word of one text may have."""
MOST_SETS = 20000
"""Sets of places that are tried for a word."""
WINDOWS = (8, 16, 32)
"""How many places are tried at first for a text: those that are too many take dimensions away from the words."""

Path = tuple[tuple[int, int], ...]
"""(row of a word, place), by place."""


def pairs_site(seen: Observation, probe: Probe, sites: Sites) -> Site | None:
    """The first block's fused query-key-value weight of a decoder with learnt positions, where it can be read."""
    placed = any(slot.role == "position_embedding" for slot in slots(probe.model))
    if not (probe.family.causal and placed) or seen.disclosed.kind != "gradient":
        return None
    found = [s for s in usable(seen, sites)[0] if s.block == 0 and s.role == "qkv" and not s.adapter]
    return found[0] if found and _norm(probe.model) is not None else None


def _norm(model: nn.Module) -> nn.LayerNorm | None:
    """The layer norm before the first block's attention."""
    for slot in slots(model):
        if slot.role == "norm" and slot.block == 0:
            layer = model.get_submodule(slot.name.rpartition(".")[0])
            return layer if isinstance(layer, nn.LayerNorm) else None
    return None


@dataclass(frozen=True)
class _Atoms:
    """What the rows of one side are combinations of.

    Attributes:
        words: (w, heads, width) keys, or queries, of the words alone.
        places: (p, heads, width) the same of the places.
        constant: (c, heads, width) what every key or query has; c = 0 where coefficients sum to zero.
    """

    words: Tensor
    places: Tensor
    constant: Tensor


class PairReader:
    """Reads one message of several texts; `read` may be called once.

    Args:
        seen: what the adversary holds.
        probe: the model; counts candidates.
        sites: its layers.
        tokens: (n,) tokens that a text can contain.
        frame: special tokens around a text.
    """

    def __init__(self, seen: Observation, probe: Probe, sites: Sites, tokens: Tensor, frame: Frame) -> None:
        self.seen, self.probe, self.sites = seen, probe, sites
        self.tokens = torch.unique(torch.cat([tokens, tokens.new_tensor(frame.wrap([]))]))

    def read(self) -> Reconstruction:
        """Propose the batch's texts."""
        site = pairs_site(self.seen, self.probe, self.sites)
        found = gather(self.seen, [site] if site else [], causal=True, most=1)
        norm = _norm(self.probe.model)
        if site is None or norm is None or not found or found[0].span.blurred:
            return _nothing("noise or rounding, or more words and places than the model is wide")
        gradient = site.oriented(self.seen.message[site.name])
        evidence = Evidence(site, by_gap(gradient, found[0].span), causal=True)
        self.words, self.places = self._bag(evidence)
        parts = self._features(norm)
        if not len(self.words) or sum(map(len, parts)) > evidence.span.inputs - SPARE:
            return _nothing("more words and places than the model is wide")
        self._divide(site, gradient, parts)
        texts = self._texts()
        notes: dict[str, Any] = {
            "weight": site.name,
            "rank": evidence.span.rank,
            "words": len(self.words),
            "unexplained": self._unexplained(texts),
        }
        ids = [[int(self.words[k]) for k, _ in text] for text in texts]
        certain = [True] * len(ids)  # every text's rows are explained to rounding, with room to fail
        ids, certain = with_last_tokens(self.seen, site, ids, certain, self.tokens, notes)
        return Reconstruction(ids, certain, 0, self.probe.scored, notes)

    def _bag(self, evidence: Evidence) -> tuple[Tensor, int]:
        """(w,) tokens that enter at some place, and the number of places."""
        extender = Extender(self.probe, evidence.site.layer)
        scored, found = self.probe.scored, self.tokens[:0]
        longest, place = self.probe.family.max_tokens(self.probe.config), 0
        while place < longest:
            states = extender.states([0] * place, self.tokens)
            rough = 1 - (nn.functional.normalize(states, dim=1) @ evidence.basis.T).pow(2).sum(1)
            near = (rough < ROUGH).nonzero().flatten()
            residual, allowed = evidence.span.outside(states[near].double())
            inside = near[residual <= allowed]
            if not len(inside):
                break
            found, place = torch.cat([found, self.tokens[inside]]), place + 1
        self.probe.scored = scored  # products with the basis, no candidate texts
        return torch.unique(found), place

    def _features(self, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
        """(w, d) what words, (p, d) places and (0 or 1, d) the norm's bias give to inputs, but for a scale."""
        table = next(slot.name for slot in slots(self.probe.model) if slot.role == "position_embedding")
        where = self.probe.positions(self.places)
        place = self.probe.model.get_parameter(table).detach()[where].double()
        word = self.probe.embedding[self.words].double()
        gain, bias = norm.weight.detach().double(), norm.bias.detach().double()
        out = [(rows - rows.mean(1, keepdim=True)) * gain for rows in (word, place)]
        return out[0], out[1], bias[None][: int(bool(bias.any()))]

    def _divide(self, site: Site, gradient: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> None:
        """Each word's share of the gradient, and what it can be made of."""
        word, place, bias = parts
        heads = int(self.probe.config.num_attention_heads)
        share = (gradient @ torch.linalg.pinv(torch.cat(parts))).T[: len(word)]
        weight = site.oriented(site.layer.get_parameter("weight"))
        plus = site.layer.bias
        offset = plus.detach().double() if isinstance(plus, Tensor) else weight.new_zeros(len(weight))

        def split(rows: Tensor) -> list[Tensor]:
            pieces = rows.chunk(3, dim=1)[:2]
            return [piece.reshape(len(rows), heads, piece.shape[1] // heads) for piece in pieces]

        of_word, of_place = split(word @ weight.T), split(place @ weight.T)
        constant = bias.sum(0, keepdim=True) @ weight.T + offset
        always = split(constant[: int(bool(constant.any()))])[0]
        self.graded = split(share)  # of queries, of keys
        self.floor = [float(rows.pow(2).sum((1, 2)).max()) * EXACT for rows in self.graded]
        self.queries = _Atoms(of_word[0], of_place[0], always)
        self.keys = _Atoms(of_word[1], of_place[1], always[:0])

    def _texts(self) -> list[Path]:
        """Texts around every word of one text only, each once; those that begin another one left out."""
        found: set[Path] = set()
        for k in range(len(self.words)):
            left = _path(self.graded[0][k], self.keys, self.floor[0])
            if not left or left[-1][0] != k:
                continue
            first = max(1, min(place for word, place in left if word == k))  # the first key is always graded zero
            right = _path(self.graded[1][k], self.queries, self.floor[1], first)
            if right and right[: len(left) - first] == left[first:]:
                found.add((*left[:first], *right))
        return sorted(text for text in found if not any(_begins(text, other) for other in found))

    def _unexplained(self, texts: list[Path]) -> int:
        """Words that no text found has, or whose queries were graded with more than these texts' keys.

        Words so common that their prefixes' keys leave no dimension to tell are not counted.
        """
        count = 0
        for k, row in enumerate(self.graded[0]):
            ends = [max((place for word, place in text if word == k), default=-1) for text in texts]
            path = sorted({pair for text, end in zip(texts, ends, strict=True) for pair in text[: end + 1]})
            known = max(ends, default=-1) >= 0
            if len(path) > row.shape[1] - SPARE or (known and float(row.pow(2).sum()) <= self.floor[0]):
                continue
            count += not (known and _explained(row, self.keys, tuple(path)))
        return count


def _nothing(reason: str) -> Reconstruction:
    return Reconstruction([], [], notes={"reason": f"no span to read the first block's words from: {reason}"})


def _begins(text: Path, other: Path) -> bool:
    return len(text) < len(other) and other[: len(text)] == text


def _path(row: Tensor, atoms: _Atoms, floor: float, first: int = 0) -> Path:
    """The words that a (heads, width) row is made of, from a place on; empty where none are proven.

    Args:
        row: the share of the gradient of one word's queries, or keys.
        atoms: what it may be made of.
        floor: squared size of a row that is rounding only.
        first: place of the first one.
    """
    if float(row.pow(2).sum()) <= floor:
        return ()
    most = len(atoms.places) - first
    for window in dict.fromkeys(min(size, most) for size in (*WINDOWS, most)):
        fixed = torch.cat([atoms.constant, atoms.places[first : first + window]])
        picked = _pursue(row, fixed, atoms.words)
        if picked is None:
            continue
        parts = _coefficients(row, torch.cat([fixed, atoms.words[picked]]))
        skip = len(atoms.constant)
        places, words = parts[skip : skip + window], parts[skip + window :]
        path = tuple((word, first + place) for word, place in _matched(words, places, picked))
        if path and _explained(row, atoms, path):
            return path
    return ()


def _pursue(row: Tensor, fixed: Tensor, words: Tensor) -> list[int] | None:
    """Words that, with all of some fixed atoms, make up a row; None when there is no room or no such words."""
    most = row.shape[1] - SPARE - len(fixed)
    picked: list[int] = []
    size = row.pow(2).sum()
    basis = torch.linalg.qr(fixed.permute(1, 2, 0)).Q  # (heads, width, atoms)
    left = row - _along(basis, row)
    apart = words - torch.einsum("hda,hea,khe->khd", basis, basis, words)
    while float(left.pow(2).sum() / size) > EXACT:
        if len(picked) >= min(most, len(words)):
            return None
        gain = (apart * left).sum(2).pow(2) / apart.pow(2).sum(2).clamp_min(1e-300)
        gain = gain.sum(1)
        gain[picked] = -1.0
        k = int(gain.argmax())
        picked.append(k)
        new = nn.functional.normalize(apart[k], dim=1)
        left = left - (left * new).sum(1, keepdim=True) * new
        apart = apart - (apart * new).sum(2, keepdim=True) * new
    return picked


def _along(basis: Tensor, row: Tensor) -> Tensor:
    """A row's part in each head's basis."""
    return torch.einsum("hda,hea,he->hd", basis, basis, row)


def _coefficients(row: Tensor, atoms: Tensor) -> Tensor:
    """(k, heads) coefficients of a row in (k, heads, width) atoms."""
    found: Tensor = torch.linalg.lstsq(atoms.permute(1, 2, 0), row[:, :, None]).solution
    return found[:, :, 0].T


def _matched(words: Tensor, places: Tensor, names: list[int]) -> Path:
    """Places and the words with their very coefficients, or with the sum of theirs; empty where that leaves a rest.

    Args:
        words: (k, heads) coefficients of words.
        places: (p, heads) coefficients of places; those of a text are none but from some place on.
        names: (k) which words these are.
    """
    sizes = places.norm(dim=1)
    least = ZERO * float(sizes.max())
    free = (sizes > least).nonzero().flatten().tolist()
    if free != list(range(len(free))):
        return ()
    left = [k for k in range(len(names)) if float(words[k].norm()) > least]
    path: list[tuple[int, int]] = []
    for count in range(1, TWICE + 1):
        for k in list(left):
            if comb(len(free), count) > MOST_SETS:
                return ()
            held = _sum_to(words[k], places, combinations(free, count))
            if held:
                left.remove(k)
                free = [place for place in free if place not in held]
                path += [(names[k], place) for place in held]
    return () if left or free else tuple(sorted(path, key=lambda pair: pair[1]))


def _sum_to(wanted: Tensor, places: Tensor, options: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The places whose coefficients sum to a word's."""
    sets = list(options)
    if not sets:
        return ()
    away = (places[torch.tensor(sets)].sum(1) - wanted).norm(dim=1)
    k = int(away.argmin())
    return sets[k] if float(away[k]) <= EQUAL * float(wanted.norm()) else ()


def _explained(row: Tensor, atoms: _Atoms, path: Path) -> bool:
    """Whether a row is a combination of the path's keys or queries to rounding, with dimensions to fail in.

    The scale of a key, which its layer norm gives, goes into its coefficient.
    """
    made = torch.cat([atoms.constant, torch.stack([atoms.words[k] + atoms.places[place] for k, place in path])])
    if len(made) > row.shape[1] - SPARE:
        return False
    basis = torch.linalg.qr(made.permute(1, 2, 0)).Q
    return float((row - _along(basis, row)).pow(2).sum() / row.pow(2).sum()) <= EXACT
