"""Other implementations' adapter formats, by name. A new one is one file of `zinit.interop` and one line here."""

from zinit.registry import Entry, Registry

FORMATS = Registry(
    "adapter format",
    {
        "official-v1": Entry(
            "zinit.interop.official:OFFICIAL_V1", "OpenGVLab/LLaMA-Adapter, V1 text: read and written."
        ),
        "official-v2": Entry(
            "zinit.interop.official_v2:MULTIMODAL",
            "OpenGVLab/LLaMA-Adapter, V2 with images, its BIAS and LORA files: read.",
        ),
        "official-v2-chat": Entry(
            "zinit.interop.official_v2:CHAT", "OpenGVLab/LLaMA-Adapter, V2 chat: biases, input scales, norms: read."
        ),
        "peft": Entry("zinit.interop.peft:PEFT", "Hugging Face PEFT, AdaptionPrompt: read and written."),
        "litgpt": Entry("zinit.interop.litgpt:LITGPT", "LitGPT 0.5.5 and later, adapter: read."),
        "litgpt-legacy": Entry("zinit.interop.litgpt:LITGPT_LEGACY", "LitGPT before 0.5.5, adapter: read."),
        "litgpt-v2": Entry("zinit.interop.litgpt_v2:LITGPT_V2", "LitGPT 0.5.5 and later, adapter_v2: read."),
        "litgpt-v2-legacy": Entry("zinit.interop.litgpt_v2:LITGPT_V2_LEGACY", "LitGPT before 0.5.5, adapter_v2: read."),
    },
)
