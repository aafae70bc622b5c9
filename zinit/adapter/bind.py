"""The bind network of ImageBind-LLM (arXiv 2309.03905): vectors of one joint space, whatever the sense, to one token.

ImageBind itself is no part of zinit: its code and weights may not be used commercially. The network takes vectors that
were made elsewhere, or an encoder's that was registered (`zinit.encoders`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zinit.adapter.encoding import Encoder, Features
from zinit.adapter.sources import ContextSource
from zinit.errors import ConfigError
from zinit.prefix import Context
from zinit.validation import Size

Weight = float | Tensor
Senses = Mapping[str, Tensor | tuple[Tensor, Weight]]
"""{"image": (B, F), "audio": ((B, F), 0.5)}: vectors, and what they weigh: a number, or one for each sample (B,)."""
EPS = 1e-6  # of the norms, and beside the sum of the weights


class GatedBlock(nn.Module):
    """x + down(silu(gate n(x)) * up n(x)), n an RMSNorm, without biases; the legacy form has LayerNorm and biases.

    Args:
        width: C.
        hidden: of the middle.
        legacy: the form of older files.
    """

    def __init__(self, width: int, hidden: int, *, legacy: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if legacy else nn.RMSNorm(width, eps=EPS)
        self.gate, self.up = (nn.Linear(width, hidden, bias=legacy) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=legacy)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) to the same."""
        normed = self.norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class BindNetwork(ContextSource):
    """ImageBind-LLM's source: unit vectors, a weighted sum over the senses, a linear layer, gated blocks: (B, 1, C).

    Weights of a sample are divided by their sum + 1e-6, and the sum of its vectors is not made a unit vector again, as
    in the released code. A sample that has no sense at all has no context; the released code encodes a black image.

    Args:
        width: C.
        length: K; the token is added to each of the K prompts. Released: 1, where attention is no more than the value.
        feature_width: of the vectors; with an encoder it is known. Released: 1024.
        hidden: width of a block's middle; None is 4 C, as released.
        blocks: their number. Released: 3.
        legacy: LayerNorm and biases in the blocks, as older files have them.
    """

    takes = ("pooled",)

    def __init__(
        self,
        *,
        width: int,
        length: int,
        feature_width: Size,
        hidden: Size | None = None,
        blocks: Size = 3,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(feature_width, width)
        inside = 4 * width if hidden is None else hidden
        self.blocks = nn.ModuleList(GatedBlock(width, inside, legacy=legacy) for _ in range(blocks))

    @classmethod
    def options_for(cls, encoder: Encoder, options: dict[str, Any]) -> dict[str, Any]:
        """The width of an encoder's vectors."""
        return {"feature_width": encoder.pooled_width}

    def forward(self, features: Features | Tensor | Senses) -> Context:
        """(B, 1, C).

        Args:
            features: of an encoder; or vectors (B, F), of any length; or those of several senses, see `Senses`.

        Raises:
            ConfigError: if vectors or weights are of a wrong shape.
        """
        senses, present = _by_sense(features)
        mixed, weighs = self._mixed(senses)
        present = weighs > 0 if present is None else present.to(weighs.device) & (weighs > 0)
        x = self.proj(mixed)
        for block in self.blocks:
            x = block(x)
        return Context(x[:, None], present)

    def _mixed(self, senses: Senses) -> tuple[Tensor, Tensor]:
        """(B, F), the senses' unit vectors by their share of the weights; and each sample's weights together, (B,)."""
        own = self.proj.weight
        vectors: list[Tensor] = []
        weights: list[Tensor] = []
        for name, given in senses.items():
            vector, weight = (given, 1.0) if isinstance(given, Tensor) else given
            batch = len(vectors[0] if vectors else vector)
            if vector.dim() != 2 or tuple(vector.shape) != (batch, self.proj.in_features):
                raise ConfigError(
                    f"vectors of {name} must be ({batch}, {self.proj.in_features}), one for each sample; got "
                    f"{tuple(vector.shape)}."
                )
            weight = torch.as_tensor(weight, dtype=own.dtype, device=own.device)
            if (weight.dim() and tuple(weight.shape) != (batch,)) or bool((weight < 0).any()):
                raise ConfigError(
                    f"{name} must weigh a number of at least 0, or one for each of the {batch} samples; got {weight}."
                )
            vectors.append(F.normalize(vector.to(own), dim=-1))
            weights.append(weight.expand(batch))
        if not vectors:
            raise ConfigError("there are no features of any sense: leave out given(...), or name at least one.")
        together = torch.stack(weights).sum(0)
        shares = [weight / (together + EPS) for weight in weights]
        return torch.stack([share[:, None] * x for share, x in zip(shares, vectors, strict=True)]).sum(0), together


def _by_sense(features: Features | Tensor | Senses) -> tuple[Senses, Tensor | None]:
    if isinstance(features, Tensor):
        return {"features": features}, None
    if isinstance(features, Features):
        if features.pooled is None:
            raise ConfigError("the context source 'bind' takes one vector of each image, and the features hold none.")
        return {"features": features.pooled}, features.present
    return features, None
