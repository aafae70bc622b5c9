"""RoBERTa and encoders laid out like it: ``query``, ``key``, ``value`` in ``attention.self``; cross-attention is left alone."""

from zinit.backbones._hf import TransformersBackbone

ROBERTA = TransformersBackbone(
    name="roberta",
    default_task="squad",
    model_types=("roberta", "bert", "camembert", "electra", "xlm-roberta"),
    attention="attention.self",
    head_dim="attention_head_size",
    query="query",
    key="key",
    value="value",
)
