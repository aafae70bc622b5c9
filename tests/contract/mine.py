"""A model that zinit has never heard of, and the few lines by which its author attaches prefixes to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zinit.backbones.base import AttentionSite, PrefixSlot


class Mixer(nn.Module):
    """Attention with one fused projection, six heads of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.fused(x).unflatten(-1, (3, 6, 4)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.split(x)).transpose(1, 2).flatten(2))


class Mine(nn.Module):
    """Three residual layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(Mixer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            x = x + mixer(F.layer_norm(x, (24,)))
        return x


class MixerWithPrefix(Mixer):
    """The one thing that differs; it asks its own child, so copies use their own prefixes."""

    zinit: PrefixSlot

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, prefix = super().attend(query, key, value), self.zinit.prefix()
        if prefix is None:
            return out
        return out + prefix(query, *self.zinit.keys_values(self, prefix, query.dtype), query.shape[-1] ** -0.5)


class MineBackbone:
    """All that the author writes."""

    name, default_task, demo_model = "mine", "alpaca", ""

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Mine)

    def sites(self, model: nn.Module) -> list[AttentionSite]:
        shape = {"width": 24, "num_heads": 6, "num_kv_heads": 6, "head_dim": 4}
        return [
            AttentionSite(name=name, module=module, project_kv=self.project_kv, **shape)
            for name, module in model.named_modules()
            if isinstance(module, Mixer)
        ]

    def project_kv(self, host: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(host, Mixer)
        _, key, value = host.split(tokens if tokens.dim() == 3 else tokens[None])
        return key, value

    def install(self, model: nn.Module, site: AttentionSite, slot: PrefixSlot) -> None:
        site.module.add_module("zinit", slot)
        site.module.__class__ = MixerWithPrefix

    def uninstall(self, model: nn.Module, site: AttentionSite) -> None:
        del site.module.zinit
        site.module.__class__ = Mixer


MINE = MineBackbone()


def tiny() -> Mine:
    torch.manual_seed(5)
    return Mine().eval()
