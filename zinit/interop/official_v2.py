"""OpenGVLab/LLaMA-Adapter, V2 chat (65B): biases, scales on the input and norms of all layers, with or without prompts.

``{"model": {...}}``: ``layers.{i}.attention.wq_bias``, ``wq_scale`` and so on beside Meta's linear layers, and
``attention_norm.weight``, ``ffn_norm.weight``, which replace the host's. Rows of the query's and key's biases are in
Meta's order. Prompts, if there are any, pass the scaled and biased projections. The released file has none.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from torch import Tensor, nn

from zinit.config import TuningConfig
from zinit.errors import CheckpointError
from zinit.interop._files import check_kind, read_pickle, tensors_in
from zinit.interop._layers import sites_of
from zinit.interop._llama import (
    ATTENTION_NORM,
    DOWN,
    GATE,
    KEY,
    MLP_NORM,
    OUT,
    QUERY,
    UP,
    VALUE,
    LlamaPaths,
    half_split,
    tuned_adapter,
)
from zinit.interop.base import Format, Gate, ImportedAdapter
from zinit.interop.official import TABLE, prompts_by_layer

LAYERS = {
    "attention.wq": QUERY, "attention.wk": KEY, "attention.wv": VALUE, "attention.wo": OUT,
    "feed_forward.w1": GATE, "feed_forward.w2": DOWN, "feed_forward.w3": UP,
}  # fmt: skip
NORMS = {"attention_norm.weight": ATTENTION_NORM, "ffn_norm.weight": MLP_NORM}
_TUNED = re.compile(r"layers\.(\d+)\.(\w+\.w[qkvo123])_(bias|scale)")
_NORM = re.compile(r"layers\.(\d+)\.(attention_norm\.weight|ffn_norm\.weight)")
LAST_NORM = "norm.weight"


def read_chat(path: Path, model: nn.Module, *, length: int, gate: Gate) -> ImportedAdapter:
    """Reads a V2 chat adapter. ``gate`` is unused: these files' gates are squashed by tanh.

    Raises:
        CheckpointError: if the file is damaged, of another kind, or does not fit ``length`` or the model.
    """
    tensors = tensors_in(read_pickle(path, allow=(argparse.Namespace,)), path, unwrap="model")
    check_kind(tensors, path, "official-v2-chat")
    sites = sites_of(model)
    paths = LlamaPaths(model, sites, path)
    tuned: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found := _TUNED.fullmatch(name):
            layer = LAYERS.get(found[2])
            if layer is None:
                raise CheckpointError(f"{path} tunes {found[2]!r}, which is no linear layer of a LLaMA.")
            if layer in (QUERY, KEY) and found[3] == "bias":
                tensor = half_split(tensor, sites[0].head_dim)
            tuned[f"{paths.block(int(found[1]), path)}.{layer}.{found[3]}"] = tensor
        elif found := _NORM.fullmatch(name):
            tuned[f"{paths.block(int(found[1]), path)}.{NORMS[found[2]]}.weight"] = tensor
    if LAST_NORM in tensors:
        tuned[f"{paths.last_norm}.weight"] = tensors[LAST_NORM]
    config = TuningConfig(
        bias=any(name.endswith("_bias") for name in tensors),
        scale="input" if any(name.endswith("_scale") for name in tensors) else "none",
        norms=True if LAST_NORM in tensors else "blocks",
    )
    prefix = prompts_by_layer(tensors, sites, path, length=length, gate="tanh") if TABLE in tensors else None
    return tuned_adapter(prefix, config, tuned)


CHAT = Format("OpenGVLab/LLaMA-Adapter, V2 chat", read_chat)
