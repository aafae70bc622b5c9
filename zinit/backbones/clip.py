"""CLIP: a text tower and a vision tower, each with its own layers; ``towers=["vision_model"]`` chooses one."""

from zinit.backbones._hf import TransformersBackbone

CLIP = TransformersBackbone(
    name="clip",
    default_task="base-to-novel",
    demo_model="zinit.demo:clip_path",
    model_types=("clip", "clip_text_model", "clip_vision_model"),
)
