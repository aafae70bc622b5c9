"""The settings of the task science-qa; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zinit.tasks.settings import AskingConfig
from zinit.validation import Name, OnBad, PositiveInt

# Before the dash is what is asked with: question, context (the hint), multiple options, lecture, explanation. After it
# is what is learned: the answer, and lecture and explanation before or behind it.
Order = Literal[
    "QCM-A",
    "CQM-A",
    "QCM-AL",
    "QCM-AE",
    "QCM-ALE",
    "QCM-AEL",
    "QCM-LA",
    "QCM-EA",
    "QCM-LEA",
    "QCM-ELA",
    "QCML-A",
    "QCME-A",
    "QCMLE-A",
    "QCLM-A",
    "QCEM-A",
    "QCLEM-A",
]
Readout = Literal["strict", "original"]


@dataclass(frozen=True, kw_only=True)
class ScienceQAConfig(AskingConfig):
    """What the task does with its data. The template is that of ScienceQA's authors.

    Args:
        max_length: tokens per example, BOS and EOS included. Where a problem is longer, its hint is cut from the left,
            never its options. Reference code: 512.
        order: of the parts of a problem; the paper asks with question, context and options for the answer alone.
        readout: what an output counts as in which no answer can be read: "strict": wrong; "original": a random choice
            of the options, as in the authors' script.
        train_split: what is trained on, of ``pid_splits.json``.
        split: what is held out.
        held_out_data: a folder of its own for the held-out problems instead.
        on_bad: what to do with a problem that cannot be used, such as one whose image is missing: "error" or "skip"
            (which is counted).
        images: False leaves the images out, and counts them; experts see them all the same.
        max_new_tokens: longest generated answer. Orders that explain before they answer need more.
    """

    order: Order = "QCM-A"
    readout: Readout = "strict"
    train_split: Name = "train"
    split: Name = "test"
    held_out_data: str | None = None
    on_bad: OnBad = "error"
    images: bool = True
    max_new_tokens: PositiveInt = 32
