"""Tiny random models and data, made in milliseconds: what tests of the engine and the command line run on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.processes import run

WORDS = ("red", "blue", "green", "seven", "river", "stone", "cat", "moon")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and <s> </s> <pad>."""
    specials = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def save_tiny_llama(folder: Path, *, seed: int = 0, layers: int = 3, **settings: Any) -> Path:
    """A random LLaMA of about 30,000 parameters with a byte tokenizer, in transformers' format."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 264,
            "max_position_embeddings": 512,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            **settings,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def records(count: int) -> list[dict[str, str]]:
    """Alpaca records of uneven lengths."""
    return [
        {
            "instruction": f"Say {WORDS[i % 8]} {i}",
            "input": "" if i % 3 else f"loudly, {'very ' * (i % 5)}much",
            "output": " ".join([WORDS[i % 8]] * (1 + i % 6)),
        }
        for i in range(count)
    ]


def save_records(path: Path, count: int = 40) -> Path:
    """The records as a JSON file."""
    path.write_text(json.dumps(records(count)))
    return path


def zinit(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user would, in a process of its own."""
    return run("zinit", *arguments, timeout=timeout)
