"""What a backbone must answer: where its attention is, how its keys and values are made, how to reach in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from zinit.config import PrefixConfig
from zinit.errors import ConfigError
from zinit.prefix import Context, ProjectKV

Rows = Literal["samples", "beams", "other"]
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
        rows: what the module's batch holds: ``"samples"``, each sample of the call once; ``"beams"``, or several beams
            of each side by side, as where text is generated; ``"other"``, things of which a sample may have none or
            several (images in a text), so that nobody knows which sample a row is of.
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
    rows: Rows = "samples"

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

    def check_rows(self, what: str, samples: int, batch: int) -> None:
        """Whether what was given for some samples can be spread over the rows of the module's batch.

        Args:
            what: was given, as "a route of" or "a context for".
            samples: it was given for; what is for one sample is for every row.
            batch: rows of the module's batch.

        Raises:
            ConfigError: if it is not known which row is of which sample.
        """
        if samples == 1 or (samples == batch and self.rows != "other"):
            return
        if self.rows == "other":
            raise ConfigError(
                f"{what} {samples} samples does not fit {self.name}: its rows are no samples, but things of which "
                f"a sample may have none or several, such as images. Adapt the other tower alone (towers=[...]), or "
                f"call the model with one sample at a time."
            )
        if self.rows == "samples" or batch % samples:
            raise ConfigError(
                f"{what} {samples} samples does not fit a batch of {batch} at {self.name}: give one for each."
            )


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


class ActivePrefix(Protocol):
    """What a slot hands to the host's attention: one prefix, a sum of several, or one for each sample.

    Attributes:
        config: of the prefix; of one of them where there are several, which then all have a softmax of their own.
    """

    config: PrefixConfig

    def keys_values(self, project: ProjectKV, dtype: torch.dtype) -> tuple[Any, Any]:
        """Keys and values, gated where the prompts have a softmax of their own, as the call below takes them."""
        ...

    def __call__(self, query: Tensor, key: Any, value: Any, scale: float) -> Tensor:
        """The addition to the heads' output, (B, H, T, D); see `zinit.prefix.ZeroGatedPrefix.forward`.

        Raises:
            ConfigError: if samples differ, and it is not known which row of the batch is of which.
        """
        ...


class SharingPrefix(ActivePrefix, Protocol):
    """A prefix in one softmax with the words: it stands alone."""

    def toward(self, query: Tensor, own: Tensor, shared: Tensor) -> Tensor:
        """The addition, (B, H, T, D), of a gated one; see `zinit.prefix.ZeroGatedPrefix.toward`."""
        ...


def shares_softmax(prefix: ActivePrefix) -> TypeGuard[SharingPrefix]:
    """Whether words and prompts share one softmax, and the host has to attend to both at once."""
    return not prefix.config.separate_softmax


AtSlot = tuple[ActivePrefix | None, tuple[Any, Any] | None]
"""What is on at a slot, and its keys and values where they were computed ahead."""


class SlotState(Protocol):
    """Which of a model's prefixes are on, asked anew at each call: it depends on the thread's scopes."""

    def at(self, slot: PrefixSlot, context: Tensor | Context | None = None) -> AtSlot:
        """What is on at a slot; (None, None) if there is nothing to add."""
        ...

    def names_at(self, slot: PrefixSlot) -> tuple[str, ...]:
        """The adapters that are on at a slot."""
        ...

    def is_per_sample(self, slot: PrefixSlot) -> bool:
        """Whether samples of the batch differ in their prefix: by a route or a context."""
        ...


class PrefixSlot(nn.ModuleDict):
    """The child ``zinit`` of an attention module: the prefixes that adapters have there.

    Args:
        project_kv: the host's key and value projections.
        site: the attention module's name in the model.
        state: says which prefixes are on. It is the model's, shared by all slots.

    Attributes:
        members: {adapter: keys of its prefixes here}, in the order of its parts.
    """

    def __init__(self, project_kv: ProjectHostKV, site: str = "", state: SlotState | None = None) -> None:
        super().__init__()
        self.project_kv = project_kv
        self.site = site
        self.state = state
        self.members: dict[str, tuple[str, ...]] = {}

    @classmethod
    def can_hold(cls, name: str) -> bool:
        """Whether a prefix may go by this name: an identifier that is no attribute of the slot itself."""
        return name.isidentifier() and not hasattr(cls(lambda host, tokens: (tokens, tokens)), name)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that are on here."""
        return () if self.state is None else self.state.names_at(self)

    @property
    def cached_kv(self) -> tuple[Any, Any] | None:
        """Keys and values that were computed ahead, for the length of a generation, say."""
        return None if self.state is None else self.state.at(self)[1]

    @property
    def per_sample(self) -> bool:
        """Whether samples of the batch differ in their prefix: by a route or a context."""
        return self.state is not None and self.state.is_per_sample(self)

    def prefix(self, context: Tensor | Context | None = None) -> ActivePrefix | None:
        """What is on here; None if there is nothing to add.

        Args:
            context: one that comes with this call; it goes before the one that `Handle.context` has set.
        """
        return None if self.state is None else self.state.at(self, context)[0]

    def check_rows(self, prefix: Any, batch: int) -> None:
        """Whether what is on fits a batch of that many rows; calling the prefix does this by itself.

        Raises:
            ConfigError: if samples differ, and it is not known which row is of which.
        """
        if not isinstance(prefix, nn.Module):  # a prefix alone is the same for every row
            prefix.check_rows(batch)

    def keys_values(
        self, host: nn.Module, prefix: ActivePrefix, dtype: torch.dtype, context: Tensor | Context | None = None
    ) -> tuple[Any, Any]:
        """The keys and values: computed ahead for the length of a generation, else computed anew.

        Those computed ahead are used only where no gradient could be wanted and no context came with the call.
        """
        ahead = self.cached_kv if context is None and not torch.is_grad_enabled() else None
        return ahead or prefix.keys_values(lambda tokens: self.project_kv(host, tokens), dtype)

    def prefix_and_kv(
        self, host: nn.Module, dtype: torch.dtype, context: Tensor | Context | None = None
    ) -> tuple[ActivePrefix, Any, Any] | None:
        """`prefix` and `keys_values` in one: every layer asks for both at every token, and two look-ups cost twice."""
        if self.state is None:
            return None
        prefix, ahead = self.state.at(self, context)
        if prefix is None:
            return None
        if ahead is None or torch.is_grad_enabled():
            ahead = prefix.keys_values(lambda tokens: self.project_kv(host, tokens), dtype)
        return prefix, *ahead


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
