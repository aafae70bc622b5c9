"""Pretrain the demo's CLIP: ``python -m scripts.pretrain_clip --output DIR``.

It trains a byte-level BPE tokenizer and a tiny CLIP from scratch on images of :mod:`zinit.demo.scenes` and their
captions, none of which it sees twice, and writes them in transformers' format. The files in ``zinit/demo/clip`` were
made by this script with its defaults. It is seeded and computes in one thread: the same processor and library versions
give the same files, however many cores there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import normalizers, processors
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from scripts.pretrain_vit import normalized
from scripts.pretraining import command, console, fit, seed_everything, train_bpe
from zinit.demo import scenes

VOCABULARY = 512  # at most; the captions hold fewer words
CONTEXT = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"  # CLIP pads with EOS; a text's features are those of its first EOS
BOS_ID, EOS_ID = range(2)  # the tokenizer's trainer numbers special tokens first


def pairs(seed: int) -> Iterator[tuple[str, scenes.Scene, scenes.Pixels]]:
    """Endless images, each with a caption."""
    rng = scenes.stream("captions", seed)
    for scene, image in scenes.scenes(seed, plain=0.8):
        yield scenes.caption(scene, rng), scene, image


def train_tokenizer(captions: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of lower-cased text, between BOS and EOS as in CLIP."""
    tokenizer = train_bpe(
        captions, vocabulary=VOCABULARY, special=[BOS, EOS], space=True, normalizer=normalizers.Lowercase()
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        pair=f"{BOS} $A {EOS} $B {EOS}",
        special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(vocabulary: int) -> CLIPModel:
    """A CLIP in miniature (0.7 M parameters)."""
    tower = {"num_hidden_layers": 4, "num_attention_heads": 4}
    text = {
        "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT,
        "hidden_size": 64,
        "intermediate_size": 256,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
        **tower,
    }
    vision = {"image_size": scenes.SIZE, "patch_size": 8, "hidden_size": 96, "intermediate_size": 384, **tower}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def losses(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    source: Iterator[tuple[str, scenes.Scene, scenes.Pixels]],
    size: int,
) -> Iterator[Tensor]:
    """CLIP's contrastive loss, batch after batch."""
    while True:
        texts, _, images = zip(*islice(source, size), strict=True)
        words = tokenizer(list(texts), padding=True, return_tensors="pt")
        yield model(**words, pixel_values=pixels(images), return_loss=True).loss


def pixels(images: Sequence[np.ndarray]) -> Tensor:
    """Images (32, 32, 3) as CLIP takes them, (B, 3, 32, 32)."""
    return normalized(list(images), tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))


@torch.inference_mode()
def zero_shot_accuracy(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, names: Sequence[str], images: Tensor, labels: Tensor
) -> float:
    """The fraction of ``images`` for which "a photo of a ..." with their own class's name scores highest."""
    words = tokenizer([f"a photo of a {name}." for name in names], padding=True, return_tensors="pt")
    return (model(**words, pixel_values=images).logits_per_image.argmax(-1) == labels).float().mean().item()


def pretrain(output: Path, steps: int, batch_size: int, peak: float, seed: int) -> CLIPModel:
    """Train tokenizer and model, write both to ``output`` and report the zero-shot accuracy."""
    seed_everything(seed)
    tokenizer = train_tokenizer(text for text, _, _ in islice(pairs(seed), 5000))
    model = make_model(len(tokenizer))
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    fit(model, losses(model, tokenizer, pairs(seed + 1), batch_size), steps, peak, warmup=steps / 20)

    model.half()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    size = {"height": scenes.SIZE, "width": scenes.SIZE}
    CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(output)

    model.float()
    _, shown, images = zip(*islice(pairs(seed + 2), 1000), strict=True)
    names = [f"{colour} {shape}" for colour in scenes.COLOURS for shape in scenes.SHAPES]
    labels = torch.tensor([names.index(f"{scene.colour} {scene.shape}") for scene in shown])
    fraction = zero_shot_accuracy(model, tokenizer, names, pixels(images), labels)
    console.print(f"zero-shot accuracy on new images, {len(names)} classes: {fraction:.3f}")
    return model


if __name__ == "__main__":
    command(
        pretrain,
        "Pretrain the demo's CLIP on procedural images and captions.",
        steps=2600,
        batch_size=64,
        peak=1.5e-3,
    )
