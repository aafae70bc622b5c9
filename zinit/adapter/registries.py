"""Encoders, context sources and formats of other implementations, by name: a new one is one file, and one line here."""

from zinit.registry import Entry, Registry

ENCODERS = Registry(
    "encoder library",
    {
        "audio": Entry(
            "zinit.encoders.audio:AUDIO",
            "CLAP, AST, Whisper's encoder, PE-AV of transformers: folder, or audio:HUB_ID.",
        ),
        "video": Entry(
            "zinit.encoders.video:VIDEO", "VideoMAE, V-JEPA 2, PE-AV of transformers: folder, or video:HUB_ID."
        ),
        "frames": Entry("zinit.encoders.frames:FRAMES", "Frames of a video by an image model: frames:IMAGE_MODEL."),
        "vectors": Entry("zinit.encoders.ready:VECTORS", "Ready features, .npy or .safetensors files: vectors:WIDTH."),
        "timm": Entry("zinit.encoders.timm:TIMM", "Image models of timm: by name, folder or Hub id."),
        "transformers": Entry(
            "zinit.encoders.transformers:TRANSFORMERS",
            "CLIP, SigLIP, DINOv2 and other image models of transformers: by folder or Hub id.",
        ),
    },
    group="zinit.encoders",
)

SOURCES = Registry(
    "context source",
    {
        "bind": Entry("zinit.adapter.bind:BindNetwork", "ImageBind-LLM: one vector of any sense through gated blocks."),
        "projected-image": Entry(
            "zinit.adapter.visual:ProjectedImage", "V1 with images: vectors of encoder layers, projected to one token."
        ),
        "visual-tokens": Entry(
            "zinit.adapter.visual:VisualTokens", "V2: K queries that attend with the image's tokens in a few blocks."
        ),
    },
    group="zinit.sources",
)

FORMATS = Registry(
    "adapter format",
    {
        "official-v1": Entry(
            "zinit.interop.official:OFFICIAL_V1", "OpenGVLab/LLaMA-Adapter, V1: read; its text adapters written."
        ),
        "official-v2": Entry(
            "zinit.interop.official_v2:MULTIMODAL",
            "OpenGVLab/LLaMA-Adapter, V2 with images, its BIAS and LORA files: read and written.",
        ),
        "official-v2-chat": Entry(
            "zinit.interop.official_v2:CHAT",
            "OpenGVLab/LLaMA-Adapter, V2 chat: biases, input scales, norms: read and written.",
        ),
        "imagebind-llm": Entry(
            "zinit.interop.imagebind:IMAGEBIND_LLM", "OpenGVLab/LLaMA-Adapter, ImageBind-LLM: read and written."
        ),
        "peft": Entry("zinit.interop.peft:PEFT", "Hugging Face PEFT, AdaptionPrompt: read and written."),
        "litgpt": Entry("zinit.interop.litgpt:LITGPT", "LitGPT 0.5.5 and later, adapter: read."),
        "litgpt-legacy": Entry("zinit.interop.litgpt:LITGPT_LEGACY", "LitGPT before 0.5.5, adapter: read."),
        "litgpt-v2": Entry(
            "zinit.interop.litgpt_v2:LITGPT_V2", "LitGPT 0.5.5 and later, adapter_v2: read; written without prompts."
        ),
        "litgpt-v2-legacy": Entry(
            "zinit.interop.litgpt_v2:LITGPT_V2_LEGACY", "LitGPT before 0.5.5, adapter_v2: read and written."
        ),
    },
)
