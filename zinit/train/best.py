"""The best weights of a run, by a figure of its evaluation, and when to stop looking for better ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zinit.train.strategy import gather_full, shard_like

LOSS = "loss"


@dataclass(kw_only=True)
class Best:
    """Where a figure was best so far, and the weights then, in the main memory. Checkpoints keep both.

    Args:
        metric: the figure.
        direction: which of its values are better.
        patience: evaluations in a row without a better value after which training ends; None goes on to the end.
        figures: measures all figures; None: the held-out loss is enough.

    Attributes:
        step: optimizer steps done then; 0 while no value was a number.
        value: of the figure.
        since: evaluations without a better value.
        weights: what trains, by name.
    """

    metric: str
    direction: Literal["lower", "higher"]
    patience: int | None = None
    figures: Callable[[], Mapping[str, float]] | None = None
    step: int = 0
    value: float | None = None
    since: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether no better value came for too long."""
        return self.patience is not None and self.since >= self.patience

    def see(self, step: int, figures: Mapping[str, float], parameters: Mapping[str, nn.Parameter]) -> None:
        """Takes the weights if they are better than those before. All processes call it, with the same figures.

        Args:
            step: optimizer steps done.
            figures: by name.
            parameters: what trains.
        """
        value = figures.get(self.metric, math.nan)
        if not self._is_better(value):
            self.since += 1
            return
        self.step, self.value, self.since = step, value, 0
        self.weights = {name: gather_full(own).detach().cpu().clone() for name, own in parameters.items()}

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value) or self.value is None:
            return math.isfinite(value)
        return value < self.value if self.direction == "lower" else value > self.value

    @torch.no_grad()
    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Puts the best weights in place; what there is stays if no value was a number."""
        for name, value in self.weights.items():
            parameters[name].copy_(shard_like(value, parameters[name]))

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint says of it, the weights aside."""
        return {"step": self.step, "value": self.value, "since": self.since}

    def load(self, values: Mapping[str, Any], weights: dict[str, Tensor]) -> None:
        """Goes on from what a checkpoint kept.

        Args:
            values: see `to_dict`.
            weights: by name.
        """
        self.step, self.value, self.since = values["step"], values["value"], values["since"]
        self.weights = weights
