"""Prompt tuning (Lester et al., EMNLP 2021), through PEFT: learned embeddings in front of the input, once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zinit.errors import ConfigError
from zinit.methods import rates
from zinit.methods.base import Adapted, ApplyContext, Method
from zinit.methods.settings import PromptTuningSettings


class PromptTuning(Method):
    """Learned embeddings before the first layer only; for models that read one sequence of tokens."""

    name = "prompt-tuning"
    default_rates = rates.PROMPT_TUNING
    Config = PromptTuningSettings

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        from peft import PromptTuningConfig, get_peft_model

        host: Any = model
        try:
            embeddings = host.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            embeddings = None
        if not isinstance(embeddings, nn.Embedding):
            raise ConfigError(
                f"the method prompt-tuning (PEFT's) needs a model that reads one sequence of tokens; "
                f"{type(model).__name__} has no single token embedding."
            )
        length = self.config.length or context.prefix.length
        can_generate = callable(getattr(host, "prepare_inputs_for_generation", None))
        settings = PromptTuningConfig(
            task_type="CAUSAL_LM" if can_generate else "FEATURE_EXTRACTION", num_virtual_tokens=length
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            wrapped: Any = get_peft_model(host, settings)
        skipped = _SkipPrompts(length)
        wrapped.register_forward_hook(skipped)
        if can_generate:
            vars(wrapped)["generate"] = functools.partial(_generate, wrapped, skipped)

        @contextmanager
        def disabled() -> Iterator[None]:
            skipped.length = 0
            try:
                if can_generate:
                    with wrapped.disable_adapter():
                        yield
                else:  # PEFT's own switch expects a model that generates
                    wrapped.forward = host.forward
                    try:
                        yield
                    finally:
                        del wrapped.forward
            finally:
                skipped.length = length

        return Adapted(model=wrapped, disabled=disabled)


def _generate(
    wrapped: Any, skipped: _SkipPrompts, *, input_ids: Tensor, attention_mask: Tensor, **settings: Any
) -> Tensor:
    """``generate`` with the prompts in front of the text once. PEFT's own puts them there again before every token.

    It looks for the cache under the name ``past_key_values``, which transformers no longer uses.
    """
    model = wrapped.get_base_model()
    if skipped.length == 0:  # switched off
        return model.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)
    words = model.get_input_embeddings()(input_ids)
    prompts = wrapped.get_prompt(batch_size=len(input_ids)).to(words.dtype)
    mask = torch.cat([attention_mask.new_ones(prompts.shape[:2]), attention_mask], dim=1)
    new = model.generate(inputs_embeds=torch.cat([prompts, words], dim=1), attention_mask=mask, **settings)
    return torch.cat([input_ids, new], dim=1)


class _SkipPrompts:
    """A forward hook: the outputs at the words' positions only, so that a task need not know of the prompts."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        for name in ("logits", "last_hidden_state"):
            if getattr(output, name, None) is not None:
                output[name] = output[name][:, self.length :]
        return output
