"""Llama and its kin: pre-norm decoders with rotary positions, RMSNorm, grouped-query attention and a gated MLP.

Qwen2 adds biases to query, key and value, Qwen3 norms of query and key. Positions have no parameters.
"""

from dpguard.inputs.family import Family

_B = r"(^|\.)layers\.(?P<block>\d+)\."

PLUGIN = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    rules=(
        (r"(^|\.)embed_tokens\.", "token_embedding"),
        (_B + r"self_attn\.q_proj\.", "query"),
        (_B + r"self_attn\.k_proj\.", "key"),
        (_B + r"self_attn\.v_proj\.", "value"),
        (_B + r"self_attn\.o_proj\.", "attention_output"),
        (_B + r"self_attn\.[qk]_norm\.", "norm"),
        (_B + r"mlp\.gate_proj\.", "mlp_gate"),
        (_B + r"mlp\.up_proj\.", "mlp_in"),
        (_B + r"mlp\.down_proj\.", "mlp_out"),
        (_B + r"(input|post_attention)_layernorm\.", "norm"),
        (r"^(model\.)?norm\.", "norm"),
        (r"^(score|lm_head|classifier|qa_outputs)\.", "head"),
    ),
    causal=True,
)
