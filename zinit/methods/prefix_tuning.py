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
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
            vars(wrapped)[name] = _refuse_checkpointing
        return Adapted(model=wrapped, disabled=lambda: _switched_off(wrapped))


@contextmanager
def _switched_off(wrapped: Any) -> Iterator[None]:
    own = vars(wrapped).pop("generate")
    try:
        with wrapped.disable_adapter():
            yield
    finally:
        vars(wrapped)["generate"] = own


def _refuse_checkpointing(*_: Any, **__: Any) -> None:
    raise ConfigError(
        "PEFT's prefix tuning hands its prompts over as a cache, which gradient checkpointing drops: "
        "-o train.gradient_checkpointing=false."
    )


def _generate(wrapped: Any, *, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
    """``generate`` that starts from a cache of the prefix; (B, T + new), as without one.

    PEFT's own looks for the cache under a name that transformers no longer uses. To transformers a cache stands for
    the first tokens of the text, so as many stand there for the prefix. Texts of one length are answered at a time: a
    sliding window would count the padding between prefix and text.
    """
    padding = (attention_mask == 0).sum(dim=1).tolist()
    answers: dict[int, Tensor] = {}
    for count in sorted(set(padding)):
        rows = [row for row, own in enumerate(padding) if own == count]
        found = _behind_the_prefix(wrapped, input_ids[rows, count:], settings)
        answers |= dict(zip(rows, found, strict=True))
    new = [answers[row][input_ids.shape[1] - count :] for row, count in enumerate(padding)]
    end = getattr(settings.get("generation_config"), "pad_token_id", None) or 0
    return torch.cat([input_ids, nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=end)], dim=1)


def _behind_the_prefix(wrapped: Any, input_ids: Tensor, settings: dict[str, Any]) -> Tensor:
    """(B, T + new) of texts of one length."""
    length = wrapped.active_peft_config.num_virtual_tokens
    longer = {name: settings[name] + length for name in ("max_length", "min_length") if settings.get(name) is not None}
    ids = torch.cat([input_ids[:, -1:].expand(-1, length), input_ids], dim=1)  # no token that the text does not have
    found = wrapped.get_base_model().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=wrapped.get_prompt(batch_size=len(ids)),
        **(settings | longer),
    )
    return found[:, length:]
