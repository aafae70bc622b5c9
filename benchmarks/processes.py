"""Time of a training step against the number of processes, for each strategy; the batch stays the same.

    OMP_NUM_THREADS=1 python -m benchmarks.processes --processes 1 2

Whole runs of `zinit train` on a random LLaMA, launched by torchrun, every round all of them one after the other; the
median of the steps that the runs log, without the first ones. On CPUs each process has one thread, so there must be as
many free cores as processes. Writes JSON and a PNG beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, parser, prepare, save
from benchmarks.sigkill import command
from tests.tiny import ROOT, save_records, save_tiny_llama

WARM_UP = 2  # steps of a run that are not counted
STRATEGIES: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    },
}


def step_seconds(options: argparse.Namespace, folder: Path, strategy: str, processes: int) -> list[float]:
    """Seconds of the counted steps of one run."""
    settings = {
        "steps": options.steps + WARM_UP,
        "warmup_steps": 0,
        "batch_size": options.batch,
        "micro_batch_size": options.micro_batch,
        "prefix.length": options.prefix_length,
        "prefix.layers": options.adapted,
        "dtype": options.dtype,
        "evaluate_every": 0,
        "save_every": 0,
        "task.evaluation_limit": 0,
    }
    with tempfile.TemporaryDirectory(dir=folder) as output:
        inputs = ["--backbone", "llama", "--model", str(folder / "model"), "--data", str(folder / "data.json")]
        given = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command([*inputs, *given, "--output", output], processes),
            env=environment | (STRATEGIES[strategy] if processes > 1 else {}),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{strategy} over {processes} processes failed:\n{done.stderr[-3000:]}")
        events = map(json.loads, (Path(output) / "log.jsonl").read_text().splitlines())
        return [event["seconds"] for event in events if event["event"] == "step"][WARM_UP:]


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Step time against processes, and what it would be if nothing were lost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for (name, points), style in zip(curves.items(), ("C0o-", "C1s--", "C2^-."), strict=False):
        axes.plot([p["processes"] for p in points], [1e3 * p["seconds"] for p in points], style, label=name)
    first = next(iter(curves.values()))
    axes.plot(
        [p["processes"] for p in first],
        [1e3 * first[0]["seconds"] * first[0]["processes"] / p["processes"] for p in first],
        "k:",
        label="nothing lost",
    )
    axes.set(xlabel="processes", ylabel="step time (ms)", xticks=[p["processes"] for p in first])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(width=256, rounds=3)
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options.add_argument("--steps", type=int, default=20, help="counted steps of each run")
    options.add_argument("--batch", type=int, default=32, help="examples of a step, over all processes")
    options.add_argument("--micro-batch", type=int, default=8)
    options = options.parse_args()
    prepare(options)
    strategies = [name for name in STRATEGIES if name != "zero3" or find_spec("deepspeed")]
    seconds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"hidden_size": options.width, "intermediate_size": int(options.width * 11008 / 4096)}
        heads = {"num_attention_heads": options.heads, "num_key_value_heads": options.kv_heads}
        save_tiny_llama(folder / "model", layers=options.layers, **shape, **heads)
        save_records(folder / "data.json", 400)
        for number in range(options.rounds):
            for strategy in strategies:
                for processes in options.processes:
                    measured = step_seconds(options, folder, strategy, processes)
                    seconds.setdefault((strategy, processes), []).extend(measured)
                    print(number, strategy, processes, round(statistics.median(measured), 4), flush=True)
    curves = {
        strategy: [
            {"processes": processes, "seconds": round(statistics.median(seconds[strategy, processes]), 5)}
            for processes in options.processes
        ]
        for strategy in strategies
    }
    save("processes", options, {"curves": curves})
    draw(curves, options.output.with_suffix(".png") if options.output else RESULTS / f"processes-{options.device}.png")


if __name__ == "__main__":
    main()
