"""A finished run of the task caption as an expert for other runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from zinit.errors import ConfigError
from zinit.tasks import TASKS

if TYPE_CHECKING:
    from PIL import Image

    from zinit.adapter.handle import Handle
    from zinit.runs.config import RunConfig
    from zinit.tasks.base import Task


class RunCaptioner:
    """Captions as the run's evaluation makes them: greedy, to its own instruction.

    Args:
        config: of the run.
        model: adapted.
        tokenizer: of the model.
        handle: the adapter on it, with its encoder.

    Raises:
        ConfigError: if the run is of another task, or its method takes no images.
    """

    name, line, by_question = "caption", "The picture shows", False

    def __init__(self, config: RunConfig, model: Any, tokenizer: Any, handle: Handle) -> None:
        if config.task != "caption" or "context" not in handle.shared:
            took = "" if config.task != "caption" else f" by the method {config.method!r}, which takes no images"
            raise ConfigError(
                f"the expert 'caption' needs a run of the task 'caption' with images; this run is of the task "
                f"{config.task!r}{took}. Name another one, or a model: caption:FOLDER_OR_HUB_ID."
            )
        self.options, self.model, self.tokenizer, self.handle = config.options, model.eval(), tokenizer, handle
        task: type[Task] = TASKS.get(config.task)
        self.prompt = task.encode_prompt(tokenizer, task.format_prompt(config.options.instruction))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], questions: Sequence[str] = ()) -> list[str]:
        """See `zinit.experts.base.Expert`."""
        from zinit.models.generation import greedy

        ids = torch.tensor([self.prompt] * len(images), device=next(self.model.parameters()).device)
        how = greedy(max_new_tokens=self.options.max_new_tokens, eos_token_id=self.tokenizer.eos_token_id)
        with self.handle.given(image=list(images)):
            found = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
        texts = self.tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]
