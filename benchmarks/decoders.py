"""How exactly and how fast texts are read from ONE weight of a decoder, alone and in batches.

    python benchmarks/decoders.py [--family gpt2 llama] [--loss classification next-token] [--blocks 0 2 4]
                                  [--batch-size 1 4 16] [--n 5] [--size 1]

GPT-2 and Llama of width 384 with six blocks and random weights as transformers draws them (``--size`` multiplies the
blocks' matrices), the 30,522 word pieces of MiniLM's tokenizer without its frame (Llama begins with one special
token, as it does in use), the fused qkv or the value weight alone, float32, one thread. No label and no length is
disclosed; the number of texts is. Batch k holds rows k * B to (k + 1) * B of CoLA's shuffled training set (seed 101).
Texts: $DPGUARD_DATA, or ../shared/data beside the checkout. Seconds are CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, processors

from dpguard.attacks import panel
from dpguard.attacks.observation import Disclosed, Observation
from dpguard.engine import gradients
from dpguard.inputs import models
from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.family import slots
from dpguard.policy.table import Policy

DATA = Path(os.environ.get("DPGUARD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
WIDTH, BLOCKS, HEADS = 384, 6, 6
ROLE = {"gpt2": "attention.qkv", "llama": "attention.value"}


@dataclass(frozen=True)
class Row:
    """One batch: how much of it was read, and in which time."""

    exact: float
    certain: float
    wrong: int
    seconds: float


def tokenizer(family: str) -> Any:
    """MiniLM's word pieces; nothing around a text for GPT-2, one token before it for Llama."""
    inner = Tokenizer.from_str(models.load("minilm").tokenizer.backend_tokenizer.to_str())
    first = inner.token_to_id("[CLS]")
    one, special = ("[CLS] $A", [("[CLS]", first)]) if family == "llama" else ("$A", [])
    inner.post_processor = processors.TemplateProcessing(single=one, special_tokens=special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", padding_side="right",
    )  # fmt: skip


def model(family: str, loss: str, vocabulary: int, size: float) -> Any:
    """A decoder with random weights (seed 0)."""
    common = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "num_labels": 2}
    common["attn_implementation"] = "eager"
    task = "ForSequenceClassification" if loss == "classification" else "LMHeadModel"
    torch.manual_seed(0)
    if family == "gpt2":
        shape = {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": 512}
        made = getattr(transformers, "GPT2" + task)(transformers.GPT2Config(**shape, **common))
    else:
        shape = {
            "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS,
            "intermediate_size": 1024, "max_position_embeddings": 512,
        }  # fmt: skip
        task = task.replace("LMHeadModel", "ForCausalLM")
        made = getattr(transformers, "Llama" + task)(transformers.LlamaConfig(**shape, **common))
    for slot in slots(made):
        if slot.block is not None and len(slot.shape) == 2:
            made.get_parameter(slot.name).data.mul_(size)
    return made.eval()


def observe(
    module: Any, words: Any, policy: Policy, rows: Sequence[dict[str, Any]], loss: str
) -> tuple[Observation, list[list[int]]]:
    """One batch's message under a plan without clip and noise, and its true token ids."""
    batch = collate([row["text"] for row in rows], [row["label"] for row in rows], words)
    lengths = batch.attention_mask.sum(1).tolist()
    true = [ids[:n].tolist() for ids, n in zip(batch.input_ids, lengths, strict=True)]
    if loss == "next-token":
        following = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        batch = Batch(batch.input_ids, batch.attention_mask, following)
    plan = policy.plan(slots(module))
    with gradients.running_as(module, "eval"):
        message = gradients.gradient(module, batch, plan.shared)
    mean = {name: value / len(rows) for name, value in message.items()}
    return Observation(mean, module, Disclosed(words, plan, len(rows), sequences=len(rows))), true


def run(seen: Observation, true: list[list[int]]) -> Row:
    """Attack one batch; each true text counts once, however often it was proposed."""
    attack = panel.attack("span")
    reason = attack.applicable(seen)
    if reason:
        print(f"  {reason}")
        return Row(0.0, 0.0, 0, 0.0)
    start = time.process_time()
    found = attack.reconstruct(seen, seed=0)
    seconds = time.process_time() - start
    both = Counter(map(tuple, true)) & Counter(map(tuple, found.sequences))
    sure = [ids for ids, certain in zip(found.sequences, found.certain, strict=True) if certain]
    row = Row(both.total() / len(true), len(sure) / len(true), sum(ids not in true for ids in sure), seconds)
    print(
        f"  {seconds:7.2f} s  exact {row.exact:.2f}  certain {len(sure):2d}  wrong {row.wrong}  "
        f"{sum(map(len, true)):3d} tokens  {found.candidates} candidates  {found.notes}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=["gpt2", "llama"], default=["gpt2", "llama"])
    losses = ["classification", "next-token"]
    parser.add_argument("--loss", nargs="+", choices=losses, default=losses)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--n", type=int, default=5, help="batches of each size")
    parser.add_argument("--size", type=float, default=1.0, help="factor on the blocks' matrices")
    parser.add_argument("--seed", type=int, default=101, help="of the order of the texts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (DATA / "cola.train.jsonl").read_text("utf-8").splitlines()]
    random.Random(options.seed).shuffle(rows)
    lines = []
    for family in options.family:
        words = tokenizer(family)
        for loss in options.loss:
            module = model(family, loss, len(words), options.size)
            for block in options.blocks:
                name = f"block[{block}].{ROLE[family]}.weight"
                policy = Policy([{"layers": "all", "share": False}, {"layers": name, "share": True}])
                for size in options.batch_size:
                    print(f"{family}, {loss}, {name}, batch {size}", flush=True)
                    parts = [rows[k * size : (k + 1) * size] for k in range(options.n)]
                    table = [run(*observe(module, words, policy, part, loss)) for part in parts]
                    seconds = [row.seconds for row in table]
                    exact, certain = (float(np.mean([getattr(r, c) for r in table])) for c in ("exact", "certain"))
                    lines.append(
                        f"| {family} | {loss} | {name} | {size} | {len(table)} | {exact:.3f} | {certain:.3f} | "
                        f"{sum(row.wrong for row in table)} | {np.median(seconds):.1f} | "
                        f"{np.quantile(seconds, 0.95):.1f} |"
                    )
    print("| family | loss | weight | batch | batches | exact | certain | certain and wrong | median s | p95 s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
