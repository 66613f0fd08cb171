"""RoBERTa and XLM-RoBERTa: BERT's encoder, positions counted from the padding index."""

from dpguard.inputs.families import bert
from dpguard.inputs.family import Family

PLUGIN = Family(
    name="roberta",
    model_types=("roberta", "xlm-roberta"),
    rules=(
        *(rule for rule in bert.PLUGIN.rules if rule[1] not in {"pooler", "head"}),
        (r"^(roberta\.)?pooler\.dense\.", "pooler"),
        (r"^(classifier|lm_head|qa_outputs)\.", "head"),
    ),
    position_offset=-1,
)
