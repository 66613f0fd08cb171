"""Small random-weight models of every family, with a whole-word tokenizer: real architectures, no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.family import Family, families, family_of
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
"""Classifiers with position embeddings; `ROWS` has every model type."""
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


CLASSIFICATION, NEXT_TOKEN = "classification", "next-token"


@dataclass(frozen=True)
class Row:
    """One model type of the families' contract suite: how to make it tiny, and where its LoRA goes.

    Attributes:
        config: configuration class.
        classes: task -> model class.
        targets: names of the layers that LoRA adapts.
        shape: (width, blocks) -> the configuration's arguments.
        lora: arguments of `peft.LoraConfig`.
    """

    config: type
    classes: Mapping[str, type]
    targets: tuple[str, ...]
    shape: Callable[[int, int], dict[str, Any]]
    lora: Mapping[str, Any] = field(default_factory=dict)


def _bert(width: int, blocks: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": 4,
        "intermediate_size": 2 * width, "max_position_embeddings": 48,
    }  # fmt: skip


def _distilbert(width: int, blocks: int) -> dict[str, Any]:
    return {"dim": width, "n_layers": blocks, "n_heads": 4, "hidden_dim": 2 * width, "max_position_embeddings": 48}


def _gpt2(width: int, blocks: int) -> dict[str, Any]:
    return {"n_embd": width, "n_layer": blocks, "n_head": 4, "n_positions": 48}


def _llama(width: int, blocks: int) -> dict[str, Any]:
    return _bert(width, blocks) | {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}


def _qwen(width: int, blocks: int) -> dict[str, Any]:
    return _llama(width, blocks) | {"head_dim": width // 4, "tie_word_embeddings": True}


def _decoder(prefix: str) -> dict[str, type]:
    causal = getattr(transformers, prefix + "ForCausalLM")
    return {CLASSIFICATION: getattr(transformers, prefix + "ForSequenceClassification"), NEXT_TOKEN: causal}


_QKV = ("q_proj", "k_proj", "v_proj")
ROWS: dict[str, Row] = {
    "bert": Row(
        transformers.BertConfig, {CLASSIFICATION: transformers.BertForSequenceClassification}, ("query", "value"), _bert
    ),
    "roberta": Row(
        transformers.RobertaConfig, {CLASSIFICATION: transformers.RobertaForSequenceClassification},
        ("query", "value"), _bert,
    ),
    "xlm-roberta": Row(
        transformers.XLMRobertaConfig, {CLASSIFICATION: transformers.XLMRobertaForSequenceClassification},
        ("query", "value"), _bert,
    ),
    "distilbert": Row(
        transformers.DistilBertConfig, {CLASSIFICATION: transformers.DistilBertForSequenceClassification},
        ("q_lin", "v_lin", "lin1"), _distilbert,
    ),
    "gpt2": Row(
        transformers.GPT2Config,
        {CLASSIFICATION: transformers.GPT2ForSequenceClassification, NEXT_TOKEN: transformers.GPT2LMHeadModel},
        ("c_attn", "c_fc"), _gpt2, {"fan_in_fan_out": True},
    ),
    "llama": Row(transformers.LlamaConfig, _decoder("Llama"), (*_QKV, "gate_proj", "down_proj"), _llama),
    "mistral": Row(transformers.MistralConfig, _decoder("Mistral"), _QKV, _llama),
    "qwen2": Row(transformers.Qwen2Config, _decoder("Qwen2"), _QKV, _qwen),
    "qwen3": Row(transformers.Qwen3Config, _decoder("Qwen3"), _QKV, _qwen),
}  # fmt: skip
"""One row a model type; "gpt2-lm" and the like are their models for next-token prediction."""


def module(family: str, *, width: int = 64, blocks: int = 3, seed: int = 0, labels: int = 2, **config: Any) -> Any:
    """A classifier ("gpt2-lm", "llama-lm" ...: a language model), float32, eval mode, eager attention."""
    row = ROWS[family.removesuffix("-lm")]
    task = NEXT_TOKEN if family.endswith("-lm") else CLASSIFICATION
    size = len(SPECIAL) + len(WORDS)
    common = {"vocab_size": size, "pad_token_id": 0, "num_labels": labels, "attn_implementation": "eager"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = row.classes[task](row.config(**{**row.shape(width, blocks), **common, **config}))
    # weights of the size that training gives: with the default .02 every block is nearly the identity
    for name, parameter in made.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            parameter.data.mul_(3.0)
    return made.eval()


def headless(folder: Path) -> None:
    """Take the head's weights out of a saved BERT classifier: what a pretrained encoder looks like."""
    file = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if not name.startswith("classifier.")}
    save_file(kept, file, metadata={"format": "pt"})


def lora(model: Any, *, seed: int = 0, **options: Any) -> Any:
    """The model inside PEFT, with LoRA on its row's layers; both matrices random, so that both have gradients."""
    import peft

    row = ROWS[model.config.model_type]
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(row.targets),
        "init_lora_weights": False,
        "lora_dropout": 0.1,
        **options,
    }
    options.setdefault("task_type", "SEQ_CLS" if type(model) is row.classes[CLASSIFICATION] else "CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = peft.get_peft_model(model, peft.LoraConfig(**{**row.lora, **options}))
    return made.eval()


@dataclass(frozen=True)
class Case:
    """One model of the contract suite: a model type, a task, with or without LoRA."""

    kind: str
    task: str = CLASSIFICATION
    lora: bool = False

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.task}" + ("-lora" if self.lora else "")

    def model(self, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """Two blocks of width 16, eval mode."""
        options = {"width": 16, "blocks": 2, **options}
        made = module(self.kind + ("-lm" if self.task == NEXT_TOKEN else ""), **options)
        return (lora(made) if self.lora else made).to(dtype)

    def batch(self, texts: Sequence[str] = SENTENCES) -> Batch:
        """The texts, padded, with alternating labels or the next tokens as labels."""
        causal = families_by_type()[self.kind].causal
        batch = collate(list(texts), [i % 2 for i in range(len(texts))], tokenizer(causal))
        if self.task == CLASSIFICATION:
            return batch
        return Batch(
            batch.input_ids, batch.attention_mask, batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        )


def families_by_type() -> dict[str, Family]:
    """Model type -> its family."""
    return {kind: family for family in families().values() for kind in family.model_types}


CASES = tuple(
    Case(kind, task, with_lora) for kind, row in ROWS.items() for task in row.classes for with_lora in (False, True)
)


def loaded(family: str, **options: Any) -> LoadedModel:
    """The same as `dpguard.inputs.models.load` would give; "llama-lora" and the like are inside PEFT."""
    made = module(family.removesuffix("-lora"), **options)
    made = lora(made) if family.endswith("-lora") else made
    found = family_of(made)
    return LoadedModel(made, tokenizer(found.causal), found, family, found.max_tokens(made.config))
