"""Make the bundled demo anew: ``python -m dpguard.inputs.demo.make [--out FOLDER]``.

Writes the three splits of the corpus, a WordPiece vocabulary learnt from the public texts, and a tiny BERT that was
pretrained on the public texts alone: by masked language modelling (Devlin et al., NAACL 2019, section 3.1), then for
a short while also on their poor labels, so that private fine-tuning starts from something, as it does in practice.
How long that while is sets how hard the task is under noise: longer, and even much noise costs nothing; without it,
even little noise stops all learning. Takes a few minutes on one thread. Everything follows from `SEED`: the corpus
and the vocabulary come out the same bytes anywhere, the weights where the floating-point arithmetic is the same.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForPreTraining, BertModel, BertTokenizerFast

from dpguard.inputs.demo import bundle, corpus

SEED = 20240
SIZES = {"train": 2048, "test": 600, "public": 3000}
FLIPPED = {"private": 0.02, "public": 0.1}  # share of wrong labels, as annotators make them
VOCABULARY = 1100  # tokens
COMMON = 3  # times a word must occur in the public texts to be a token of its own
EPOCHS = 40  # on hidden words
LABEL_EPOCHS = 9  # on hidden words and labels
BATCH = 64
LEARNING_RATE = 2e-3
MASKED = 0.15  # share of hidden tokens
TOKENS = 26  # longest private note, [CLS] and [SEP] included
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL))
LABELS = {0: "can wait", 1: "call back today"}


def public_notes() -> list[corpus.Note]:
    """What anybody may read: the texts that the vocabulary and the model are learnt from."""
    return corpus.notes(SIZES["public"], seed=SEED + 1, pool="public", flip=FLIPPED["public"])


def private_notes(tokenizer: BertTokenizerFast) -> tuple[list[corpus.Note], list[corpus.Note]]:
    """The train and the test split, of notes that are at most `TOKENS` long."""

    def fits(text: str) -> bool:
        return len(tokenizer(text).input_ids) <= TOKENS

    count = SIZES["train"] + SIZES["test"]
    private = corpus.notes(count, seed=SEED, pool="private", flip=FLIPPED["private"], fits=fits)
    return private[: SIZES["train"]], private[SIZES["train"] :]


def pieces(texts: Sequence[str]) -> list[str]:
    """The vocabulary of ``texts``: characters, common words, and the commonest beginnings and ends of the rest.

    Sorted by count and then by spelling, so that the same texts give the same list (a trained WordPiece of the
    tokenizers library breaks ties by chance).
    """
    splitter = pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    characters = sorted({character for word in counts for character in word} | set("abcdefghijklmnopqrstuvwxyz"))
    common = sorted(
        (word for word in counts if len(word) > 1 and counts[word] >= COMMON), key=lambda w: (-counts[w], w)
    )
    parts: Counter[str] = Counter()
    for word in counts:
        for size in (2, 3):
            parts[word[:size]] += 1
            parts.update(f"##{word[at : at + size]}" for at in range(1, len(word) - size + 1))
    known = [*SPECIAL, *characters, *(f"##{character}" for character in characters), *common]
    rest = sorted(set(parts) - set(known), key=lambda part: (-parts[part], part))
    return known + rest[: VOCABULARY - len(known)]


def learn_vocabulary(texts: Sequence[str]) -> BertTokenizerFast:
    """A lower-casing WordPiece tokenizer with the `pieces` of ``texts``."""
    vocabulary = {piece: number for number, piece in enumerate(pieces(texts))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return BertTokenizerFast(tokenizer_object=tokenizer, do_lower_case=True, model_max_length=64)


def config(vocabulary: int) -> BertConfig:
    """Four blocks of width 64: wider than any note is long, so that a note's token vectors can be independent."""
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        type_vocab_size=2,
        pad_token_id=PAD,
        id2label=LABELS,
        label2id={name: label for label, name in LABELS.items()},
    )


def hide(ids: Tensor, generator: torch.Generator, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Hide a share of the tokens: of those, 80 % become [MASK], 10 % another token, 10 % stay.

    Args:
        ids: (B, L) token ids, padded with 0.
        generator: the source of chance.
        vocabulary: number of token ids.

    Returns:
        (B, L) ids to read and (B, L) ids to predict, -100 where nothing is asked.
    """
    chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & (ids >= len(SPECIAL))
    fate = torch.rand(ids.shape, generator=generator)
    other = torch.randint(len(SPECIAL), vocabulary, ids.shape, generator=generator)
    hidden = torch.where(chosen & (fate < 0.8), MASK, ids)
    hidden = torch.where(chosen & (fate >= 0.9), other, hidden)
    return hidden, torch.where(chosen, ids, -100)


def epoch(
    model: BertForPreTraining,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
) -> float:
    """Train once on all notes; returns the mean loss.

    Args:
        model: in train mode.
        optimizer: of the model's parameters.
        ids: (N, L) padded token ids.
        labels: (N,) poor labels to guess besides the hidden words, or None for the words alone.
        generator: the source of chance.
    """
    losses = []
    order = torch.randperm(len(ids), generator=generator)
    for start in range(0, len(ids), BATCH):
        batch = order[start : start + BATCH]
        real = ids[batch][:, : int((ids[batch] != PAD).sum(1).max())]
        shown, wanted = hide(real, generator, model.config.vocab_size)
        states, pooled = model.bert(shown, attention_mask=(real != PAD).long(), return_dict=False)
        asked = wanted != -100
        loss = functional.cross_entropy(model.cls.predictions(states[asked]), wanted[asked])
        if labels is not None:
            loss = loss + functional.cross_entropy(model.cls.seq_relationship(pooled), labels[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def pretrain(notes: Sequence[corpus.Note], tokenizer: BertTokenizerFast) -> BertModel:
    """A BERT that has learnt, from ``notes`` alone, to fill in hidden words and a little of their poor labels."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    ids = tokenizer([note.text for note in notes], padding=True, return_tensors="pt").input_ids
    labels = torch.tensor([note.label for note in notes])
    model = BertForPreTraining(config(len(tokenizer))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    for done in track(range(EPOCHS), description="pretraining"):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (done + 1) / 3, (EPOCHS - done) / EPOCHS + 0.1)
        loss = epoch(model, optimizer, ids, None, generator)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE / 4
    for _ in track(range(LABEL_EPOCHS), description="pretraining, labels"):
        loss = epoch(model, optimizer, ids, labels, generator)
    print(f"last loss: {loss:.3f}")
    return model.bert


def write_notes(path: Path, notes: Sequence[corpus.Note]) -> None:
    """One JSON object a line: text, label, entities."""
    rows = [{"text": note.text, "label": note.label, "entities": list(note.entities)} for note in notes]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(out: Path) -> None:
    """Write the corpus, the model and ``about.json`` into the folder ``out``."""
    torch.set_num_threads(1)  # sums in one order
    public = public_notes()
    tokenizer = learn_vocabulary([note.text for note in public])
    train, test = private_notes(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    splits = {"train": train, "test": test, "public": public}
    for split, notes in splits.items():
        write_notes(out / f"{split}.jsonl", notes)
    model = pretrain(public, tokenizer)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    about = {
        "synthetic": True,
        "note": bundle.SYNTHETIC,
        "made_by": "python -m dpguard.inputs.demo.make",
        "seed": SEED,
        "rows": {split: len(notes) for split, notes in splits.items()},
        "wrong_labels": FLIPPED,
        "labels": LABELS,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "vocabulary": len(tokenizer),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (out / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the demo's corpus and model anew.")
    parser.add_argument("--out", type=Path, default=bundle.folder().parent, help="folder to write to")
    make(parser.parse_args().out)
