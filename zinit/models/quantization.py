"""Frozen hosts with matrices in 8 or 4 bits, through bitsandbytes or torchao as transformers loads them.

Prompts, gates and heads stay in float32 and train as usual; quantised weights are never trained. bitsandbytes runs on
GPUs and CPUs, torchao wherever torch runs.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from zinit.errors import ConfigError, install_extra

if TYPE_CHECKING:
    import torch
    from torch import nn

Quantize = Literal["bnb-8bit", "bnb-4bit", "torchao-int8"]
PACKAGES = {"bnb-8bit": "bitsandbytes", "bnb-4bit": "bitsandbytes", "torchao-int8": "torchao"}
QUANTIZATIONS: tuple[str, ...] = get_args(Quantize)


def check_installed(quantize: Quantize) -> None:
    """Checks that the package behind a quantization is installed.

    Raises:
        ConfigError: if it is missing.
    """
    if find_spec(PACKAGES[quantize]) is None:
        raise ConfigError(
            f"quantize={quantize} needs the package {PACKAGES[quantize]}, which is not installed. "
            f"{install_extra('quantize')}"
        )


def quantization_config(quantize: Quantize, dtype: torch.dtype) -> Any:
    """The quantization config that transformers takes.

    Args:
        quantize: ``bnb-8bit`` is LLM.int8() (Dettmers et al., NeurIPS 2022), which rounds a matrix's inputs too;
            ``bnb-4bit`` QLoRA's NF4 with double quantisation (Dettmers et al., NeurIPS 2023); ``torchao-int8`` int8
            weights with a scale for each row.
        dtype: of the matrix products.

    Raises:
        ConfigError: if the package is missing.
    """
    check_installed(quantize)
    if quantize == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # LLM.int8() warns about every product it rounds
    if quantize == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def quantize_in_place(model: nn.Module, quantize: Quantize, device: torch.device | str) -> None:
    """Quantises the linear layers of a model that transformers cannot load quantised, and moves it, layer by layer.

    Args:
        model: in its own dtype, on the CPU.
        quantize: ``torchao-int8``.
        device: the model is moved to it.

    Raises:
        ConfigError: if the package is missing, or only works for models that transformers loads.
    """
    if quantize != "torchao-int8":
        raise ConfigError(f"quantize={quantize} is for models of transformers; timm's take quantize=torchao-int8.")
    check_installed(quantize)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), device=device)
    model.to(device)


def quantized_weights(model: nn.Module) -> list[str]:
    """Names of the quantised weights, whoever loaded the model."""
    return [
        name
        for name, parameter in model.named_parameters()
        if not parameter.is_floating_point() or type(parameter.data).__module__.partition(".")[0] == "torchao"
    ]


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights of a model are quantised."""
    return bool(quantized_weights(model))


def keep_differentiable(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16 at the first call without gradients.

    Repacked weights have no backward pass: training after an evaluation would get no gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
