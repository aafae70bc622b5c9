"""What ``zinit inspect --train`` estimates, beside a step that is measured: peak memory and time, on the CPU.

    python -m benchmarks.estimate                        # the embedded language model
    python -m benchmarks.estimate --model FOLDER --batch 2 --length 256

The step is measured in a process of its own: the peak of resident memory over what the process has before the model is
loaded, and the median time of the later steps. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import save
from benchmarks.load_memory import status
from zinit.adapter.attach import attach
from zinit.config import PrefixConfig
from zinit.demo import llama_path
from zinit.models.losses import chunked_cross_entropy

STEPS = 5


def child(options: argparse.Namespace) -> None:
    """Trains some steps, and prints what they took."""
    torch.set_num_threads(options.threads)
    train(options.model, 1, 8)  # all code is there
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    (started,) = status("VmRSS")
    times = train(options.model, options.batch, options.length)
    (peak,) = status("VmHWM")
    print(json.dumps({"peak_bytes": peak - started, "seconds": statistics.median(times[1:])}))


def train(source: str, batch: int, length: int) -> list[float]:
    """The seconds of some steps."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    handle = attach(model, PrefixConfig())
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-3)
    ids = torch.zeros(batch, length, dtype=torch.long)
    head, times = model.get_output_embeddings(), []
    for _ in range(STEPS):
        began = time.perf_counter()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        chunked_cross_entropy(hidden, head.weight, head.bias, ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    arguments = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    arguments.add_argument("--model", default=str(llama_path()))
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.set_defaults(device="cpu", output=None)
    arguments.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.child:
        child(options)
        return
    from zinit.ui.inspection import estimate_training

    torch.set_num_threads(options.threads)
    estimated = estimate_training(options.model, batch=options.batch, length=options.length)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.estimate", *sys.argv[1:], "--child"],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    figures = {
        "estimated": estimated,
        "measured": measured,
        "memory_estimated_over_measured": round(estimated["peak_bytes"] / measured["peak_bytes"], 3),
        "time_estimated_over_measured": round(estimated["seconds"] / measured["seconds"], 3),
    }
    options.model = Path(options.model).name
    vars(options).pop("child")
    save(f"estimate-{options.model}", options, figures)


if __name__ == "__main__":
    main()
