"""OpenGVLab/LLaMA-Adapter, ImageBind-LLM: any sense that ImageBind knows, through one bind network.

``{"model": {...}}`` without a config: ``image_bind_proj.*``, ``image_bind_norm_{j}.weight`` and
``image_bind_f{1,2,3}_{j}.weight`` with j from 1 to 3 (older files have biases, and LayerNorm), ``prefix_query.weight``
(L, C), one prompt for each layer, and gates, which are squashed by tanh. Biases (not of keys and values), norms and
LoRA of the language model are in fine-tuned files only, named ``llama.layers.{i}.attention.wq.bias`` and so on, see
`zinit.interop.official_v2`. Training checkpoints may call the model ``llma`` and hold ImageBind (``image_bind.*``) and
all of LLaMA besides.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from zinit.adapter.bind import BindNetwork, GatedBlock
from zinit.adapter.handle import Handle
from zinit.config import ONLY, AdapterConfig, PrefixConfig, TuningConfig
from zinit.errors import CheckpointError
from zinit.files import write_atomically
from zinit.interop import _llama as llama
from zinit.interop._files import adapter_tensors, pickled, read_pickle, tensors_in
from zinit.interop._layers import cannot, sites_of
from zinit.interop.base import Format, Gate, ImportedAdapter
from zinit.interop.official import GATE, TABLE, check_base, prompts_by_layer
from zinit.interop.official_v2 import LAST_NORM, LAYERS, NORMS, TUNED_LINEARS, released_tuning

FORMAT = "imagebind-llm"
PROMPTS, PROJECTION = "prefix_query.weight", "image_bind_proj"
LINEARS = {"f1": "gate", "f2": "down", "f3": "up"}
_BLOCK = re.compile(r"image_bind_(norm|f[123])_(\d{1,6})\.(weight|bias)")
RELEASED_BLOCKS = 3
TUNING = TuningConfig(linears=TUNED_LINEARS, scale="none")  # with LoRA of any rank


def read(path: Path, model: nn.Module, *, length: int, gate: Gate) -> ImportedAdapter:
    """Reads an ImageBind-LLM adapter, pretrained or fine-tuned. ``length`` and ``gate`` are unused: 1 and tanh.

    Raises:
        CheckpointError: if the file is damaged, of another kind, or does not fit the model.
    """
    stored = tensors_in(read_pickle(path, allow=(argparse.Namespace,)), path, unwrap="model")
    stored = adapter_tensors(stored, path, FORMAT)
    tensors = {re.sub(r"^ll[am]+a\.", "", name): tensor for name, tensor in stored.items()}
    missing = [name for name in (PROMPTS, f"{PROJECTION}.weight") if name not in tensors]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}, which an ImageBind-LLM adapter holds.")
    sites = sites_of(model)
    prefix, own = prompts_by_layer({**tensors, TABLE: tensors[PROMPTS]}, sites, path, length=1, gate="tanh")
    network, options = _network(tensors, path)
    config = AdapterConfig(
        parts={ONLY: dataclasses.replace(prefix, prompt="table+context")}, context="bind", context_options=options
    )
    named = own | {f"shared.context.{name}": tensor.float() for name, tensor in network.items()}
    tuned, tuning = released_tuning(tensors, llama.LlamaPaths(model, sites, path), sites, path)
    if tuned:
        kinds = {name.rpartition(".")[2] for name in tuned}
        tuning = dataclasses.replace(tuning, bias="bias" in kinds, norms="weight" in kinds)
        config = dataclasses.replace(config, tuning=tuning)
        named |= {f"tuning.{name}": tensor.to(torch.float32, copy=True) for name, tensor in tuned.items()}
    return config, named


def _network(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors and the options of `zinit.adapter.bind.BindNetwork`."""
    found = {name: match for name in tensors if (match := _BLOCK.fullmatch(name))}
    numbers = {int(match[2]) for match in found.values()}
    if not numbers or numbers != set(range(1, len(numbers) + 1)) or "image_bind_f1_1.weight" not in tensors:
        raise CheckpointError(f"{path} has the bind blocks {sorted(numbers)}. Expected all from 1 on, with their f1.")
    shapes = [tensors[name].shape for name in (f"{PROJECTION}.weight", "image_bind_f1_1.weight")]
    if any(len(shape) != 2 for shape in shapes):
        raise CheckpointError(
            f"{path} has bind layers of shapes {', '.join(str(tuple(s)) for s in shapes)}, no matrices."
        )
    made = {f"proj.{kind}": tensors[f"{PROJECTION}.{kind}"] for kind in ("weight", "bias")}
    for name, match in found.items():
        made[f"blocks.{int(match[2]) - 1}.{LINEARS.get(match[1], match[1])}.{match[3]}"] = tensors[name]
    legacy = any(match[3] == "bias" for match in found.values())
    options = {"feature_width": shapes[0][1], "hidden": shapes[1][0], "blocks": len(numbers), "legacy": legacy}
    return made, options


def write(handle: Handle, path: Path) -> None:
    """Writes an adapter as the project's conversion script does; its code reads what has the released sizes.

    Raises:
        CheckpointError: if the format cannot express the adapter.
    """
    config = handle.config
    if not isinstance(config, AdapterConfig) or config.context != "bind" or list(config.parts) != [ONLY]:
        raise cannot(FORMAT, "the format holds one prefix and a bind network (context='bind')")
    if reason := _why_another_form(handle, config.parts[ONLY], config.tuning):
        raise cannot(FORMAT, reason)
    check_base(handle, FORMAT)
    network = handle.shared["context"]
    assert isinstance(network, BindNetwork)
    made = {f"{PROJECTION}.{name}": tensor for name, tensor in network.proj.state_dict().items()}
    names = {own: theirs for theirs, own in LINEARS.items()}
    for number, block in enumerate(network.blocks, start=1):
        for name, tensor in block.state_dict().items():
            own, _, kind = name.rpartition(".")
            made[f"image_bind_{names.get(own, own)}_{number}.{kind}"] = tensor
    prefixes = [handle.prefixes[site.name] for site in handle.sites]
    made[PROMPTS] = torch.cat([prefix.prompt() for prefix in prefixes])
    for index, prefix in enumerate(prefixes):
        made[f"llama.{GATE.format(index)}"] = prefix.gate.expand(prefix.num_heads).view(1, -1, 1, 1)
    if config.tuning is not None:
        made |= {f"llama.{name}": tensor for name, tensor in _tuned(handle, path).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in made.items()}
    write_atomically(path, pickled({"model": plain}))


def _why_another_form(handle: Handle, part: PrefixConfig, tuning: TuningConfig | None) -> str:
    """What of an adapter the format has no room for; empty if there is room for all of it."""
    network, every = handle.shared["context"], list(handle.state.sites.values())
    assert isinstance(network, BindNetwork)
    if part.length != 1 or part.prompt != "table+context" or not part.gating or part.gate != "tanh":
        return "the format holds one prompt for each layer, to which the features are added, with tanh gates"
    if not part.separate_softmax:
        return "its prompts share one softmax with the words, and the format's prompts have a softmax of their own"
    if handle.sites != every:
        return f"it adapts {len(handle.sites)} of {len(every)} layers, and the format holds all"
    first = network.blocks[0]
    assert isinstance(first, GatedBlock)
    inside = first.gate.out_features
    if len(network.blocks) != RELEASED_BLOCKS or inside != 4 * every[0].width:
        return (
            f"its bind network has {len(network.blocks)} blocks of {inside}, and the code that reads the "
            f"format has {RELEASED_BLOCKS} of {4 * every[0].width}"
        )
    with_lora = dataclasses.replace(TUNING, lora_rank=0 if tuning is None else tuning.lora_rank, lora_linears=("all",))
    if tuning not in (None, TUNING, with_lora):
        return (
            f"the format holds biases of {', '.join(TUNED_LINEARS)}, no scales, all norms, and LoRA of all linear "
            f"layers or none; this adapter's tuning is {tuning.to_dict()}"
        )
    return ""


def _tuned(handle: Handle, path: Path) -> dict[str, Tensor]:
    """Biases, norms and LoRA, rows of queries and keys in Meta's order."""
    sites = list(handle.state.sites.values())
    paths = llama.LlamaPaths(handle.model, sites, path)
    own = {name.removeprefix("tuning."): tensor for name, tensor in handle.state_dict().items()}
    made = {LAST_NORM: own[f"{paths.last_norm}.weight"]}
    for index, block in enumerate(paths.blocks):
        for theirs, ours in NORMS.items():
            made[f"layers.{index}.{theirs}"] = own[f"{block}.{ours}.weight"]
        for place, linear in LAYERS.items():
            above, _, name = place.rpartition(".")
            kinds = {"bias": f"{place}.bias", **{f"lora_{way}": f"{above}.lora_{name}_l{number}.weight"
                     for number, way in ((1, "down"), (2, "up"))}}  # fmt: skip
            for kind, theirs in kinds.items():
                if (tensor := own.get(f"{block}.{linear}.{kind}")) is not None:
                    of_output = kind != "lora_down" and linear in (llama.QUERY, llama.KEY)
                    made[f"layers.{index}.{theirs}"] = (
                        llama.interleaved(tensor, sites[0].head_dim) if of_output else tensor
                    )
    return made


IMAGEBIND_LLM = Format("OpenGVLab/LLaMA-Adapter, ImageBind-LLM", read, write)
