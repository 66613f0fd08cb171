"""DistilBERT: a six-block BERT without pooler and token types; its pre-classifier belongs to the head."""

from dpguard.inputs.family import Family

_B = r"transformer\.layer\.(?P<block>\d+)\."

PLUGIN = Family(
    name="distilbert",
    model_types=("distilbert",),
    rules=(
        (r"embeddings\.word_embeddings\.", "token_embedding"),
        (r"embeddings\.position_embeddings\.", "position_embedding"),
        (r"embeddings\.LayerNorm\.", "embedding_norm"),
        (_B + r"attention\.q_lin\.", "query"),
        (_B + r"attention\.k_lin\.", "key"),
        (_B + r"attention\.v_lin\.", "value"),
        (_B + r"attention\.out_lin\.", "attention_output"),
        (_B + r"ffn\.lin1\.", "mlp_in"),
        (_B + r"ffn\.lin2\.", "mlp_out"),
        (_B + r"(sa|output)_layer_norm\.", "norm"),
        (
            r"^(pre_classifier|classifier|vocab_transform|vocab_layer_norm|vocab_projector|qa_outputs)\.",
            "head",
        ),
    ),
)
