"""What the benchmarks share: a random model, three ways to tune it, and ratios measured interleaved."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import zinit

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Options of every benchmark: the shape of the model, the prefix, where to run."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--width", type=int, default=512, help="C")
    options.add_argument("--layers", type=int, default=8, help="N")
    options.add_argument("--heads", type=int, default=8, help="H")
    options.add_argument("--kv-heads", type=int, default=8, help="G")
    options.add_argument("--vocabulary", type=int, default=2000)
    options.add_argument("--prefix-length", type=int, default=10, help="K")
    options.add_argument("--adapted", type=int, default=None, help="L; default: all layers but two")
    options.add_argument("--rounds", type=int, default=15, help="interleaved repetitions; medians are reported")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", default=None, help="default: bfloat16 on a GPU, float32 on a CPU")
    options.add_argument("--threads", type=int, default=None)
    options.add_argument("--output", type=Path, default=None, help="default: benchmarks/results/<name>-<device>.json")
    return options


def prepare(options: argparse.Namespace) -> None:
    """Fills in the defaults that depend on others."""
    options.adapted = options.layers - 2 if options.adapted is None else options.adapted
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)


IMAGE_WIDTH = 1024  # of a layer's vector of CLIP ViT-L


def random_llama(options: argparse.Namespace) -> LlamaForCausalLM:
    """LLaMA's architecture with random weights."""
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=int(options.width * 11008 / 4096),
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocabulary,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM(config).to(getattr(torch, options.dtype))
    model.requires_grad_(False)
    return model


def floor(options: argparse.Namespace, *, adapted: int | None = None) -> nn.Module:
    """The frozen model with one trainable vector at the input of the lowest adapted layer: what any method costs."""
    model = random_llama(options)
    layer = model.model.layers[options.layers - (options.adapted if adapted is None else adapted)]
    layer.register_parameter("dummy", nn.Parameter(torch.zeros(options.width, device=options.device)))

    def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args[0] + module.dummy.to(args[0].dtype), *args[1:]), kwargs

    layer.register_forward_pre_hook(add, with_kwargs=True)
    return model


def with_zinit(options: argparse.Namespace) -> nn.Module:
    """zinit's prefix, gates open a little so that no term is trivially zero."""
    model = random_llama(options)
    zinit.attach(model, zinit.PrefixConfig(length=options.prefix_length, layers=options.adapted, gate_init=0.1), seed=0)
    return model


def with_tuning(options: argparse.Namespace) -> nn.Module:
    """V2's bias tuning alone: scales and biases of every linear layer of the blocks, every norm."""
    model = random_llama(options)
    zinit.attach(model, zinit.AdapterConfig(parts={}, tuning=zinit.TuningConfig()), seed=0)
    return model


def with_image(options: argparse.Namespace) -> nn.Module:
    """V1 with images: the prefix of `with_zinit`, to which the projected features of an image are added."""
    model = random_llama(options)
    part = zinit.PrefixConfig(
        length=options.prefix_length, layers=options.adapted, gate_init=0.1, prompt="table+context"
    )
    config = zinit.AdapterConfig(
        parts={"prefix": part}, context="projected-image", context_options={"feature_width": 4 * IMAGE_WIDTH}
    )
    zinit.attach(model, config, seed=0)
    return model


def with_peft(options: argparse.Namespace) -> nn.Module:
    """PEFT's AdaptionPrompt of the same K and L."""
    from peft import AdaptionPromptConfig, TaskType, get_peft_model

    config = AdaptionPromptConfig(
        adapter_len=options.prefix_length, adapter_layers=options.adapted, task_type=TaskType.CAUSAL_LM
    )
    model = get_peft_model(random_llama(options), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(0.1)
    return model


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleaved(
    actions: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    device: str,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each action, every round running all of them one after the other; the first rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + warm_up):
        names = list(actions)
        names = names[number % len(names) :] + names[: number % len(names)]  # nobody is always first
        for name in names:
            gc.collect()
            synchronize(device)
            started = clock()
            actions[name]()
            synchronize(device)
            if number >= warm_up:
                seconds[name].append(clock() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    """The median over rounds of one action's time divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def save(name: str, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Prints the figures and writes them with everything that they depend on."""
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    document = {
        "benchmark": name,
        "figures": figures,
        "settings": settings,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine(),
        "versions": {package: metadata.version(package) for package in ("torch", "transformers", "peft")}
        | {"zinit": zinit.__version__},
    }
    path = options.output or RESULTS / f"{name}-{options.device.partition(':')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    print(f"written to {path}")
