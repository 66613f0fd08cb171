"""Gradient matching: move soft texts until they send the message that was seen.

Presets (`match_setting`):
    default: our own. One text without noise: reads likely tokens off soft spans (`match_soft`), then searches on the
        exact distance until a text is proven (`match_polish`). Otherwise: per-tensor cosine without noise, whitened
        distance with it; replays clip, pruning and rounding; restarts side by side, among them what cheaper attacks
        proposed; ends with a discrete search among the nearest tokens.
    dlg, tag, lamp: the published attacks that this one descends from.
    partial: the setting of "Seeing the Forest through the Trees" (Li, Xu, Dras, EMNLP 2024, arXiv
        2406.00999; its loop is LAMP's, arXiv 2202.08827): mean over tensors of 1 - cos, plus
        (mean token norm - 1.4)²; Adam at .01, times .89 every 50 steps; 500 random starts, then 500
        orders of the best; from a tenth of the steps on, every 75 steps, 200 other token orders. There a
        language model's loss is added to an order's score with weight .2. Here a bigram model of the
        public texts takes its place, because the core needs no language model. Labels and lengths are
        known there; where they are not, every class gets its own run.
    demo: the default's objective on a budget for the bundled model.

Dropout (``mode`` "train"): soft spans find the dropped entries of the first block's inputs together with the tokens;
elsewhere a candidate's gradient is compared with dropout off. A delta (the change of weights after local steps) is
compared as if it were one step's gradient, whose direction is minus its own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpguard.attacks.base import Budget, Capability
from dpguard.attacks.guesses import Guesses, draw, label_guesses, length_guesses, of_texts
from dpguard.attacks.labels import labels_of
from dpguard.attacks.language import Corpus, bigram
from dpguard.attacks.match_polish import Polish
from dpguard.attacks.match_proof import is_message, without_noise
from dpguard.attacks.match_setting import SETTINGS as SETTINGS
from dpguard.attacks.match_setting import Setting
from dpguard.attacks.match_soft import Lists, likely
from dpguard.attacks.objective import Objective, targets
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.presets import choose
from dpguard.attacks.reorder import propose, shuffle
from dpguard.attacks.span_sites import left_as_found
from dpguard.attacks.vocabulary import TokenTable, framed
from dpguard.engine.gradients import running_as
from dpguard.inputs.family import family_of

CHUNK = 64
SOLVED = 1e-5


class Match:
    """See the module's docstring."""

    name = "match"
    cite = "Li, Xu, Dras, EMNLP 2024 (arXiv 2406.00999); LAMP, NeurIPS 2022 (arXiv 2202.08827)"

    capability = Capability(
        "any tensor but the token embedding",
        "read models that predict tokens; replay several local steps (it takes an update for one gradient); prove "
        "anything under noise",
        tokens=False,
        kinds=("gradient", "delta"),
        published=("partial", "lamp", "tag", "dlg"),
    )

    def __init__(self) -> None:
        self.presets = {
            "default": Budget(steps=600, candidates=4_000, restarts=4),
            **{name: Budget(steps=2_000, candidates=6_000, restarts=1) for name in self.capability.published},
            "demo": Budget(steps=30, candidates=200, restarts=1),
        }

    def applicable(self, seen: Observation) -> str:
        """Empty when a shared tensor can be compared with a candidate's gradient, else the reason."""
        if not seen.message:
            return "the message holds no tensor"
        kind = seen.disclosed.kind
        if kind not in ("gradient", "delta"):
            return f"the message is an {kind}; matching replays one gradient step"
        if kind == "delta" and not without_noise(seen):
            return "the message is a noisy change of weights; matching knows the noise of one gradient step only"
        if not targets(seen, aware=False)[0]:
            return "nothing to compare: only token-embedding rows or empty tensors are shared"
        return ""

    def reconstruct(
        self, seen: Observation, *, rng: torch.Generator, budget: Budget | None = None, preset: str = ""
    ) -> Reconstruction:
        """Propose the texts whose gradient comes nearest to the message; certain when its own message is the one seen.

        ``notes``: ``objective``, ``loss`` of the proposed tokens, ``losses`` of every restart before its
        projection to tokens, ``compared`` and ``ignored`` tensors, ``lengths`` and ``labels`` as guessed.

        Raises:
            UserError: no such preset.
        """
        name, limits = choose(self.name, self.presets, preset, budget)
        search = Search(seen, SETTINGS[name], limits, rng)
        with left_as_found(seen.model):  # `running_as` would set the dropout rates to zero, which are evidence
            lists = search.lists()
        with running_as(seen.model, "eval"):
            return search.run(lists)


@dataclass
class Spent:
    """Steps and candidates used so far."""

    steps: int = 0
    candidates: int = 0


@dataclass
class Search:
    """One reconstruction: start, order, optimise, project, search."""

    seen: Observation
    setting: Setting
    budget: Budget
    rng: torch.Generator
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        told, model = self.seen.disclosed, self.seen.model
        self.texts = told.texts
        self.objective = Objective(self.seen, self.texts, aware=self.setting.aware, distance=self.setting.distance)
        self.table = TokenTable(model.get_input_embeddings().weight, told.tokenizer)  # type: ignore[operator]
        self.norm = self.table.mean_norm if self.setting.norm is None else self.setting.norm
        self.bigram = bigram(Corpus.of(told), len(self.table.weight))

    def lists(self) -> Lists | None:
        """What soft spans say about one text without noise; None when they say nothing or are not to be asked."""
        if self.setting.soft and self.texts == 1 and not self.objective.whitened and self.budget.candidates > 0:
            return likely(self.seen)
        return None

    def run(self, lists: Lists | None) -> Reconstruction:
        """The discrete way where soft spans say something, else the continuous one."""
        return self.continuous() if lists is None else self.discrete(lists)

    def discrete(self, lists: Lists) -> Reconstruction:
        """Tokens from soft spans, then a search on the exact distance."""
        told, limit = self.seen.disclosed, self.budget.candidates
        draws = random.Random(int(torch.randint(2**62, (1,), generator=self.rng)))
        lengths = told.lengths or ()
        starts = [row for row in self.proposals() if not lengths or len(row) == lengths[0]]
        polish = Polish(self.seen, lists, labels_of(self.seen), limit, draws, starts)
        label, row = polish.run()
        return Reconstruction(
            sequences=[list(row)],
            certain=[polish.certain],
            candidates=len(polish.pool),
            notes={
                "objective": "cosine",
                "loss": polish.pool[label, row],
                "compared": len(polish.objective.targets),
                "ignored": polish.objective.ignored,
                "lengths": [len(row)],
                "labels": [label],
                "likely_lengths": list(lists.lengths),
                **self.kind_note(),
            },
        )

    def kind_note(self) -> dict[str, str]:
        """A word on messages that are not one step's gradient."""
        delta = self.seen.disclosed.kind == "delta"
        return {"kind": "a change of weights, replayed as one step"} if delta else {}

    def continuous(self) -> Reconstruction:
        """Start, order, optimise, project, search."""
        guesses, losses = self.optimise(self.reordered_starts(self.starts()))
        ids = self.project(guesses)
        discrete = self.score(guesses.moved(self.table.weight[ids]))
        best = int(discrete.nan_to_num(nan=torch.inf).argmin())
        final, chosen = guesses.at([best]), ids.reshape(guesses.messages, self.texts, -1)[best]
        loss = float(discrete[best])
        if self.setting.substitutes:
            chosen, loss = self.climb(final, chosen)
        lengths = final.mask.sum(1).tolist()
        return Reconstruction(
            sequences=[row[:length] for row, length in zip(chosen.tolist(), lengths, strict=True)],
            certain=self.proven(chosen, final),
            steps=self.spent.steps,
            candidates=self.spent.candidates,
            notes={
                "objective": "whitened" if self.objective.whitened else self.setting.distance,
                "loss": loss,
                "losses": losses.tolist(),
                "compared": len(self.objective.targets),
                "ignored": self.objective.ignored,
                "lengths": lengths,
                "labels": final.labels.tolist(),
                **self.kind_note(),
            },
        )

    def proven(self, chosen: Tensor, final: Guesses) -> list[bool]:
        """Whether the text's own message is the one seen; texts of a batch are not proven one by one."""
        if self.texts > 1 or not self.setting.soft:
            return [False] * self.texts
        return [is_message(self.seen, chosen[0][: int(final.mask[0].sum())].tolist(), int(final.labels[0]))]

    def left(self, wanted: int) -> int:
        """``wanted`` candidates, or as many as the budget still holds."""
        return max(0, min(wanted, self.budget.candidates - self.spent.candidates))

    @torch.no_grad()
    def score(self, guesses: Guesses) -> Tensor:
        """(R,) distances of R messages, in chunks; each counts as a candidate."""
        self.spent.candidates += guesses.messages
        size = max(1, CHUNK // self.texts)
        parts = []
        for first in range(0, guesses.messages, size):
            some = guesses.at(list(range(first, min(first + size, guesses.messages))))
            parts.append(self.objective(some.batch, some.embeddings).detach())
        return torch.cat(parts)

    # -- initialisation

    def starts(self) -> Guesses:
        """The best random starts: ``restarts`` of them for each of the most promising label guesses."""
        told, model = self.seen.disclosed, self.seen.model
        longest = family_of(model).max_tokens(model.config)
        labels = label_guesses(self.seen, self.texts, self.rng)
        count = max(self.budget.restarts, min(self.setting.starts, self._quarter(len(labels))))
        lengths = length_guesses(told, self.texts, count, longest, self.rng)
        pools = [
            draw(lengths, label, table=self.table.weight, norm=self.norm, tokenizer=told.tokenizer, rng=self.rng)
            for label in labels
        ]
        self.objective.calibrate(pools[0].batch, pools[0].embeddings)
        scores = [self.score(pool) for pool in pools]
        promising = sorted(range(len(pools)), key=lambda index: float(scores[index].min()))[:4]
        kept = [pools[index].at(scores[index].argsort()[: self.budget.restarts]) for index in promising]
        return Guesses.join(kept + self.proposed(labels, int(lengths.max())))

    def proposals(self) -> list[tuple[int, ...]]:
        """What cheaper attacks proposed, each once and with its special tokens."""
        tokenizer, model = self.seen.disclosed.tokenizer, self.seen.model
        longest = family_of(model).max_tokens(model.config)
        rows = (tuple(framed(tokenizer, row, longest)) for row in self.seen.proposals)
        return [row for row in dict.fromkeys(rows) if row]

    def proposed(self, labels: list[tuple[int, ...]], width: int) -> list[Guesses]:
        """What cheaper attacks proposed for the message of one text, under the label that fits best."""
        told = self.seen.disclosed
        rows = [row for row in self.proposals() if len(row) <= width]
        if told.lengths is not None:
            rows = [row for row in rows if len(row) == told.lengths[0]]
        rows = rows[: self.budget.restarts]
        if not self.setting.soft or self.texts > 1 or not rows:
            return []
        tries = [of_texts(rows, label[0], width, table=self.table.weight, tokenizer=told.tokenizer) for label in labels]
        return [min(tries, key=lambda guesses: float(self.score(guesses).min()))]

    def reordered_starts(self, guesses: Guesses) -> Guesses:
        """Every start in the best of several random orders of its embeddings."""
        count = min(self.setting.permutations, self._quarter(guesses.messages))
        return guesses.moved(self._best_orders(guesses, count, 0.0, scramble=True))

    def _quarter(self, share: int) -> int:
        """A quarter of the candidates still left, split into ``share`` parts: how much a first step may use."""
        return self.left(self.budget.candidates) // (4 * share)

    # -- continuous search

    def optimise(self, guesses: Guesses) -> tuple[Guesses, Tensor]:
        """Adam on all restarts at once; each keeps the embeddings of its smallest distance, (R,) with it."""
        setting, free, fixed = self.setting, guesses.free[:, :, None], guesses.embeddings.detach()
        x = fixed.clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=setting.learning_rate)
        decay = torch.optim.lr_scheduler.StepLR(adam, setting.decay_every, setting.decay)
        best, lowest = fixed.clone(), torch.full((guesses.messages,), torch.inf, device=fixed.device)
        for step in range(self.budget.steps):
            now = torch.where(free, x, fixed)
            distance = self.objective(guesses.batch, now, create_graph=True)
            total = distance + setting.norm_weight * self.norm_penalty(now, guesses)
            better = distance.detach() < lowest
            lowest = torch.where(better, distance.detach(), lowest)
            best = torch.where(better.repeat_interleave(self.texts)[:, None, None], now.detach(), best)
            (x.grad,) = torch.autograd.grad(total.sum(), x)
            adam.step()
            decay.step()
            self.spent.steps += 1
            if setting.check and step % setting.check == setting.check - 1 and self.solved(guesses.moved(best)):
                break
            if step >= setting.burn_in * self.budget.steps and step % setting.every == 0 and step:
                self.reorder(x, guesses)
        return guesses.moved(best), lowest

    def solved(self, guesses: Guesses) -> bool:
        """Whether the tokens nearest to some restart send the message exactly, as far as rounding can tell."""
        if self.objective.whitened or not self.left(guesses.messages):
            return False
        return float(self.score(guesses.moved(self.table.weight[self.project(guesses)])).min()) < SOLVED

    def norm_penalty(self, embeddings: Tensor, guesses: Guesses) -> Tensor:
        """(R,) squared difference of the mean norm of a message's free tokens from the wanted norm."""
        weights = guesses.free.reshape(guesses.messages, -1).float()
        norms = (embeddings.pow(2).sum(2) + 1e-12).sqrt().reshape(guesses.messages, -1)
        return ((norms * weights).sum(1) / weights.sum(1).clamp(min=1) - self.norm).pow(2)

    # -- order

    @torch.no_grad()
    def reorder(self, x: Tensor, guesses: Guesses) -> None:
        """Put every restart's embeddings in the best of several orders; Adam's memory stays in place."""
        now = guesses.moved(torch.where(guesses.free[:, :, None], x.detach(), guesses.embeddings))
        count = self.left(self.setting.proposals * guesses.messages) // guesses.messages
        x.copy_(self._best_orders(now, count, self.setting.order_prior))

    def _best_orders(self, guesses: Guesses, count: int, prior: float, *, scramble: bool = False) -> Tensor:
        """Embeddings with every message in the best of ``count`` orders (as it is, and count - 1 others)."""
        out = guesses.embeddings.clone()
        if count < 2:
            return out
        ids = self.project(guesses).reshape(guesses.messages, self.texts, -1)
        for message in range(guesses.messages):
            many = guesses.at([message] * count)
            order = self._orders(many.free[: self.texts], count, scramble=scramble).to(out.device)
            embeddings = many.embeddings.gather(1, order[:, :, None].expand_as(many.embeddings))
            scores = self.score(many.moved(embeddings))
            if prior and self.bigram is not None:
                tokens = ids[message].repeat(count, 1).gather(1, order)
                loss = self.bigram.loss(tokens, many.mask).reshape(count, self.texts).mean(1)
                scores = scores + prior * loss.to(scores)
            winner = int(scores.argmin())
            rows = slice(message * self.texts, (message + 1) * self.texts)
            out[rows] = embeddings[winner * self.texts : (winner + 1) * self.texts]
        return out

    def _orders(self, free: Tensor, count: int, *, scramble: bool) -> Tensor:
        """(count * B, L) positions to read from; the first B rows leave everything where it is."""
        identity = torch.arange(free.shape[1]).repeat(count, len(free), 1)
        inside = [row.nonzero().flatten().tolist() for row in free.cpu()]
        for index in range(1, count):
            text = int(torch.randint(len(inside), (1,), generator=self.rng))
            for each in range(len(inside)) if scramble else [text]:
                new = shuffle(inside[each], self.rng) if scramble else propose(inside[each], self.rng)
                identity[index, each, inside[each]] = torch.tensor(new, dtype=torch.int64)
        return identity.flatten(0, 1)

    # -- tokens

    def project(self, guesses: Guesses) -> Tensor:
        """(N, L) token ids: the nearest token by cosine at free positions, special tokens elsewhere."""
        return torch.where(guesses.free, self.table.nearest(guesses.embeddings)[:, :, 0], guesses.ids)

    def climb(self, final: Guesses, ids: Tensor) -> tuple[Tensor, float]:
        """Better tokens for one message: other orders, and each position's nearest tokens, while budget is left.

        Args:
            final: one message, at its continuous solution.
            ids: (B, L) its tokens.

        Returns:
            (B, L) token ids and their distance.
        """
        near = self.table.nearest(final.embeddings, self.setting.substitutes)
        places = final.free.nonzero().tolist()
        swaps = [(row, place, int(token)) for row, place in places for token in near[row, place]]
        best, (score, distance) = ids, self._posterior(final, ids[None])[0]
        while swaps and self.left(CHUNK) == CHUNK and (self.objective.whitened or distance > SOLVED):
            tried = []
            for index in torch.randperm(len(swaps), generator=self.rng)[: CHUNK // 2].tolist():
                row, place, token = swaps[index]
                tried.append(best.index_put((torch.tensor(row), torch.tensor(place)), torch.tensor(token)))
            order = self._orders(final.free, CHUNK - len(tried) + 1, scramble=False)[self.texts :].to(best.device)
            tried += list(best.repeat(CHUNK - len(tried), 1).gather(1, order).reshape(-1, *best.shape))
            found = self._posterior(final, torch.stack(tried))
            winner = min(range(len(found)), key=lambda index: found[index][0])
            if found[winner][0] < score:
                best, (score, distance) = tried[winner], found[winner]
        return best, distance

    def _posterior(self, final: Guesses, ids: Tensor) -> list[tuple[float, float]]:
        """(what to minimise, distance) of (K, B, L) token ids.

        Under noise half the whitened distance is a negative log-likelihood, so the public bigram model
        adds its nats to it; without noise the message alone decides.
        """
        many = final.at([0] * len(ids))
        flat = ids.flatten(0, 1)
        distances = self.score(many.moved(self.table.weight[flat]))
        scores = distances
        if self.objective.whitened and self.bigram is not None:
            nats = self.bigram.loss(flat, many.mask).to(distances) * (many.mask.sum(1) - 1)
            scores = distances + 2 * nats.reshape(len(ids), -1).sum(1) / self.objective.scale
        return list(zip(scores.tolist(), distances.tolist(), strict=True))


PLUGIN = Match()
