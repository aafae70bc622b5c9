"""What an image shows, by an image-to-text model of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from zinit.errors import ConfigError
from zinit.models.vision import load_captioner

LONGEST = 64  # tokens of a caption


class Captioner:
    """See the module. Captions are greedy.

    A finished run of zinit is another expert of this name, which `zinit.runs.build` makes.

    Args:
        argument: folder or Hub id of the model.
        device: for it.
    """

    name, line, by_question = "caption", "The picture shows", False

    def __init__(self, argument: str, *, device: torch.device | str = "cpu") -> None:
        if not argument:
            raise ConfigError("say by what the expert 'caption' captions: caption:RUN, or caption:FOLDER_OR_HUB_ID.")
        self.model, self.prepare, self.tokenizer = load_captioner(argument)
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], questions: Sequence[str] = ()) -> list[str]:
        """See `zinit.experts.base.Expert`."""
        pixels = self.prepare(images=list(images), return_tensors="pt")["pixel_values"].to(self.model.device)
        ids = self.model.generate(pixel_values=pixels, max_new_tokens=LONGEST, do_sample=False, num_beams=1)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
