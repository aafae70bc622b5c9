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
