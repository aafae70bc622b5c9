"""Loading models of timm: by name, from the Hub, from a folder or a file of weights."""

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
from zinit.files import is_lfs_pointer
from zinit.models import quantization
from zinit.models.loading import Loading, model_source

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


def load_timm(source: str | Path, **loading: Unpack[Loading]) -> tuple[nn.Module, dict[str, Any]]:
    """A trunk of timm without its classifier: pictures in, pooled features out.

    Args:
        source: a name of timm's, whose weights come from the Hub (``vit_base_patch16_224.augreg_in21k``); a name with
            a local file of weights (``vit_base_patch16_224:weights/ViT-B_16.npz``; .npz as first published for JAX,
            .safetensors, .pth, .pt or .bin); a folder in timm's format (config.json and weights); or a Hub id.
        loading: see `Loading`; of the ways to quantise ``torchao-int8`` alone.

    Returns:
        The model, and the input it was pretrained on: ``input_size`` (C, H, W), ``mean``, ``std``, ``interpolation``.

    Raises:
        BackboneError: if there is no such model, or the weights are not its own.
        ConfigError: if it cannot be quantised so.
    """
    import timm
    from timm.data import resolve_data_config

    text, revision = str(source), loading.get("revision")
    path = Path(text.removeprefix("local-dir:")).expanduser()
    name, _, file = text.partition(":")
    try:
        if path.is_dir() or text.startswith("local-dir:"):
            model = timm.create_model(f"local-dir:{model_source(path)}", num_classes=0)
            _load_weights(model, _weights_in(path))
        elif path.is_file() or (path.suffix in WEIGHTS and not file):
            raise BackboneError(f"{text} is a file of weights; say of which model: vit_base_patch16_224:{text}")
        elif name in ("hf-hub", "hf_hub") or ("/" in text and not file):
            hub_id = file or model_source(text)
            model = timm.create_model(_on_hub(hub_id, revision), pretrained=True, num_classes=0)
        elif file and timm.is_model(name):
            model = timm.create_model(name, num_classes=0)
            _load_weights(model, Path(file).expanduser())
        elif timm.is_model(name) and not file:
            on_hub = text if revision is None else _on_hub(f"timm/{text}", revision)
            model = timm.create_model(on_hub, pretrained=True, num_classes=0)
        else:
            near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
            raise BackboneError(
                f"timm has no model {name!r}, and there is no such folder. {f'Near it: {near}. ' if near else ''}"
                f"Expected one of timm.list_models(), a folder in timm's format, or a Hub id."
            )
    except BackboneError:
        raise
    except Exception as error:  # timm, the Hub and torch raise many kinds; all mean that there is no such model
        raise BackboneError(f"{text} cannot be loaded as a model of timm's: {first_line(error)}") from error
    given = resolve_data_config({}, model=model)
    model, device = model.to(loading["dtype"]), loading.get("device", "cpu")
    if (quantize := loading.get("quantize")) is not None:
        quantization.quantize_in_place(model, quantize, device)
    return model.to(device).eval(), {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def _on_hub(hub_id: str, revision: str | None) -> str:
    return f"hf-hub:{hub_id}@{revision}" if revision else f"hf-hub:{hub_id}"


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder of timm's; safetensors first."""
    files = [file for suffix in WEIGHTS for file in sorted(folder.glob(f"*{suffix}"))]
    preferred = [file for file in files if file.stem in ("model", "pytorch_model")] or files
    if not preferred:
        raise BackboneError(f"the folder {folder} holds no weights ({', '.join(WEIGHTS)}).")
    return preferred[0]


def _load_weights(model: Any, file: Path) -> None:
    """Loads a local file; a classifier in it is left out. Nothing is ever unpickled but tensors.

    timm would stretch the patches of one model over those of another and leave surplus layers out; here that is an
    error. Position embeddings are resampled where the picture's size differs, as intended.
    """
    if not file.is_file():
        raise BackboneError(f"there is no file of weights {file}.")
    if is_lfs_pointer(file):
        raise BackboneError(f"{file} is a Git LFS pointer, not the weights. Fetch the file with 'git lfs pull'.")
    kind = type(model).__name__
    try:
        if file.suffix == ".npz":
            _load_npz(model, file)
            return
        state = _read_state(file)
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        patches = state.get("patch_embed.proj.weight")
        if patches is not None and patches.ndim == 4:
            _check_patches(model, patches.shape[2:], file)
        state = convert(state, model) if convert else state
        classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        own = model.state_dict()
        state = {k: v for k, v in state.items() if k in own or not k.startswith(tuple(f"{head}." for head in heads))}
        wrong = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
        for what, names in (
            ("lacks", sorted(own.keys() - state.keys())),
            ("has, beyond the model,", sorted(state.keys() - own.keys())),
            ("has other shapes of", wrong),
        ):
            if names:
                raise BackboneError(
                    f"{file} does not hold the weights of this {kind}: it {what} {', '.join(names[:3])}"
                    f"{' ...' if len(names) > 3 else ''} ({len(names)} in all). Name the model that they are of."
                )
        model.load_state_dict(state)
    except BackboneError:
        raise
    except Exception as error:  # damaged files show themselves in many ways
        raise BackboneError(f"{file} cannot be read as the weights of this {kind}: {first_line(error)}") from error


def _read_state(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    if file.suffix not in WEIGHTS:
        raise BackboneError(f"{file}: expected a file {', '.join((*WEIGHTS, '.npz'))}.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BackboneError(
            f"{file} holds more than tensors, or is damaged; it was not opened, since a pickle can run any code. "
            f"Save the state dict alone, best as .safetensors."
        ) from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BackboneError(f"{file} holds no state dict (names of weights, each with a tensor).")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _load_npz(model: Any, file: Path) -> None:
    """The original JAX archives, through timm's own reader."""
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
            f"Name the model that they are of."
        )
