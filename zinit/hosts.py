"""Loading pretrained models, with errors a user can act on. Remote code is never run."""

from __future__ import annotations

import difflib
import json
import pickle
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Required, TypedDict, Unpack

import torch
from torch import nn

from zinit import quantization
from zinit.errors import BackboneError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


class Loading(TypedDict, total=False):
    """How a host is loaded.

    Attributes:
        dtype: of the weights, or of what quantised ones are multiplied in.
        revision: on the Hub.
        device: that the weights are read to, one by one; default: the CPU.
        quantize: how the weights are held; default: in ``dtype``. See `zinit.quantization`.
    """

    dtype: Required[torch.dtype]
    revision: str | None
    device: torch.device | str
    quantize: quantization.Quantize | None


def load_causal_lm(source: str | Path, *, tokenizer: bool = True, **loading: Unpack[Loading]) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer.

    Args:
        source: a folder in transformers' format, or a Hub id.
        tokenizer: False loads none (None comes back).
        loading: see `Loading`.

    Raises:
        BackboneError: if there is no such model.
        ConfigError: if the package that quantises is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, revision, options = model_source(source), loading.get("revision"), _options(loading)
    try:
        loaded = None
        if tokenizer:
            loaded = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds; all mean that this is no model it can load
        raise BackboneError(f"{source} cannot be loaded as a causal language model: {reason(source, error)}") from error
    quantization.keep_differentiable(model)
    return model, loaded


def _options(loading: Loading) -> dict[str, Any]:
    """`Loading` in the words of transformers' ``from_pretrained``."""
    options: dict[str, Any] = {"dtype": loading["dtype"], "revision": loading.get("revision")}
    device, quantize = torch.device(loading.get("device", "cpu")), loading.get("quantize")
    if quantize is not None:
        options["quantization_config"] = quantization.quantization_config(quantize, loading["dtype"])
    if quantize is not None or device.type != "cpu":  # left to itself, it would quantise on some GPU
        options["device_map"] = {"": device}
    return options


@dataclass(frozen=True)
class ClipProcessor:
    """What turns texts and pictures into a dual encoder's inputs.

    Args:
        tokenizer: of the text tower.
        mean: of the pixels' channels, in 0..1.
        std: see ``mean``.
        padding: of texts: to the longest of them, or to all the room there is where padding is part of the text.
    """

    tokenizer: Any
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    padding: Literal["longest", "max_length"] = "longest"


def load_clip(source: str | Path, **loading: Unpack[Loading]) -> tuple[nn.Module, ClipProcessor]:
    """CLIP or another dual encoder of its kind, and its tokenizer and pixel statistics (CLIP's, if it names none).

    Args:
        source: a folder in transformers' format, or a Hub id.
        loading: see `Loading`.

    Raises:
        ConfigError: if the package that quantises is missing.
        BackboneError: if there is no such model, or it does not compare pictures with texts.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.image_processing_base import ImageProcessingMixin

    source, revision, quantize = model_source(source), loading.get("revision"), loading.get("quantize")
    if later := quantize == "torchao-int8":  # transformers does it to models of one input embedding
        quantization.check_installed(quantize)
    options = _options({"dtype": loading["dtype"], "revision": revision} if later else loading)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model: Any = AutoModel.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # as in load_causal_lm
        raise BackboneError(
            f"{source} cannot be loaded as a dual encoder such as CLIP: {reason(source, error)}"
        ) from error
    needed = ("get_image_features", "get_text_features", "logit_scale")
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        raise BackboneError(
            f"{source} is a {type(model).__name__}, which has no {', '.join(missing)}. "
            f"Expected a model of pictures and texts such as openai/clip-vit-base-patch16."
        )
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
    except OSError:
        settings = {}
    if later:
        quantization.quantize_in_place(model, quantize, loading.get("device", "cpu"))
    quantization.keep_differentiable(model)
    mean, std = settings.get("image_mean") or CLIP_MEAN, settings.get("image_std") or CLIP_STD
    # A tokenizer that gives no mask, as SigLIP's, was made for a tower that reads the padding too.
    padding = "longest" if "attention_mask" in tokenizer.model_input_names else "max_length"
    return model, ClipProcessor(tokenizer, tuple(mean), tuple(std), padding)


def load_encoder(source: str | Path, **loading: Unpack[Loading]) -> tuple[nn.Module, Any]:
    """The trunk of an encoder, without a head or pooling layer, and its fast tokenizer.

    Args:
        source: a folder in transformers' format, or a Hub id.
        loading: see `Loading`.

    Raises:
        ConfigError: if the package that quantises is missing.
        BackboneError: if there is no such model, or it lacks some of the weights.
    """
    from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer

    source, revision, options = model_source(source), loading.get("revision"), _options(loading)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model_class: Any = MODEL_MAPPING[type(config)]
        pooling = {"add_pooling_layer": False} if "add_pooling_layer" in signature(model_class).parameters else {}
        model, report = model_class.from_pretrained(
            source, config=config, output_loading_info=True, **options, **pooling
        )
    except Exception as error:  # see load_causal_lm
        raise BackboneError(f"{source} cannot be loaded as an encoder: {reason(source, error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise BackboneError(f"{source} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}.")
    quantization.keep_differentiable(model)
    return model, tokenizer


def load_on_meta(source: str | Path) -> nn.Module:
    """A model's modules without its weights, from its config alone.

    Args:
        source: a folder in transformers' or timm's format, a Hub id, or a name of timm's.

    Raises:
        BackboneError: if there is no such model.
    """
    import transformers

    source = model_source(source)
    try:
        if (of_timm := _timm_name(source)) is not None:
            import timm

            with torch.device("meta"):
                return timm.create_model(of_timm, pretrained=False, num_classes=0)
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        name = (config.architectures or [""])[0]
        model_class: Any = getattr(transformers, name, None)
        known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
        with torch.device("meta"):
            return model_class(config) if known else transformers.AutoModel.from_config(config)
    except Exception as error:
        raise BackboneError(f"{source} cannot be inspected: {reason(source, error)}") from error


def _timm_name(source: str) -> str | None:
    """What timm would call a model; None if it is none of timm's. timm's folders name one architecture."""
    if (file := Path(source) / "config.json").is_file():
        return f"local-dir:{source}" if "architecture" in json.loads(file.read_text(encoding="utf-8")) else None
    if "/" in source:
        return None
    import timm

    return source if timm.is_model(source) else None


def model_source(source: str | Path) -> str:
    """A path or Hub id that may be a model.

    Raises:
        BackboneError: if it is a path that holds no model.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BackboneError(f"the folder {source} holds no model: it has no config.json.")
        return str(path)
    text = str(source)
    if path.is_file() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise BackboneError(f"there is no model folder {source}. Expected a folder with a config.json, or a Hub id.")
    return text


def reason(source: str | Path, error: BaseException) -> str:
    """Why a model could not be loaded; where no folder has its name, that is said first."""
    line = first_line(error)
    return line if Path(source).exists() else f"there is no folder of that name, and the Hub did not give it: {line}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


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
    with file.open("rb") as opened:
        if opened.read(42).startswith(b"version https://git-lfs.github.com/spec"):
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
