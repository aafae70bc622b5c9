"""How a model generates text: by a configuration that is complete in itself, or by the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig

from zinit.errors import ConfigError, first_line

# Entries beside a model's weights that shape an answer, and that a chat takes over.
SHAPES = (
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "sequence_bias", "bad_words_ids"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "stop_strings"),
    *("min_new_tokens", "min_length", "exponential_decay_length_penalty", "max_time", "remove_invalid_values"),
)
SAMPLING = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "renormalize_logits")
SAID_OTHERWISE = ("max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "top_k")
COLDEST = 1e-4  # below it logits divided by the temperature may overflow, and the likeliest token is certain
NO_SETTINGS = ("bos_token_id", "pad_token_id", "use_cache", "transformers_version")  # shape no answer


class OwnGenerationConfig(GenerationConfig):
    """A configuration that ``model.generate`` does not fill up from the model's own.

    ``generate`` copies every entry that is None, and every custom one, from ``model.generation_config``: what lies
    beside the weights would be part of a measurement. Its general defaults still apply.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """As transformers'; but what comes from the model (the only call that allows custom entries) is left out."""
        return kwargs if allow_custom_entries else super().update(defaults_only=defaults_only, **kwargs)


def greedy(*, max_new_tokens: int, eos_token_id: int | list[int], stop_strings: Sequence[str] = ()) -> GenerationConfig:
    """Greedy answers, whatever lies beside the weights: for measurements.

    Args:
        max_new_tokens: longest answer.
        eos_token_id: ends an answer, and pads; of several each ends one, and the first pads.
        stop_strings: texts that end an answer too; ``generate`` needs the tokenizer for them.
    """
    ends = _numbers(eos_token_id)
    return OwnGenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=ends[0],
        eos_token_id=ends if len(ends) > 1 else ends[0],
        stop_strings=list(stop_strings) or None,
    )


def sampled(*, max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    """What a user says of an answer, as `conversational` takes it.

    Args:
        max_new_tokens: longest answer.
        temperature: below `COLDEST` the likeliest token is taken.
        top_p: nucleus sampling.
    """
    if temperature < COLDEST:
        return {"max_new_tokens": max_new_tokens, "do_sample": False}
    how = {"temperature": temperature, "top_p": top_p, "top_k": 0}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, **how}


def conversational(model: Any, *, eos_token_id: int, **said: Any) -> tuple[GenerationConfig, dict[str, Any], list[str]]:
    """The model's own configuration, as far as one answer to one prompt can follow it.

    Args:
        model: of transformers.
        eos_token_id: the tokenizer's; ends an answer beside the model's own ones, and pads.
        said: what the user says, see `sampled`; goes before the model's.

    Returns:
        The configuration, the model's entries that it uses, and the names of those that it does not.

    Raises:
        ConfigError: if the model's entries cannot be used.
    """
    own: dict[str, Any] = dict(model.generation_config.to_diff_dict())
    ends = _numbers(own.pop("eos_token_id", None))
    taken = (*SHAPES, *SAMPLING) if said.get("do_sample") else SHAPES
    used = {name: value for name, value in own.items() if name in taken and value is not None}
    if set(ends) - {eos_token_id}:
        used["eos_token_id"] = ends
    known = {*used, *SAID_OTHERWISE, *NO_SETTINGS, *SAMPLING}
    rest = {name: value for name, value in own.items() if name not in known and not name.startswith("_")}
    ignored = [name for name, value in rest.items() if value is not None and value is not False]
    tokens = {"pad_token_id": eos_token_id, "eos_token_id": list(dict.fromkeys([eos_token_id, *ends]))}
    try:
        return OwnGenerationConfig(**{**used, **said, **tokens}), used, ignored
    except (ValueError, TypeError) as error:
        raise unusable(error) from error


def describe_own(used: Mapping[str, Any], ignored: Sequence[str]) -> str:
    """In words, what `conversational` says of the model's entries; nothing of a model that has none."""
    parts = [f"uses {', '.join(f'{name}={value!r}' for name, value in used.items())}"] if used else []
    parts += [f"does not use {', '.join(ignored)}"] if ignored else []
    return f"of the model's generation settings this {'; it '.join(parts)}" if parts else ""


def unusable(error: Exception) -> ConfigError:
    """The error of a model's own entries that transformers cannot follow."""
    return ConfigError(
        f"the settings in the model's generation_config.json cannot be used: {first_line(error)} Correct the file, or "
        f"remove it."
    )


def _numbers(value: int | Sequence[int] | None) -> list[int]:
    """Token numbers, of which transformers writes one bare."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)
