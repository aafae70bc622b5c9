"""Loads timm models: by name, from the Hub, from a folder or a weights file."""

from __future__ import annotations

import difflib
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from zinit.errors import BackboneError, first_line
from zinit.files import is_file, is_folder, is_lfs_pointer, local_path
from zinit.models import quantization
from zinit.models.loading import Loading, model_source

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


def load_timm(source: str | Path, **loading: Unpack[Loading]) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a timm model without its classifier: images in, pooled features out.

    Args:
        source: a timm model name, whose weights come from the Hub (``vit_base_patch16_224.augreg_in21k``); a name with
            a local weights file (``vit_base_patch16_224:weights/ViT-B_16.npz``; .npz as first published for JAX,
            .safetensors, .pth, .pt or .bin); a folder in timm's format (config.json and weights); or a Hub id.
        loading: see `Loading`; of the quantizations only ``torchao-int8``.

    Returns:
        The model, and the input it was pretrained on: ``input_size`` (C, H, W), ``mean``, ``std``, ``interpolation``.

    Raises:
        BackboneError: if there is no such model, or the weights belong to another one.
        ConfigError: if it cannot be quantised that way.
    """
    from timm.data import resolve_data_config

    try:
        model = _create(str(source), loading.get("revision"))
    except BackboneError:
        raise
    except Exception as error:  # timm, the Hub and torch raise many classes; all mean that there is no such model
        raise BackboneError(f"{source} cannot be loaded as a model of timm's: {first_line(error)}") from error
    given = resolve_data_config({}, model=model)
    model, device = model.to(loading["dtype"]), loading.get("device", "cpu")
    if (quantize := loading.get("quantize")) is not None:
        quantization.quantize_in_place(model, quantize, device)
    return model.to(device).eval(), {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def _create(source: str, revision: str | None) -> Any:
    """The model with its weights, in the dtype they are stored in."""
    import timm

    path = local_path(source.removeprefix("local-dir:"))
    name, _, file = source.partition(":")
    if is_folder(path) or source.startswith("local-dir:"):
        model = timm.create_model(f"local-dir:{model_source(path)}", num_classes=0)
        _load_weights(model, _weights_in(path))
        return model
    if is_file(path) or (path.suffix in WEIGHTS and not file):
        raise BackboneError(f"{source} is a file of weights; say of which model: vit_base_patch16_224:{source}")
    if name in ("hf-hub", "hf_hub") or ("/" in source and not file):
        return timm.create_model(_on_hub(file or model_source(source), revision), pretrained=True, num_classes=0)
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        raise BackboneError(
            f"timm has no model {name!r}, and there is no such folder. {f'Near it: {near}. ' if near else ''}"
            f"Expected one of timm.list_models(), a folder in timm's format, or a Hub id."
        )
    if file:
        model = timm.create_model(name, num_classes=0)
        _load_weights(model, local_path(file))
        return model
    on_hub = source if revision is None else _on_hub(f"timm/{source}", revision)
    return timm.create_model(on_hub, pretrained=True, num_classes=0)


def _on_hub(hub_id: str, revision: str | None) -> str:
    return f"hf-hub:{hub_id}@{revision}" if revision else f"hf-hub:{hub_id}"


def _weights_in(folder: Path) -> Path:
    """The weights file in a folder in timm's format; safetensors first."""
    files = [file for suffix in WEIGHTS for file in sorted(folder.glob(f"*{suffix}"))]
    preferred = [file for file in files if file.stem in ("model", "pytorch_model")] or files
    if not preferred:
        raise BackboneError(f"the folder {folder} holds no weights ({', '.join(WEIGHTS)}).")
    return preferred[0]


def _load_weights(model: Any, file: Path) -> None:
    """Loads a local file without its classifier; nothing but tensors is ever unpickled.

    timm would stretch one model's patches over another's and ignore surplus layers; here both are errors. Position
    embeddings are resampled where the image size differs, as intended.
    """
    if not is_file(file):
        raise BackboneError(f"there is no file of weights {file}.")
    if is_lfs_pointer(file):
        raise BackboneError(f"{file} is a Git LFS pointer, not the weights. Fetch the file with 'git lfs pull'.")
    try:
        if file.suffix == ".npz":
            _load_npz(model, file)
            return
        state = _converted(_read_state(file), model, file)
        _check_state(state, model.state_dict(), type(model).__name__, file)
        model.load_state_dict(state)
    except BackboneError:
        raise
    except Exception as error:  # damaged files fail in many ways
        raise BackboneError(
            f"{file} cannot be read as the weights of this {type(model).__name__}: {first_line(error)}"
        ) from error


def _converted(state: dict[str, torch.Tensor], model: Any, file: Path) -> dict[str, torch.Tensor]:
    """The file's tensors under the model's own names, without the classifier's."""
    patches = state.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 4:
        _check_patches(model, patches.shape[2:], file)
    if convert := getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None):
        state = convert(state, model)
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))
    own = model.state_dict()
    return {name: value for name, value in state.items() if name in own or not name.startswith(heads)}


def _check_state(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], kind: str, file: Path) -> None:
    """Names and shapes agree exactly."""
    for what, names in (
        ("lacks", own.keys() - state.keys()),
        ("has, beyond the model,", state.keys() - own.keys()),
        ("has other shapes of", {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}),
    ):
        if names:
            raise BackboneError(
                f"{file} does not hold the weights of this {kind}: it {what} {', '.join(sorted(names)[:3])}"
                f"{' ...' if len(names) > 3 else ''} ({len(names)} in all). Name the model they belong to."
            )


def _read_state(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    if file.suffix not in WEIGHTS:
        raise BackboneError(f"{file}: expected a file {', '.join((*WEIGHTS, '.npz'))}.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BackboneError(
            f"{file} holds more than tensors, or is damaged; it was not loaded, since a pickle can run any code. "
            f"Save the state dict alone, best as .safetensors."
        ) from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BackboneError(f"{file} holds no state dict (names of weights, each with a tensor).")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _load_npz(model: Any, file: Path) -> None:
    """Loads an original JAX archive with timm's own reader."""
    import numpy as np

    if not hasattr(model, "load_pretrained"):
        raise BackboneError(f"timm reads no .npz of a {type(model).__name__}.")
    with np.load(file, allow_pickle=False) as arrays:
        shapes = {name: arrays[name].shape for name in arrays.files}
    layers = {int(found[1]) for name in shapes if (found := re.search(r"/encoderblock_(\d+)/", name))}
    if layers and len(layers) != len(model.blocks):
        raise BackboneError(f"{file} has {len(layers)} layers, the model {len(model.blocks)}. Name its own model.")
    for name, shape in shapes.items():
        if name.endswith("embedding/kernel") and len(shape) == 4:
            _check_patches(model, shape[:2], file)
        if name.endswith("encoder_norm/scale") and shape != tuple(model.norm.weight.shape):
            raise BackboneError(f"{file} is {shape[0]} wide, the model {len(model.norm.weight)}. Name its own model.")
    model.load_pretrained(str(file))


def _check_patches(model: Any, found: Sequence[int], file: Path) -> None:
    expected = tuple(model.patch_embed.proj.weight.shape[2:])
    if tuple(found) != expected:
        raise BackboneError(
            f"{file} has patches of {found[0]} x {found[1]} pixels, the model {expected[0]} x {expected[1]}. "
            f"Name the model they belong to."
        )
