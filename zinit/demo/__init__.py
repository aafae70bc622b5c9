"""Tiny pretrained backbones and data to adapt them to: every command of zinit works offline on a fresh machine.

This package says where things are; importing it loads no model code. :mod:`zinit.demo.world` makes the text data,
``zinit.demo.pretrain_*`` made the backbones. Figures of the demo say nothing about those of any paper.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zinit.demo import world
from zinit.demo.questions import documents


def llama_path() -> Path:
    """The folder of the demo's causal language model and its tokenizer, in transformers' format."""
    return Path(__file__).parent / "llama"


def roberta_path() -> Path:
    """The folder of the demo's masked language model and its tokenizer, in transformers' format."""
    return Path(__file__).parent / "roberta"


def instructions() -> tuple[list[world.Record], list[world.Record]]:
    """The demo's instruction data: records ``{"instruction", "input", "output"}``, as ``(train, held_out)``.

    All answers are facts of the invented world whose texts the demo's language models were pretrained on. The two
    parts share no instruction and no entity, so held-out answers can only come from what the frozen model knows.
    """
    return world.instructions(world.build())


def questions() -> tuple[dict[str, Any], dict[str, Any]]:
    """The demo's reading comprehension, as ``(train, dev)`` documents in SQuAD v2.0's format.

    Every paragraph has facts of its own, so answers have to be read. About a third of the questions have none. The two
    parts share no subject and no paragraph.
    """
    return documents(world.build())
