"""How far training moves the features of a frozen encoder: what it forgets, where it has no loss of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Drift:
    """Remembers the features of the frozen model, which the first call hands in."""

    def __init__(self) -> None:
        self.base: Tensor | None = None

    def measure(self, features: Tensor) -> float:
        """1 - cosine of every feature vector to that of the frozen model, on average: 0 to 2.

        Args:
            features: of the same places at every call, (N, C).
        """
        features = features.detach().double().cpu()
        self.base = features if self.base is None else self.base
        return max(0.0, 1 - F.cosine_similarity(features, self.base, dim=-1).mean().item())  # rounding goes below

    @torch.no_grad()
    def of_tokens(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """{"drift": of the last hidden states of some texts}; {} without one.

        Args:
            model: an encoder, in evaluation mode.
            batches: its inputs, one text each: padding would round otherwise.
        """
        device = next(model.parameters()).device
        found = [
            model(**{name: tensor.to(device) for name, tensor in batch.items()}).last_hidden_state[0]
            for batch in batches
        ]
        return {"drift": self.measure(torch.cat(found))} if found else {}
