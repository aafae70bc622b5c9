"""RoBERTa and encoders laid out like it: ``query``, ``key`` and ``value`` in ``attention.self``.

Cross-attention lies beside it, in ``crossattention.self``, and is left as it is.
"""

from zinit.backbones._hf import TransformersBackbone

ROBERTA = TransformersBackbone(
    name="roberta",
    default_task="squad",
    demo_model="zinit.demo:roberta_path",
    model_types=("roberta", "bert", "camembert", "electra", "xlm-roberta"),
    attention="attention.self",
    head_dim="attention_head_size",
    query="query",
    key="key",
    value="value",
)
