"""Alpaca's prompt: one template with a section for an input, one without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEADER = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."


def format_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's prompt: the template with an input section if there is an input, else the one without.

    Args:
        instruction: what to do.
        input: further context; may be empty or blank.
    """
    if input.strip():
        return (
            f"{HEADER}, paired with an input that provides further context. {REQUEST}\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        )
    return f"{HEADER}. {REQUEST}\n\n### Instruction:\n{instruction}\n\n### Response:"


def format_conversation(turns: Sequence[tuple[str, str]], instruction: str) -> str:
    """A prompt that holds the earlier turns of a chat, each as an instruction with its response.

    Args:
        turns: (instruction, response) pairs so far.
        instruction: the one to answer now.
    """
    sections = [f"### Instruction:\n{asked}\n\n### Response:{answered}" for asked, answered in turns]
    return "\n\n".join([f"{HEADER}. {REQUEST}", *sections, f"### Instruction:\n{instruction}\n\n### Response:"])


def encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids without BOS and EOS. A "</s>" that somebody wrote in a text stays text."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Texts with their answers as the reference makes them: BOS + both encoded as one text + EOS.

    Where a tokenizer would merge across the border the answer is encoded by itself, so that a prompt is always the same
    tokens in training and in generation.

    Args:
        tokenizer: of the model.
        pairs: of a prompt and the answer to it.

    Returns:
        For each pair its token ids, and how many of them are the prompt's.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = encode_texts(
        tokenizer, [*(prompt for prompt, _ in pairs), *(prompt + answer for prompt, answer in pairs)]
    )
    found = []
    for (_, answer), start, both in zip(pairs, encoded, encoded[len(pairs) :], strict=False):
        if both[: len(start)] != start:
            both = start + encode_texts(tokenizer, [answer])[0]
        found.append(([*bos, *both, tokenizer.eos_token_id], len(bos) + len(start)))
    return found
