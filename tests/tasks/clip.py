"""A tiny CLIP, images, and base-to-novel tasks on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import processors

from tests.tiny import byte_tokenizer
from zinit.models.loading import ClipProcessor
from zinit.tasks.base import TaskInputs
from zinit.tasks.base_to_novel.task import BaseToNovel, BaseToNovelConfig
from zinit.train.config import TrainConfig
from zinit.train.strategy import make_accelerator

SIZE = 32
ACCOUNTED = (
    *("dropped", "unused", "train", "train_not_drawn", "train_skipped_unreadable", "train_skipped_also_held_out"),
    *("train_of_novel_classes",),
    *("base_test", "novel_test", "test_skipped_unreadable"),
)


def tokenizer() -> Any:
    """One token per byte between <s> and </s>, as CLIP's text tower wants it."""
    made = byte_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return made


def clip() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "vocab_size": 264, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**shape, "image_size": SIZE, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text | {"pad_token_id": 2}, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config)
    with torch.no_grad():  # freshly made towers hardly tell inputs apart
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def make_image(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def folders(root: Path, classes: int = 5, each: int = 6, start: int = 0) -> Path:
    for label in range(classes):
        folder = root / f"kind_{label}"
        folder.mkdir(parents=True)
        for i in range(each):
            make_image(start + 100 * label + i).save(folder / f"{i}.png")
    return root


def task(
    data: Path | str | None,
    model: Any = None,
    *,
    processor: ClipProcessor | None = None,
    seed: int = 0,
    labels: Any = None,
    **settings: Any,
) -> Any:
    settings = {"shots": 2} | settings
    return BaseToNovel(
        TaskInputs(
            model=model or clip(),
            processor=processor or ClipProcessor(tokenizer()),
            data=None if data is None else str(data),
            seed=seed,
            labels=labels,
        ),
        BaseToNovelConfig(**settings),
    )


def accounted(t: Any) -> bool:
    counts = t.data_report()
    held_out = counts["base_test"] + counts["novel_test"]
    files = sum(count for name, count in counts.items() if name.startswith("files_skipped"))
    return counts["read"] == files + sum(counts.get(name, 0) for name in ACCOUNTED) and counts["held_out"] == held_out


def evaluate(t: Any, limit: int | None = None) -> Any:
    return t.evaluate(make_accelerator(TrainConfig()), limit=limit)
