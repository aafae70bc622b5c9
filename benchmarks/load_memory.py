"""Peak memory of loading a host on the CPU, as stored, converted and quantised, relative to the size of its weights.

    python -m benchmarks.load_memory

A random LLaMA is saved in bfloat16 in several files. Each case loads it in a process of its own, which has loaded a
tiny one before (so that all code is there), and reads what the kernel counts: resident pages, files that are mapped
included, and of these the process's own ("anonymous"). Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import parser, prepare, random_llama, save
from zinit.models.loading import load_causal_lm

CASES: dict[str, dict[str, Any]] = {
    "as_stored": {"dtype": "bfloat16"},
    "to_float32": {"dtype": "float32"},
    **{kind: {"dtype": "bfloat16", "quantize": kind} for kind in ("torchao-int8", "bnb-8bit", "bnb-4bit")},
}


def status(*names: str) -> list[int]:
    """Bytes, as /proc/self/status has them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) * 1024 for name in names]


def child(folder: Path, case: str) -> None:
    """Loads, and prints what that added: (peak, resident after, own after)."""
    options = CASES[case] | {"dtype": getattr(torch, CASES[case]["dtype"])}
    load_causal_lm(folder / "tiny", tokenizer=False, **options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    resident, own = status("VmRSS", "RssAnon")
    model, _ = load_causal_lm(folder / "model", tokenizer=False, **options)
    (peak,) = status("VmHWM")
    ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps of freed memory is none of the model
    after, own_after = status("VmRSS", "RssAnon")
    assert sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps([peak - resident, after - resident, own_after - own]))


def main() -> None:
    options = parser(str(__doc__).splitlines()[0])
    options.set_defaults(width=2048, layers=4, heads=16, kv_heads=16, device="cpu", dtype="bfloat16")
    options.add_argument("--shard", default="100MB", help="largest file")
    options.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.child:
        child(Path(options.child[0]), options.child[1])
        return
    vars(options).pop("child")
    prepare(options)
    with tempfile.TemporaryDirectory() as folder:
        random_llama(options).save_pretrained(Path(folder, "model"), max_shard_size=options.shard)
        tiny = argparse.Namespace(**vars(options) | {"width": 64, "layers": 1, "heads": 4, "kv_heads": 4})
        random_llama(tiny).save_pretrained(Path(folder, "tiny"))
        files = list(Path(folder, "model").glob("*.safetensors"))
        stored = sum(file.stat().st_size for file in files)
        figures: dict[str, Any] = {"stored_bytes": stored, "files": len(files)}
        for case in CASES:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.load_memory", "--child", folder, case],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            added = dict(zip(("peak", "after", "own_after"), json.loads(done.stdout.splitlines()[-1]), strict=True))
            figures[case] = {f"{name}_over_stored": round(value / stored, 3) for name, value in added.items()}
    save("load_memory", options, figures)


if __name__ == "__main__":
    main()
