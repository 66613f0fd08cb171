from __future__ import annotations

import pytest

from dpguard.errors import UserError
from dpguard.inputs.family import slots
from dpguard.policy.layers import select
from tests import tiny


@pytest.fixture(scope="module")
def bert():
    return slots(tiny.module("bert"))


def names(selector, found):
    return {slot.name for slot in select(selector, found)}


def test_every_granularity_of_the_seed_paper(bert):
    everything = names("all", bert)
    assert (
        names("block[*]", bert) | names("embeddings", bert) | names("pooler", bert) | names("head", bert) == everything
    )
    block = "bert.encoder.layer.1."
    assert names("block[1]", bert) == {n for n in everything if n.startswith(block)}
    for selector, module in {
        "block[1].attention.query": "attention.self.query",
        "block[1].attention.key": "attention.self.key",
        "block[1].attention.value": "attention.self.value",
        "block[1].attention.output": "attention.output.dense",
        "block[1].mlp.in": "intermediate.dense",
        "block[1].mlp.out": "output.dense",
    }.items():
        assert names(selector, bert) == {f"{block}{module}.weight", f"{block}{module}.bias"}, selector
    qkv = {f"{block}attention.self.{n}.{k}" for n in ("query", "key", "value") for k in ("weight", "bias")}
    assert names("block[1].attention.qkv", bert) == qkv


def test_mlp_out_does_not_catch_attention_output(bert):
    # the seed paper's "ffn_output" substring selects attention.output as well
    assert not any("attention" in name for name in names("block[*].mlp.out", bert))


def test_indices(bert):
    assert names("block[-1]", bert) == names("block[2]", bert)
    assert names("block[0:2]", bert) == names("block[0]", bert) | names("block[1]", bert)
    assert names("block[1:]", bert) == names("block[1]", bert) | names("block[2]", bert)
    assert names("block[0:50%]", bert) == names("block[0]", bert)
    assert names("block[ 0 : 2 ]", bert) == names("block[0:2]", bert)


def test_weight_bias_norms_biases(bert):
    assert names("block[0].attention.query.weight", bert) == {"bert.encoder.layer.0.attention.self.query.weight"}
    assert all(name.endswith("bias") for name in names("biases", bert))
    assert names("norms", bert) >= names("embeddings.norm", bert)
    assert names("name:*.query.bias", bert) == {f"bert.encoder.layer.{i}.attention.self.query.bias" for i in range(3)}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_same_selectors_mean_the_same_in_every_family(family):
    found = slots(tiny.module(family))
    whole = {s.name for s in found}
    parts = [names(s, found) for s in ("embeddings", "block[*].attention.qkv", "block[*].mlp", "head")]
    assert all(parts)
    assert len(set().union(*parts)) == sum(map(len, parts)), "parts overlap"
    assert set().union(*parts) < whole


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        ("blok[1]", "unknown selector 'blok[1]'; did you mean 'block[0]'?"),
        ("block[1].attention.qery", "did you mean 'attention.query'?"),
        ("block[x]", "expected 3, -1, *, 0:4, 2: or 0:50%"),
        ("block[0 1]", "expected 3, -1, *, 0:4, 2: or 0:50%"),
        ("block[0:150%]", "expected 3, -1, *, 0:4, 2: or 0:50%"),
        ("block[0]\n", "unknown selector"),
        ("block[7]", "matches nothing in this model; it has blocks 0 to 2"),
        ("adapters", "matches nothing in this model"),
        ("name:*.qurey.*", "matches nothing"),
        ("", "is no text"),
    ],
)
def test_a_selector_that_cannot_be_meant_is_one_sentence(bert, selector, said):
    with pytest.raises(UserError) as error:
        select(selector, bert)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_fused_matrix_is_named():
    with pytest.raises(UserError, match=r"use '\.attention\.qkv'"):
        select("block[0].attention.query", slots(tiny.module("gpt2")))
