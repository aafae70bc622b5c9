"""Which linear layers and norms belong to the Transformer's blocks: what V2's bias tuning changes.

Nothing is told from the names of families. A block is the largest module that holds one attention site and no other;
a linear layer is what maps a known width to another; a norm is a leaf whose only weights are vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zinit.backbones.base import AttentionSite, random_like, with_real_weights
from zinit.errors import ConfigError

HEAD = "head"


def widths_of(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, quantised ones and GPT-2's included; None if the module is none."""
    known: Any = module
    if isinstance(module, nn.Linear):
        return known.in_features, known.out_features
    if isinstance(getattr(module, "nx", None), int) and isinstance(getattr(module, "nf", None), int):
        return known.nx, known.nf
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module only weights each channel: a ``weight`` (C,), perhaps a ``bias`` (C,), and nothing else."""
    tensors = dict(module.named_parameters(recurse=False))
    if next(module.children(), None) is not None or any(True for _ in module.buffers()):
        return False
    return tensors.keys() <= {"weight", "bias"} and "weight" in tensors and all(t.dim() == 1 for t in tensors.values())


def block_of(site: AttentionSite, sites: Sequence[AttentionSite]) -> str:
    """The path of the block that a site is in: the largest numbered one that holds no other site."""
    others = [other.name for other in sites if other.name != site.name]
    parts = site.name.split(".")
    for count in range(1, len(parts)):
        path = ".".join(parts[:count])
        if parts[count - 1].isdigit() and not any(other.startswith(f"{path}.") for other in others):
            return path
    return ".".join(parts[:-1])


def site_beside(path: str, sites: Sequence[AttentionSite]) -> AttentionSite:
    """The attention module that shares most of its path with a module; of several the last, nearest to the head."""
    parts = path.split(".")

    def shared(site: AttentionSite) -> int:
        pairs = zip(parts, site.name.split("."), strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    return max(reversed(sites), key=shared)


def linears_of(model: nn.Module, sites: Sequence[AttentionSite], chosen: Sequence[str]) -> dict[str, nn.Module]:
    """{path: linear layer} of the blocks, in the model's order; the output head last.

    Args:
        model: the host.
        sites: of the towers that are meant.
        chosen: "all", the layers' own names ("q_proj"), and "head", which "all" leaves out.

    Raises:
        ConfigError: if there is no layer of a name.
    """
    found = {
        name: module
        for block in dict.fromkeys(block_of(site, sites) for site in sites)
        for name, module in _own_modules(model.get_submodule(block), block)
        if widths_of(module)
    }
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in found))
    for name in chosen:
        if name not in ("all", HEAD, *names):
            raise ConfigError(
                f"the blocks of this {type(model).__name__} have no linear layer named {name!r}. Known: all, {HEAD}, "
                f"{', '.join(names)}."
            )
    picked = {path: module for path, module in found.items() if {"all", path.rpartition(".")[2]} & set(chosen)}
    return picked | (_head_of(model) if HEAD in chosen else {})


def norms_of(model: nn.Module, sites: Sequence[AttentionSite], *, outside: bool) -> dict[str, nn.Module]:
    """{path: norm} of the blocks, in the model's order; with ``outside`` those beside the stacks of blocks too."""
    blocks = dict.fromkeys(block_of(site, sites) for site in sites)
    found = {
        path: module
        for block in blocks
        for path, module in _own_modules(model.get_submodule(block), block)
        if is_norm(module)
    }
    if outside:
        for path in dict.fromkeys(above for block in blocks for above in _above(block)):
            parent = model.get_submodule(path)
            found |= {f"{path}.{name}".lstrip("."): part for name, part in parent.named_children() if is_norm(part)}
    return found


def _own_modules(block: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in block.named_modules(prefix=path):
        if "zinit" not in name.split("."):
            yield name, module


def _above(path: str) -> Iterator[str]:
    """The paths above one, "" last."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _head_of(model: nn.Module) -> dict[str, nn.Module]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore
    for name, module in model.named_modules():
        if output is not None and module is output:
            return {name: module}
    raise ConfigError(f"this {type(model).__name__} has no output head to tune: leave {HEAD!r} out.")


@torch.no_grad()
def keys_of(site: AttentionSite) -> tuple[str, Tensor | None]:
    """The path of the linear layer that a site's keys leave, and which numbers of its output they are, (G * D,).

    None is all of them, in their order.

    It is tried: what the layer gives for random tokens must hold the keys that the site makes of them, bit for bit.

    Raises:
        ConfigError: if there is no such layer.
    """
    host, names = with_real_weights(site.module), dict(site.module.named_modules())
    tokens = random_like(next(host.parameters()), 1, 16, site.width)
    keys = site.project_kv(host, tokens)[0].transpose(1, 2).flatten(2)[0]
    for name, layer in host.named_modules():
        if site.query_value is None or not name or name not in names or (widths_of(layer) or (0,))[0] != site.width:
            continue
        given = layer(tokens)[0]
        _, numbers = torch.cat([given, keys], dim=1).unique(dim=1, return_inverse=True)
        of_output, of_keys = numbers[: given.shape[1]], numbers[given.shape[1] :]
        same = of_keys[:, None] == of_output
        if bool((same.sum(1) == 1).all()):
            rows = same.int().argmax(1)
            alone = given.shape[1] == len(rows) and torch.equal(rows, torch.arange(len(rows), device=rows.device))
            return f"{site.name}.{name}", None if alone else rows
    raise ConfigError(
        f"the keys of {site.name} ({type(site.module).__name__}) leave none of its linear layers as they are (they are "
        f"normed, or made in another way), so nothing can be added to them there. Take another method or other layers."
    )
