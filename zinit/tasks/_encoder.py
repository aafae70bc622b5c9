"""What tasks on a text encoder share: a linear head in float32, padding, and how much text the encoder has room for."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zinit.errors import ConfigError
from zinit.models.room import check_positions
from zinit.tasks.base import Batch

HEAD_STD = 0.02  # as transformers initialises its heads


def make_head(model: nn.Module, outputs: int, seed: int) -> nn.Linear:
    """A linear head for the encoder's last hidden states: (..., C) to (..., outputs), float32.

    Args:
        model: the encoder; its config says C.
        outputs: width of the output.
        seed: of the weights, which start from N(0, 0.02^2); the biases start from zero.
    """
    width: int = model.config.hidden_size  # pyright: ignore[reportAttributeAccessIssue,reportAssignmentType]
    head = nn.Linear(width, outputs, dtype=torch.float32)
    with torch.no_grad():
        head.weight.normal_(std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return head


def head_logits(model: nn.Module, head: nn.Linear, batch: Batch) -> Tensor:
    """(B, T, outputs) in float32. Takes what `pad` makes; other entries of the batch are ignored."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    hidden = model(**inputs).last_hidden_state
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float())


def pad(tokenizer: Any, ids: Sequence[np.ndarray], types: Sequence[np.ndarray] | None = None) -> Batch:
    """One micro-batch, padded to its longest member.

    Always on the right, whatever the tokenizer's side: absolute positions must start at each example's first token.

    Args:
        tokenizer: names the padding token.
        ids: token ids of each example.
        types: token types of each example, if the model takes them.

    Returns:
        ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids``, all (B, T).
    """
    shape = (len(ids), max(len(own) for own in ids))
    batch = {"input_ids": torch.full(shape, tokenizer.pad_token_id), "attention_mask": torch.zeros(shape).long()}
    if types is not None:
        batch["token_type_ids"] = torch.zeros(shape).long()
    for index, own in enumerate(ids):
        batch["input_ids"][index, : len(own)] = torch.from_numpy(own.astype(np.int64))
        batch["attention_mask"][index, : len(own)] = 1
        if types is not None:
            batch["token_type_ids"][index, : len(own)] = torch.from_numpy(types[index].astype(np.int64))
    return batch


def takes_token_types(model: nn.Module, tokenizer: Any) -> bool:
    """Whether the encoder tells a first text from a second by token types, and the tokenizer makes them."""
    host: Any = model
    if hasattr(host, "get_base_model"):  # a wrapper of PEFT's
        host = host.get_base_model()
    taken = "token_type_ids" in inspect.signature(host.forward).parameters
    kinds = getattr(getattr(model, "config", None), "type_vocab_size", 2)
    return taken and kinds > 1 and "token_type_ids" in tokenizer.model_input_names


def check_encoder(model: nn.Module, tokenizer: Any, max_length: int) -> None:
    """The tokenizer maps tokens to text and pads, and the model has room for ``max_length`` tokens.

    Raises:
        ConfigError: if not.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for; a fast tokenizer is needed."
        )
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"{type(tokenizer).__name__} has no padding token. Set one in tokenizer_config.json.")
    check_positions(model, max_length)


def paper_figure(method: str, dataset: str, metric: str) -> float | None:
    """What the paper reports for RoBERTa-large, in percent; see `zinit.tasks.base.Task.paper_figure`."""
    text = (resources.files("zinit.tasks") / "paper_encoder.toml").read_text("utf-8")
    for table in tomllib.loads(text).values():
        if dataset.lower() in table["names"] and metric in table["metrics"] and method in table:
            return table[method][table["metrics"].index(metric)]
    return None
