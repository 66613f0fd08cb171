"""Batches with more tokens than the model is wide: the exact bag, and drafts of the texts.

Every weight's gradient then has all the dimensions it can have, so that no span of states is left and nothing can
be proven. Two things remain. The first block's attention inputs are sums of a token's and a position's part, which
take up tokens + positions dimensions and not one for each row, so that the query's span still names the batch's
tokens. And the MLP output weight's row space, though smaller than the span of its inputs, lies within it: true rows
come nearer to it than others, at mixtures (what the row's attention picked from its text) near the true ones. Rows of
one text have like mixtures, and this says which rows belong together.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dpguard.attacks.observation import Reconstruction
from dpguard.attacks.span_affine import Family
from dpguard.attacks.span_block import FirstBlock
from dpguard.attacks.span_descent import Descent
from dpguard.attacks.span_pool import Pool
from dpguard.attacks.vocabulary import Frame

SORTING, NEWTON = 6, 2
"""Cheap steps for all candidates, full steps for the best."""
COMPONENTS = 128
"""Principal directions of mixtures that a row may move along: few enough that they say something about its text."""
SAMPLES = 60
"""Random texts that the directions are taken from."""
SHORTLIST = 5
"""Candidates that get the full steps, as a multiple of the model's width."""
HOLD = 2e-3
"""Loss of a mixture one standard deviation away from the mean in every direction."""
DOUBT = 100.0
"""What a unit of loss counts against a unit of cosine, when rows are given to texts."""
COPIES = 2
"""Texts that may share a token at one place."""
REPEATED = 0.3
"""What a token that its text has at another place already counts less: rows of one token are alike in any case."""
TURNS = 6
MOST = 64
"""Texts at most."""


class WideReader:
    """Drafts of a batch that no span of states can prove.

    Args:
        block: the model's first block, float64.
        pool: (token, position) pairs that the batch may hold.
        frame: special tokens around a text.
        gradient: (outputs, inputs) of the first block's MLP output weight, float64.
        rng: source of the draws.
    """

    def __init__(self, block: FirstBlock, pool: Pool, frame: Frame, gradient: Tensor, rng: torch.Generator) -> None:
        self.block, self.pool, self.frame, self.rng = block, pool, frame, rng
        values, directions = torch.linalg.svd(gradient, full_matrices=False)[1:]
        self.basis = directions[values > 1e-6 * values[0]]

    def read(self, texts: int) -> Reconstruction:
        """So many drafts; none is certain."""
        which, losses, towards = self._rows()
        drafts = self._grouped(which, losses, towards, min(texts, MOST))
        special = {*self.frame.prefix, *self.frame.suffix}
        notes = {
            "reason": "more tokens than the model is wide: the bag is known, its texts are drafts",
            "pool": len(self.pool),
            "bag": [token for token in torch.unique(self.pool.tokens).tolist() if token not in special],
        }
        return Reconstruction(drafts, [False] * len(drafts), SORTING + NEWTON, len(self.pool) + len(which), notes)

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """(c,) candidates, (c,) losses, (c, k) standardised mixtures, the best first."""
        family = self._family()
        descent = Descent(self.block, self.pool.rows, family, self.basis, torch.float32)
        everyone = torch.arange(len(self.pool), device=self.pool.rows.device)
        start = torch.zeros((len(everyone), family.size), device=everyone.device)
        losses, y = descent.sort(everyone, start, SORTING)
        best = losses.argsort()[: SHORTLIST * self.block.width]
        losses, y = descent.descend(best, y[best], NEWTON)
        losses = losses + HOLD * y.pow(2).mean(1)
        order = losses.argsort()
        return best[order], losses[order], y[order]

    def _family(self) -> Family:
        """Mixtures of every candidate: the mean over random contexts, and the directions in which contexts differ."""
        rows, block, count = self.pool.rows, self.block.in_precision(torch.float32), len(self.pool)
        some = torch.randperm(count, generator=self.rng)[:300].to(rows.device)
        middle = block.mixtures(rows.float(), rows[some].float()).double()
        apart = []
        for _ in range(SAMPLES):
            size = int(torch.randint(15, 45, (1,), generator=self.rng))
            text = torch.randint(count, (size,), generator=self.rng).to(rows.device)
            apart.append(self.block.mixtures(rows[text], rows[text]) - middle[text])
        differences = torch.cat(apart)
        mean = differences.mean(0)
        values, vectors = torch.linalg.eigh((differences - mean).T @ (differences - mean) / len(differences))
        wide = min(COMPONENTS, len(values))
        free = vectors[:, -wide:] * values[-wide:].clamp_min(0).sqrt()
        return Family(middle + mean, free.T.contiguous())

    def _grouped(self, which: Tensor, losses: Tensor, towards: Tensor, texts: int) -> list[list[int]]:
        """Rows of every place given to texts one for one, by loss and by likeness to the text's other rows."""
        unit = torch.nn.functional.normalize(towards.double(), dim=1)
        places, tokens = self.pool.places[which].tolist(), self.pool.tokens[which].tolist()
        closing = set(self.frame.suffix[-1:])
        at: dict[int, list[int]] = {}
        for row, (place, token) in enumerate(zip(places, tokens, strict=True)):
            if place >= len(self.frame.prefix):
                at.setdefault(-1 if token in closing else place, []).append(row)
        at = {place: rows[: 2 * texts] for place, rows in at.items()}
        order = sorted(at, key=lambda place: float(losses[at[place][:texts]].mean()) + (len(at[place]) < texts))
        first = (at[order[0]] * texts)[:texts]
        given = {order[0]: first}
        for _ in range(TURNS):
            for place in order:
                others = [rows for key, rows in given.items() if key != place] or [first]
                centre = torch.nn.functional.normalize(torch.stack([unit[rows] for rows in others]).mean(0), dim=1)
                gain = centre @ unit[at[place]].T - DOUBT * losses[at[place]].double()
                gain = gain - REPEATED * _again([[tokens[r] for r in rows] for rows in others], at[place], tokens)
                given[place] = self._assigned(at[place], gain)
        return self._texts(given, places, tokens, texts)

    def _assigned(self, rows: list[int], gain: Tensor) -> list[int]:
        """One of a place's rows for every text, with the largest total gain; a row serves few texts."""
        copies = max(COPIES, -(-len(gain) // len(rows)))
        cost = -gain.repeat(1, copies)
        chosen = linear_sum_assignment(cost.cpu().numpy())[1]
        return [rows[int(k) % len(rows)] for k in chosen]

    def _texts(self, given: dict[int, list[int]], places: list[int], tokens: list[int], texts: int) -> list[list[int]]:
        """Each text's rows in order, up to its closing token."""
        out = []
        for text in range(texts):
            end = places[given[-1][text]] if -1 in given else max(given) + 1
            body = [tokens[given[p][text]] for p in range(len(self.frame.prefix), end) if p in given]
            out.append(self.frame.wrap(body))
        return out


def _again(given: list[list[int]], rows: list[int], tokens: list[int]) -> Tensor:
    """(texts, rows) 1 where a row's token stands at another place of the text already."""
    return torch.tensor([[float(tokens[row] in words) for row in rows] for words in map(set, zip(*given, strict=True))])
