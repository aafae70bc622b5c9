"""Suites by name: published questions about images, and the rules that score answers to them.

A new one is one file and one line here; outside of zinit: an entry point of the group ``zinit.suites``.
"""

from zinit.registry import Entry, Registry

SUITES = Registry(
    "suite",
    {
        "mme": Entry(
            "zinit.suites.mme:Mme", "MME: two yes-no questions an image; perception of 2,000, cognition of 800."
        ),
        "mmbench": Entry(
            "zinit.suites.mmbench:MMBench", "MMBench: single choice, plain and over all rotations of the options."
        ),
        "pope": Entry(
            "zinit.suites.pope:Pope", "POPE: is an object in the image? Random, popular, adversarial objects."
        ),
        "vqa": Entry(
            "zinit.suites.vqa:Vqa", "Records of image, question, answers: right if an answer is in the output."
        ),
    },
    group="zinit.suites",
)
