"""Context sources over image features: V1's projected image and V2's visual tokens.

Both end in the width of the model and are added to, or stand for, the prompts of the parts that take a context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zinit.adapter.encoding import Encoder, Features
from zinit.adapter.sources import ContextSource
from zinit.prefix import Context
from zinit.validation import PositiveFloat, Size


class ProjectedImage(ContextSource):
    """V1 with images (paper, Eq. 9): vectors of several encoder layers, one bottleneck network, one token (B, 1, C).

    The paper gives no shape but its size, 0.56M numbers at 7B: LayerNorm, Linear, SiLU, Linear is ours.

    Args:
        width: C.
        length: K; the token is added to each of the K prompts.
        feature_width: of all layers' vectors together; with an encoder it is known.
        hidden: of the bottleneck.
        layers: how many encoder layers, equally spaced, the last included.
    """

    takes = ("layers",)

    def __init__(self, *, width: int, length: int, feature_width: Size, hidden: Size = 64, layers: Size = 4) -> None:
        super().__init__()
        self.layers = layers
        self.norm = nn.LayerNorm(feature_width)
        self.down, self.up = nn.Linear(feature_width, hidden), nn.Linear(hidden, width)

    @classmethod
    def options_for(cls, encoder: Encoder, options: dict[str, Any]) -> dict[str, Any]:
        """The width of an encoder's vectors."""
        return {"feature_width": encoder.layer_width * options.get("layers", 4)}

    def forward(self, features: Features) -> Context:
        """(B, 1, C)."""
        vectors = torch.cat(features.layers, dim=-1).to(self.norm.weight.dtype)
        made = self.up(nn.functional.silu(self.down(self.norm(vectors))))
        return Context(made[:, None], features.present)


class VisualTokens(ContextSource):
    """V2's bridge, as released: K queries attend with the image's tokens in a few ViT blocks (B, K, C).

    Linear and LayerNorm in, pre-norm blocks (exact GELU, eps 1e-5), the queries' outputs through Linear and LayerNorm.

    Args:
        width: C.
        length: K.
        feature_width: of the encoder's tokens; with an encoder it is known.
        hidden: width of the blocks. Released: 768.
        blocks: their number. Released: 8; the default is a small form for own training.
        heads: of a block. Released: 16.
        mlp_ratio: width of a block's MLP over its own.
    """

    def __init__(
        self,
        *,
        width: int,
        length: int,
        feature_width: Size,
        hidden: Size = 256,
        blocks: Size = 2,
        heads: Size = 4,
        mlp_ratio: PositiveFloat = 4.0,
    ) -> None:
        super().__init__()
        self.proj_in, self.norm_in = nn.Linear(feature_width, hidden), nn.LayerNorm(hidden)
        self.query = nn.Parameter(torch.randn(length, hidden))
        plain = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        inside = int(hidden * mlp_ratio)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(hidden, heads, inside, **plain) for _ in range(blocks))
        self.proj_out, self.norm_out = nn.Linear(hidden, width), nn.LayerNorm(width)

    @classmethod
    def options_for(cls, encoder: Encoder, options: dict[str, Any]) -> dict[str, Any]:
        """The width of an encoder's tokens."""
        return {"feature_width": encoder.width}

    def forward(self, features: Features) -> Context:
        """(B, K, C)."""
        assert features.tokens is not None
        tokens = self.norm_in(self.proj_in(features.tokens.to(self.query.dtype)))
        x = torch.cat([self.query.expand(len(tokens), -1, -1), tokens], dim=1)
        hidden = self._absent(features, x)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=hidden)
        return Context(self.norm_out(self.proj_out(x[:, : len(self.query)])), features.present)

    def _absent(self, features: Features, x: Tensor) -> Tensor | None:
        """(B, K + N) boolean, the tokens that there are not."""
        if features.mask is None:
            return None
        queries = features.mask.new_zeros(len(x), len(self.query))
        return torch.cat([queries, ~features.mask], dim=1)
