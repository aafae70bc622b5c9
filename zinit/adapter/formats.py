"""Other implementations' adapter formats, by name. A new one is one file of `zinit.interop` and one line here."""

from zinit.registry import Registry

FORMATS = Registry(
    "adapter format",
    {
        "official-v1": "zinit.interop.official:OFFICIAL_V1",
        "peft": "zinit.interop.peft:PEFT",
        "litgpt": "zinit.interop.litgpt:LITGPT",
        "litgpt-legacy": "zinit.interop.litgpt:LITGPT_LEGACY",
    },
)
