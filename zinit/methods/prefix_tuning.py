"""Prefix tuning (Li and Liang, ACL 2021), through PEFT: learned keys and values in the softmax of the words."""

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


class PeftPrefixTuning(Method):
    """PEFT's prefix tuning with the run's ``prefix.length``, in all layers; its other settings are fixed.

    PEFT hands keys and values over as a cache, so it knows causal language models alone, and no gradient checkpointing.
    Padded batches of answers are those of each alone only on models without a sliding window.
    """

    name = "peft-prefix-tuning"
    default_rates = rates.PEFT_PREFIX_TUNING

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        from peft import PrefixTuningConfig, get_peft_model

        host: Any = model
        if not callable(getattr(host, "prepare_inputs_for_generation", None)):
            raise ConfigError(
                f"PEFT's prefix tuning knows causal language models, and {type(model).__name__} is none. "
                f"The same prompts on any model: -o method=prefix-tuning."
            )
        settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=context.prefix.length)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            wrapped: Any = get_peft_model(host, settings)
        read = wrapped.active_peft_config
        shape = (read.num_layers, read.num_attention_heads, read.token_dim // read.num_attention_heads)
        sites = context.sites(model)
        for site in sites:
            own = (len(sites), site.num_kv_heads, site.head_dim)
            if own != shape or site.value_dim not in (None, site.head_dim):
                raise ConfigError(
                    f"PEFT's prefix tuning reads (layers, key/value heads, width of a head) = {shape} from the model's "
                    f"config; {site.name} has {own}. The same prompts on any model: -o method=prefix-tuning."
                )
        vars(wrapped)["generate"] = functools.partial(_generate, wrapped)
        return Adapted(model=wrapped, disabled=lambda: _switched_off(wrapped))


@contextmanager
def _switched_off(wrapped: Any) -> Iterator[None]:
    own = vars(wrapped).pop("generate")
    try:
        with wrapped.disable_adapter():
            yield
    finally:
        vars(wrapped)["generate"] = own


def _generate(wrapped: Any, *, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
    """``generate`` that starts from a cache of the prefix; (B, T + new), as without one.

    PEFT's own looks for the cache under a name that transformers no longer uses. To transformers a cache stands for
    the first tokens of the text, so as many stand there for the prefix; nobody looks at them.
    """
    count, length = len(input_ids), wrapped.active_peft_config.num_virtual_tokens
    first = input_ids.new_zeros((count, length))
    found = wrapped.get_base_model().generate(
        input_ids=torch.cat([first, input_ids], dim=1),
        attention_mask=torch.cat([attention_mask.new_ones((count, length)), attention_mask], dim=1),
        past_key_values=wrapped.get_prompt(batch_size=count),
        **settings,
    )
    return found[:, length:]
