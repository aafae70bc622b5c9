"""What a backbone must answer: where its attention is, how its keys and values are made, how to reach in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from zinit.prefix import ZeroGatedPrefix

if TYPE_CHECKING:
    from zinit.adapter.routing import RoutedPrefix

ProjectHostKV = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
"""(host module, (K, C) or (B, K, C)) to two of (1 or B, G, K, D). A plain function: a prefix never holds its host."""


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One self-attention module that can take a prefix.

    Args:
        name: its path in the model, "model.layers.7.self_attn": stable, and the checkpoint's key.
        module: the host.
        width: C, what the key and value projections take in.
        num_heads: H.
        num_kv_heads: G, divides H.
        head_dim: D, read from the module, never C // H.
        value_dim: width of a value head where it is not D.
        query_value: names of the linear layers inside the module that make queries and values, where they are known
            (LoRA asks); None if the module calls none, but reads their weights.
        project_kv: the host's frozen key and value projections.
        project_query: (host module, (K, C)) to (1, H, K, D), neither normalised nor rotated; only importers of
            other implementations' files ask, and a backbone need not answer.
    """

    name: str
    module: nn.Module
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    project_kv: ProjectHostKV
    project_query: Callable[[nn.Module, Tensor], Tensor] | None = None
    value_dim: int | None = None
    query_value: tuple[str, ...] | None = ()

    @property
    def tower(self) -> str:
        """The stack of layers it belongs to: its path up to the first number ("text_model.encoder.layers")."""
        parts = self.name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        return ".".join(parts[:number])

    def shape(self) -> dict[str, int]:
        """C, H, G and D by name (and the values' D where it differs): what an adapter must agree with."""
        of_value = {} if self.value_dim in (None, self.head_dim) else {"value_dim": self.value_dim}
        return of_value | {
            "width": self.width,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
        }


class Backbone(Protocol):
    """A family of models. Implementations are tables of facts; nobody else asks what a model is."""

    name: str
    default_task: str
    demo_model: str

    def matches(self, model: nn.Module) -> bool:
        """Whether this backbone knows the model."""
        ...

    def sites(self, model: nn.Module) -> list[AttentionSite]:
        """All attention modules that can take a prefix, from the lowest layer to the topmost.

        Raises:
            BackboneError: if the model has something the backbone cannot reproduce.
        """
        ...

    def install(self, model: nn.Module, site: AttentionSite, slot: PrefixSlot) -> None:
        """Makes the host add what the slot's active prefix computes."""
        ...

    def uninstall(self, model: nn.Module, site: AttentionSite) -> None:
        """Undoes `install` completely."""
        ...


class PrefixSlot(nn.ModuleDict):
    """The child ``zinit`` of an attention module: its prefixes by adapter name, and which of them is on.

    Args:
        project_kv: the host's key and value projections.
    """

    def __init__(self, project_kv: ProjectHostKV) -> None:
        super().__init__()
        self.project_kv = project_kv
        self.active: str | None = None
        self.contexts: dict[str, Tensor] = {}
        self.frozen: tuple[Tensor, Tensor] | None = None
        self.route: RoutedPrefix | None = None

    @classmethod
    def can_hold(cls, name: str) -> bool:
        """Whether a prefix may go by this name: an identifier that is no attribute of the slot itself."""
        return name.isidentifier() and not hasattr(cls(lambda host, tokens: (tokens, tokens)), name)

    def prefix(self) -> ZeroGatedPrefix | RoutedPrefix | None:
        """The active prefix, or the route's; None if there is nothing to add here."""
        if self.route is not None:
            return self.route if self.route.prefixes else None
        if self.active is None or self.active not in self:
            return None
        return self[self.active]  # pyright: ignore[reportReturnType]

    def keys_values(
        self,
        host: nn.Module,
        prefix: ZeroGatedPrefix | RoutedPrefix,
        dtype: torch.dtype,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The keys and gated values: frozen for the length of a generation, else computed anew.

        Frozen ones are used only where no gradient could be wanted. A context given here comes before the one that
        `Handle.context` has set for the active adapter.
        """
        if self.frozen is not None and context is None and not torch.is_grad_enabled():
            return self.frozen
        if context is None:
            used = [self.active] if self.route is None else self.route.prefixes
            context = next((self.contexts[name] for name in used if name in self.contexts), None)
        return prefix.keys_values(lambda tokens: self.project_kv(host, tokens), dtype, context)


def with_real_weights(module: nn.Module) -> nn.Module:
    """The module itself; where its weights are on the meta device, a copy on the CPU with random ones."""
    if not any(tensor.device.type == "meta" for tensor in module.parameters()):
        return module
    copied = copy.deepcopy(module).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(generator=generator).mul_(tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0)
            else:
                tensor.zero_()
    return copied


def random_like(weight: Tensor, *shape: int) -> Tensor:
    """The same random numbers at every call, on the weight's device and in its dtype."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return numbers.to(weight.device, weight.dtype)
