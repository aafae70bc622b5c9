"""How keys and values of prompts come out of an attention module's own forward.

A module that uses the attention interface hands its final keys and values to a function looked up by name. So its own
forward, run on the prompts and stopped at that call, *is* its projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zinit.backbones._view import HostView
from zinit.backbones.base import random_like
from zinit.compat import attention_implementation

PROBE = "zinit_probe"
ROTATIONS = ("position_embeddings", "rotary_pos_emb", "freqs_ci", "freqs_cis", "rotary_position_embeddings")


SHARED = "shared_kv_states"  # {kind of layer: keys and values} that earlier layers leave for later ones

LAYER = "layer_idx"


class SharesKV(Exception):
    """A module takes the keys and values that an earlier layer made, and has no projections for prompts to pass."""


class NothingShared(dict[str, Any]):
    """Takes what a module leaves for later layers, and has nothing for a module that wants what earlier ones left."""

    def __getitem__(self, name: str) -> Any:
        raise SharesKV


class Handed(Exception):
    """Ends a module's forward at the moment it hands queries, keys and values over."""


class Listener(HostView):
    """An attention module as its own forward sees it while zinit listens to what it hands over.

    Args:
        module: the host.
        answering: whether the module asks its config for the implementation's name besides looking it up.
        stop: end the forward at the first call.
    """

    def __init__(self, module: nn.Module, *, answering: bool, stop: bool = True) -> None:
        config: Any = module.config
        config = getattr(config, "zinit_host", config)
        super().__init__(module, AnsweringProbeView(config) if answering else ProbeView(config))
        self.stop = stop
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []


def listen(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The attention function behind the probe's name; ``module`` is a `Listener`."""
    module.calls.append((query, key, value))
    if module.stop:
        raise Handed
    return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


class ProbeView:
    """A config that names the probe as the attention implementation."""

    _attn_implementation: Any = PROBE
    zinit_function = listen

    def __init__(self, host: Any) -> None:
        self.host = host

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "host":
            raise AttributeError(name)
        return getattr(self.host, name)


class AnsweringProbeView(ProbeView):
    """One that gives the host's answer; the look-up is caught in the module's file."""

    @property
    def _attn_implementation(self) -> str | None:
        return attention_implementation(self.host)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """How a module's forward is called on vectors that stand nowhere.

    Args:
        width: C.
        layout: what the module takes: ``"batch"`` (N, 1, C), ``"row"`` (N, C) or ``"rows"`` (1, N, C).
        rotation: form of the identity rotation: ``"none"``, ``"pair"`` (cosines, sines), ``"reversed"`` (sines,
            cosines), ``"tensor"`` or ``"complex"``.
        rotation_dim: last size of its tensors.
        rotation_rank: their number of dimensions.
        names: the arguments after the hidden states that are given.
        answering: whether the module asks its config for the implementation's name besides looking it up.
    """

    width: int
    layout: str
    rotation: str = "none"
    rotation_dim: int = 1
    rotation_rank: int = 3
    names: tuple[str, ...] = ()
    answering: bool = False

    def __call__(self, host: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The host's keys and values of (K, C) or (B, K, C): two of (1 or B, G, K, D); not rotated."""
        tokens = tokens if tokens.dim() == 3 else tokens[None]
        rows = tokens.flatten(0, 1)
        _, key, value = self.run(host, rows[:, None] if self.layout == "batch" else self._as_rows(rows))
        return self._sorted(key, tokens), self._sorted(value, tokens)

    def run(self, host: nn.Module, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the host hands over for its first attention."""
        from transformers.modeling_utils import AttentionInterface

        AttentionInterface.register(PROBE, listen)
        listener = Listener(host, answering=self.answering)
        try:  # noqa: SIM105 (torch.compile follows this form)
            type(host).forward(listener, states, **self.arguments(host, states))  # pyright: ignore[reportArgumentType]
        except Handed:
            pass
        return listener.calls[0]

    def arguments(self, host: nn.Module, states: Tensor) -> dict[str, Any]:
        """Neutral values for `names`."""
        length = states.shape[0] if self.layout == "row" else states.shape[1]
        values: dict[str, Any] = {}
        for name in self.names:
            if name in ROTATIONS:
                values[name] = self._rotation(states, length)
            elif name == "cu_seqlens":
                values[name] = torch.tensor([0, length], dtype=torch.int32, device=states.device)
            elif name == "max_seqlen":
                values[name] = length
            elif name == "position_ids":
                values[name] = torch.zeros(1, length, dtype=torch.long, device=states.device)
            elif name == LAYER:
                own = getattr(host, name, None)  # a module that is lent to several layers has none, or -1
                values[name] = own if isinstance(own, int) and own >= 0 else None
            elif name == SHARED:
                values[name] = {} if torch.compiler.is_compiling() else NothingShared()
            else:
                values[name] = None
        return values

    def _rotation(self, states: Tensor, length: int) -> Any:
        shape = (1,) * (self.rotation_rank - 2) + (length, self.rotation_dim)
        if self.rotation == "none":
            return None
        if self.rotation == "complex":
            return torch.ones(shape, dtype=torch.complex64, device=states.device)
        if self.rotation == "tensor":
            return states.new_zeros(shape)
        cosines, sines = states.new_ones(shape), states.new_zeros(shape)
        return (sines, cosines) if self.rotation == "reversed" else (cosines, sines)

    def _as_rows(self, rows: Tensor) -> Tensor:
        return rows if self.layout == "row" else rows[None]

    def _sorted(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(N, G, 1, D) or (1, G, N, D) to (B, G, K, D)."""
        rows = x.squeeze(2) if self.layout == "batch" else x[0].transpose(0, 1)
        return rows.unflatten(0, tokens.shape[:2]).transpose(1, 2)


def states_of(host: nn.Module, replay: Replay, tokens: int = 5) -> Tensor:
    """Random hidden states: one sequence in the module's layout."""
    weights = list(host.parameters())  # of a quantised module all may be integers
    weight = next((p for p in weights if p.is_floating_point()), torch.empty(0, device=weights[0].device))
    states = random_like(weight, tokens, replay.width)
    return states if replay.layout == "row" else states[None]
