"""Experts by name: each writes text about an image, for the input field of a prompt (LLaMA-Adapter V2, section 3.4).

A new one is one file and one line here; outside of zinit: an entry point of the group ``zinit.experts``. An entry is
called with what the user wrote behind the name and its colon, and a device; see `zinit.experts.base.Expert`.
"""

from zinit.registry import Entry, Registry

EXPERTS = Registry(
    "expert",
    {
        "caption": Entry(
            "zinit.experts.caption:Captioner",
            "What the image shows: caption:RUN (of the task caption), or caption:MODEL of transformers.",
        ),
        "detection": Entry(
            "zinit.experts.detection:Detector",
            "Which objects are in the image, counted: detection:MODEL of transformers.",
        ),
        "ocr": Entry("zinit.experts.ocr:Ocr", "The text in the image, by RapidOCR (zinit[ocr])."),
        "search": Entry(
            "zinit.experts.search:Search",
            "What a function of yours finds: search:MODULE:FUNCTION, called with image and question.",
        ),
    },
    group="zinit.experts",
)
