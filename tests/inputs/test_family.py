from __future__ import annotations

import pytest

from dpguard.inputs.family import bare, families, family_of, slots
from tests import tiny

LLAMA = {
    "model.embed_tokens.weight": ("token_embedding", None),
    "model.layers.12.self_attn.q_proj.weight": ("query", 12),
    "model.layers.12.self_attn.k_proj.bias": ("key", 12),
    "model.layers.12.self_attn.v_proj.weight": ("value", 12),
    "model.layers.12.self_attn.o_proj.weight": ("attention_output", 12),
    "model.layers.12.self_attn.q_norm.weight": ("norm", 12),
    "model.layers.12.mlp.gate_proj.weight": ("mlp_gate", 12),
    "model.layers.12.mlp.up_proj.weight": ("mlp_in", 12),
    "model.layers.12.mlp.down_proj.weight": ("mlp_out", 12),
    "model.layers.12.input_layernorm.weight": ("norm", 12),
    "model.layers.12.post_attention_layernorm.weight": ("norm", 12),
    "model.norm.weight": ("norm", None),
    "score.weight": ("head", None),
    "lm_head.weight": ("head", None),
}
PEFT = {
    "base_model.model.model.layers.3.mlp.up_proj.base_layer.weight": ("mlp_in", 3),
    "base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight": ("adapter_a", 3),
    "base_model.model.model.layers.3.mlp.up_proj.lora_B.default.weight": ("adapter_b", 3),
    "base_model.model.model.layers.3.mlp.up_proj.lora_B.default.bias": ("adapter_b", 3),
    "base_model.model.model.layers.3.mlp.up_proj.lora_A.7.weight": ("adapter_a", 3),
    "base_model.model.model.embed_tokens.lora_embedding_A.default": ("adapter_a", None),
    "base_model.model.model.embed_tokens.lora_embedding_B.5": ("adapter_b", None),
    "base_model.model.score.modules_to_save.default.weight": ("head", None),
    "base_model.model.score.original_module.weight": ("head", None),
    "base_model.model.score.lora_A.1.weight": ("adapter_a", None),
    # an adapter that transformers itself put into a model, without PEFT's wrapper
    "model.layers.3.self_attn.q_proj.lora_A.default.weight": ("adapter_a", 3),
    # neither LoRA nor a layer's own weight or bias
    "base_model.model.model.layers.3.mlp.up_proj.lora_magnitude_vector.default.weight": None,
    "base_model.model.score.lora_magnitude_vector.default.weight": None,
    "base_model.model.model.layers.3.mlp.up_proj.ia3_l.default": None,
    "base_model.model.model.layers.3.mlp.up_proj.hada_w1_a.default": None,
    "base_model.model.model.layers.3.gadget.lora_A.default.weight": None,
    "model.layers.3.mlp.up_proj.gadget.weight": None,
}


@pytest.mark.parametrize(("name", "expected"), (LLAMA | PEFT).items(), ids=lambda x: x if isinstance(x, str) else "")
def test_roles_and_blocks_of_llama_with_and_without_adapters(name, expected):
    assert families()["llama"].role(name) == expected


def test_inside_a_peft_wrapper_is_the_model_itself():
    plain = tiny.module("llama", width=16, blocks=1)
    assert bare(plain) is plain
    wrapped = tiny.lora(plain)
    assert bare(wrapped) is plain
    assert family_of(wrapped) is families()["llama"]


def test_two_adapters_of_one_model_are_told_apart_by_name():
    import peft

    model = tiny.lora(tiny.module("bert", width=16, blocks=1))
    model.add_adapter("second", peft.LoraConfig(target_modules=["key"]))
    found = {slot.name: slot for slot in slots(model)}
    key = "base_model.model.bert.encoder.layer.0.attention.self.key"
    assert found[f"{key}.lora_A.second.weight"].role == "adapter_a"
    assert not found[f"{key}.lora_A.second.weight"].trainable, "the first one is active"
    assert found[f"{key}.base_layer.weight"].role == "key"
