"""Tiny pretrained backbones and data to adapt them to: every command of zinit works offline on a fresh machine.

Importing this package loads no model code. :mod:`zinit.demo.world` and :mod:`zinit.demo.questions` make the text data,
:mod:`zinit.demo.images` the images; ``scripts.pretrain_*`` made the backbones. Figures of the demo say nothing about
those of any paper.
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
    parts share no instruction and no entity, so held-out answers can only come from the frozen model's knowledge.
    """
    return world.instructions(world.build())


def questions() -> tuple[dict[str, Any], dict[str, Any]]:
    """The demo's reading comprehension, as ``(train, dev)`` documents in SQuAD v2.0's format.

    Every paragraph has facts of its own, so answers must be read. About a third of the questions have none. The two
    parts share no subject and no paragraph.
    """
    return documents(world.build())


def vit_path() -> Path:
    """The folder of the demo's Vision Transformer, in timm's format: ``timm.create_model(f"local-dir:{...}")``."""
    return Path(__file__).parent / "vit"


def labelled_images(dataset: str) -> tuple[list[str], dict[str, Labelled]]:
    """A demo task in VTAB-1k's format: the names of its classes, and (32 x 32 RGB image, label) pairs by split.

    Args:
        dataset: ``"digits"`` (natural: real handwritten digits), ``"textures"`` (specialized) or ``"counts"``
            (structured: how many objects).

    Returns:
        The splits are ``"train800"``, ``"val200"`` and ``"test"`` (the rest); they share no image.

    Raises:
        ConfigError: if there is no such task.
    """
    from zinit.demo import images

    return images.task(dataset)


def clip_path() -> Path:
    """The folder of the demo's CLIP, its tokenizer and image processor, in transformers' format."""
    return Path(__file__).parent / "clip"


def base_to_novel() -> tuple[list[str], dict[str, Labelled]]:
    """The demo's base-to-novel task: sorted class names such as "red ring", and (image, label) pairs by split.

    The images are pale shapes with a dark outline on squared paper; the demo's CLIP was pretrained on nothing like
    them, but knows the colours and shapes. The splits ``"train"`` (24 images of each class) and ``"test"``
    (40) share no image.
    """
    from zinit.demo import images

    return images.drawings()
