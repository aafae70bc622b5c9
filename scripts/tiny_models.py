"""Tiny random models of the families in the installed transformers and timm, and inputs that they run on."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zinit.backbones._discover import on_interface

WIDTH, HEADS, SHARED, HEAD, LAYERS, VOCABULARY = 64, 4, 2, 16, 4, 300
LARGEST = 100_000_000

LAYER_NAMES = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
    "num_decoder_layers",
    "num_encoder_layers",
]
TOKENS = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES: dict[str, int] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"], WIDTH),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "mlp_dim"], WIDTH),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], WIDTH),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"], HEADS),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], HEADS),
    **dict.fromkeys(LAYER_NAMES, LAYERS),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk"], 2),
    **dict.fromkeys(["n_group", "topk_group"], 1),
    **TOKENS,
    "num_key_value_heads": SHARED,
    "head_dim": HEAD,
    "d_kv": HEAD,
    "max_position_embeddings": 128,
    "hidden_size_per_layer_input": 8,
}


def shrunk(config_class: Any, names: tuple[str, ...]) -> Any:
    """A config of that class, and its parts' configs, with the named sizes made small."""
    default = config_class()
    changes: dict[str, Any] = {}
    settings: dict[str, Any] = vars(default)
    for name, value in settings.items():
        sized = isinstance(value, int) and not isinstance(value, bool)
        if name in names and (sized or (name == "vocab_size" and value is None)):
            changes[name] = SIZES[name]
            if name == "num_key_value_heads" and value == getattr(default, "num_attention_heads", None):
                changes[name] = HEADS
        elif hasattr(value, "sub_configs") and getattr(value, "model_type", ""):
            changes[name] = shrunk(type(value), names)
    if names and isinstance(vars(default).get("image_size"), int) and isinstance(vars(default).get("patch_size"), int):
        changes["image_size"] = 2 * default.patch_size
    return config_class(**changes)


def small_configs(config_class: Any) -> Iterator[Any]:
    """Configs to try, the smallest first. Families differ in which sizes may be changed without breaking another."""
    everything = tuple(SIZES)
    for names in (
        everything,
        tuple(name for name in everything if name not in ("head_dim", "num_key_value_heads", "d_kv")),
        tuple(name for name in everything if "expert" not in name and "group" not in name),
        tuple(name for name in everything if name not in LAYER_NAMES),
        (*LAYER_NAMES, *TOKENS),
        tuple(LAYER_NAMES),
        (),
    ):
        try:
            yield shrunk(config_class, names)
        except Exception:  # this combination of sizes is not allowed
            continue


def tiny_transformer(model_type: str) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """The family's base model, and inputs; None where none of ours is what it wants.

    The smallest model that runs and has attention on the interface; else one that runs; else one that can be built.

    Raises:
        RuntimeError: if no size that we know to choose works, with the last reason.
    """
    last: Exception = RuntimeError("none of the sizes can be configured")
    runs: tuple[nn.Module, dict[str, Tensor] | None] | None = None
    built: nn.Module | None = None
    for config in small_configs(CONFIG_MAPPING[model_type]):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
            if size > LARGEST:
                raise RuntimeError(f"its smallest model has {size:,} parameters")
            torch.manual_seed(0)
            model = randomized(transformers.AutoModel.from_config(config))
        except Exception as error:
            last = error
            continue
        attends = any(on_interface(module) for module in model.modules())
        inputs = next((inputs for inputs in inputs_of(model) if runs_on(model, inputs)), None)
        if attends and inputs is not None:
            return model, inputs
        runs = runs or (None if inputs is None else (model, inputs))
        built = model if attends or built is None else built
        if "get_interface(" not in inspect.getsource(sys.modules[type(model).__module__]) and inputs is not None:
            break  # no size will change that
    if runs is not None:
        return runs
    if built is None:
        reason = (str(last).splitlines() or [""])[0].partition(" from '")[0]  # without a path of this machine
        raise RuntimeError(f"{type(last).__name__}: {reason[:120]}")
    return built, None


FLAGS = re.compile(r"^(use_(qk|shared|mem_rope|sliding|bias|attention|attn)|qk_|attention_bias|qkv_bias|multi_query|"
                   r"new_decoder|add_swa|attn_output_gate|partial_|rotary_pct)")  # fmt: skip


def variants_of(config: Any) -> Iterator[tuple[str, Any]]:
    """(what is different, config): kinds of layers, windows, sharing and switches of attention that a config offers."""
    from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES

    values = vars(config)
    text = inspect.getsource(sys.modules[type(config).__module__])
    modeling = sys.modules.get(type(config).__module__.replace("configuration_", "modeling_"))
    text += "" if modeling is None else inspect.getsource(modeling)
    changes: list[dict[str, Any]] = []
    layers = values.get("layer_types")
    for kind in ALLOWED_ATTN_LAYER_TYPES if isinstance(layers, list) else ():
        if f'"{kind}"' in text and set(layers) != {kind}:
            changes.append({"layer_types": [kind] * len(layers)})
    if "sliding_window" in values and values["sliding_window"] != 4:
        changes.append({"sliding_window": 4} | ({"use_sliding_window": True} if "use_sliding_window" in values else {}))
    if "num_kv_shared_layers" in values and isinstance(layers, list):  # each kind needs a layer that shares its own
        kinds = ["sliding_attention", "full_attention"] * len(layers)
        changes.append({"num_kv_shared_layers": 2, "layer_types": kinds[: len(layers)]})
    changes += [{name: not value} for name, value in values.items() if isinstance(value, bool) and FLAGS.match(name)]
    for change in changes:
        changed = copy.deepcopy(config)
        for name, value in change.items():
            setattr(changed, name, value)
        yield (
            ", ".join(f"{name}={value[0] if isinstance(value, list) else value}" for name, value in change.items()),
            (changed),
        )


def runs_on(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the model takes these inputs and gives numbers."""
    try:
        with torch.no_grad():
            return bool(floats(model(**inputs)))
    except Exception:  # not what this model takes
        return False


def randomized(model: nn.Module) -> nn.Module:
    """Weights large enough that everything matters; biases and norms are no longer 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.empty(parameter.shape).normal_(generator=generator)
                parameter.add_(0.1 * noise) if parameter.dim() < 2 else parameter.copy_(
                    noise / parameter.shape[-1] ** 0.5
                )
    return model.eval()


def inputs_of(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs to try."""
    takes = inspect.signature(model.forward).parameters
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    decoder = {"decoder_input_ids": ids[:, :5]} if "decoder_input_ids" in takes else {}
    texts = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}] if "input_ids" in takes else []
    images: list[dict[str, Tensor]] = []
    if "pixel_values" in takes:
        parts = [
            model.config,
            *(getattr(model.config, name, None) for name in getattr(model.config, "sub_configs", {})),
        ]
        found = [getattr(part, "image_size", None) for part in parts]
        sizes = [
            s if isinstance(s, int) else s[0]
            for s in found
            if isinstance(s, int) or (s and isinstance(s, (list, tuple)))
        ]
        images = [{"pixel_values": torch.randn(2, 3, size, size)} for size in dict.fromkeys([*sizes, 64, 224])]
        images += [{"pixel_values": torch.randn(1, 16, 3, size, size)} for size in sizes]
    sounds: list[dict[str, Tensor]] = []
    if "input_values" in takes:
        sounds = [{"input_values": torch.randn(2, 4000)}, {"input_values": torch.randn(2, 1024, 128)},
                  {"input_values": torch.randn(2, 1, 4000)}]  # fmt: skip
    if "input_features" in takes:
        mels = getattr(model.config, "num_mel_bins", 80)
        frames = 2 * getattr(model.config, "max_source_positions", 1500)
        sounds += [{"input_features": torch.randn(2, mels, frames)}, {"input_features": torch.randn(2, 64, mels)}]
    plain = [*texts, *images, *sounds]
    for one in plain:
        yield one | decoder
    for text in texts:
        for other in (*images, *sounds):
            yield text | other | decoder
    if "inputs_embeds" in takes:
        yield {"inputs_embeds": torch.randn(2, 8, WIDTH)}
    if "hidden_states" in takes:
        yield {"hidden_states": torch.randn(2, 8, WIDTH)}


def floats(output: Any) -> list[Tensor]:
    """All floating tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for part in output for tensor in floats(part)] if isinstance(output, (list, tuple)) else []
