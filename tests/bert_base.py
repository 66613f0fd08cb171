"""A folder with a model of BERT-base's size and random weights: python -m tests.bert_base FOLDER

It shows that studies run at that size where no hub can be reached. What it learns and leaks means nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from dpguard.inputs.demo import bundle

VOCABULARY = 30_522


def make(folder: str | Path) -> Path:
    """109 million parameters in 12 blocks of width 768, and the bundled demo's tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=2))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundle.folder()).save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    print(make(sys.argv[1]))
