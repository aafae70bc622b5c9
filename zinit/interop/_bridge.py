"""The bridge of the official project's files with images: CLIP's tokens to K visual tokens, by ViT blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zinit.errors import CheckpointError

QUERIES = "visual_query.weight"
NAMES = {
    "clip_proj": "proj_in", "clip_proj_norm": "norm_in", "visual_proj": "proj_out", "visual_proj_norm": "norm_out",
}  # fmt: skip
BLOCK = {
    "norm1": "norm1", "norm2": "norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2",
}  # fmt: skip
_BLOCK = re.compile(r"visual_blocks\.(\d{1,6})\.(.+)\.(weight|bias)")
_OWN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def read_bridge(tensors: Mapping[str, Tensor], heads: int, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options and tensors of a `zinit.adapter.visual.VisualTokens`.

    Args:
        tensors: of the file.
        heads: of a block, which the file does not say.
        path: for messages.

    Raises:
        CheckpointError: if something is missing, or of a shape that no such bridge has.
    """
    missing = [name for name in (QUERIES, "clip_proj.weight") if name not in tensors]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}, which an adapter with images holds.")
    queries = tensors[QUERIES]
    if queries.dim() != 2:
        raise CheckpointError(f"{path} has visual queries of shape {tuple(queries.shape)}. Expected (K, width).")
    blocks = {int(found[1]) for name in tensors if (found := _BLOCK.fullmatch(name))}
    if not blocks or blocks != set(range(len(blocks))):
        raise CheckpointError(f"{path} has the visual blocks {sorted(blocks)}. Expected all from 0 on.")
    made = {"query": queries}
    for name, tensor in tensors.items():
        own, _, kind = name.rpartition(".")
        if own in NAMES:
            made[f"{NAMES[own]}.{kind}"] = tensor
        elif (found := _BLOCK.fullmatch(name)) and found[2] == "attn.qkv":
            made[f"blocks.{found[1]}.self_attn.in_proj_{kind}"] = tensor
        elif found and found[2] in BLOCK:
            made[f"blocks.{found[1]}.{BLOCK[found[2]]}.{kind}"] = tensor
    options = {
        "feature_width": tensors["clip_proj.weight"].shape[1], "hidden": queries.shape[1], "blocks": len(blocks),
        "heads": heads,
    }  # fmt: skip
    return options, {f"shared.context.{name}": tensor.float() for name, tensor in made.items()}


def write_bridge(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way: the file's tensors of the parameters of a `zinit.adapter.visual.VisualTokens`."""
    outside, inside = ({mine: theirs for theirs, mine in names.items()} for names in (NAMES, BLOCK))
    made = {}
    for name, tensor in own.items():
        path, _, kind = name.rpartition(".")
        if found := _OWN_BLOCK.fullmatch(path):
            fused = kind.startswith("in_proj_")
            layer = "attn.qkv" if fused else inside[found[2]]
            made[f"visual_blocks.{found[1]}.{layer}.{kind.removeprefix('in_proj_')}"] = tensor
        else:
            made[QUERIES if name == "query" else f"{outside[path]}.{kind}"] = tensor
    return made
