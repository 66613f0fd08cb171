"""ELECTRA with embeddings as wide as its blocks (the base size): BERT's blocks, and a head of two layers."""

from dpguard.inputs.family import Family

_B = r"encoder\.layer\.(?P<block>\d+)\."  # a group called block says which block a parameter is in

PLUGIN = Family(
    name="electra",  # the file's name
    model_types=("electra",),  # config.model_type
    rules=(  # the first rule that matches a parameter's name gives its role
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
        (r"^classifier\.", "head"),
    ),
)
