"""Logistic regression (scikit-learn) on the frozen model's features: what can be had without any adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zinit.config import JsonConfig, PrefixConfig
from zinit.errors import ConfigError
from zinit.methods.base import Adapted, Method

if TYPE_CHECKING:
    from zinit.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class LogisticRegressionSettings(JsonConfig):
    """How strongly it is regularised.

    Args:
        C: inverse strength of the L2 penalty; scikit-learn's default is 1.
    """

    C: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.C, bool) or not isinstance(self.C, int | float) or not self.C > 0:
            raise ConfigError(f"C must be a number above 0; got {self.C!r}.")


class LogisticRegression(Method):
    """Frozen features with logistic regression; for tasks that have one feature vector per example."""

    name = "logistic-regression"
    Config = LogisticRegressionSettings

    def apply(
        self, model: nn.Module, *, prefix: PrefixConfig, backbone: str, seed: int, saved: Path | None = None
    ) -> Adapted:
        model.requires_grad_(False)
        return Adapted(model=model)

    def solve(self, task: Task) -> bool:
        """Sets the task's linear head to the solution.

        Raises:
            ConfigError: if the task has no feature vectors, or no linear head on them.
        """
        features, head = getattr(task, "features", None), getattr(task, "head", None)
        labels = getattr(task, "train_labels", None)
        if features is None or labels is None or not isinstance(head, nn.Linear):
            raise ConfigError(
                f"the method logistic-regression needs one feature vector per example and a linear head; the task "
                f"{task.name} has none."
            )
        solve_head(head, features(task.train_stream), labels, C=self.config.C)
        return True


@torch.no_grad()
def solve_head(head: nn.Linear, features: Tensor, labels: Any, *, C: float = 1.0) -> None:
    """Sets a linear head to the logistic regression of labels on standardised features.

    Args:
        head: (classes, C).
        features: (N, C).
        labels: N class numbers; classes that do not occur are never predicted.
        C: inverse strength of the L2 penalty.
    """
    from sklearn.linear_model import LogisticRegression as Solver

    x, y = features.double().cpu().numpy(), np.asarray(labels)
    mean, std = x.mean(0), x.std(0)
    std[std < 1e-8] = 1.0
    present = np.unique(y)
    weight = np.zeros((head.out_features, head.in_features))
    bias = np.full(head.out_features, -1e4)
    if len(present) == 1:
        bias[present] = 0.0
    else:
        solution = Solver(C=C, max_iter=2000).fit((x - mean) / std, y)
        coefficients, intercepts = solution.coef_, solution.intercept_
        if len(present) == 2:  # one score for the second class; softmax(0, score) is its sigmoid
            coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
            intercepts = np.concatenate([np.zeros(1), intercepts])
        weight[present] = coefficients / std
        bias[present] = intercepts - (coefficients / std) @ mean
    head.weight.copy_(torch.from_numpy(weight))
    head.bias.copy_(torch.from_numpy(bias))
