"""The embedded demo with its ablations: zero-init, a gate that starts at random, plain prefix tuning; several seeds.

    python -m benchmarks.demo

Same model, data, budget and schedule for all. These are figures of a model of under a million parameters and an
invented task: they say nothing about the paper's.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch

from benchmarks.common import RESULTS
from zinit.runs.record import versions
from zinit.runs.settings import resolve
from zinit.runs.train import train_run

METHODS = {
    "zero-init": (),
    "random gate, N(0, 1)": ("prefix.gate_init=random",),
    "plain prefix tuning": ("prefix.gating=false", "prefix.separate_softmax=false"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="llama")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        for method, settings in METHODS.items():
            config, _ = resolve(backbone=options.backbone, seed=seed, options=settings)
            with tempfile.TemporaryDirectory() as folder:
                results = train_run(config, Path(folder) / "run")
            row = {"method": method, "seed": seed, "steps": results["steps"], "training_seconds": results["seconds"],
                   "counts": results["counts"], **results["metrics"]}  # fmt: skip
            rows.append(row)
            print(f"{method}, seed {seed}: {row['base']['exact_match']:.3f} -> {row['adapted']['exact_match']:.3f} "
                  f"in {row['training_seconds']} s", flush=True)  # fmt: skip
    document = {"benchmark": "demo", "rows": rows, "threads": torch.get_num_threads(), "machine": platform.machine(),
                "versions": versions()}  # fmt: skip
    path = RESULTS / f"demo-{options.backbone}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
