"""Several sequences continued together, one token at a time; sequences join and leave between tokens.

Rows are padded on the left, as ``generate`` has it: so whatever a model makes of distances (rotations, windows, biases)
holds for every row.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from zinit.compat import logits_processors
from zinit.errors import BackboneError

ROOM = 64  # columns that a full cache grows by at least


class GrowingLayer(DynamicLayer):
    """Keys and values (R, G, S, D) of one layer in memory with room for more columns.

    A `DynamicLayer` copies everything at every token; this one only when the room is used up.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes further columns; see `DynamicLayer.update`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.own(key_states, value_states, used=key_states.shape[2])
            return key_states, value_states
        used = self.used
        end = used[0].shape[2] + key_states.shape[2]
        if end > self.memory[0].shape[2]:
            self.memory = tuple(F.pad(x, (0, 0, 0, max(ROOM, end // 2))) for x in used)  # pyright: ignore
        for memory, new in zip(self.memory, (key_states, value_states), strict=True):
            memory[:, :, end - new.shape[2] : end] = new
        self.keys, self.values = (memory[:, :, :end] for memory in self.memory)
        return self.used

    @property
    def used(self) -> tuple[Tensor, Tensor]:
        """The keys and values in use."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def own(self, *memory: Tensor, used: int) -> None:
        """Takes over memory for keys and values, whose first columns are in use."""
        self.memory = memory
        self.keys, self.values = (x[:, :, :used] for x in memory)

    def keep(self, rows: Tensor, start: int) -> None:
        """Some rows from a column on, and the room behind them, as far as they need it."""
        used = self.used[0].shape[2] - start
        end = start + used + max(ROOM, used // 2)
        self.own(*(x[:, :, start:end].index_select(0, rows) for x in self.memory), used=used)

    def join(self, other: GrowingLayer, width: int) -> None:
        """Takes over the rows of another layer behind its own, all padded on the left to a width."""
        joined = []
        for mine, new in zip(self.used, other.used, strict=True):
            rows = len(mine)
            both = mine.new_zeros(rows + len(new), mine.shape[1], width + ROOM, mine.shape[3])
            both[:rows, :, width - mine.shape[2] : width] = mine
            both[rows:, :, width - new.shape[2] : width] = new
            joined.append(both)
        self.own(*joined, used=width)


class Batch:
    """Sequences of different lengths and what the model has cached of them.

    Args:
        model: a causal language model of transformers.

    Attributes:
        lengths: tokens of each row that are cached.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.lengths = model, list[int]()
        takes = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # transformers 5.24 renamed it
        self._positions = "position_ids" in takes
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._cache: Any = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        """Columns of the cache."""
        return max(self.lengths, default=0)

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads prompts into an empty batch.

        Args:
            prompts: at least one token each.

        Returns:
            (R, V) the logits of each next token.
        """
        self._cache = DynamicCache()
        self._cache.layer_class_to_replicate = GrowingLayer
        self.lengths = [len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * (self.width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = self._mask()
        return self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Adds one token to each row; returns the logits (R, V) of the next ones."""
        positions = torch.tensor(self.lengths)[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        return self._forward(torch.tensor(tokens)[:, None], self._mask(), positions)

    def keep(self, rows: Sequence[int]) -> None:
        """Rows that stay; the others leave."""
        if list(rows) == list(range(len(self))):
            return
        width = self.width
        self.lengths = [self.lengths[row] for row in rows]
        index, start = torch.tensor(rows, device=self.model.device), width - self.width
        for layer in self._cache.layers if rows else ():
            layer.keep(index, start)

    def join(self, other: Batch) -> None:
        """Takes over all rows of another batch, behind its own."""
        if not self.lengths:
            self.lengths, self._cache = other.lengths, other._cache
            return
        width = max(self.width, other.width)
        for layer, new in zip(self._cache.layers, other._cache.layers, strict=True):
            layer.join(new, width)
        self.lengths = self.lengths + other.lengths

    def _mask(self) -> Tensor:
        """(R, S): 1 where a row has a token."""
        return (torch.arange(self.width) >= self.width - torch.tensor(self.lengths)[:, None]).long()

    @torch.no_grad()
    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        device = self.model.device
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            use_cache=True,
            **{self._cache_name: self._cache},
            **({"position_ids": positions.to(device)} if self._positions else {}),
            **self._keep,
        )
        return output.logits[:, -1].float()


class Chooser:
    """Chooses the tokens of one answer as ``generate`` does.

    Args:
        model: of transformers.
        config: complete in itself, as `zinit.models.generation` makes it.
        prompt: of the answer.
        seed: of what is drawn.

    Attributes:
        greedy: whether the likeliest token is taken, whatever came before.
    """

    def __init__(self, model: Any, config: Any, prompt: Sequence[int], seed: int) -> None:
        self.draws, self.prompt, self.device = bool(config.do_sample), list(prompt), model.device
        self.processors = logits_processors(model, config, torch.tensor([self.prompt], device=self.device))
        self.greedy = not self.draws and not self.processors
        self.generator = torch.Generator(self.device).manual_seed(seed) if self.draws else None

    def __call__(self, logits: Tensor, answer: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: (V,), float32.
            answer: the tokens so far.
        """
        ids = torch.tensor([[*self.prompt, *answer]], device=self.device)
        scores = self.processors(ids, logits[None].clone())
        if not self.draws:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))


def choose(
    logits: Tensor, choosers: Sequence[Chooser], answers: Sequence[Sequence[int]]
) -> tuple[list[int], dict[int, Exception]]:
    """The next token of each row, see `Chooser`; and {row: error} of those whose token cannot be chosen."""
    tokens = logits.argmax(-1).tolist()
    errors: dict[int, Exception] = {}
    for row, chooser in enumerate(choosers):
        if not chooser.greedy:
            try:
                tokens[row] = chooser(logits[row], answers[row])
            except Exception as error:
                errors[row] = error
    return tokens, errors


@torch.no_grad()
def check_batches(model: Any) -> None:
    """Tries on a few tokens whether a model computes the same for rows of a padded batch as for each alone.

    Raises:
        BackboneError: if it does not, or caches something else than keys and values.
    """
    prompts = [[1, 2, 3, 4, 5], [3, 1], [2, 2, 4]]
    try:
        together, alone = Batch(model), [Batch(model) for _ in prompts]
        pairs = [(together.start(prompts[:1]), [alone[0].start(prompts[:1])])]
        new = Batch(model)
        pairs.append((new.start(prompts[1:]), [one.start([p]) for one, p in zip(alone[1:], prompts[1:], strict=True)]))
        together.join(new)
        for _ in range(2):
            pairs.append((together.step([5, 4, 3]), [one.step([t]) for one, t in zip(alone, (5, 4, 3), strict=True)]))
        together.keep([1, 2])
        pairs.append((together.step([4, 3]), [one.step([t]) for one, t in zip(alone[1:], (4, 3), strict=True)]))
    except (ValueError, TypeError, AttributeError, IndexError, NotImplementedError, RuntimeError) as error:
        raise BackboneError(
            f"{type(model).__name__} cannot be served in batches: {type(error).__name__}. It needs a cache of keys and "
            f"values in every layer. Use zinit generate."
        ) from error
    half = model.dtype != torch.float32
    worst = max(float((a - torch.cat(b)).abs().max() / torch.cat(b).abs().max()) for a, b in pairs)
    if not worst <= (0.05 if half else 1e-3):
        raise BackboneError(
            f"{type(model).__name__} cannot be served in batches: its rows differ by {worst:.2g} from each alone, "
            f"relative to the largest logit. Use zinit generate."
        )
