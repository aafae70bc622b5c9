"""Other implementations' adapter formats, by name. A new one is one file of `zinit.interop` and one line here."""

from zinit.registry import Entry, Registry

FORMATS = Registry(
    "adapter format",
    {
        "official-v1": Entry(
            "zinit.interop.official:OFFICIAL_V1", "OpenGVLab/LLaMA-Adapter, V1 text: read and written."
        ),
        "peft": Entry("zinit.interop.peft:PEFT", "Hugging Face PEFT, AdaptionPrompt: read and written."),
        "litgpt": Entry("zinit.interop.litgpt:LITGPT", "LitGPT 0.5.5 and later, adapter: read."),
        "litgpt-legacy": Entry("zinit.interop.litgpt:LITGPT_LEGACY", "LitGPT before 0.5.5, adapter: read."),
    },
)
