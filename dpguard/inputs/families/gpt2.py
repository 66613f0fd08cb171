"""GPT-2: pre-norm decoder, fused query-key-value in a Conv1D, language-model head tied to the embeddings."""

from dpguard.inputs.family import Family

_B = r"(^|\.)h\.(?P<block>\d+)\."

PLUGIN = Family(
    name="gpt2",
    model_types=("gpt2",),
    rules=(
        (r"(^|\.)wte\.", "token_embedding"),
        (r"(^|\.)wpe\.", "position_embedding"),
        (_B + r"attn\.c_attn\.", "qkv"),
        (_B + r"attn\.c_proj\.", "attention_output"),
        (_B + r"mlp\.c_fc\.", "mlp_in"),
        (_B + r"mlp\.c_proj\.", "mlp_out"),
        (_B + r"ln_[12]\.", "norm"),
        (r"(^|\.)ln_f\.", "norm"),
        (r"^(score|lm_head|classifier)\.", "head"),
    ),
    causal=True,
)
