"""BERT: post-norm encoder, separate query, key and value."""

from dpguard.inputs.family import Family

_B = r"encoder\.layer\.(?P<block>\d+)\."

PLUGIN = Family(
    name="bert",
    model_types=("bert",),
    rules=(
        (r"embeddings\.word_embeddings\.", "token_embedding"),
        (r"embeddings\.position_embeddings\.", "position_embedding"),
        (r"embeddings\.token_type_embeddings\.", "type_embedding"),
        (r"embeddings\.LayerNorm\.", "embedding_norm"),
        (_B + r"attention\.self\.query\.", "query"),
        (_B + r"attention\.self\.key\.", "key"),
        (_B + r"attention\.self\.value\.", "value"),
        (_B + r"attention\.output\.dense\.", "attention_output"),
        (_B + r"intermediate\.dense\.", "mlp_in"),
        (_B + r"output\.dense\.", "mlp_out"),
        (_B + r"(attention\.)?output\.LayerNorm\.", "norm"),
        (r"^(bert\.)?pooler\.dense\.", "pooler"),
        (r"^(classifier|cls|qa_outputs)\.", "head"),
    ),
)
