"""Encoders and context sources by name: a new one is one file, and one line here. Formats: `zinit.adapter.formats`."""

from zinit.registry import Entry, Registry

ENCODERS = Registry(
    "encoder library",
    {
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
        "projected-image": Entry(
            "zinit.adapter.visual:ProjectedImage", "V1 with images: vectors of encoder layers, projected to one token."
        ),
        "visual-tokens": Entry(
            "zinit.adapter.visual:VisualTokens", "V2: K queries that attend with the image's tokens in a few blocks."
        ),
    },
    group="zinit.sources",
)
