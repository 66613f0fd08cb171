"""Every gradient mode gives the same clipped sum: partitions, tied and repeated weights, padding, bad examples.

Real model families are in tests/contracts/test_families.py; here are a model made to be difficult, and what a mode
must do around the sum.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpguard.engine import clipping
from dpguard.engine.client import Client
from dpguard.engine.gradients import per_example_losses, running_as
from dpguard.engine.modes.contributions import Dense, Grams, Lookup, Outer, merge, squared_norm
from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy.layers import Slot
from dpguard.policy.table import Policy
from tests import tiny

TEXTS = ["the nurse called about her new test result today", "yes", "the old bank card was lost", "no pain in the arm"]
PARTITIONS = {
    "flat": [{"layers": "all", "clip": 0.3}],
    "tensor": [{"layers": "all", "clip": 0.05, "per": "tensor"}],
    "mixture": [
        {"layers": "all", "clip": 0.5},
        {"layers": "name:shared.*", "clip": 0.05, "per": "tensor"},
        {"layers": "biases", "train": False},
    ],
}


class Scale(nn.Module):
    """A layer that no rule knows: y = x * scale, elementwise."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x):
        return x * self.scale


class Doubled(nn.Linear):
    """A Linear whose forward is another one: the rule of Linear would be wrong by a factor."""

    def forward(self, x):
        return 2 * super().forward(x)


class Difficult(nn.Module):
    """Tied head, a linear layer used three times, both norms, dropout, an unknown layer, a pooled two-dim input."""

    def __init__(self, width=12, vocabulary=23, dropout=0.0):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=0)
        self.shared = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.rms = nn.RMSNorm(width)
        self.scale = Scale(width)
        self.doubled = Doubled(width, width)
        self.dropout = nn.Dropout(dropout)
        self.pooled = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        for _ in range(3):
            x = x + self.dropout(torch.tanh(self.shared(self.norm(x))))
        x = self.doubled(self.scale(self.rms(x))) + torch.tanh(self.pooled(x.mean(1)))[:, None]
        return SimpleNamespace(logits=self.head(x))


def difficult(**options):
    torch.manual_seed(3)
    model = Difficult(**options)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model.train()


def plan_of(model, rows):
    first, listed = {}, []
    for name, p in model.named_parameters(remove_duplicate=False):
        tied = first.setdefault(id(p), name)
        listed.append(Slot(name, tuple(p.shape), "norm", None, "" if tied == name else tied))
    return Policy(rows).plan(listed)


IDS = torch.tensor([[1, 2, 2, 5, 0], [7, 1, 7, 7, 3], [9, 8, 0, 0, 0], [4, 4, 4, 4, 4]])


def backward(model, ids, reduction="sum"):
    losses = F.cross_entropy(model(ids=ids).logits.transpose(1, 2), ids.roll(-1, 1), reduction="none").mean(1)
    (losses.mean() if reduction == "mean" else losses.sum()).backward()


def collected(model, rows, mode, *, ids=IDS, reduction="sum", parts=1, **more):
    plan = plan_of(model, rows)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in plan.trained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attached = clipping.attach(model, plan, loss_reduction=reduction, grad_mode=mode)
        try:
            for part in ids.chunk(parts):
                backward(model, part, reduction, **more)
                if parts > 1:
                    attached.fold()
            return attached.collect()
        finally:
            attached.detach()


def distance(one, two):
    """Largest relative error of a tensor; of the whole sum where the tensor is next to nothing."""
    whole = torch.stack([v.double().norm() for v in two.sums.values()]).norm()
    return max(float((one.sums[n] - v).norm() / max(v.norm(), 1e-3 * whole)) for n, v in two.sums.items())


@pytest.mark.parametrize("partition", PARTITIONS)
def test_tied_repeated_and_unknown_layers_give_the_loops_sum(partition):
    model = difficult().double()
    reference = collected(model, PARTITIONS[partition], "loop")
    found = collected(model, PARTITIONS[partition], "fast")
    assert distance(found, reference) < 1e-12
    assert any(float(n.max()) > 0.3 for n in reference.norms.values())  # something was clipped
    for key, norms in reference.norms.items():
        assert torch.allclose(found.norms[key], norms, rtol=1e-10, atol=1e-14)


def test_float32_stays_within_a_hundred_thousandth():
    model = difficult()
    for rows in PARTITIONS.values():
        reference = collected(difficult().double(), rows, "loop")
        assert distance(collected(model, rows, "fast"), reference) < 1e-5


@pytest.mark.parametrize("mode", ["fast", "loop"])
def test_mean_and_sum_losses_and_parts_of_a_batch_give_one_sum(mode):
    model = difficult().double()
    reference = collected(model, PARTITIONS["tensor"], mode)
    for options in ({"reduction": "mean"}, {"parts": 2}, {"parts": 4, "reduction": "mean"}):
        found = collected(model, PARTITIONS["tensor"], mode, **options)
        assert distance(found, reference) < 1e-12, options
        assert {k: len(v) for k, v in found.norms.items()} == dict.fromkeys(reference.norms, 4)


def test_a_second_forward_pass_folds_the_first_part():
    model = difficult().double()
    plan = plan_of(model, PARTITIONS["flat"])
    with pytest.warns(UserWarning, match="samplers for scale"):
        attached = clipping.attach(model, plan, loss_reduction="sum")
    backward(model, IDS[:1])
    backward(model, IDS[1:])
    found = attached.collect()
    attached.detach()
    assert distance(found, collected(model, PARTITIONS["flat"], "loop")) < 1e-12


def test_one_bad_example_is_left_out_everywhere_and_counted():
    for mode in ("fast", "loop"):
        model = difficult().double()
        with torch.no_grad():
            model.tokens.weight[2] = float("nan")  # only the first example holds token 2 ...
        tied = model.head.weight
        model.head.weight = nn.Parameter(difficult().double().head.weight.detach().clone())  # ... as an input
        assert tied is model.tokens.weight
        reference = difficult().double()
        reference.head.weight = nn.Parameter(reference.tokens.weight.detach().clone())
        good = collected(reference, PARTITIONS["mixture"], "fast", ids=IDS[1:])
        found = collected(model, PARTITIONS["mixture"], mode)
        assert found.dropped == 1
        assert distance(found, good) < 1e-12


def test_dropout_in_train_mode_uses_the_masks_of_the_forward_pass():
    sums = []
    for mode in ("fast", "opacus"):
        model = difficult(dropout=0.4).double()
        model.tokens.padding_idx = None  # Opacus gives the padding row a gradient, which autograd does not
        torch.manual_seed(12)
        sums.append(collected(model, PARTITIONS["tensor"], mode))
    assert distance(*sums) < 1e-10


def test_half_precision_activations_still_bound_every_example_and_sum_in_float32():
    model = difficult().bfloat16()
    whole = collected(model, PARTITIONS["tensor"], "fast")
    assert {v.dtype for v in whole.sums.values()} == {torch.float32}
    assert {v.dtype for v in whole.norms.values()} == {torch.float32}
    for i in range(len(IDS)):
        one = collected(model, PARTITIONS["tensor"], "fast", ids=IDS[i : i + 1])
        for value in one.sums.values():
            assert float(value.norm()) <= 0.05 * (1 + 1e-5)
    reference = collected(difficult().double(), [{"layers": "all", "clip": 1e9}], "loop")
    assert distance(collected(model, [{"layers": "all", "clip": 1e9}], "fast"), reference) < 0.1


def test_frozen_layers_are_neither_differentiated_nor_touched():
    model = difficult()
    rows = [{"layers": "all", "train": False}, {"layers": "name:pooled.*", "train": True, "clip": 1.0}]
    plan = plan_of(model, rows)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in plan.trained)
    attached = clipping.attach(model, plan)
    seen = []
    model.shared.register_forward_hook(lambda _m, _a, out: seen.append(out.requires_grad))
    backward(model, IDS, "mean")
    assert seen == [False] * 3
    assert set(attached.collect().sums) == {"pooled.weight", "pooled.bias"}
    assert model.shared.weight.grad is None
    assert model.pooled.weight.requires_grad
    attached.detach()


@pytest.mark.parametrize("mode", clipping.MODES)
def test_detach_leaves_an_ordinary_model(mode):
    model = difficult()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    collected(model, PARTITIONS["tensor"], mode)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert "forward" not in vars(model)
    backward(model, IDS)
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))


@pytest.mark.parametrize("mode", clipping.MODES)
def test_a_trained_tensor_outside_the_loss_is_an_error_not_a_zero(mode):
    model = difficult()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"'unused\.weight' is trained but took no part"):
        collected(model, [{"layers": "all", "clip": 1.0}], mode)


def test_an_input_that_is_not_per_example_is_an_error():
    model = tiny.module("bert", width=16, blocks=1).train()
    plan = Policy([{"layers": "all", "clip": 1.0}]).plan(slots(model))
    attached = clipping.attach(model, plan)
    ids = torch.randint(5, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, position_ids=torch.arange(6)[None]).logits.sum().backward()
    with pytest.raises(RuntimeError, match="a broadcast input"):
        attached.collect()
    attached.detach()


def test_an_input_overwritten_in_place_is_an_error():
    class Overwrites(Difficult):
        def forward(self, ids):
            x = self.tokens(ids) * 1.0
            y = self.shared(x)
            x.detach().mul_(0.5)
            return SimpleNamespace(logits=self.head(y))

    torch.manual_seed(0)
    model = Overwrites().train()
    rows = [{"layers": "all", "train": False}, {"layers": "name:shared.*", "train": True, "clip": 1.0}]
    with pytest.raises(RuntimeError, match="overwritten in place"):
        collected(model, rows, "fast")


def test_a_layer_that_nothing_can_handle_is_refused_before_any_step():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(12, 12)
            self.gain = nn.Parameter(torch.ones(12))

        def forward(self, x):
            return self.inner(x) * self.gain

    model = difficult()
    model.pooled = Holder()
    with pytest.raises(UserError, match=r"'pooled' \(Holder\) .* expected it frozen \(train: false\), or grad_mode"):
        collected(model, PARTITIONS["flat"], "fast")
    assert collected(model, PARTITIONS["flat"], "loop").sums["pooled.gain"].norm() > 0


def test_a_layer_that_gives_no_tensor_is_refused_at_its_first_use():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRU(12, 12, batch_first=True)

        def forward(self, x):
            return self.cell(x[:, None])[0][:, 0]

    model = difficult()
    model.pooled = First()
    with pytest.raises(UserError, match=r"GRU has trained tensors and gives tuple, .* grad_mode='loop'"):
        collected(model, PARTITIONS["flat"], "fast")
    assert collected(model, PARTITIONS["flat"], "loop").sums["pooled.cell.weight_ih_l0"].norm() > 0


def test_an_unknown_mode_names_the_nearest():
    model = difficult()
    with pytest.raises(UserError, match="unknown grad_mode 'fst'; did you mean 'fast'"):
        clipping.attach(model, plan_of(model, PARTITIONS["flat"]), grad_mode="fst")


def test_attached_modes_do_not_disturb_evaluation():
    model = tiny.module("distilbert", width=16, blocks=1).train()
    attached = clipping.attach(model, Policy([{"layers": "all", "clip": 1.0}]).plan(slots(model)))
    case = tiny.Case("distilbert")
    batch = case.batch(TEXTS)
    with torch.no_grad(), running_as(model, "eval"):
        losses = per_example_losses(model, batch)
    assert not losses.requires_grad
    model.eval()
    per_example_losses(model, batch).sum().backward()  # outside train mode: an ordinary gradient
    assert all(p.requires_grad for p in model.parameters())
    assert not attached.pending()
    attached.detach()


@pytest.mark.parametrize("steps", [2, 30])  # Gram matrices, and example by example
def test_factored_norms_and_sums_equal_the_written_out_ones(steps):
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, steps, d, generator=g, dtype=torch.float64) for d in (11, 7))
    ids = torch.randint(0, 11, (3, 5), generator=g)
    looked = torch.randn(3, 5, 7, generator=g, dtype=torch.float64)
    value = torch.randn(3, 11, 7, generator=g, dtype=torch.float64)
    uses = [Outer(left, right), Lookup(ids, looked), Dense(value), Outer(left.flip(1), right), Lookup(ids, looked)]
    shape = torch.Size((11, 7))
    written = torch.stack([use.dense(shape) for use in uses]).sum(0)
    merged = merge(uses)
    assert len(merged) == 3
    assert torch.allclose(squared_norm(merged, shape, Grams()), written.square().sum((1, 2)), rtol=1e-12)
    factors = torch.rand(3, generator=g, dtype=torch.float64)
    total = torch.einsum("b,bij->ij", factors, written)
    for start in (None, torch.zeros(shape, dtype=torch.float64)):
        into = start
        for use in merged:
            into = use.weighted(factors, shape, into)
        assert torch.allclose(into, total, rtol=1e-12)
    bad = torch.tensor([False, True, False])
    assert all(not use.without(bad).dense(shape)[1].any() for use in merged)


@pytest.mark.parametrize("mode", ["fast", "opacus"])
def test_lora_on_embeddings_is_refused_before_any_step_and_the_loop_can_do_it(mode):
    model = tiny.lora(tiny.module("bert", width=16, blocks=1), target_modules=["query", "word_embeddings"]).train()
    plan = Policy([{"layers": "adapters", "clip": 1.0}, {"layers": "head", "train": False}]).plan(slots(model))
    with pytest.raises(UserError, match=r"lora_embedding_A.*ParameterDict.*grad_mode='loop'"):
        clipping.attach(model, plan, grad_mode=mode)
    client = Client(model, plan, grad_mode="loop", seed=0)
    assert client.clipped(tiny.Case("bert").batch(TEXTS)).sums
