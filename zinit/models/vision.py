"""Loads models of transformers that say something about images: captions, objects. Remote code is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zinit.errors import BackboneError
from zinit.models.loading import check_complete, model_source, quiet, reason


def load_captioner(source: str | Path) -> tuple[Any, Any, Any]:
    """An image-to-text model that needs no prompt (BLIP, GIT, an encoder and decoder), in float32.

    Args:
        source: folder or Hub id.

    Returns:
        The model, its image processor and its tokenizer.

    Raises:
        BackboneError: if there is no such model, or some of its weights are missing.
    """
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    source = model_source(source)
    model, processor = _load(AutoModelForImageTextToText, source, "an image-to-text model")
    try:
        return model, processor, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # see _load
        raise BackboneError(f"{source} has no tokenizer that can be loaded: {reason(source, error)}") from error


def load_detector(source: str | Path) -> tuple[Any, Any]:
    """An object-detection model (DETR, YOLOS, RT-DETR) in float32.

    Args:
        source: folder or Hub id.

    Returns:
        The model and its image processor.

    Raises:
        BackboneError: if there is no such model, or some of its weights are missing.
    """
    from transformers import AutoModelForObjectDetection

    return _load(AutoModelForObjectDetection, model_source(source), "an object-detection model")


def _load(of_kind: Any, source: str, kind: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        with quiet():
            model, report = of_kind.from_pretrained(
                source, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
            )
    except Exception as error:  # transformers raises many classes; all mean that it cannot load this
        raise BackboneError(f"{source} cannot be loaded as {kind}: {reason(source, error)}") from error
    check_complete(model, report, source)
    return model.eval(), processor
