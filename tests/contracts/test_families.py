"""What every model family must keep, for every task, with and without LoRA: one suite over `tiny.CASES`."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from dpguard.engine import clipping, gradients, wire
from dpguard.engine.client import Client
from dpguard.engine.gradients import running_as
from dpguard.engine.privacy_engine import PrivacyEngine
from dpguard.engine.sampling import Part
from dpguard.errors import UserError
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import families, family_of, slots
from dpguard.policy.layers import select
from dpguard.policy.table import Plan, Policy
from tests import tiny
from tests.tiny import Case

MODES = sorted(clipping.MODES)
TEXTS = (*tiny.SENTENCES, "no no no pain no", "yes")
"""Of five lengths; a repeated token, and one token alone, which leaves nothing to predict."""
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
ROTARY = {"llama", "mistral", "qwen2", "qwen3"}
"""transformers computes their norms and softmax in float32 whatever the model's dtype, and how a padded row is summed
there depends on the processor's vectors: in float64 they are exact to float32 only."""
PER = ("row", "block", "role", "tensor")
DP = [{"layers": "all", "clip": 1.0, "noise": 0.8}]

every_case = pytest.mark.parametrize("case", tiny.CASES, ids=lambda case: case.id)
every_lora = pytest.mark.parametrize("case", [c for c in tiny.CASES if c.lora], ids=lambda case: case.id)
every_mode = pytest.mark.parametrize("grad_mode", MODES)


def _tolerance(case: Case, dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float64 and case.kind in ROTARY else TOLERANCE[dtype]


def _plan(model, rows) -> Plan:
    return Policy(rows).plan(slots(model))


@cache
def _reference(case: Case, dtype: torch.dtype):
    """A model, a padded batch and, for every parameter, the gradients of the examples run alone, unpadded."""
    model, batch = case.model(dtype=dtype), case.batch(TEXTS)
    names = [slot.name for slot in slots(model) if slot.trainable and not slot.tied_to]
    with running_as(model, "eval"):
        alone = [gradients.gradient(model, batch.rows(slice(i, i + 1)), names) for i in range(len(batch))]
    return model, batch, {name: torch.stack([g[name] for g in alone]) for name in names}


def _padded(batch: Batch, more: int) -> Batch:
    """The same examples with ``more`` further columns of padding."""

    def widen(x, value):
        return torch.cat([x, x.new_full((len(x), more), value)], 1)

    labels = batch.labels if batch.labels.dim() == 1 else widen(batch.labels, -100)
    return Batch(widen(batch.input_ids, 0), widen(batch.attention_mask, 0), labels)


def test_every_model_type_of_every_family_has_a_row() -> None:
    assert {kind for family in families().values() for kind in family.model_types} == set(tiny.ROWS)


# --- roles -----------------------------------------------------------------------------------------------------


@every_case
def test_every_parameter_is_a_slot_with_a_role_that_fits_its_shape(case: Case) -> None:
    model = case.model(width=24, blocks=3)
    found = slots(model)
    named = list(model.named_parameters(remove_duplicate=False))
    assert [(s.name, s.shape, s.trainable) for s in found] == [(n, tuple(p.shape), p.requires_grad) for n, p in named]
    for slot, (name, parameter) in zip(found, named, strict=True):
        first = next(n for n, p in named if p is parameter)
        assert slot.tied_to == ("" if first == name else first)
    words = len(tiny.WORDS) + len(tiny.SPECIAL)
    outputs = {"head": {2, 24, words}, "token_embedding": {words}}
    for slot in found:
        if slot.role in {"norm", "embedding_norm"} or slot.is_bias:
            assert len(slot.shape) == 1, slot
        else:
            assert len(slot.shape) == 2, slot
        if slot.role in outputs:
            assert slot.shape[0] in outputs[slot.role], slot
        if slot.role in {"query", "attention_output"} and not slot.is_bias:
            assert slot.shape == (24, 24), slot
        if slot.role in {"mlp_in", "mlp_gate", "mlp_out"} and not slot.is_bias:
            assert set(slot.shape) == {24, 96 if case.kind == "gpt2" else 48}, slot


@every_case
def test_every_block_has_the_same_roles_and_lists_them_in_the_order_of_the_module(case: Case) -> None:
    found = slots(case.model(blocks=3))
    blocks = [[(s.role, s.shape, s.is_bias) for s in found if s.block == i] for i in range(3)]
    assert blocks[0] == blocks[1] == blocks[2]
    assert {"attention_output", "mlp_in", "mlp_out", "norm"} <= {role for role, *_ in blocks[0]}
    assert [s.block for s in found if s.block is not None] == sorted(s.block for s in found if s.block is not None)
    outside = {s.role for s in found if s.block is None}
    assert {"token_embedding", "head"} <= outside
    assert outside <= {
        "token_embedding", "position_embedding", "type_embedding", "embedding_norm", "norm", "pooler", "head",
    }  # fmt: skip


@every_case
def test_selectors_divide_the_model_and_mean_what_they_say(case: Case) -> None:
    found = slots(case.model(blocks=3))

    def names(selector):
        return [s.name for s in select(selector, found)]

    final = [s.name for s in found if s.role == "norm" and s.block is None]
    poolers = [s.name for s in found if s.role == "pooler"]
    parts = [*names("embeddings"), *names("block[*]"), *final, *poolers, *names("head")]
    assert sorted(parts) == sorted(names("all")) == sorted(s.name for s in found)
    assert len(set(parts)) == len(parts)
    assert all(".2." in name for name in names("block[-1].mlp"))
    mlp = ("mlp", "ffn", "intermediate", "output.dense")
    assert all(any(word in name for word in mlp) and "attention" not in name for name in names("block[-1].mlp"))
    assert all("norm" in n.lower() or "ln_" in n for n in names("norms"))
    normed = {
        n for n, p in case.model(blocks=3).named_parameters() if ("norm" in n.lower() or "ln_" in n) and p.dim() == 1
    }
    assert normed == set(names("norms"))
    adapters = [s.name for s in found if "lora_" in s.name]
    assert bool(adapters) == case.lora
    if case.lora:
        assert names("adapters") == adapters
        assert sorted(names("adapters.a") + names("adapters.b")) == sorted(adapters)
        assert set(names("block[1].adapters")) == {n for n in adapters if ".1." in n}
        assert all("lora_" not in n for n in names("block[1].attention") + names("block[1].mlp"))


# --- the forward pass ------------------------------------------------------------------------------------------


@every_case
def test_positions_are_explicit_and_one_row_an_example(case: Case) -> None:
    model, batch = case.model(), case.batch(TEXTS)
    ids = gradients.forward_arguments(model, batch)["position_ids"]
    assert ids.shape == batch.input_ids.shape
    assert ids.is_contiguous()
    first = ids[0, 0].item()
    for row, length in zip(ids, batch.attention_mask.sum(1).tolist(), strict=True):
        assert row[:length].tolist() == list(range(first, first + length))
    assert first + family_of(model).max_tokens(model.config) == 48, "rows of the position table"


@every_case
def test_an_examples_loss_depends_on_neither_companions_nor_padding(case: Case) -> None:
    model, batch = case.model(dtype=torch.float64), case.batch(TEXTS)
    together = gradients.per_example_losses(model, batch)
    assert together.dtype == torch.float64
    alone = torch.cat([gradients.per_example_losses(model, batch.rows(slice(i, i + 1))) for i in range(len(batch))])
    backwards = gradients.per_example_losses(model, batch.rows(torch.arange(len(batch)).flip(0))).flip(0)
    wide = gradients.per_example_losses(model, _padded(batch, 7))
    for other in (alone, backwards, wide):
        assert torch.allclose(together, other, rtol=0, atol=_tolerance(case, torch.float64))
    assert together[:4].std() > 0


@every_case
def test_the_loss_of_one_example_is_the_models_own(case: Case) -> None:
    model, batch = case.model(dtype=torch.float64), case.batch()
    for i in range(len(batch)):
        one = batch.rows(slice(i, i + 1))
        own = model(input_ids=one.input_ids, attention_mask=one.attention_mask, labels=one.labels).loss
        assert gradients.per_example_losses(model, one).item() == pytest.approx(own.item(), rel=1e-6)


@every_case
def test_token_embeddings_in_place_of_ids_give_the_same_losses(case: Case) -> None:
    model, batch = case.model(dtype=torch.float64), case.batch(TEXTS)
    embeddings = model.get_input_embeddings()(batch.input_ids)
    direct = gradients.per_example_losses(model, batch)
    through = gradients.per_example_losses(model, batch, embeddings=embeddings)
    assert torch.allclose(direct, through, rtol=0, atol=1e-10)


@every_case
def test_without_dropout_train_mode_is_the_same_function_as_eval_mode(case: Case) -> None:
    model, batch = case.model(**_dropout(case)), case.batch(TEXTS)
    still = gradients.per_example_losses(model.eval(), batch)
    with running_as(model, "eval"):
        assert torch.allclose(gradients.per_example_losses(model, batch), still, atol=1e-6)
    with running_as(model, "train"):
        assert not torch.allclose(gradients.per_example_losses(model, batch), still, atol=1e-4)
    assert torch.equal(gradients.per_example_losses(model, batch), still), "the rates came back"


def _dropout(case: Case) -> dict[str, float]:
    """Configuration of a model that drops out inside attention, where Llama's kin have none by default."""
    return {"attention_dropout": 0.3} if "llama" in family_of(case.model()).name else {}


# --- gradients -------------------------------------------------------------------------------------------------


def _clip(per_example: dict[str, torch.Tensor], plan: Plan) -> float:
    """A bound that about half of the (example, group) pairs exceed."""
    squared = {name: g.flatten(1).pow(2).sum(1) for name, g in per_example.items()}
    norms = torch.cat([wire.group_norms(squared, group) for group in plan.groups.values()])
    return norms[norms > 1e-6 * norms.max()].median().item()


def _error(got: wire.ClippedSum, want: wire.ClippedSum, plan: Plan) -> float:
    """Largest relative error of a group's clipped sum; groups of zero gradient (attention.key.bias) by the whole."""
    assert got.sums.keys() == want.sums.keys()
    whole = math.sqrt(sum(v.pow(2).sum().item() for v in want.sums.values()))
    errors = []
    for group in plan.groups.values():
        size = math.sqrt(sum(want.sums[n].pow(2).sum().item() for n in group.names))
        off = math.sqrt(sum((got.sums[n] - want.sums[n]).pow(2).sum().item() for n in group.names))
        errors.append(off / max(size, 1e-3 * whole))
    return max(errors)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_mode
@every_case
def test_clipped_sums_are_those_of_one_example_at_a_time(case: Case, grad_mode: str, dtype: torch.dtype) -> None:
    model, batch, per_example = _reference(case, dtype)
    for per in PER:
        clip = _clip(per_example, _plan(model, [{"layers": "all", "clip": 1.0, "per": per}]))
        plan = _plan(model, [{"layers": "all", "clip": clip, "per": per}])
        want = wire.clip_and_sum(per_example, plan)
        got = Client(model, plan, grad_mode=grad_mode).clipped(batch)
        assert _error(got, want, plan) <= _tolerance(case, dtype), per
        for key, norms in want.norms.items():
            scale = max(1e-3, norms.max().item())
            assert torch.allclose(got.norms[key], norms, rtol=0, atol=10 * _tolerance(case, dtype) * scale), (per, key)


@every_mode
@every_case
def test_one_example_and_none(case: Case, grad_mode: str) -> None:
    model, batch, per_example = _reference(case, torch.float32)
    plan = _plan(model, [{"layers": "all", "clip": 0.05}])
    one = Client(model, plan, grad_mode=grad_mode).clipped(batch.rows(slice(1, 2)))
    want = wire.clip_and_sum({name: g[1:2] for name, g in per_example.items()}, plan)
    assert _error(one, want, plan) <= 1e-5
    none = Client(model, plan, grad_mode=grad_mode).clipped(batch.rows(slice(0, 0)))
    assert none.sums.keys() == want.sums.keys()
    assert all(value.shape == want.sums[name].shape and not value.any() for name, value in none.sums.items())


@every_case
def test_the_same_dropout_seed_gives_the_same_gradient_in_every_mode_that_runs_the_whole_batch(case: Case) -> None:
    model = case.model(dtype=torch.float64, **_dropout(case))
    batch, plan = case.batch(TEXTS), _plan(model, [{"layers": "all", "clip": 0.05, "per": "block"}])

    def clipped(grad_mode, seed):
        return Client(model, plan, mode="train", dropout_seed=seed, grad_mode=grad_mode).clipped(batch)

    # the loop draws other masks: one example has no companions whose masks come first
    whole = [mode for mode in MODES if mode != "loop"]
    first = clipped(whole[0], 3)
    assert all(_error(clipped(mode, 3), first, plan) <= 1e-10 for mode in whole)
    assert _error(clipped(whole[0], 4), first, plan) > 1e-3


# --- training --------------------------------------------------------------------------------------------------


def _collate(case: Case):
    def collate(texts):
        batch = case.batch(texts) if texts else case.batch(TEXTS).rows(slice(0, 0))
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    return collate


def _private(case: Case, rows, **options):
    model = case.model().train()
    loader = DataLoader([t for t in TEXTS for _ in range(6)], batch_size=5, collate_fn=_collate(case))
    engine = PrivacyEngine()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, policy=Policy(rows), seed=0, **options
    )
    return engine, *out[:2]


def _step(case: Case, module, optimizer, texts) -> tuple[set[str], dict[str, torch.Tensor]]:
    """One step; the names in the state dictionary that moved, and the message."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer.zero_grad()
    optimizer.begin_part(Part(first=True, last=True, rows=len(texts), epoch=1))  # as the loader says of its batches
    module(**_collate(case)(texts)).loss.backward()
    optimizer.step()
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    return moved, optimizer.last_message


@every_case
def test_a_step_moves_exactly_what_is_trained(case: Case) -> None:
    upper = [{"layers": ["block[0]"], "train": False}] if not case.lora else []
    engine, module, optimizer = _private(case, DP + upper)
    ties = {s.name: s.tied_to for s in slots(module) if s.tied_to}
    wanted = set(engine.plan.trained)
    wanted |= {name for name, first in ties.items() if first in wanted}
    for texts in (list(TEXTS), [TEXTS[0]], []):  # a Poisson batch may have any size
        moved, message = _step(case, module, optimizer, texts)
        assert moved == wanted
        assert set(message) == set(engine.plan.trained)
    assert engine.steps == 3
    assert 0 < engine.get_epsilon(1e-3) < math.inf


@every_lora
def test_lora_under_a_policy_of_the_adapters_alone(case: Case) -> None:
    rows = [{"layers": "adapters", "clip": 1.0, "noise": 0.8}]
    if case.task == tiny.CLASSIFICATION:
        assert any("modules_to_save" in name for name in _private(case, rows)[0].plan.trained)
        rows.append({"layers": "head", "train": False})
    engine, module, optimizer = _private(case, rows)
    moved, message = _step(case, module, optimizer, list(TEXTS))
    adapters = {name for name, _ in module.named_parameters() if "lora_" in name}
    assert moved == set(message) == adapters
    assert 0 < engine.get_epsilon(1e-3) < math.inf


@every_lora
def test_trained_adapters_are_in_what_is_saved(case: Case, tmp_path) -> None:
    """Opacus issue #820: a wrapped model was trained, and the adapters that were saved had not moved."""
    from peft import PeftModel

    engine, module, optimizer = _private(case, DP)
    fresh = case.model()
    _step(case, module, optimizer, list(TEXTS))
    engine.close()
    module.save_pretrained(tmp_path)
    base = tiny.module(case.kind + ("-lm" if case.task == tiny.NEXT_TOKEN else ""), width=16, blocks=2)
    again = PeftModel.from_pretrained(base, str(tmp_path)).state_dict()
    trained, start = module.state_dict(), fresh.state_dict()
    for name in engine.plan.trained:
        assert torch.equal(again[name], trained[name]), name
        assert not torch.equal(again[name], start[name]), name


def test_lora_with_biases_and_saved_embeddings_has_their_roles() -> None:
    model = tiny.lora(
        tiny.module("bert", width=16, blocks=2), bias="lora_only", modules_to_save=["classifier", "LayerNorm"]
    )
    found = {slot.name.removeprefix("base_model.model."): slot for slot in slots(model)}
    bias = found["bert.encoder.layer.1.attention.self.query.base_layer.bias"]
    assert (bias.role, bias.block, bias.trainable) == ("query", 1, True)
    norm = found["bert.encoder.layer.1.output.LayerNorm.modules_to_save.default.weight"]
    assert (norm.role, norm.block, norm.trainable) == ("norm", 1, True)
    old = found["bert.encoder.layer.1.output.LayerNorm.original_module.weight"]
    assert (old.role, old.block, old.trainable) == ("norm", 1, False)
    head = found["classifier.modules_to_save.default.weight"]
    assert (head.role, head.block, head.trainable) == ("head", None, True)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_lora_on_the_token_embeddings(kind: str) -> None:
    table = {"bert": "word_embeddings", "llama": "embed_tokens"}[kind]
    model = tiny.lora(tiny.module(kind, width=16, blocks=2), target_modules=[table])
    adapters = [slot for slot in slots(model) if "lora_" in slot.name]
    assert [(s.role, s.block) for s in adapters] == [("adapter_a", None), ("adapter_b", None)]
    batch, plan = Case(kind).batch(), _plan(model, [{"layers": "all", "clip": 1e3}])
    with running_as(model, "eval"):
        want = gradients.gradient(model, batch, plan.trained)
    got = Client(model, plan, grad_mode="loop").clipped(batch).sums
    assert all(torch.allclose(got[name], value, atol=1e-6) for name, value in want.items())


def test_a_masked_language_models_twice_registered_bias_is_one_tied_slot() -> None:
    config = tiny.ROWS["bert"].config(**tiny.ROWS["bert"].shape(16, 1), vocab_size=67)
    found = slots(transformers.BertForMaskedLM(config))
    assert {s.name: s.tied_to for s in found if s.tied_to} == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    assert all(s.role == "head" for s in found if s.name.startswith("cls."))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_head_tied_to_the_embeddings_is_one_tensor_of_one_group(kind: str) -> None:
    model = Case(kind, tiny.NEXT_TOKEN).model()
    plan = _plan(model, [{"layers": "all", "clip": 1.0, "per": "tensor"}])
    tied = [slot for slot in slots(model) if slot.tied_to]
    assert [slot.name for slot in tied] == ["lm_head.weight"]
    assert "lm_head.weight" not in plan
    with pytest.raises(UserError, match="are one tied tensor"):
        _plan(model, [{"layers": "embeddings.token", "clip": 1.0}, {"layers": "head", "clip": 2.0}])


@pytest.mark.parametrize("kind", [kind for kind, row in tiny.ROWS.items() if tiny.NEXT_TOKEN in row.classes])
def test_a_decoders_classifier_needs_to_know_its_padding(kind: str) -> None:
    case = Case(kind)
    model = case.model()
    model.config.pad_token_id = None
    with pytest.raises(UserError, match="pad_token_id is not set"):
        gradients.per_example_losses(model, case.batch())
