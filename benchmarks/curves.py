"""Cost curves: time and memory of a training step against sequence length, K, L, batch and width.

    python -m benchmarks.curves --threads 1

One setting is varied at a time around the shape that the options give. Each point is measured in one process,
interleaved with the floor and PEFT's AdaptionPrompt (see train_step.py); medians. Writes JSON and a PNG beside it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, floor, interleaved, parser, prepare, ratio, save, with_peft, with_zinit
from benchmarks.train_step import peak_bytes, step_of

LABELS = {
    "length": "sequence length (tokens)",
    "prefix_length": "prompt length K",
    "adapted": "adapted layers L",
    "batch": "batch",
    "width": "model width C",
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One point: median seconds, peak bytes of a step, and the ratios."""
    ids = torch.randint(0, options.vocabulary, (options.batch, options.length), device=options.device)
    made = {"floor": floor, "zinit": with_zinit, "peft": with_peft}
    steps = {name: step_of(make(options), ids) for name, make in made.items()}
    seconds = interleaved(steps, rounds=options.rounds, device=options.device, warm_up=1)
    return {
        "seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
        "peak_bytes": {name: peak_bytes(step) for name, step in steps.items()},
        "zinit_over_floor": round(ratio(seconds, "zinit", "floor"), 4),
        "peft_over_zinit": round(ratio(seconds, "peft", "zinit"), 4),
    }


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Time above, memory below, a column for each setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 5.6), layout="constrained")
    grid = figure.subplots(2, len(curves), squeeze=False)
    for column, (name, points) in enumerate(curves.items()):
        for row, (what, unit, scale) in enumerate((("seconds", "ms", 1e3), ("peak_bytes", "MB", 1e-6))):
            axes = grid[row][column]
            for kind, style in (("floor", "k:"), ("zinit", "C0o-"), ("peft", "C1s--")):
                axes.plot([p["value"] for p in points], [p[what][kind] * scale for p in points], style, label=kind)
            axes.set(xlabel=LABELS[name], ylabel=f"{'step time' if row == 0 else 'peak memory of a step'} ({unit})")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.2)
    grid[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(width=256, rounds=5)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--length", type=int, default=128, help="tokens per example")
    options = options.parse_args()
    prepare(options)
    n = options.layers
    spans = {
        "length": [32, 64, 128, 256, 512],
        "prefix_length": [1, 10, 40, 160],
        "adapted": sorted({1, max(1, n // 4), max(1, n // 2), max(1, n - 2), n}),
        "batch": [1, 2, 4, 8],
        "width": [128, 256, 512],
    }
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, values in spans.items():
        for value in values:
            here = copy.copy(options)
            setattr(here, name, value)
            curves.setdefault(name, []).append({"value": value, **measure(here)})
            print(name, curves[name][-1], flush=True)
    save("curves", options, {"curves": curves})
    draw(curves, options.output.with_suffix(".png") if options.output else RESULTS / f"curves-{options.device}.png")


if __name__ == "__main__":
    main()
