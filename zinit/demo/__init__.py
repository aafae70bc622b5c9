"""Tiny pretrained backbones and data to adapt them to: every command of zinit works offline on a fresh machine.

This package says where things are; importing it loads no model code. :mod:`zinit.demo.world` and
:mod:`zinit.demo.questions` make the text data, :mod:`zinit.demo.images` the pictures, ``scripts.pretrain_*`` made
the backbones. Figures of the demo say nothing about those of any paper.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.demo import world
from zinit.demo.questions import documents

if TYPE_CHECKING:
    from zinit.demo.images import Labelled


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


def vit_path() -> Path:
    """The folder of the demo's Vision Transformer, in timm's format: ``timm.create_model(f"local-dir:{...}")``."""
    return Path(__file__).parent / "vit"


def pictures(dataset: str) -> tuple[list[str], dict[str, Labelled]]:
    """A demo task in VTAB-1k's form: the names of its classes, and (32 x 32 RGB picture, label) pairs by split.

    Args:
        dataset: ``"digits"`` (natural: real handwritten digits), ``"textures"`` (specialized) or ``"counts"``
            (structured: how many objects).

    Returns:
        The splits are ``"train800"``, ``"val200"`` and ``"test"`` (the rest); they share no picture.

    Raises:
        ConfigError: if there is no such task.
    """
    from zinit.demo import images

    return images.task(dataset)


def clip_path() -> Path:
    """The folder of the demo's CLIP, its tokenizer and image processor, in transformers' format."""
    return Path(__file__).parent / "clip"


def base_to_novel() -> tuple[list[str], dict[str, Labelled]]:
    """The demo's base-to-novel task: sorted class names such as "red ring", and (picture, label) pairs by split.

    The pictures are pale shapes with a dark outline on squared paper; the demo's CLIP was pretrained on nothing like
    them, though it knows the colours and shapes. The splits ``"train"`` (24 pictures of each class) and ``"test"``
    (40) share no picture.
    """
    from zinit.demo import images

    return images.drawings()
