"""Any other transformers model: asks each attention module's own code how it makes keys and values of hidden states.

A module that uses the attention interface hands its final keys and values to a function looked up by name. So its own
forward, run on the prompts and stopped at that call, *is* its projection, whatever the layout: fused, grouped,
normalised, low-rank. Nothing is guessed from names or shapes. What has to be neutral is position: each prompt is a
sequence of its own, of length one, and rotations that come in as arguments are the identity. Before a model is
accepted every module is checked on random vectors: values and the lengths of keys must not depend on where in a
sequence a vector stands, and the module must attend once. Otherwise it is refused with the reason.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zinit.backbones._hf import InterfaceSeam
from zinit.backbones._view import NEXT_STEP, HostView, asks_for_implementation, attention_home, catch_lookup
from zinit.backbones.base import AttentionSite, random_like, with_real_weights
from zinit.compat import attention_implementation
from zinit.errors import BackboneError

PROBE = "zinit_probe"
TOLERANCE = 1e-3
CROSS = re.compile(r"cross|enc_?dec|encoder_attn|perceiver", re.IGNORECASE)
FOREIGN = re.compile(
    r"^(key_value|encoder_hidden|cross_att|context|latents|(keys?|values?|k|v|kv)(_|$))", re.IGNORECASE
)
ROTATIONS = ("position_embeddings", "rotary_pos_emb", "freqs_ci", "freqs_cis", "rotary_position_embeddings")
ADDED = re.compile(r"(key|value)s?_(?!value|states|hidden)", re.IGNORECASE)  # to keys or values, from elsewhere
DOES_NOT_RUN = "its forward does not run on plain hidden states ({})"
NOT_REPRODUCED = {"reorder_and_upcast_attn": "it computes eager attention itself, past the interface"}


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
        rotation: form of the identity rotation: ``"none"``, ``"pair"`` (cosines, sines), ``"tensor"`` or ``"complex"``.
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
            elif name == "layer_idx":
                values[name] = getattr(host, name, 0)
            elif name == "shared_kv_states":
                values[name] = {}
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
        return states.new_ones(shape), states.new_zeros(shape)

    def _as_rows(self, rows: Tensor) -> Tensor:
        return rows if self.layout == "row" else rows[None]

    def _sorted(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(N, G, 1, D) or (1, G, N, D) to (B, G, K, D)."""
        rows = x.squeeze(2) if self.layout == "batch" else x[0].transpose(0, 1)
        return rows.unflatten(0, tokens.shape[:2]).transpose(1, 2)


class Discovered(InterfaceSeam):
    """The registry's last entry: whatever uses the attention interface."""

    name, default_task, demo_model = "transformers", "alpaca", ""

    def matches(self, model: nn.Module) -> bool:
        """Whether it is a transformers model, or a part of one that attends."""
        home = sys.modules.get("transformers.modeling_utils")
        if home is None:
            return False
        return isinstance(model, home.PreTrainedModel) or any(on_interface(module) for module in model.modules())

    def sites(self, model: nn.Module) -> list[AttentionSite]:
        """The self-attention modules that use the interface, lowest layer first.

        Raises:
            BackboneError: if there are none, or one of them makes its keys and values in a way that prompts cannot
                follow; the message says which and why.
        """
        left_out: list[str] = []
        found: list[AttentionSite] = []
        for name, module in model.named_modules():
            if "zinit" in name.split(".") or not on_interface(module):
                continue
            if reason := attends_elsewhere(model, name, module):
                left_out.append(f"{name} ({reason})")
            else:
                found.append(site_of(name, module))
        if not found:
            without = "has no attention on transformers' attention interface"
            if left_out:
                without = f"has no self-attention that zinit can tell to be one: {left_out[0]}"
            raise BackboneError(f"{type(model).__name__} {without}. {NEXT_STEP}")
        return found


TRANSFORMERS = Discovered()


def on_interface(module: nn.Module) -> bool:
    """Whether the module looks its attention function up in the interface."""
    if not hasattr(module, "config"):
        return False
    try:
        attention_home(type(module))
    except BackboneError:
        return False
    return True


def parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    """Of the module's forward, without ``self`` and variable ones."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def says_cross(name: str, module: nn.Module) -> str:
    """Why a module is cross-attention by what it is called or says of itself; empty if it is not."""
    parent, _, own = name.rpartition(".")
    if CROSS.search(own) or CROSS.search(type(module).__name__):
        return "cross-attention by its name"
    if CROSS.search(parent.rpartition(".")[2]):
        return "cross-attention by its parent's name"
    return "cross-attention by its own word" if getattr(module, "is_cross_attention", False) else ""


def attends_elsewhere(model: nn.Module, name: str, module: nn.Module) -> str:
    """Why a module is taken for cross-attention and left as it is; empty if it is self-attention.

    A class that serves both ways (BART's, say) is self-attention where its name says so, or where nothing else in its
    layer could be.
    """
    if reason := says_cross(name, module):
        return reason
    foreign = [p for p in parameters_of(module) if FOREIGN.search(p.name)]
    required = [p.name for p in foreign if p.default is p.empty]
    if required:
        return f"its forward needs {', '.join(required)} from elsewhere"
    parent, _, own = name.rpartition(".")
    if foreign and "self" not in own.lower():
        for sibling_name, sibling in model.get_submodule(parent).named_modules(prefix=parent):
            if sibling is not module and on_interface(sibling) and not says_cross(sibling_name, sibling):
                return f"its forward takes {foreign[0].name}, and {sibling_name} may be the self-attention beside it"
    return ""


@torch.no_grad()
def site_of(name: str, module: nn.Module) -> AttentionSite:
    """Finds how to replay a module, and checks it.

    Raises:
        BackboneError: if that cannot be done; the message says why.
    """
    what = f"{name} ({type(module).__name__})"
    part = "Attach to a part of the model that does without it, or describe the model in a short file and register it."
    for option, reason in NOT_REPRODUCED.items():
        if getattr(module, option, False):
            raise BackboneError(f"{what} cannot take a prefix with {option}=True: {reason}. Set it to False.")
    for parameter in parameters_of(module):
        if ADDED.match(parameter.name):
            raise BackboneError(f"{what} cannot take a prefix: its forward takes {parameter.name} besides. {part}")
    host = with_real_weights(module)
    with torch.autocast(next(iter(host.parameters())).device.type, enabled=False):
        replay, handed, problem = find_replay(host)
    if replay is None:
        raise BackboneError(f"{what} cannot take a prefix: {problem}. {part}")
    query, key, value = handed
    return AttentionSite(
        name=name,
        module=module,
        width=replay.width,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=key.shape[-1],
        value_dim=value.shape[-1],
        project_kv=replay,
    )


def find_replay(host: nn.Module) -> tuple[Replay | None, tuple[Tensor, ...], str]:
    """A replay without an objection, and what it handed over; else None, nothing and the weightiest objection."""
    failed: list[str] = []
    rotated = False
    objections: list[str] = []
    for replay in forms(host):
        try:
            handed = replay.run(host, states_of(host, replay))
        except Exception as error:  # the wrong form of call: whatever a model raises then
            place = 0 if replay.rotation == "pair" and not rotated else len(failed)  # the most telling one first
            rotated = rotated or replay.rotation == "pair"
            failed.insert(place, DOES_NOT_RUN.format(f"{type(error).__name__}: {str(error)[:100]}"))
            continue
        problem = objection(host, replay)
        if not problem:
            return replay, handed, ""
        objections.append(problem)
    return None, (), [*objections, *failed, DOES_NOT_RUN.format("it has no linear layers")][0]


def forms(host: nn.Module) -> Iterator[Replay]:
    """Ways to call the module, most usual first."""
    parameters = parameters_of(host)[1:]
    needed = tuple(p.name for p in parameters if p.default is p.empty)
    rotations = tuple(p.name for p in parameters if p.name in ROTATIONS)
    layouts = ("row", "rows") if "cu_seqlens" in needed else ("batch", "row")
    if answering := asks_for_implementation(type(host)):
        catch_lookup(type(host))
    same: dict[str, Any] = {"answering": answering}
    for width in widths(host):
        for layout in layouts:
            same |= {"width": width, "layout": layout}
            yield Replay(**same, names=needed)
            if rotations:
                names = tuple(dict.fromkeys(needed + rotations))
                for form, dim, rank in rotation_forms(host):
                    yield Replay(**same, names=names, rotation=form, rotation_dim=dim, rotation_rank=rank)


def rotation_forms(host: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(form, last size, rank) of rotations by nothing."""
    sizes = [getattr(host, name, None) for name in ("rotary_ndims", "rotary_dim", "qk_rope_head_dim", "head_dim")]
    sizes = [int(size) for size in sizes if isinstance(size, int)]
    for size in dict.fromkeys([*sizes, *(size // 2 for size in sizes), 1]):
        for rank in (3, 2, 4):
            for form in ("pair", "complex", "tensor"):
                yield form, size, rank


def widths(host: nn.Module) -> list[int]:
    """Candidates for C: what the module's own projections take in."""
    found: list[int] = []
    for name, child in host.named_modules():
        if "zinit" not in name.split("."):
            size = getattr(child, "in_features", None) or getattr(child, "nx", None)
            found += [size] if isinstance(size, int) else []
    return list(dict.fromkeys(found))


def states_of(host: nn.Module, replay: Replay, tokens: int = 5) -> Tensor:
    """Random hidden states: one sequence in the module's layout."""
    weights = list(host.parameters())  # of a quantised module all may be integers
    weight = next((p for p in weights if p.is_floating_point()), torch.empty(0, device=weights[0].device))
    states = random_like(weight, tokens, replay.width)
    return states if replay.layout == "row" else states[None]


def objection(host: nn.Module, replay: Replay) -> str:
    """Why what the module hands over is no projection of single vectors; empty if it is one."""
    states = states_of(host, replay)
    rows = states.reshape(-1, replay.width)
    count = rows.shape[0]
    listener = Listener(host, answering=replay.answering, stop=False)
    try:
        type(host).forward(listener, states, **replay.arguments(host, states))  # pyright: ignore[reportArgumentType]
    except Exception as error:
        return DOES_NOT_RUN.format(f"{type(error).__name__}: {str(error)[:100]}")
    if len(listener.calls) != 1:
        return f"it attends {len(listener.calls)} times in one forward"
    query, in_place_key, in_place_value = listener.calls[0]
    if in_place_key.dim() != 4 or in_place_key.shape[2] != count:
        return f"it hands over keys of shape {tuple(in_place_key.shape)} for {count} tokens"
    if query.shape[1] % in_place_key.shape[1]:
        return f"{query.shape[1]} query heads cannot share {in_place_key.shape[1]} key heads evenly"
    if query.shape[-1] != in_place_key.shape[-1]:
        return f"its queries are {query.shape[-1]} wide and its keys {in_place_key.shape[-1]}"
    turned = rows.flip(0)
    try:
        key, value = replay(host, turned)
    except Exception as error:
        return f"its forward does not run on single tokens ({type(error).__name__}: {str(error)[:100]})"
    if key.shape != in_place_key.shape or value.shape != in_place_value.shape:
        return f"a token alone gives keys of shape {tuple(key.shape)}, in a sequence {tuple(in_place_key.shape)}"
    for what, alone, in_place in (
        ("values depend", value.flip(2), in_place_value),
        ("keys' lengths depend", key.flip(2).float().norm(dim=-1), in_place_key.float().norm(dim=-1)),
    ):
        alone, in_place = alone.float(), in_place.float()
        if not torch.isfinite(alone).all() or not in_place.abs().max() > 0:
            return "its keys and values of random hidden states are zero or not finite"
        slack = TOLERANCE if states.dtype == torch.float32 else 3e-2
        if (alone - in_place).abs().max() > slack * in_place.abs().max():
            return f"its {what} on the neighbouring tokens or on the position"
    return ""
