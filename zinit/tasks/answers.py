"""Greedy answers of a causal language model to many prompts, neighbours in length together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from zinit.errors import ConfigError
from zinit.models.room import positions
from zinit.tasks.chat import cut_at

BATCH = 32  # prompts per forward pass


def by_room(model: nn.Module, lengths: Sequence[int], most: int) -> dict[int, list[int]]:
    """{tokens of the longest answer: places of the prompts with room for it}: no answer ends by another's room.

    Args:
        model: of transformers.
        lengths: of the prompts, in tokens.
        most: tokens of an answer where there is room enough.

    Raises:
        ConfigError: if a prompt leaves no room at all.
    """
    room = positions(model)
    if room is not None and max(lengths, default=0) >= room:
        raise ConfigError(f"a prompt has {max(lengths)} tokens, but the model has room for {room}, answer included.")
    found: dict[int, list[int]] = defaultdict(list)
    for place, length in enumerate(lengths):
        found[most if room is None else min(most, room - length)].append(place)
    return found


def answer_in_batches(
    model: nn.Module,
    encoded: Sequence[Sequence[int]],
    most: int,
    answer: Callable[[list[int], int], Sequence[str]],
    *,
    batch_size: int = BATCH,
) -> list[str]:
    """One answer for each prompt, in order.

    Args:
        model: of transformers.
        encoded: the prompts, as tokens.
        most: tokens of the longest answer.
        answer: gets the places of the prompts of one batch and the tokens of their longest answer.
        batch_size: prompts per batch.

    Raises:
        ConfigError: if a prompt leaves no room for an answer.
    """
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    answers = [""] * len(encoded)
    for count, alike in by_room(model, [len(encoded[index]) for index in order], most).items():
        for start in range(0, len(alike), batch_size):
            chosen = [order[place] for place in alike[start : start + batch_size]]
            for index, text in zip(chosen, answer(chosen, count), strict=True):
                answers[index] = text.strip()
    return answers


@torch.no_grad()
def continue_texts(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    count: int,
    *,
    stop_tokens: Sequence[int],
    stop_strings: Sequence[str] = (),
) -> list[str]:
    """Greedy continuations of one batch of prompts, padded on the left.

    Args:
        model: of transformers.
        tokenizer: of the model.
        encoded: the prompts, as tokens.
        count: tokens of the longest answer.
        stop_tokens: each of them ends an answer; the first pads.
        stop_strings: texts that end an answer too, and are no part of it.
    """
    from zinit.models.generation import greedy

    device, longest = next(model.parameters()).device, max(map(len, encoded))
    ids = torch.full((len(encoded), longest), tokenizer.eos_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, own in enumerate(encoded):
        ids[place, longest - len(own) :] = torch.tensor(own)
        mask[place, longest - len(own) :] = 1
    generated = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=greedy(max_new_tokens=count, eos_token_id=list(stop_tokens), stop_strings=stop_strings),
        **({"tokenizer": tokenizer} if stop_strings else {}),
    )
    texts = tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
    return [cut_at(text, stop_strings) for text in texts]
