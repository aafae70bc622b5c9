"""One living process of `benchmarks.old_new`: times the work it is asked for with the zinit on its path.

It runs in old and new checkouts alike, so it uses only what both have: `zinit.attach`, `zinit.PrefixConfig`, the
handle's ``parameters()``, and the command line. It reads one name of a work per line on stdin, and answers each with
one JSON line.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zinit

Seconds = dict[str, float]
WARM_UP_STEPS = 3  # of a run of `zinit train`, not counted


def random_llama(shape: dict[str, int]) -> Any:
    """A frozen LLaMA with random weights and zinit's prefix on its topmost layers, gates slightly open."""
    config = LlamaConfig(
        hidden_size=shape["width"],
        intermediate_size=int(shape["width"] * 11008 / 4096),
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        vocab_size=shape["vocabulary"],
        max_position_embeddings=1024,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).requires_grad_(False)
    prefix = zinit.PrefixConfig(length=shape["prefix_length"], layers=shape["layers"] - 2, gate_init=0.1)
    return model, zinit.attach(model, prefix, seed=0)


def training_step(shape: dict[str, int]) -> Callable[[], Seconds]:
    """Forward, backward and AdamW's update of the adapter."""
    model, handle = random_llama(shape)
    model.train()
    ids = torch.randint(0, shape["vocabulary"], (shape["batch"], shape["length"]))
    optimizer = torch.optim.AdamW(list(handle.parameters()), lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step)


def generation(shape: dict[str, int]) -> Callable[[], Seconds]:
    """``model.generate``: one prompt, greedy, with a KV cache."""
    model, _ = random_llama(shape)
    model.eval()
    ids = torch.randint(1, shape["vocabulary"], (1, shape["length"]))
    count = shape["tokens"]

    def generate() -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                       min_new_tokens=count, do_sample=False)  # fmt: skip

    return timed(generate)


def command_line(shape: dict[str, int]) -> Callable[[], Seconds]:
    """A step of ``zinit train`` on the embedded demo: the median of those that one short run logs."""

    def run() -> Seconds:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            options = {"steps": WARM_UP_STEPS + shape["steps"], "warmup_steps": 1, "batch_size": 8,
                       "micro_batch_size": 4, "evaluate_every": 0,
                       "save_every": 0, "task.evaluation_limit": 0, "task.held_out": 8}  # fmt: skip
            arguments = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
            zinit_command(["train", "--backbone", "llama", "--output", str(output), *arguments])
            events = map(json.loads, (output / "log.jsonl").read_text(encoding="utf-8").splitlines())
            steps = [event["seconds"] for event in events if event["event"] == "step"][WARM_UP_STEPS:]
        return {"wall": statistics.median(steps)}

    return run


def zinit_command(arguments: list[str]) -> None:
    """``zinit ...`` in this process."""
    from zinit.cli import main

    sys.argv = ["zinit", *arguments]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"zinit {' '.join(arguments)} ended with status {ended.code}") from ended


def timed(action: Callable[[], None]) -> Callable[[], Seconds]:
    """Seconds of one call, by the wall clock and of this process's own time."""

    def measure() -> Seconds:
        gc.collect()
        wall, own = time.perf_counter(), time.process_time()
        action()
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - own}

    return measure


WORKS: dict[str, Callable[[dict[str, int]], Callable[[], Seconds]]] = {
    "step": training_step,
    "generate": generation,
    "train": command_line,
}


def main() -> None:
    checkout, cpu, shape = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed must not mix with the answers
    if not Path(zinit.__file__).resolve().is_relative_to(checkout.resolve()):
        raise SystemExit(f"imported {zinit.__file__}, expected the zinit of {checkout}")
    if cpu >= 0:
        os.sched_setaffinity(0, {cpu})
    torch.set_num_threads(1)
    made: dict[str, Callable[[], Seconds]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in made:
            made[name] = WORKS[name](shape)
        answers.write(json.dumps(made[name]()) + "\n")


if __name__ == "__main__":
    main()
