"""Before a module is accepted its replay is tried on random vectors: nothing is believed that was not seen.

Values and the lengths of keys must not depend on where in a sequence a vector stands, keys must not be turned, and the
module must attend once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from zinit.backbones._replay import LAYER, ROTATIONS, SHARED, Listener, Replay, SharesKV, states_of
from zinit.backbones._view import asks_for_implementation, catch_lookup

TOLERANCE = 1e-3
DOES_NOT_RUN = "its forward does not run on plain hidden states ({})"


def parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    """Of the module's forward, without ``self`` and variable ones."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def find_replay(host: nn.Module) -> tuple[Replay | None, tuple[Tensor, ...], str]:
    """A replay without an objection, and what it handed over; else None, nothing and the weightiest objection.

    Raises:
        SharesKV: if the module takes the keys and values that an earlier layer made.
    """
    failed: list[str] = []
    rotated = False
    objections: list[str] = []
    for replay in forms(host):
        try:
            handed = replay.run(host, states_of(host, replay))
        except SharesKV:
            raise
        except Exception as error:  # the wrong form of call: whatever a model raises then
            if LAYER in replay.names and isinstance(error, KeyError):
                return None, (), f"its projections depend on {LAYER}, which the layer that calls it gives"
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
    needed = tuple(p.name for p in parameters if p.default is p.empty or p.name == SHARED)
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
            for form in ("pair", "reversed", "complex", "tensor"):
                yield form, size, rank


def widths(host: nn.Module) -> list[int]:
    """Candidates for C: what the module's own projections take in."""
    found: list[int] = []
    for name, child in host.named_modules():
        if "zinit" not in name.split("."):
            size = getattr(child, "in_features", None) or getattr(child, "nx", None)
            found += [size] if isinstance(size, int) else []
    return list(dict.fromkeys(found))


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
    keys = ("keys depend", key.flip(2), in_place_key)
    if replay.layout == "batch":  # in its place in a sequence a key may be turned; each prompt is a sequence of its own
        keys = ("keys' lengths depend", *(x.float().norm(dim=-1) for x in keys[1:]))
    for what, alone, in_place in (("values depend", value.flip(2), in_place_value), keys):
        alone, in_place = alone.float(), in_place.float()
        if not torch.isfinite(alone).all() or not in_place.abs().max() > 0:
            return "its keys and values of random hidden states are zero or not finite"
        slack = TOLERANCE if states.dtype == torch.float32 else 3e-2
        if (alone - in_place).abs().max() > slack * in_place.abs().max():
            return f"its {what} on the neighbouring tokens or on the position"
    return "its keys are turned even where the rotation is by nothing" if turns_keys(host, replay) else ""


def turns_keys(host: nn.Module, replay: Replay) -> bool:
    """Whether keys come out turned: as seen by their signs, where all that the module's own layers give is positive.

    Lengths do not show it, and there is no telling a turned key from another one by its numbers alone.
    """

    def positive(layer: nn.Module, args: Any, output: Any) -> Tensor | None:
        return output.abs() + 1 if isinstance(output, Tensor) and output.is_floating_point() else None

    with ExitStack() as hooks:
        for name, layer in host.named_modules():
            own = any(True for _ in layer.parameters(recurse=False)) or hasattr(layer, "in_features")
            if own and "zinit" not in name.split("."):
                hooks.callback(layer.register_forward_hook(positive).remove)
        _, key, _ = replay.run(host, states_of(host, replay))
    return not bool((key > 0).all())
