"""Frozen hosts whose matrices are held in 8 or 4 bits: through bitsandbytes or torchao, as transformers loads them.

Prompts, gates and heads stay float32 and train as ever; no quantised weight does. Which packages run where:
bitsandbytes on GPUs and on CPUs, torchao wherever torch does.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from zinit.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

Quantize = Literal["bnb-8bit", "bnb-4bit", "torchao-int8"]
PACKAGES = {"bnb-8bit": "bitsandbytes", "bnb-4bit": "bitsandbytes", "torchao-int8": "torchao"}
QUANTIZATIONS: tuple[str, ...] = get_args(Quantize)


def check_installed(quantize: Quantize) -> None:
    """Raises:
    ConfigError: if the package that quantises so is missing.
    """
    if find_spec(PACKAGES[quantize]) is None:
        raise ConfigError(
            f"quantize={quantize} needs the package {PACKAGES[quantize]}, which is not installed: "
            f"pip install 'zinit[quantize]'"
        )


def quantization_config(quantize: Quantize, dtype: torch.dtype) -> Any:
    """What transformers calls a quantization config.

    Args:
        quantize: ``bnb-8bit`` is LLM.int8() (Dettmers et al., NeurIPS 2022), which rounds what goes into a matrix too;
            ``bnb-4bit`` QLoRA's NF4 with double quantisation (Dettmers et al., NeurIPS 2023); ``torchao-int8`` int8
            weights with a scale for each row.
        dtype: that matrices are multiplied in.

    Raises:
        ConfigError: if the package is missing.
    """
    check_installed(quantize)
    if quantize == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # LLM.int8() warns at every product that it rounds
    if quantize == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def quantize_in_place(model: nn.Module, quantize: Quantize, device: torch.device | str) -> None:
    """Quantises the linear layers of a model that transformers cannot load so, and moves it, a layer at a time.

    Args:
        model: in its own dtype, on the CPU.
        quantize: ``torchao-int8``.
        device: where it goes.

    Raises:
        ConfigError: if the package is missing, or quantises only what transformers loads.
    """
    if quantize != "torchao-int8":
        raise ConfigError(f"quantize={quantize} is for models of transformers; timm's take quantize=torchao-int8.")
    check_installed(quantize)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), device=device)
    model.to(device)


def quantized_weights(model: nn.Module) -> list[str]:
    """Names of the weights that are held in fewer bits than they are multiplied in, whoever loaded the model."""
    return [
        name
        for name, parameter in model.named_parameters()
        if not parameter.is_floating_point() or type(parameter.data).__module__.partition(".")[0] == "torchao"
    ]


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights of a model are quantised."""
    return bool(quantized_weights(model))


def keep_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16 at the first call without gradients.

    What is packed so has no backward pass: training after an evaluation would go on without a gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
