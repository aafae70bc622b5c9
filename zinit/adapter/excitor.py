"""LLaMA-Excitor (CVPR 2024, arXiv 2404.00913): prompts that change which words are attended to, and add no value.

The paper adds to each score of the words a gated score of its own, q (g k'), with an auxiliary key k' made of prompts
and the layer's input. That is q (k + g k'): a gated addition to the keys, which any attention kernel and any cache
takes as it is. From the paper are the bottleneck, the sizes (K = 30, r = 16: 7.6M numbers at 7B), one gate of zero for
each layer, and that values stay. How the parts go together is ours, as its code is not public:

    k'_t  =  softmax((U D x_t) P^T / sqrt(C)) W_k P          k_t  <-  k_t + g k'_t

D (r, C), U (C, r) and the prompts P (K, C) are learned; x_t is what the key projection takes. The addition is made
where the keys leave their layer, so the host rotates (and norms, where it does) the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zinit.adapter.bias_modules import low_rank, uniform
from zinit.adapter.select import select_sites
from zinit.adapter.tuning import TunedCall, Tuning, build_tuning, place
from zinit.backbones.base import AttentionSite
from zinit.backbones.layers import keys_of
from zinit.config import ExcitorConfig, PrefixConfig


class ExcitedKeys(nn.Module):
    """What is learned for one attention module.

    Attributes:
        prompts: (K, C), standard normal at the start.
        down: (r, C), random. ``up``: (C, r), random.
        gate: (1,), zero: the start is the host bit for bit.
        rows: which numbers of the layer's output are keys, in their order; None is all. Not learned.
    """

    def __init__(self, config: ExcitorConfig, width: int, rows: Tensor | None, *, device: Any, generator: Any) -> None:
        super().__init__()
        start = torch.empty(config.length, width, device=device if device.type == "meta" else "cpu")
        self.prompts = nn.Parameter((start if start.is_meta else start.normal_(generator=generator)).to(device))
        self.down = nn.Parameter(uniform(config.rank, width, device=device, generator=generator))
        self.up = nn.Parameter(uniform(width, config.rank, device=device, generator=generator))
        self.gate = nn.Parameter(torch.zeros(1, device=device))
        self.rows = rows

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """``g k'``: (..., C) and the prompts' keys (K, G * D) to (..., G * D)."""
        asked = low_rank(x, self.down, self.up)
        scores = F.linear(asked, self.prompts.to(x.dtype)).float() * x.shape[-1] ** -0.5
        return self.gate.to(x.dtype) * (scores.softmax(-1).to(x.dtype) @ keys)


class Excitor(Tuning):
    """See the module.

    Args:
        modules: {path of the host's layer that makes keys: what is learned for it}.
    """

    def __init__(self, modules: dict[str, ExcitedKeys]) -> None:
        super().__init__()
        self._paths = tuple(modules)
        for path, module in modules.items():
            place(self, path, module)

    def targets(self) -> Sequence[str]:
        """The paths of the layers that make keys."""
        return self._paths

    @classmethod
    def changed(cls, on: Sequence[Any], call: TunedCall, output: Any) -> Any:
        """The words' keys with the additions; those of prompts stay."""
        if call.of_prompts:
            return output
        for one in on:
            own: ExcitedKeys = one.get_submodule(call.name)
            x = call.args[0]
            keys = type(call.module).forward(call.module, own.prompts.to(x.dtype))  # pyright: ignore
            if own.rows is None:
                output = output + own(x, keys).to(output.dtype)
            else:
                rows = own.rows.to(output.device)
                output = output.index_add(-1, rows, own(x, keys[..., rows]).to(output.dtype))
        return output


@build_tuning.register
def _build(
    config: ExcitorConfig,
    model: nn.Module,
    sites: Sequence[AttentionSite],
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Excitor:
    modules = {}
    for site in select_sites(model, list(sites), PrefixConfig(layers=config.layers, towers=config.towers)):
        path, rows = keys_of(site)
        where = next(site.module.parameters()).device if device is None else torch.device(device)
        modules[path] = ExcitedKeys(config, site.width, rows, device=where, generator=generator)
    return Excitor(modules)
