"""Logistic regression of labels on features, as the weights of a linear head."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


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
