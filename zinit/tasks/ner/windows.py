"""A tagged sentence as windows of tokens that fit the model; each word counts in one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zinit.errors import ConfigError
from zinit.tasks.ner.sentences import Sentence


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A sentence, or as much of it as fits.

    Attributes:
        sentence: which one, by its place in the list.
        ids: (T,) token ids.
        words: (N,) which words of the sentence are read off here.
        positions: (N,) where each of them begins.
        labels: (N,) what they are.
    """

    sentence: int
    ids: np.ndarray
    words: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


def make_windows(
    tokenizer: Any, sentence: Sentence, labels: np.ndarray, *, place: int, max_length: int, stride: int
) -> list[Window]:
    """Encodes a sentence: its words are joined by spaces, and each is read off at its first token.

    Args:
        tokenizer: a fast one.
        sentence: what to encode.
        labels: (N,) number of each word's tag.
        place: of the sentence in the list.
        max_length: tokens of a window, special ones included.
        stride: tokens that neighbouring windows share.

    Raises:
        ConfigError: if a window has no room for more than the stride.
    """
    encoded = tokenizer(
        " ".join(sentence.tokens), return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )
    ids = np.asarray(encoded["input_ids"], dtype=np.int32)
    of_text = [position for position, part in enumerate(encoded.sequence_ids(0)) if part == 0]
    if not of_text:
        return []
    before, ids, after = ids[: of_text[0]], ids[of_text[0] : of_text[-1] + 1], ids[of_text[-1] + 1 :]
    offsets = np.asarray(encoded["offset_mapping"])[of_text[0] : of_text[-1] + 1]
    lengths = np.asarray([len(token) for token in sentence.tokens])
    ends = np.cumsum(lengths + 1) - 1
    first = np.searchsorted(offsets[:, 1], ends - lengths, side="right")
    has_token = (first < len(ids)) & (offsets[np.minimum(first, len(ids) - 1), 0] < ends)

    room = max_length - len(before) - len(after)
    if room <= stride:
        raise ConfigError(
            f"windows of task.max_length={max_length} tokens hold {max(0, room)} tokens of a sentence; "
            f"that must be more than task.stride={stride}, which neighbouring windows share."
        )
    begins = np.arange(0, max(1, len(ids) - stride), room - stride)
    lasts = np.minimum(begins + room, len(ids)) - 1
    home = np.where(has_token, _home(first, begins, lasts, room - stride), -1)
    windows = []
    for number, (begin, last) in enumerate(zip(begins, lasts, strict=True)):
        words = np.flatnonzero(home == number)
        if len(words):
            windows.append(
                Window(
                    sentence=place,
                    ids=np.concatenate([before, ids[begin : last + 1], after]),
                    words=words,
                    positions=len(before) + first[words] - begin,
                    labels=labels[words],
                )
            )
    return windows


def _home(first: np.ndarray, begins: np.ndarray, lasts: np.ndarray, step: int) -> np.ndarray:
    """The window that shows most around each word, the first of several; looked for among those that hold it only.

    Args:
        first: (N,) token at which each word begins.
        begins: (W,) first token of each window.
        lasts: (W,) last token of each.
        step: from window to window.
    """
    longest = int((lasts - begins).max()) + 1
    nearest = np.minimum(first // step, len(begins) - 1)
    home, most = np.zeros_like(nearest), np.full(len(first), -1)
    for back in range(-(-longest // step), -1, -1):  # how many windows before the last that begins before the word
        window = np.maximum(nearest - back, 0)
        around = np.minimum(first - begins[window], lasts[window] - first)  # tokens shown on the poorer side
        better = around > most
        home, most = np.where(better, window, home), np.where(better, around, most)
    return home
