"""Seconds and bytes of an embedded federation: 20 clients, 10 a round, 30 rounds, the demo model.

    python benchmarks/federation.py [--threads 2] [--local-steps 1] [--server fedavg] [--view client]
        [--policy dp-sgd ...] [--engine flower]

Prints wall and CPU seconds of the rounds, of the judging and of the clients' ledgers, one row a policy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from dpguard.federation import flower, rounds, worth
from dpguard.federation.settings import Settings
from dpguard.federation.split import split
from dpguard.inputs import models, texts
from dpguard.inputs.family import slots
from dpguard.policy.table import Plan, Policy

POLICIES = {
    "none": [{"layers": "all", "train": True}],
    "dp-sgd": [{"layers": "all", "clip": 1.0, "noise": 0.5}],
    "dp-sgd per block, 8 bits": [{"layers": "all", "clip": 0.3, "noise": 0.5, "per": "block", "bits": 8}],
    "pruned to a tenth": [{"layers": "all", "clip": 1.0, "noise": 0.5, "keep": 0.1}],
    "embeddings at home": [{"layers": "all", "clip": 1.0, "noise": 0.5}, {"layers": "embeddings", "share": False}],
}
T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--per-round", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--server", default="fedavg")
    parser.add_argument("--view", default="client")
    parser.add_argument("--engine", default="embedded", help="embedded, or flower: Flower's simulation of the same")
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = Settings(
        given.clients, given.per_round, given.rounds, given.local_steps,
        server=given.server, view=given.view, learning_rate=1.0,
    )  # fmt: skip
    corpus = texts.load("demo")
    train, test = split(corpus.train, corpus.test, settings)
    print(
        f"{settings}\n{'policy':26} {'rounds s':>9} {'cpu s':>7} {'judge s':>8} {'epsilon s':>9} {'bytes/message':>13}",
        end="",
    )
    print(f" {'accuracy':>8} {'worst 10th':>10} {'epsilon':>8}")
    for name in given.policy:
        rows = POLICIES[name]
        model = models.load("demo", labels=corpus.classes, seed=0)
        plan = Policy(rows, name).plan(slots(model.module))

        def train_all(m: models.LoadedModel = model, p: Plan = plan) -> rounds.Run:
            if given.engine == "flower":
                return flower.run(
                    m, corpus.train, train, p, settings, labels=corpus.classes, seed=0, cpus=given.threads
                )  # fmt: skip
            return rounds.run(m.module, m.tokenizer, corpus.train, train, p, settings, seed=0)

        run, wall, cpu = timed(train_all)
        judged, judging, _ = timed(
            lambda m=model, r=run: worth.judge(m.module, m.tokenizer, corpus.test, test, r.states)
        )
        epsilons, counting, _ = timed(run.epsilons)
        each = sum(run.bytes) // (settings.rounds * settings.per_round)
        print(
            f"{name:26} {wall:9.1f} {cpu:7.1f} {judging:8.1f} {counting:9.1f} {each:13,} "
            f"{judged.mean['accuracy']:8.3f} {judged.worst_tenth['accuracy']:10.3f} {max(epsilons):8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
