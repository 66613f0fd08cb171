"""Small random-weight models of every family, with a whole-word tokenizer: real architectures, no files."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dpguard.inputs.family import family_of
from dpguard.inputs.models import LoadedModel

WORDS = [
    "the",
    "a",
    "nurse",
    "doctor",
    "patient",
    "called",
    "wrote",
    "asked",
    "about",
    "her",
    "his",
    "new",
    "old",
    "test",
    "result",
    "ward",
    "number",
    "is",
    "was",
    "not",
    "yet",
    "ready",
    "late",
    "today",
    "tomorrow",
    "please",
    "thank",
    "you",
    "for",
    "help",
    "with",
    "pain",
    "in",
    "left",
    "right",
    "arm",
    "leg",
    "and",
    "but",
    "no",
    "yes",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "bank",
    "card",
    "lost",
    "found",
    "blocked",
    "money",
    "sent",
    "got",
    "never",
    "always",
    "soon",
]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FAMILIES = ("bert", "roberta", "distilbert", "gpt2")
SENTENCES = ("the nurse called about her test result", "card is not blocked", "please help with pain in left arm today")


@cache
def tokenizer(causal: bool = False) -> Any:
    """Whole words; [CLS] ... [SEP] around a text for encoders, nothing for decoders."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if not causal:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", padding_side="right", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def module(family: str, *, width: int = 64, blocks: int = 3, seed: int = 0, labels: int = 2) -> Any:
    """A classifier ("gpt2-lm": a language model with a tied head), float32, eval mode, eager attention."""
    size = len(SPECIAL) + len(WORDS)
    common = {"vocab_size": size, "pad_token_id": 0, "num_labels": labels, "attn_implementation": "eager"}
    encoder = {
        "hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": 4,
        "intermediate_size": 2 * width, "max_position_embeddings": 48, **common,
    }  # fmt: skip
    gpt2 = {"n_embd": width, "n_layer": blocks, "n_head": 4, "n_positions": 48, **common}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {
            "bert": lambda: BertForSequenceClassification(BertConfig(**encoder)),
            "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**encoder)),
            "distilbert": lambda: DistilBertForSequenceClassification(
                DistilBertConfig(
                    dim=width, n_layers=blocks, n_heads=4, hidden_dim=2 * width, max_position_embeddings=48, **common
                )
            ),
            "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(**gpt2)),
            "gpt2-lm": lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
        }[family]()
    # weights of the size that training gives: with the default .02 every block is nearly the identity
    for name, parameter in made.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            parameter.data.mul_(3.0)
    return made.eval()


def loaded(family: str, **options: Any) -> LoadedModel:
    """The same as `dpguard.inputs.models.load` would give."""
    made = module(family, **options)
    found = family_of(made)
    return LoadedModel(made, tokenizer(found.causal), found, family, found.max_tokens(made.config))
