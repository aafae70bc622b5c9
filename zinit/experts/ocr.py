"""The text in an image, by RapidOCR (PP-OCR's models, which its package carries)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from zinit.errors import ConfigError, install_extra

SURE = 0.8  # what is kept has a higher confidence: single wrong characters on photographs have less
SHORTEST = 2  # characters of what is kept


class Ocr:
    """See the module. Texts are joined by commas in reading order: from top to bottom, from left to right.

    Args:
        argument: none; what a user wrote behind "ocr:" is refused.
        device: not used, RapidOCR runs on the CPU.
    """

    name, line, by_question = "ocr", "Text in the picture", False

    def __init__(self, argument: str = "", *, device: torch.device | str = "cpu") -> None:
        if argument:
            raise ConfigError(f"the expert 'ocr' takes nothing behind a colon; got 'ocr:{argument}'. Write 'ocr'.")
        try:
            import onnxruntime  # noqa: F401 # pyright: ignore[reportMissingImports]
            from rapidocr import RapidOCR  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"the expert 'ocr' needs the packages rapidocr and onnxruntime. {install_extra('ocr')}"
            ) from error
        threads = int(os.environ.get("OMP_NUM_THREADS", -1))  # -1: as many as there are cores
        settings = {"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": threads}
        self.engine: Any = RapidOCR(params=settings)

    def __call__(self, images: Sequence[Image.Image], questions: Sequence[str] = ()) -> list[str]:
        """See `zinit.experts.base.Expert`."""
        return [", ".join(self._read(image)) for image in images]

    def _read(self, image: Image.Image) -> list[str]:
        found = self.engine(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))  # it takes BGR
        if found.txts is None:
            return []
        texts = [text.strip() for text, score in zip(found.txts, found.scores, strict=True) if score > SURE]
        return [text for text in texts if len(text) >= SHORTEST]
