"""LLaMA-7B's shape with random weights on one GPU: zinit against the floor and PEFT, and Alpaca's time extrapolated.

    python -m benchmarks.llama7b
    python -m benchmarks.llama7b --smoke                                # a tiny shape anywhere: whether it runs
    python -m benchmarks.llama7b --quantize bnb-4bit bnb-8bit torchao-int8 --attention flash_attention_2

Needs a CUDA device with about 40 GB, and 14 GB of disk for the quantised cases: their host is saved and loaded as a
user's is. Prints tokens per second, the share of the matrix peak (given by --peak-tflops), peak memory, and how long
52,002 examples x 5 epochs would take at the measured rate; and how far logits and prompts' gradients are from those
with another attention implementation. Not measured yet.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zinit
from benchmarks.common import floor, parser, prepare, random_llama, save, synchronize, with_peft, with_zinit
from benchmarks.train_step import step_of
from zinit.models.loading import load_causal_lm
from zinit.models.quantization import QUANTIZATIONS

Make = Callable[[argparse.Namespace], nn.Module]
EXAMPLES, EPOCHS, MEAN_TOKENS = 52_002, 5, 127  # Alpaca 52K; mean length with LLaMA's tokenizer
SMOKE = {"width": 64, "layers": 3, "heads": 4, "kv_heads": 4, "vocabulary": 500, "rounds": 2, "batch": 2, "length": 16}


def quantized(options: argparse.Namespace, quantize: Any) -> nn.Module:
    """zinit's prefix as in `with_zinit`, on a quantised host."""
    with tempfile.TemporaryDirectory() as folder:
        random_llama(options).save_pretrained(folder, max_shard_size="2GB")
        release(options.device)
        how: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "device": options.device, "quantize": quantize}
        model, _ = load_causal_lm(Path(folder), tokenizer=False, **how)
    zinit.attach(model, zinit.PrefixConfig(length=options.prefix_length, layers=options.adapted, gate_init=0.1), seed=0)
    return model


def release(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def measured(model: nn.Module, ids: torch.Tensor, weights: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time and peak memory of a training step."""
    cuda, step, seconds = options.device.startswith("cuda"), step_of(model, ids), []
    for _ in range(min(5, options.rounds)):
        step()
    synchronize(options.device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.rounds):
        started = time.perf_counter()
        step()
        synchronize(options.device)
        seconds.append(time.perf_counter() - started)
    second, tokens = statistics.median(seconds), ids.numel()
    # Per weight and token 2 operations forward and 2 backward through activations; no gradients of weights.
    return {
        "seconds_per_step": round(second, 5),
        "tokens_per_second": round(tokens / second, 1),
        "share_of_peak": round(4 * weights * tokens / second / (options.peak_tflops * 1e12), 4),
        "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        "alpaca_minutes_extrapolated": round(EXAMPLES * EPOCHS * MEAN_TOKENS / (tokens / second) / 60, 1),
    }


def parity(ids: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Largest relative difference of logits and gradients between sdpa and another implementation, left-padded too."""
    model: Any = with_zinit(options).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mask = torch.ones_like(ids)
    mask[1:, : ids.shape[1] // 3] = 0
    found: dict[str, list[torch.Tensor]] = {}
    for name in ("sdpa", options.attention):
        try:
            model.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            return {"attention": options.attention, "not_run": str(error).splitlines()[0]}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()
        gradients = torch.autograd.grad(logits.square().mean(), trained)
        found[name] = [logits.detach(), *gradients]
    ours, theirs = found["sdpa"], found[options.attention]
    relative = [
        ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item() for a, b in zip(ours, theirs, strict=True)
    ]
    return {"attention": options.attention, "logits": relative[0], "gradients": max(relative[1:])}


def main() -> None:
    options = parser(str(__doc__).splitlines()[0])
    options.set_defaults(width=4096, layers=32, heads=32, kv_heads=32, vocabulary=32000, rounds=100)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16 peak (H200: 989)")
    options.add_argument("--quantize", nargs="*", choices=QUANTIZATIONS, default=["bnb-4bit"], help="hosts to try too")
    options.add_argument("--attention", default="flash_attention_2", help="to compare with sdpa")
    options.add_argument("--smoke", action="store_true", help="a tiny shape; nothing is written unless --output")
    options = options.parse_args()
    if options.smoke:
        vars(options).update(SMOKE)
    elif not torch.cuda.is_available():
        raise SystemExit("benchmarks.llama7b needs a CUDA device; --smoke runs a tiny shape anywhere.")
    prepare(options)
    ids = torch.randint(0, options.vocabulary, (options.batch, options.length), device=options.device)
    cases: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
        "floor": floor,
        "zinit": with_zinit,
        "peft": with_peft,
    }
    for kind in options.quantize:
        cases[f"zinit-{kind}"] = lambda options, kind=kind: quantized(options, kind)
    figures: dict[str, dict[str, Any]] = {}
    weights = 0
    for name, make in cases.items():  # one at a time: each is 13.5 GB
        model = make(options)
        weights = weights or sum(parameter.numel() for parameter in model.parameters())  # 4-bit ones count half
        figures[name] = measured(model, ids, weights, options)
        del model
        release(options.device)
    figures["parity"] = parity(ids, options)
    if options.smoke and options.output is None:
        print(figures)
    else:
        save("llama7b", options, figures)


if __name__ == "__main__":
    main()
