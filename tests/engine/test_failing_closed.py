"""Ways of moving the message by more than one clip that look like ordinary training code: each refused or harmless."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, WeightedRandomSampler

from dpguard.engine.client import Client
from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.errors import UserError
from dpguard.inputs.batch import collate
from dpguard.policy.table import Policy
from tests import tiny

ALL = [{"layers": "all", "clip": 0.1, "noise": 1.0}]
HEAD = [{"layers": "all", "train": False}, {"layers": "head", "train": True, "clip": 0.01, "noise": 1.0}]
TEXTS = [(f"{word} was {end}", k % 2) for k, (word, end) in enumerate((w, e) for w in "abcdef" for e in "ghij")]


def encoded(items, tokenizer=None, *, mask=True):
    batch = collate([text for text, _ in items], [label for _, label in items], tokenizer or tiny.tokenizer())
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    return given if mask else {name: value for name, value in given.items() if name != "attention_mask"}


def private(rows=HEAD, *, dropout=0.0, rate=0.0, batch_size=8, loader=None, data=TEXTS, model=None, **more):
    model = (model or tiny.module("bert")).train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = dropout
    engine = PrivacyEngine()
    loader = loader or DataLoader(data, batch_size=batch_size, collate_fn=encoded)
    inner = torch.optim.SGD(model.parameters(), lr=rate)
    policy = Policy(rows) if isinstance(rows, list) else rows
    return engine, *engine.make_private(module=model, optimizer=inner, data_loader=loader, policy=policy, **more)


def distance(one, two, clip):
    return math.sqrt(sum(float((one[k] - two[k]).double().pow(2).sum()) for k in one)) / clip


def message(rows, batch_size=10, family="bert", **more):
    client = Client(tiny.module(family), Policy(ALL), seed=0, batch_size=batch_size, **more)
    return {name: value * batch_size for name, value in client.observe(rows).tensors.items()}


SHORT, LONG = [("bad film", 0)] * 9, [("a very long story about a film and a dinner and a trip with many friends", 1)]


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_longest_text_changes_no_other_text_s_gradient(family, side):
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.padding_side = side
    with_it, without = (encoded(items, tokenizer) for items in (SHORT + LONG, SHORT))
    if side == "left" and family in ("bert", "roberta"):
        with pytest.raises(UserError, match=f"padded on the left; .* because {family} reads the first position"):
            message(with_it, family=family)
        return
    assert with_it["input_ids"].shape[1] > without["input_ids"].shape[1]
    assert distance(message(with_it, family=family), message(without, family=family), 0.1) <= 1 + 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_that_a_decoders_classifier_takes_for_text_is_refused(family):
    """With another padding token in the configuration one text moved the sum by 9.7 clips."""
    model = tiny.module(family)
    model.config.pad_token_id = 3
    given = encoded(SHORT + LONG)
    with pytest.raises(UserError, match="padded with other tokens than 3"):
        Client(model, Policy(ALL), seed=0, batch_size=10).observe(given)
    _engine, module, _optimizer, _loader = private(model=model)
    with pytest.raises(UserError, match="padded with other tokens than 3"):
        module(**given)
    embedded = {"inputs_embeds": model.get_input_embeddings()(given.pop("input_ids")), **given}
    with pytest.raises(UserError, match="embeddings are padded"):
        module(**embedded)


def test_padding_without_a_mask_is_refused_and_none_is_needed_without_padding():
    for items in (SHORT + LONG, [*SHORT[:1], *LONG]):
        with pytest.raises(UserError, match="without attention_mask has padding, or may have"):
            message(encoded(items, mask=False))
    given, told = message(encoded(SHORT, mask=False)), message(encoded(SHORT))
    assert all(torch.equal(given[name], told[name]) for name in told)
    _engine, module, _optimizer, _loader = private()
    with pytest.raises(UserError, match="without attention_mask"):
        module(**encoded(SHORT + LONG, mask=False))


def test_a_tensor_that_was_thawed_after_make_private_is_not_stepped_on():
    engine, module, optimizer, loader = private(rate=1.0)
    table = module.get_input_embeddings().weight
    before = table.detach().clone()
    batch = next(iter(loader))
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    optimizer.zero_grad()
    module(**batch).loss.backward()
    with pytest.raises(UserError, match="is frozen by the policy and has a gradient"):
        optimizer.step()
    assert torch.equal(table, before)
    assert engine.steps == 0


@pytest.mark.parametrize("seen", [False, True])
def test_batches_of_another_loader_are_refused(seen):
    engine, module, optimizer, loader = private(seed=0)
    if seen:
        optimizer.zero_grad()
        module(**next(iter(loader))).loss.backward()
        optimizer.step()
    steps = engine.steps
    optimizer.zero_grad()
    module(**encoded(TEXTS)).loss.backward()
    with pytest.raises(UserError, match="the loader had handed out none"):
        optimizer.step()
    assert engine.steps == steps


def test_a_sampler_that_draws_twice_is_refused_inside_a_batch_sampler_too():
    twice = BatchSampler(WeightedRandomSampler([1.0] + [0.0] * (len(TEXTS) - 1), 8), 8, False)
    loader = DataLoader(TEXTS, batch_sampler=twice, collate_fn=encoded)
    with pytest.raises(UserError, match=r"sampler of its own .WeightedRandomSampler., which may draw an example twice"):
        private(loader=loader, poisson_sampling=False)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_example_moves_the_sum_by_its_clip_however_the_model_s_loss_is_reduced(reduction):
    found = []
    for drop in (0, 1):
        loader = DataLoader([*SHORT, ("bad film", 1)][: 10 - drop], batch_size=10 - drop, collate_fn=encoded)
        _engine, module, optimizer, own = private(
            [{"layers": "all", "clip": 0.27, "noise": 1.0}],
            loader=loader, seed=3, loss_reduction=reduction, poisson_sampling=False,
        )  # fmt: skip
        optimizer.zero_grad()
        module(**next(iter(own))).loss.backward()
        found.append(optimizer.mode.collect().sums)
    assert distance(*found, 0.27) == pytest.approx(1.0, abs=1e-5)


def test_a_mean_loss_in_sixteen_bits_is_refused():
    _engine, module, _optimizer, loader = private(model=tiny.module("bert").to(torch.bfloat16))
    with pytest.raises(UserError, match="expected loss_reduction='sum' in 16 bits"):
        module(**next(iter(loader)))


def test_dropout_masks_are_secret_where_the_noise_is():
    rows = encoded(TEXTS[:8])
    first, second = (Client(tiny.module("bert"), Policy(ALL), mode="train", batch_size=8) for _ in range(2))
    sums = [client.clipped(client._read(rows)).sums for client in (first, first, second)]
    seeded = [Client(tiny.module("bert"), Policy(ALL), mode="train", seed=0, batch_size=8) for _ in range(2)]
    same = [client.clipped(client._read(rows)).sums for client in seeded]
    for name in ("classifier.weight",):
        assert not torch.equal(sums[0][name], sums[1][name])
        assert not torch.equal(sums[0][name], sums[2][name])
        assert torch.equal(same[0][name], same[1][name])


def test_a_seeded_script_does_not_know_the_masks_and_keeps_its_own_random_numbers():
    def logits(**more):
        _engine, module, _optimizer, loader = private(dropout=0.5, poisson_sampling=False, **more)
        batch = next(iter(loader))
        torch.manual_seed(0)
        return module(**batch).logits.detach(), torch.rand(1)

    one, two = logits(), logits()
    assert not torch.equal(one[0], two[0])
    torch.manual_seed(0)
    assert torch.equal(one[1], torch.rand(1))
    assert torch.equal(logits(seed=1)[0], logits(seed=1)[0])  # a study's


def test_the_caller_s_random_numbers_go_on_after_an_error_in_the_model():
    _engine, module, _optimizer, loader = private(dropout=0.5)
    batch = next(iter(loader))
    torch.manual_seed(0)
    with pytest.raises(IndexError):
        module(**{**batch, "input_ids": batch["input_ids"] + 10**6})
    found = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(1))


def test_a_part_that_was_refused_is_not_in_the_sum_of_those_who_go_on():
    def run(*, doubled):
        _engine, module, optimizer, loader = private(
            [{"layers": "all", "clip": 0.01}], seed=1, max_physical_batch_size=1
        )
        for k, batch in enumerate(loader):
            optimizer.zero_grad()
            for _ in range(2 if doubled and k == 0 else 1):
                module(**batch).loss.backward()
            try:
                optimizer.step()
            except UserError:
                continue
            if optimizer.stepped:
                return {name: value * 8 for name, value in optimizer.last_message.items()}
        raise AssertionError

    assert distance(run(doubled=True), run(doubled=False), 0.01) <= 1 + 1e-5


def test_a_checkpoint_does_not_make_steps_unhappen():
    engine, module, optimizer, loader = private(seed=0)
    kept = engine.state_dict()
    optimizer.zero_grad()
    module(**next(iter(loader))).loss.backward()
    optimizer.step()
    with pytest.raises(UserError, match="this engine has made 1 steps since make_private"):
        engine.load_state_dict(kept)
    assert engine.steps == 1


def test_a_policy_may_be_a_path_or_a_name_and_nothing_else(tmp_path: Path):
    file = tmp_path / "p.yaml"
    file.write_text("name: p\nrows: [{layers: all, clip: 0.1, noise: 1.0}]\n", "utf-8")
    for given in (file, str(file), "dp-sgd"):
        assert private(given)[2].plan.trained
        assert Client(tiny.module("bert"), given).plan.trained
    with pytest.raises(UserError, match="the policy is a dict; expected a Policy, a file of one or its name"):
        Client(tiny.module("bert"), {"layers": "all"})


@pytest.mark.parametrize(("change", "sentence"), [
    ({"labels": torch.tensor([7])}, r"label 7 is no class of the model; expected 0 to 1"),
    ({"labels": torch.tensor([-1])}, r"label -1 is no class"),
    ({"input_ids": torch.ones(1, 600, dtype=torch.int64), "attention_mask": torch.ones(1, 600, dtype=torch.int64)},
     r"a text of 600 tokens does not fit the model's \d+ positions; expected at most"),
])  # fmt: skip
def test_a_batch_that_the_model_has_no_row_for_is_one_sentence(change, sentence):
    with pytest.raises(UserError, match=sentence):
        message({**encoded(TEXTS[:1]), **change}, 1)


def test_positional_arguments_and_no_return_dict():
    _engine, module, optimizer, loader = private(poisson_sampling=False)
    batch = next(iter(loader))
    by_place = module(batch["input_ids"], batch["attention_mask"]).logits
    assert torch.equal(by_place, module(**batch).logits)
    with pytest.raises(UserError, match="return_dict is False"):
        module(**batch, return_dict=False)
    assert optimizer.mode is not None


@pytest.mark.parametrize(("more", "sentence"), [
    ({"max_physical_batch_size": "a"}, "max_physical_batch_size is 'a'; expected a whole number"),
    ({"lengths": 5}, r"lengths has no entries \(5\); expected one for each"),
])  # fmt: skip
def test_settings_of_another_type(more, sentence):
    with pytest.raises(UserError, match=sentence):
        private(**more)
