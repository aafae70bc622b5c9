"""Prefix tuning (Li and Liang, ACL 2021), through PEFT: learned keys and values in the softmax of the words."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
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
    own = vars(wrapped).pop("generate", None)  # None inside another such scope
    try:
        with wrapped.disable_adapter():
            yield
    finally:
        if own is not None:
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

    Raises:
        ConfigError: if stopping criteria are to look at texts of different lengths.
    """
    padding = (attention_mask == 0).sum(dim=1).tolist()
    if settings.get("stopping_criteria") and any(padding):
        raise ConfigError(
            "with PEFT's prefix tuning texts of different lengths are answered one length at a time, and stopping "
            "criteria look at all answers at once. Give texts of one length, such as one at a time (batch size 1)."
        )
    each = _said(wrapped, settings, "num_return_sequences") or 1
    answers: dict[int, Sequence[Tensor]] = {}
    for count in sorted(set(padding)):
        rows = [row for row, own in enumerate(padding) if own == count]
        found = _behind_the_prefix(wrapped, input_ids[rows, count:], settings)
        answers |= dict(zip(rows, zip(*[iter(found)] * each, strict=True), strict=True))
    new = [answer[input_ids.shape[1] - count :] for row, count in enumerate(padding) for answer in answers[row]]
    end = getattr(settings.get("generation_config"), "pad_token_id", None) or 0
    padded = nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=end)
    return torch.cat([input_ids.repeat_interleave(each, 0), padded], dim=1)


def _behind_the_prefix(wrapped: Any, input_ids: Tensor, settings: dict[str, Any]) -> Tensor:
    """(B x answers to each, T + new) of texts of one length."""
    length = wrapped.active_peft_config.num_virtual_tokens
    longer: dict[str, Any] = {}
    if least := _said(wrapped, settings, "min_length"):
        longer["min_length"] = least + length
    if not _said(wrapped, settings, "max_new_tokens") and (most := _said(wrapped, settings, "max_length")):
        longer["max_length"] = most + length
    if criteria := settings.get("stopping_criteria"):
        longer["stopping_criteria"] = type(criteria)(functools.partial(_sees, own, length) for own in criteria)
    ids = torch.cat([input_ids[:, -1:].expand(-1, length), input_ids], dim=1)  # no token that the text does not have
    rows = len(ids) * max(_said(wrapped, settings, name) or 1 for name in ("num_beams", "num_return_sequences"))
    found = wrapped.get_base_model().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=wrapped.get_prompt(batch_size=rows),
        **(settings | longer),
    )
    return found[:, length:]


def _said(wrapped: Any, settings: dict[str, Any], name: str) -> int | None:
    """A number that ``generate`` was given, by itself or in a configuration; that of the model's own behind them."""
    sources = (settings.get("generation_config"), wrapped.get_base_model().generation_config)
    found = [settings.get(name), *(getattr(source, name, None) for source in sources)]
    return next((number for number in found if number is not None), None)


def _sees(criterion: Any, skipped: int, input_ids: Tensor, scores: Any, **more: Any) -> Any:
    """What a stopping criterion says of the text without the tokens that stand for the prefix."""
    return criterion(input_ids[:, skipped:], scores, **more)
