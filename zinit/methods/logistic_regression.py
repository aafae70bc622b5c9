"""Logistic regression (scikit-learn) on the frozen model's features: the result without any adaptation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from zinit.errors import ConfigError
from zinit.methods.base import Adapted, ApplyContext, Method
from zinit.methods.settings import LogisticRegressionSettings
from zinit.tasks._linear_probe import solve_head

if TYPE_CHECKING:
    from zinit.tasks.base import Task


class LogisticRegression(Method):
    """Frozen features with logistic regression; for tasks that have one feature vector per example."""

    name = "logistic-regression"
    Config = LogisticRegressionSettings

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
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
