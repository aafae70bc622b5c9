"""How much a model has room for: positions, and rows for tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from zinit.errors import BackboneError, ConfigError

NAMES = ("max_position_embeddings", "max_seq_len")  # transformers maps n_positions and the like to the first


def positions(model: nn.Module) -> int | None:
    """Tokens of text that a model reads at most, those of PEFT's virtual prompts taken off; None where nothing limits.

    Args:
        model: of transformers, also one in a wrapper. Of several towers, the text's.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    limit = next((limit for name in NAMES if isinstance(limit := getattr(config, name, None), int)), None)
    if limit is None or limit <= 0:  # -1 and 0 stand for "none" in configs of relative positions
        return None
    return limit - _rows_before_the_first(model, limit) - _virtual_tokens(model)


def check_positions(model: nn.Module, max_length: int) -> None:
    """A model has room for ``task.max_length`` tokens.

    Raises:
        ConfigError: if not.
    """
    room = positions(model)
    if room is not None and max_length > room + _virtual_tokens(model):  # short texts may leave the prompts room
        raise ConfigError(
            f"task.max_length is {max_length}, but the model has room for {room} tokens: -o task.max_length={room}."
        )


def check_lengths(model: nn.Module, *splits: Sequence[int]) -> None:
    """A model has room for all of these lengths, PEFT's virtual prompts in front.

    Raises:
        ConfigError: if not.
    """
    room, longest = positions(model), max((length for lengths in splits for length in lengths), default=0)
    if room is not None and longest > room:
        raise ConfigError(
            f"an example has {longest} tokens, but the model has room for {room}, the prompts of the method aside: "
            f"-o task.max_length={room}."
        )


def _rows_before_the_first(model: nn.Module, limit: int) -> int:
    """Rows of a table of learned positions that none takes: RoBERTa's family begins after that of the padding."""
    words = set(map(id, _word_embeddings(model)))
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding) and id(part) not in words]
    after = [part.padding_idx + 1 for part in tables if part.num_embeddings == limit and part.padding_idx is not None]
    return max(after, default=0)


def _virtual_tokens(model: Any) -> int:
    """Positions that PEFT's prompts take in front of the text."""
    return getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0


def check_vocabulary(model: nn.Module, processor: Any, source: object) -> None:
    """The embedding of a model has a row for every token of its tokenizer.

    Args:
        model: as loaded.
        processor: its tokenizer, or what holds one as ``tokenizer``; anything else is not looked at.
        source: folder or Hub id, for the message.

    Raises:
        BackboneError: naming a token that has none.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    rows = next((part.num_embeddings for part in _word_embeddings(model)), None)
    if rows is None or not hasattr(tokenizer, "get_vocab"):
        return
    beyond = sorted((row, token) for token, row in tokenizer.get_vocab().items() if row >= rows)
    if beyond:
        row, token = beyond[0]
        others = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise BackboneError(
            f"{source}: the tokenizer has the token {token!r} (number {row}){others}, but the model's embedding has "
            f"only {rows} rows. Use the tokenizer that the model was trained with, or add rows and save the model "
            f"(resize_token_embeddings)."
        )


def _word_embeddings(model: Any) -> Iterator[nn.Embedding]:
    """The embedding of the tokens of a text model, or of the text tower."""
    hosts: tuple[Any, ...] = (model, getattr(model, "text_model", None))
    for host in hosts:
        try:
            found = host.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(found, nn.Embedding):
            yield found
            return
