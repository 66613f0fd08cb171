"""Embedding and head rows: the tokens that got a gradient, put in order by the position rows that got the same one.

A text's gradient on the token table is zero but in the rows of its own tokens, and row v is the sum, over
the positions that hold v, of the very vectors that the position table receives (their lookups are added,
so they share a gradient). So one text with both tables shared is read off exactly, and under noise each row
is a matched filter. Bag of words from embedding rows: Melis et al. (S&P 2019, section 4); FILM (Gupta et
al., NeurIPS 2022) starts from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from scipy.stats import norm
from torch import Tensor

from dpguard.attacks.base import Budget, Capability
from dpguard.attacks.language import Corpus, bigram
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.presets import choose
from dpguard.attacks.rows_head import NextTokens, head_tables, next_tokens
from dpguard.attacks.rows_noise import Noise
from dpguard.attacks.vocabulary import Frame, allowed_tokens, frame_of
from dpguard.inputs.family import family_of, predicts_tokens, slots

FALSE_ALARMS = 0.01
"""Expected number of rows that pure noise lets through, over a whole table."""
EXACT = 1e-4
"""Largest relative residual of a reading that float32 rounding explains."""
SETTLED = 0.1
"""Largest share of any one position's vector that a certain reading may leave unexplained."""


class Rows:
    """See the module's docstring."""

    name = "rows"
    cite = "Melis et al., IEEE S&P 2019 (arXiv 1805.04049); Gupta et al., NeurIPS 2022 (arXiv 2205.08514)"
    capability = Capability(
        "rows of the token embedding (positions put them in order) or of a head over the vocabulary",
        "read anything without them; several texts come as one bag; prove more tokens than the width",
        kinds=("gradient", "delta"),
    )
    presets = {"default": Budget(steps=0, candidates=20_000)}  # noqa: RUF012

    def applicable(self, seen: Observation) -> str:
        """Empty when the token table or a language model's head is shared, else the reason."""
        if seen.disclosed.kind != "gradient" and seen.disclosed.learning_rate is None:
            return "the update was not made by plain SGD, whose rows are sums of gradients"
        if _table(seen, "token_embedding") is None and head_tables(seen) == (None, None):
            return "neither the token embedding nor a head over the vocabulary is shared"
        return ""

    def reconstruct(
        self, seen: Observation, *, rng: torch.Generator, budget: Budget | None = None, preset: str = ""
    ) -> Reconstruction:
        """Read off the text; with position rows in order, else as a bag put in the likeliest order.

        Certain when, without noise, every position's vector is accounted for by its token's row and no other text
        would do. Several texts in one message give one bag. ``candidates``: texts whose fit was computed, the starts
        and one a move. ``notes``: ``tokens``, ``positions`` seen, ``residual``.
        """
        limit = choose(self.name, self.presets, preset, budget)[1].candidates
        frame = frame_of(seen.disclosed.tokenizer)
        labels = next_tokens(seen, FALSE_ALARMS) if predicts_tokens(seen.model) else None
        matched = _filtered(seen)
        token = _tokens(seen, frame, matched)
        found = token.rows.tolist() if token else []
        if not found and not (labels and labels.counts):
            return Reconstruction([], [], notes={"tokens": 0})
        position = _read(seen, "position_embedding", matched)
        if token is None or not found or position is None or not len(position.rows) or seen.disclosed.texts != 1:
            bag = [*(labels.bag if labels else []), *(t for t in found if not labels or t not in labels.counts)]
            text = _chain(bag, seen, frame)
            return Reconstruction([text], [False], notes={"tokens": len(set(bag)), "positions": 0})
        places = _places(_as_clipped(position, token, seen), seen)
        clean = all(not read.std and seen.disclosed.plan[read.name].whole for read in (token, position))
        if predicts_tokens(seen.model):  # the last token is read by nobody: it is only a label
            best = _assign(token, places, replace(frame, suffix=frame.suffix[:-1]), limit, clean)
            last = _last(best.text, labels)
            text, certain = [*best.text, *(last or frame.suffix[-1:])], best.proven and len(last) == 1
        else:
            best = _assign(token, places, frame, limit, clean)
            text, certain = best.text, best.proven
        notes = {"tokens": len(token.rows), "positions": len(places.rows), "residual": best.residual}
        return Reconstruction([text], [certain], candidates=best.tried, notes=notes)


@dataclass(frozen=True)
class Read:
    """The rows of one table that hold more than noise.

    Attributes:
        name: the parameter.
        rows: (n,) row indices.
        vectors: (n, d) their gradients.
        std: noise on one entry, in wire units; 0 = none.
    """

    name: str
    rows: Tensor
    vectors: Tensor
    std: float

    def only(self, keep: Tensor) -> Read:
        """The rows at ``keep`` (a mask or indices)."""
        return Read(self.name, self.rows[keep], self.vectors[keep], self.std)


@dataclass(frozen=True)
class Reading:
    """A text for the position vectors.

    Attributes:
        text: token ids.
        residual: of the token rows, relative to them.
        proven: whether no other text explains them.
        tried: texts whose fit was computed.
    """

    text: list[int]
    residual: float
    proven: bool
    tried: int


def _tokens(seen: Observation, frame: Frame, matched: Mapping[str, Tensor]) -> Read | None:
    """The token table's rows, of tokens that a text can hold and the loudest of them if they are more than the texts
    can hold; None when it is not shared or is the head as well."""
    name = _table(seen, "token_embedding")
    token = None if name is None or name in head_tables(seen) else _read(seen, "token_embedding", matched)
    if token is None:
        return None
    allowed = allowed_tokens(seen.disclosed.tokenizer, seen.message[token.name].shape[0], unknown=True)
    allowed[[*frame.prefix, *frame.suffix]] = True
    token = token.only(allowed[token.rows])
    loudest = token.vectors.norm(dim=1).topk(min(_room(seen), len(token.rows))).indices
    return token.only(loudest.sort().values)


def _room(seen: Observation) -> int:
    """How many tokens the texts of the message can hold."""
    told = seen.disclosed
    return sum(told.lengths or ()) or told.texts * family_of(seen.model).max_tokens(seen.model.config)


def _last(text: list[int], labels: NextTokens | None) -> list[int]:
    """What the labels hold besides the tokens after the first: the last token, where every sign is exact."""
    if labels is None or not labels.sure:
        return []
    left = Counter(labels.bag) - Counter(text[1:])
    return list(left) if left.total() == 1 else []


def _table(seen: Observation, role: str) -> str | None:
    for slot in slots(seen.model):
        if slot.role == role and not slot.tied_to and slot.name in seen.message:
            return slot.name
    return None


def _filtered(seen: Observation) -> dict[str, Tensor]:
    """Role -> (rows,) bool, rows of the two tables that match: each position's vector is in its token's row again.

    The two tables have noise of their own, so under no signal every inner product is Gaussian, or of lighter tails,
    and the number of rows that pass is `FALSE_ALARMS` in all. Where positions arrive as signs, whose energy says
    nothing, all of them are tried, and those before one that matched hold a token too: the likeliest. Empty without
    noise, without position rows, or where rounding made tails heavier.
    """
    name, position = _table(seen, "token_embedding"), _read(seen, "position_embedding")
    if name is None or position is None or not (std := seen.noise_std(name)):
        return {}
    table, places = seen.message[name].double() / std, seen.message[position.name].double()
    signs = position.std > 0 and seen.disclosed.plan[position.name].bits == 1
    rows = torch.arange(_first(seen), len(places)) if signs else position.rows
    noise = Noise.of(seen, name)
    if not len(rows) or not noise.light:
        return {}
    match = table @ _unit(places[rows]).T / noise.scale
    passed = match > norm.isf(FALSE_ALARMS / match.numel())
    if signs and passed.any():
        held = torch.arange(int(passed.any(0).nonzero().max()) + 1)
        passed[match[:, held].argmax(0), held] = True
    positions = torch.zeros(len(places), dtype=torch.bool)
    positions[rows] = passed.any(0)
    return {"token_embedding": passed.any(1), "position_embedding": positions}


def _read(seen: Observation, role: str, matched: Mapping[str, Tensor] | None = None) -> Read | None:
    """Rows whose energy noise alone would exceed in `FALSE_ALARMS` rows of the whole table, and those that matched."""
    name = _table(seen, role)
    if name is None:
        return None
    table, std = seen.message[name].double(), seen.noise_std(name)
    if std == 0:
        found = table.any(1)
    else:
        found = Noise.of(seen, name).loud(table / std, FALSE_ALARMS)
        if matched and role in matched:
            found = found | matched[role]
    rows = found.nonzero()[:, 0]
    return Read(name, rows, table[rows], std)


def _as_clipped(position: Read, token: Read, seen: Observation) -> Read:
    """The position rows as the token table's clip would have left them.

    Clips of their own multiply the two tables by different factors; both hold the sum of all positions' vectors.
    """
    groups = {seen.disclosed.plan[read.name].group for read in (position, token)}
    if len(groups) == 1:
        return position
    mine, other = position.vectors.sum(0), token.vectors.sum(0)
    factor = float((mine @ other) / (mine @ mine).clamp(min=1e-300))
    return Read(position.name, position.rows, position.vectors * factor, position.std * abs(factor))


def _first(seen: Observation) -> int:
    """Row of the position table that a text's first token reads."""
    return int(family_of(seen.model).positions(torch.ones(1, 1), seen.model.config)[0, 0])


def _places(position: Read, seen: Observation) -> Read:
    """Position rows from the first on, gaps filled with zero vectors (their token is still to be guessed).

    A model that predicts tokens reads every token but the last, whose position gets no gradient.
    """
    offset = _first(seen)
    last = int(position.rows.max())
    if seen.disclosed.lengths:
        last = offset + seen.disclosed.lengths[0] - (2 if predicts_tokens(seen.model) else 1)
    rows = torch.arange(offset, last + 1)
    vectors = torch.zeros((len(rows), position.vectors.shape[1]), dtype=torch.float64)
    for row, vector in zip(position.rows.tolist(), position.vectors, strict=True):
        if offset <= row <= last:
            vectors[row - offset] = vector
    return Read(position.name, rows, vectors, position.std)


def _assign(token: Read, places: Read, frame: Frame, limit: int, clean: bool) -> Reading:
    """A token for every position so that the position vectors add up to the token rows.

    Starts from the most similar row, or without noise (``clean``) from the solution of token rows = A @ position
    vectors, which is the only one while the vectors are independent, if that leaves less. Then moves single positions
    while the squared residual falls. The special tokens stand where the tokenizer puts them.
    """
    seats = _seats(token, places, frame)
    inverse = torch.linalg.pinv(places.vectors) if clean else None
    scores = [_unit(places.vectors) @ _unit(token.vectors).T]
    scores += [] if inverse is None else [(token.vectors @ inverse).T]
    starts = [score.masked_fill(~seats, -torch.inf).argmax(1) for score in scores][-limit:]
    start = min(starts, key=lambda chosen: float(_left(chosen, token, places).norm()))
    chosen, moves = _descend(start, token, places, seats, min(2 * len(start), limit - len(starts)))
    left = _left(chosen, token, places)
    residual = float(left.norm() / token.vectors.norm())
    words = token.rows[chosen].tolist()
    text = frame.wrap(words[len(frame.prefix) : len(words) - len(frame.suffix)])
    whole = residual < EXACT and text == words and len(words) > frame.size
    proven = whole and inverse is not None and _settled(left, places, inverse)
    return Reading(text, residual, proven, len(starts) + moves)


def _descend(chosen: Tensor, token: Read, places: Read, seats: Tensor, most: int) -> tuple[Tensor, int]:
    """Move single positions to other tokens while the squared residual falls; the tokens chosen and how many moves.

    A move changes two rows of the residual, so what all next ones gain costs about as much as the fit of one text.
    """
    chosen = chosen.clone()
    products = places.vectors @ places.vectors.T
    size = products.diagonal()[:, None]
    inner = places.vectors @ _left(chosen, token, places).T
    for done in range(most):
        # moving position p from a to b changes |left_a + P|^2 - |left_a|^2 + |left_b - P|^2 - |left_b|^2
        gain = 2 * inner.gather(1, chosen[:, None]) + size - 2 * inner + size
        gain.scatter_(1, chosen[:, None], 0.0)
        gain[~seats] = torch.inf
        p, b = divmod(int(gain.argmin()), gain.shape[1])
        if gain[p, b] >= -1e-12 * float(size.sum()):
            return chosen, done
        inner[:, chosen[p]] += products[:, p]
        inner[:, b] -= products[:, p]
        chosen[p] = b
    return chosen, max(0, most)


def _settled(left: Tensor, places: Read, inverse: Tensor) -> bool:
    """Whether no other text fits: what is left unexplained is far from a whole vector of any position.

    Another text differs by whole numbers of position vectors, so it would show there, were they independent. A vector
    of zero, and more vectors than their width, leave several texts.

    Args:
        left: (tokens, d) residual.
        places: the position vectors.
        inverse: (d, positions) their pseudo-inverse.
    """
    if int(torch.linalg.matrix_rank(places.vectors)) < len(places.rows):
        return False
    return float((left @ inverse).abs().max()) < SETTLED


def _seats(token: Read, places: Read, frame: Frame) -> Tensor:
    """(positions, tokens) bool: special tokens at the ends, words between; all seats where that leaves none."""
    count = len(places.rows)
    special = torch.isin(token.rows, torch.tensor([*frame.prefix, *frame.suffix], dtype=token.rows.dtype))
    out = ~special.repeat(count, 1)
    ends = list(zip(range(len(frame.prefix)), frame.prefix, strict=True))
    ends += [(count - len(frame.suffix) + i, t) for i, t in enumerate(frame.suffix)]
    for place, wanted in ends:
        if 0 <= place < count:
            out[place] = token.rows == wanted
    out[~out.any(1)] = True
    return out


def _left(chosen: Tensor, token: Read, places: Read) -> Tensor:
    """(tokens, d) token rows without the vectors of the positions that chose them."""
    return token.vectors.index_add(0, chosen, places.vectors, alpha=-1)


def _unit(vectors: Tensor) -> Tensor:
    norms: Tensor = vectors.norm(dim=1, keepdim=True)
    return vectors / norms.clamp(min=1e-30)


def _chain(bag: list[int], seen: Observation, frame: Frame) -> list[int]:
    """The bag, as far as texts can hold it, in the order that a bigram model of the public texts finds likeliest."""
    bag = [t for t in bag if t not in {*frame.prefix, *frame.suffix}][: _room(seen)]
    model = bigram(Corpus.of(seen.disclosed), int(seen.model.config.vocab_size))  # type: ignore[union-attr, arg-type]
    if model is None:
        return frame.wrap(bag)
    out = list(frame.prefix)
    while bag:
        pairs = torch.tensor([[out[-1] if out else word, word] for word in bag])
        out.append(bag.pop(int(model.loss(pairs, torch.ones_like(pairs)).argmin())))
    return [*out, *frame.suffix]


PLUGIN = Rows()
