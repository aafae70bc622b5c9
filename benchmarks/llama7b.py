"""LLaMA-7B's shape with random weights on one GPU: zinit against the floor and PEFT, and Alpaca's time extrapolated.

    python -m benchmarks.llama7b

Needs a CUDA device with about 40 GB. Prints tokens per second, the share of the matrix peak (given by --peak-tflops),
peak memory, and how long 52,002 examples x 5 epochs would take at the measured rate. Not measured yet.
"""

from __future__ import annotations

import gc
import statistics
import time

import torch

from benchmarks.common import floor, parser, prepare, save, with_peft, with_zinit
from benchmarks.train_step import step_of

EXAMPLES, EPOCHS, MEAN_TOKENS = 52_002, 5, 127  # Alpaca 52K; mean length with LLaMA's tokenizer


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(width=4096, layers=32, heads=32, kv_heads=32, vocabulary=32000, rounds=100)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16 peak (H200: 989)")
    options = options.parse_args()
    prepare(options)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.llama7b needs a CUDA device.")
    tokens = options.batch * options.length
    ids = torch.randint(0, options.vocabulary, (options.batch, options.length), device=options.device)
    figures: dict[str, dict[str, float]] = {}
    for name, make in (("floor", floor), ("zinit", with_zinit), ("peft", with_peft)):  # one at a time: each is 13.5 GB
        model = make(options)
        weights = sum(parameter.numel() for parameter in model.parameters())
        step = step_of(model, ids)
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(options.rounds):
            started = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        second = statistics.median(seconds)
        # Per weight and token 2 operations forward and 2 backward through activations; no gradients of weights.
        figures[name] = {
            "seconds_per_step": round(second, 5),
            "tokens_per_second": round(tokens / second, 1),
            "share_of_peak": round(4 * weights * tokens / second / (options.peak_tflops * 1e12), 4),
            "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "alpaca_minutes_extrapolated": round(EXAMPLES * EPOCHS * MEAN_TOKENS / (tokens / second) / 60, 1),
        }
        del model, step
        gc.collect()
        torch.cuda.empty_cache()
    save("llama7b", options, figures)


if __name__ == "__main__":
    main()
