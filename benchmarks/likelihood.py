"""How much a Gaussian message gives away to the exact likelihood: identification, and reading without candidates.

    python benchmarks/likelihood.py closed [--draws 2] [--sigma .1 .2 ...] [--shared "block[3].attention.query.weight"]
    python benchmarks/likelihood.py open [--n 8] [--sigma .01 .03] [--told ""] [--candidates 32000]

MiniLM, CoLA, batch 1, one thread, everything but embeddings and pooler shared unless said, clip fitted below the
gradient norms. closed: which of M = 100 texts was it, against the optimum from the candidates' Gram matrix and the
bound. open: labels and lengths told unless `--told ""`; no public text shares more than .4 of ROUGE-1 with a target.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rouge_score import rouge_scorer
from scipy import stats

import dpguard
from dpguard.attacks import panel
from dpguard.attacks.base import Budget
from dpguard.attacks.observation import Disclosed, Observation
from dpguard.engine import gradients
from dpguard.engine.client import Client
from dpguard.inputs import models
from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.family import slots
from dpguard.policy.table import Plan, Policy

DATA = Path(os.environ.get("DPGUARD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SIGMAS = {"closed": (0.1, 0.2, 0.3, 0.5, 1.0, 2.0), "open": (0.003, 0.01, 0.03, 0.05)}
CONTAMINATED = 0.4
Text = tuple[str, int]


def cola(seed: int) -> list[Text]:
    """All distinct training sentences in a random order."""
    rows = [json.loads(line) for line in (DATA / "cola.train.jsonl").read_text("utf-8").splitlines()]
    random.Random(seed).shuffle(rows)
    return list({row["text"]: (row["text"], row["label"]) for row in rows}.values())


def policy(shared: str, clip: float, sigma: float) -> Policy:
    """DP-SGD of what a selector names (empty: everything but embeddings and pooler); the rest stays frozen."""
    if not shared:
        rows = [{"layers": "all", "clip": clip, "noise": sigma}, {"layers": ["embeddings", "pooler"], "train": False}]
        return Policy(rows)
    return Policy([{"layers": "all", "train": False}, {"layers": shared, "train": True, "clip": clip, "noise": sigma}])


def encoded(model: models.LoadedModel, text: Text) -> Batch:
    """One text as the client feeds it."""
    return collate([text[0]], [text[1]], model.tokenizer)


def flat(model: models.LoadedModel, plan: Plan, text: Text) -> torch.Tensor:
    """One text's gradient over everything shared, in one vector."""
    with gradients.running_as(model.module, "eval"):
        found = gradients.gradient(model.module, encoded(model, text), plan.shared)
    return torch.cat([found[name].detach().flatten() for name in plan.shared])


def observe(
    model: models.LoadedModel, plan: Plan, text: Text, seed: int, *, told: str = "label length", **known: Any
) -> Observation:
    """One message of the client itself."""
    batch = encoded(model, text)
    update = Client(model.module, plan, seed=seed).observe(batch)
    disclosed = Disclosed(
        model.tokenizer, plan, update.batch_size,
        labels=(text[1],) if "label" in told else None,
        lengths=(batch.input_ids.shape[1],) if "length" in told else None,
        **known,
    )  # fmt: skip
    return Observation(update.tensors, model.module, disclosed)


def clopper(hits: int, total: int, level: float) -> float:
    """Lower confidence limit of a success rate."""
    return float(stats.beta.ppf(level, hits, total - hits + 1)) if hits else 0.0


def closed(options: argparse.Namespace, model: models.LoadedModel) -> None:
    """Identification among M candidates; every target is one of them."""
    # of one label, so that the disclosed label says nothing about which
    texts = [text for text in cola(options.seed) if text[1] == 1][: options.m]
    plain = policy(options.shared, 1e9, 0.0).plan(slots(model.module))
    vectors = torch.stack([flat(model, plain, text) for text in texts])
    norms = vectors.norm(dim=1)
    clip = 0.999 * float(norms.min())
    vectors *= (clip / norms)[:, None]
    gram = (vectors @ vectors.T).double() / clip**2
    cosine = float((gram.sum() - options.m) / options.m / (options.m - 1))
    print(f"M {options.m}, clip {clip:.4f}, mean cosine {cosine:.3f}")
    print("sigma  attack (lower limit)  same draws, gradients written out  agree  optimum  bound")
    for sigma in options.sigma:
        plan = policy(options.shared, clip, sigma).plan(slots(model.module))
        best = optimum(gram, sigma, random_state=options.seed)
        hits = right = agree = total = 0
        for draw in range(options.draws):
            for index, text in enumerate(texts):
                seed = 1_000 * draw + index
                order = random.Random(seed).sample(range(options.m), options.m)
                # the length would rule most candidates out, and the bound is on M of them
                seen = observe(model, plan, text, seed, told="label", candidates=[texts[i][0] for i in order])
                found = panel.attack("likelihood").reconstruct(seen, seed=seed)
                guess = found.sequences[0]
                message = torch.cat([seen.message[name].flatten() for name in plan.shared])
                written = int((vectors @ message).argmax())
                named = [encoded(model, texts[i]).input_ids[0].tolist() == guess for i in (index, written)]
                hits, right, agree = hits + named[0], right + (written == index), agree + named[1]
                total += 1
        bound = dpguard.guarantee(plan, sampling_rate=1.0, steps=1, delta=1e-5).bound(kappa=1 / options.m)
        low = clopper(hits, total, 1e-3 / len(options.sigma))
        warning = "" if low <= bound else "  ABOVE THE BOUND"
        print(
            f"{sigma:5g}  {hits / total:.3f} ({low:.3f})  {right / total:.3f}  {agree / total:.3f}  {best:.3f}  "
            f"{bound:.3f}{warning}",
            flush=True,
        )


def optimum(gram: torch.Tensor, sigma: float, *, random_state: int, draws: int = 200) -> float:
    """Success of the exact likelihood by Monte Carlo: noise on scores has the Gram's covariance."""
    count = len(gram)
    root = torch.linalg.cholesky(gram + 1e-9 * torch.eye(count, dtype=gram.dtype))
    source = torch.Generator().manual_seed(random_state)
    hits = 0
    for _ in range(draws):
        noise = sigma * (root @ torch.randn(count, count, dtype=gram.dtype, generator=source)).T
        hits += int(((gram + noise - gram.diag() / 2).argmax(1) == torch.arange(count)).sum())
    return hits / draws / count


def words(text: str) -> Counter[str]:
    """Word counts as ROUGE sees them."""
    return Counter(re.findall(r"[a-z0-9]+", text.lower()))


def rouge_1(one: Counter[str], two: Counter[str]) -> float:
    """ROUGE-1, F-measure."""
    both = sum((one & two).values())
    return 2 * both / max(1, sum(one.values()) + sum(two.values()))


def decontaminated(texts: list[Text], targets: list[Text]) -> list[str]:
    """The texts that share little with every target."""
    counts = [words(text) for text, _ in targets]
    return [text for text, _ in texts if all(rouge_1(words(text), c) <= CONTAMINATED for c in counts)]


def reading(options: argparse.Namespace, model: models.LoadedModel) -> None:
    """Fresh sentences read through noise."""
    texts = cola(options.seed)
    targets, rest = texts[options.skip : options.skip + options.n], texts[options.skip + options.n :]
    public = [t for t, _ in rest] if options.near else decontaminated(rest, targets)
    plain = policy(options.shared, 1e9, 0.0).plan(slots(model.module))
    labels = dict(rest)
    norms = [float(flat(model, plain, (text, labels[text])).norm()) for text in public[:200]]
    clip = float(np.quantile(norms, 0.05))
    own = [float(flat(model, plain, text).norm()) for text in targets]
    print(
        f"{len(targets)} targets, {len(public)} public texts of {len(rest)}, clip {clip:.4f} (.05 quantile of public "
        f"norms), targets clipped {statistics.mean(norm > clip for norm in own):.2f}; told: {options.told or 'nothing'}"
    )
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for sigma in options.sigma:
        plan = policy(options.shared, clip, sigma).plan(slots(model.module))
        rows = []
        for number, text in enumerate(targets):
            seen = observe(model, plan, text, number, told=options.told, public_texts=public)
            begun, busy = time.perf_counter(), time.process_time()
            found = panel.attack("likelihood").reconstruct(
                seen, seed=options.attack_seed, budget=Budget(steps=0, candidates=options.candidates)
            )
            wall, seconds = time.perf_counter() - begun, time.process_time() - busy
            true = encoded(model, text).input_ids[0].tolist()
            plainly = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in (true, found.sequences[0])]
            score = scorer.score(*plainly)
            behind = _loglik(seen, true, text[1]) - found.notes["loglik"]
            rows.append(
                [*(score[k].fmeasure for k in ("rouge1", "rouge2", "rougeL")), true == found.sequences[0], seconds]
            )
            print(
                f"  sigma {sigma:g}  {seconds:5.0f} CPU s ({wall:.0f} wall)  R-1 {rows[-1][0]:.2f}  "
                f"R-2 {rows[-1][1]:.2f}  truth ahead by {behind:.0f} nats  {plainly[0]} | {plainly[1]}",
                flush=True,
            )
        means = np.array(rows, dtype=float).mean(0)
        print(
            "sigma {:g}: R-1 {:.3f}  R-2 {:.3f}  R-L {:.3f}  exact {:.2f}  CPU seconds {:.0f}".format(sigma, *means),
            flush=True,
        )


def _loglik(seen: Observation, ids: list[int], label: int) -> float:
    """What the truth would score: to tell a search that fails from a message that says too little."""
    from dpguard.attacks.likelihood_replay import Replay
    from dpguard.attacks.likelihood_texts import score

    return float(score(Replay(seen), [ids], label, 0).loglik[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=SIGMAS)
    parser.add_argument("--sigma", type=float, nargs="+", help="noise multipliers")
    parser.add_argument("--shared", default="", help="selector; by default everything but embeddings and pooler")
    parser.add_argument("--m", type=int, default=100, help="closed: candidates")
    parser.add_argument("--draws", type=int, default=1, help="closed: messages of every candidate")
    parser.add_argument("--n", type=int, default=8, help="open: targets")
    parser.add_argument("--skip", type=int, default=0, help="open: texts before the first target")
    parser.add_argument("--told", default="label length", help="open: what is disclosed")
    parser.add_argument("--near", action="store_true", help="open: leave near-duplicates in the public text")
    parser.add_argument("--candidates", type=int, default=32_000, help="open: budget")
    parser.add_argument("--seed", type=int, default=101, help="of the texts")
    parser.add_argument("--attack-seed", type=int, default=0)
    options = parser.parse_args()
    options.sigma = options.sigma or SIGMAS[options.part]
    torch.set_num_threads(1)
    model = models.load("minilm")
    {"closed": closed, "open": reading}[options.part](options, model)


if __name__ == "__main__":
    main()
