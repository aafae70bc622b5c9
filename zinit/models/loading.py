"""Loads pretrained models, with errors a user can act on. Remote code is never run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Required, TypedDict, Unpack

import torch
from torch import nn

from zinit.errors import BackboneError, first_line
from zinit.files import is_file, model_source, read_json
from zinit.models import quantization

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Loading(TypedDict, total=False):
    """How a host is loaded.

    Attributes:
        dtype: of the weights; with quantised weights, of the matrix products.
        revision: on the Hub.
        device: the weights are read to it one by one; default: the CPU.
        quantize: how the weights are stored; default: in ``dtype``. See `zinit.models.quantization`.
    """

    dtype: Required[torch.dtype]
    revision: str | None
    device: torch.device | str
    quantize: quantization.Quantize | None


def load_causal_lm(source: str | Path, *, tokenizer: bool = True, **loading: Unpack[Loading]) -> tuple[nn.Module, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
        source: a folder in transformers' format, or a Hub id.
        tokenizer: False loads no tokenizer and returns None in its place.
        loading: see `Loading`.

    Raises:
        BackboneError: if there is no such model, or some of its weights are missing.
        ConfigError: if the quantization package is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, revision, options = model_source(source), loading.get("revision"), _options(loading)
    try:
        loaded = None
        if tokenizer:
            loaded = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        of_kind: Any = AutoModelForCausalLM
        with quiet():
            model, report = of_kind.from_pretrained(
                source, trust_remote_code=False, output_loading_info=True, **options
            )
    except Exception as error:  # transformers raises many classes; all mean that it cannot load this
        raise BackboneError(f"{source} cannot be loaded as a causal language model: {reason(source, error)}") from error
    check_complete(model, report, source)
    quantization.keep_differentiable(model)
    return model, loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' bars over weights and its report on them off the terminal; the Hub's bars of downloads stay.

    What is wrong with the weights is an error here.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    hook = logging.set_tqdm_hook(lambda make, args, options: make(*args, **{**options, "disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(hook)
        logging.set_verbosity(verbosity)


def check_complete(model: nn.Module, report: Mapping[str, Any], source: str) -> None:
    """No weight is left at the random values it was made with.

    Args:
        model: as loaded.
        report: transformers' own, of ``output_loading_info``.
        source: folder or Hub id, for the message.

    Raises:
        BackboneError: naming a weight that is missing.
    """
    if missing := sorted(report["missing_keys"]):
        raise BackboneError(f"{source} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}.")


def _options(loading: Loading) -> dict[str, Any]:
    """`Loading` as the arguments of transformers' ``from_pretrained``."""
    options: dict[str, Any] = {"dtype": loading["dtype"], "revision": loading.get("revision")}
    device, quantize = torch.device(loading.get("device", "cpu")), loading.get("quantize")
    if quantize is not None:
        options["quantization_config"] = quantization.quantization_config(quantize, loading["dtype"])
    if quantize is not None or device.type != "cpu":  # by default transformers quantises on some GPU
        options["device_map"] = {"": device}
    return options


@dataclass(frozen=True)
class ClipProcessor:
    """Prepares the texts and images a dual encoder takes.

    Args:
        tokenizer: of the text tower.
        mean: (3,), of the pixels' channels, which range over 0..1.
        std: (3,), see ``mean``.
        padding: pads texts to the longest one, or to the full context where the model reads the padding too.
    """

    tokenizer: Any
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    padding: Literal["longest", "max_length"] = "longest"


def load_clip(source: str | Path, **loading: Unpack[Loading]) -> tuple[nn.Module, ClipProcessor]:
    """Loads CLIP or a similar dual encoder, with its tokenizer and pixel statistics (CLIP's, if it names none).

    Args:
        source: a folder in transformers' format, or a Hub id.
        loading: see `Loading`.

    Raises:
        ConfigError: if the quantization package is missing.
        BackboneError: if there is no such model, or it does not compare images with texts.
    """
    from transformers import AutoModel, AutoTokenizer

    source, revision, quantize = model_source(source), loading.get("revision"), loading.get("quantize")
    if later := quantize == "torchao-int8":  # transformers only does it for models with one input embedding
        quantization.check_installed(quantize)
    options = _options({"dtype": loading["dtype"], "revision": revision} if later else loading)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        with quiet():
            model, report = AutoModel.from_pretrained(
                source, trust_remote_code=False, output_loading_info=True, **options
            )
    except Exception as error:  # see load_causal_lm
        raise BackboneError(
            f"{source} cannot be loaded as a dual encoder such as CLIP: {reason(source, error)}"
        ) from error
    _check_dual_encoder(model, source)
    check_complete(model, report, source)
    mean, std = _pixel_statistics(source, revision)
    if later:
        quantization.quantize_in_place(model, quantize, loading.get("device", "cpu"))
    quantization.keep_differentiable(model)
    # A tokenizer that returns no mask, such as SigLIP's, belongs to a tower that reads the padding too.
    padding = "longest" if "attention_mask" in tokenizer.model_input_names else "max_length"
    return model, ClipProcessor(tokenizer, mean, std, padding)


def _check_dual_encoder(model: nn.Module, source: str) -> None:
    missing = [name for name in ("get_image_features", "get_text_features", "logit_scale") if not hasattr(model, name)]
    if missing:
        raise BackboneError(
            f"{source} is a {type(model).__name__}, which has no {', '.join(missing)}. "
            f"Expected a model of images and texts such as openai/clip-vit-base-patch16."
        )


def _pixel_statistics(source: str, revision: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the channels by the model's image processor; CLIP's where it names none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
    except OSError:
        settings = {}
    return tuple(settings.get("image_mean") or CLIP_MEAN), tuple(settings.get("image_std") or CLIP_STD)


def load_encoder(source: str | Path, **loading: Unpack[Loading]) -> tuple[nn.Module, Any]:
    """Loads the backbone of an encoder, without head or pooling layer, and its fast tokenizer.

    Args:
        source: a folder in transformers' format, or a Hub id.
        loading: see `Loading`.

    Raises:
        ConfigError: if the quantization package is missing.
        BackboneError: if there is no such model, or some of its weights are missing.
    """
    from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer

    source, revision, options = model_source(source), loading.get("revision"), _options(loading)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model_class: Any = MODEL_MAPPING[type(config)]
        pooling = {"add_pooling_layer": False} if "add_pooling_layer" in signature(model_class).parameters else {}
        with quiet():
            model, report = model_class.from_pretrained(
                source, config=config, output_loading_info=True, **options, **pooling
            )
    except Exception as error:  # see load_causal_lm
        raise BackboneError(f"{source} cannot be loaded as an encoder: {reason(source, error)}") from error
    check_complete(model, report, source)
    quantization.keep_differentiable(model)
    return model, tokenizer


def load_on_meta(source: str | Path, *, revision: str | None = None) -> nn.Module:
    """Builds a model's modules without its weights, from its config alone.

    Args:
        source: a folder in transformers' or timm's format, a Hub id, or a timm model name.
        revision: on the Hub; not of timm's models.

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
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        name = (config.architectures or [""])[0]
        model_class: Any = getattr(transformers, name, None)
        known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
        with torch.device("meta"):
            return model_class(config) if known else transformers.AutoModel.from_config(config)
    except Exception as error:
        raise BackboneError(f"{source} cannot be inspected: {reason(source, error)}") from error


def _timm_name(source: str) -> str | None:
    """The name under which timm creates a model; None if it is not a timm model."""
    if is_file(file := Path(source) / "config.json"):  # a timm folder names its architecture
        return f"local-dir:{source}" if "architecture" in read_json(file, BackboneError) else None
    if "/" in source:
        return None
    import timm

    return source if timm.is_model(source) else None


def reason(source: str | Path, error: BaseException) -> str:
    """Why a model could not be loaded; if there is no such folder, the message starts with that."""
    line = first_line(error)
    return line if os.path.exists(source) else f"there is no folder of that name, and the Hub did not give it: {line}"
