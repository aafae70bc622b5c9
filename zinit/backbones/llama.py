"""LLaMA and decoders laid out like it: separate ``q_proj``, ``k_proj``, ``v_proj``; keys rotated, not normalised."""

from zinit.backbones._hf import TransformersBackbone

LLAMA = TransformersBackbone(
    name="llama",
    default_task="alpaca",
    demo_model="zinit.demo:llama_path",
    model_types=("llama", "mistral", "qwen2"),
)
