"""What a task gives the engine: splits and streams of examples, and what an evaluation found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zinit.errors import ConfigError

MAIN = "main"  # the group of a task that has one


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """A part of the data, such as what is trained on or what is held out.

    Attributes:
        name: for logs and errors.
        lengths: of each example, in tokens (or patches): micro-batches are sorted by it.
        counts: supervised units of each example: what the loss is averaged over.
        examples: the examples themselves, in whatever form `Task.collate` reads; a task may keep them elsewhere.
    """

    name: str
    lengths: Sequence[int]
    counts: Sequence[int]
    examples: Sequence[Any] = ()

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream(Split):
    """A split that steps draw on. Its loss trains one group of parameters and no other.

    Attributes:
        group: the group it trains, one of `Task.groups`.
        ratio: examples per step, as a multiple of ``train.batch_size``; 0 takes no step on it.
        passes: (examples, passes of an epoch over them) of its sources, one after the other; none is one pass over
            all. A fraction of a pass goes on in the next epoch where this one ended.
    """

    group: str = MAIN
    ratio: float = 1.0
    passes: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio >= 0):
            raise ConfigError(f"the ratio of the stream {self.name!r} must be a number from 0 on; got {self.ratio}.")
        if self.passes and sum(count for count, _ in self.passes) != len(self):
            raise ConfigError(f"the sources of the stream {self.name!r} do not add up to its {len(self)} examples.")

    @property
    def taken(self) -> tuple[int, ...]:
        """Examples that an epoch takes of each source."""
        return tuple(max(1, round(count * passes)) if count else 0 for count, passes in self.passes) or (len(self),)


@dataclass(kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: name to value.
        counts: how many examples each part of it saw.
        samples: a few inputs: "prompt", "expected" and "output", as text. Besides perhaps "instruction", what people
            read in place of a prompt that is made of it, and "image", see `zinit.data.images.thumbnail`.
        examples: {name of a figure: one (x, y) for each example}, where the figure is the sum of x over the sum of y;
            what confidence intervals are made of. As many for all figures, in the same order in every run.
    """

    metrics: dict[str, float]
    counts: dict[str, int] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    examples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
