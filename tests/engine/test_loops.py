"""What ordinary training loops do with batches, loaders and optimizers: it works, or it is one sentence."""

from __future__ import annotations

import pickle
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader

from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.engine.private_optimizer import HOOKS
from dpguard.engine.release.prune import random_indices
from dpguard.engine.sampling import no_rows
from dpguard.errors import UserError
from dpguard.policy.table import Policy
from tests import tiny
from tests.engine.test_opacus_traps import EXAMPLES, collator, private, train_step

DP = [{"layers": "all", "clip": 1.0, "noise": 1.0}]
MASKED = [{"layers": "all", "clip": 1.0, "noise": 1.0, "keep": 0.1, "prune": "random"}]


class Named(NamedTuple):
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def encoding(items):
    """As `transformers.DataCollatorWithPadding` gives it, with token types."""
    batch = tiny.tokenizer()([t for t, _ in items], padding=True, return_tensors="pt", return_token_type_ids=True)
    batch["labels"] = torch.tensor([label for _, label in items])
    return batch


def made(collate=collator, *, model=None, rows=DP, batch_size=1, seed=11, optimizer=None, **more):
    """With this seed some Poisson batches are empty."""
    model = (model or tiny.module("bert")).train()
    settings = {key: more.pop(key) for key in list(more) if key in LOADER}
    loader = DataLoader(EXAMPLES, batch_size=batch_size, collate_fn=collate, **settings)
    inner = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine()
    out = engine.make_private(module=model, optimizer=inner, data_loader=loader, policy=Policy(rows), seed=seed, **more)
    return engine, *out


LOADER = {"num_workers", "persistent_workers", "worker_init_fn", "prefetch_factor", "timeout", "generator",
          "multiprocessing_context"}  # fmt: skip


@pytest.mark.parametrize("types", [1, 2])
def test_a_tokenizer_s_own_batches_may_be_empty(types):
    """RoBERTa has one token type: the row that an empty batch is fed must not have a second."""
    engine, module, optimizer, loader = made(encoding, model=tiny.module("roberta", type_vocab_size=types))
    sizes = []
    for batch in loader:
        train_step(module, optimizer, batch.to("cpu"))
        sizes.append(len(batch["labels"]))
    assert 0 in sizes
    assert engine.steps == len(sizes)


def test_named_tuples_may_be_empty():
    engine, module, optimizer, loader = made(lambda items: Named(**collator(items)))
    sizes = []
    for batch in loader:
        train_step(module, optimizer, batch._asdict())
        sizes.append(len(batch.labels))
    assert 0 in sizes
    assert engine.steps == len(sizes)


def test_an_empty_batch_is_of_the_same_kind_and_the_example_s_stays_as_it_was():
    for batch in (encoding(EXAMPLES[:1]), Named(**collator(EXAMPLES[:1])), MappingProxyType(collator(EXAMPLES[:1]))):
        empty = no_rows(batch)
        assert isinstance(empty, dict if isinstance(batch, MappingProxyType) else type(batch))
        for rows, given in ((0, empty), (1, batch)):
            assert len(given.labels if isinstance(given, Named) else given["labels"]) == rows


def test_an_evaluation_may_come_between_an_empty_batch_and_its_step():
    engine, module, optimizer, loader = made()
    batch = next(b for b in skipping(loader, optimizer) if not len(b["labels"]))
    module(**batch).loss.backward()
    module.eval()
    with torch.no_grad():
        assert len(module(**collator(EXAMPLES[:3])).logits) == 3
    module.train()
    optimizer.step()
    assert engine.steps == 1


def test_an_evaluation_over_the_private_loader_may_meet_an_empty_batch():
    _engine, module, _optimizer, loader = made()
    module.eval()
    with torch.no_grad():
        sizes = [(len(module(**batch).logits), len(batch["labels"])) for batch in loader]
    assert (0, 0) in sizes
    assert all(found == wanted for found, wanted in sizes)


def skipping(loader, optimizer):
    for batch in loader:
        optimizer.zero_grad()
        yield batch


def test_the_private_loader_keeps_what_the_caller_s_says_of_its_workers(tmp_path):
    generator = torch.Generator().manual_seed(3)
    settings = {
        "num_workers": 1, "persistent_workers": True, "prefetch_factor": 3, "timeout": 300, "generator": generator,
        "multiprocessing_context": "fork", "worker_init_fn": lambda number: (tmp_path / f"worker {number}").touch(),
    }  # fmt: skip
    engine, module, optimizer, loader = made(batch_size=6, **settings)
    assert loader.multiprocessing_context.get_start_method() == "fork"
    assert all(getattr(loader, key) == settings[key] for key in settings if key != "multiprocessing_context")
    for _ in range(2):
        for batch in loader:
            train_step(module, optimizer, batch)
    assert engine.steps == 10
    assert (tmp_path / "worker 0").exists()
    one, other = iter(loader), iter(loader)
    for parts in (one, other):
        train_step(module, optimizer, next(parts))
    with pytest.raises(UserError, match="expected one pass at a time, or persistent_workers=False"):
        next(one)


def test_spawned_workers_can_be_given_the_collate_function():
    _engine, _module, _optimizer, loader = made()
    assert len(pickle.loads(pickle.dumps(loader.collate_fn))([])["labels"]) == 0


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_of_an_optimizer_can_be_registered(name):
    _engine, module, optimizer, loader = private(DP)
    called = []
    handle = getattr(optimizer, name)(lambda *_: called.append(name))

    def use():
        train_step(module, optimizer, next(iter(loader)))
        optimizer.load_state_dict(optimizer.state_dict())

    use()
    assert called == [name]
    handle.remove()
    use()
    assert called == [name]


def test_step_hooks_run_once_a_batch_and_see_the_message_alone():
    engine, module, optimizer, loader = private(DP, batch_size=8, max_physical_batch_size=2)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(module.classifier.weight.grad.clone()))
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.last_message["classifier.weight"].clone()))
    for part in loader:
        train_step(module, optimizer, part)
    assert len(seen) == 2 * engine.steps
    assert all(torch.equal(*pair) for pair in zip(seen[::2], seen[1::2], strict=True))


def masks_of(engine, module, optimizer, loader, steps):
    found = []
    for batch in loader:
        sent = train_step(module, optimizer, batch)["classifier.weight"]
        found.append(set(sent.flatten().nonzero()[:, 0].tolist()))
        if len(found) == steps:
            return found
    raise AssertionError(engine.steps)


def test_every_step_draws_a_random_mask_of_its_own_also_after_a_checkpoint():
    whole = private(MASKED)
    size = whole[1].classifier.weight.numel()
    wanted = [
        set(random_indices(size, 13, name="classifier.weight", mask_seed=step).tolist()) for step in range(4)
    ]  # public: whoever knows the step knows the mask
    assert masks_of(*whole, 2) == wanted[:2]
    state = whole[0].state_dict()
    resumed = private(MASKED)
    resumed[0].load_state_dict(state)
    assert masks_of(*resumed, 2) == wanted[2:]
    assert len({frozenset(mask) for mask in wanted}) == 4


def test_an_empty_tokenizer_batch_keeps_nobody_s_tokens() -> None:
    found = no_rows(tiny.tokenizer()(["the nurse called"], return_tensors="pt"))
    assert not found.encodings
