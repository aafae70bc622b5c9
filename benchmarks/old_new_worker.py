"""The processes of one life of `benchmarks.old_new`: one that builds the model, and a fork of it for each checkout.

They share the frozen weights, in memory too: where these lie decides about several per cent of a round, and would be
another luck for each process. A fork imports the zinit of its checkout, and uses only what old and new both have:
`zinit.attach`, `zinit.PrefixConfig`, the handle's ``parameters()``, and the command line.

Stdin has lines ``number work``, of a checkout and what it shall do; each is answered with one JSON line.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

Figures = dict[str, float]
Action = Callable[[], None]
WARM_UP_STEPS = 3  # of a run of `zinit train`, not counted


def random_llama(shape: dict[str, int]) -> Any:
    """A frozen LLaMA with random weights."""
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
    return LlamaForCausalLM(config).requires_grad_(False)


def attached(model: Any, shape: dict[str, int]) -> Any:
    """The handle of a prefix on the topmost layers, gates slightly open."""
    zinit = importlib.import_module("zinit")
    prefix = zinit.PrefixConfig(length=shape["prefix_length"], layers=shape["layers"] - 2, gate_init=0.1)
    return zinit.attach(model, prefix, seed=0)


def training_step(model: Any, handle: Any, shape: dict[str, int]) -> Action:
    """Forward, backward and AdamW's update of the adapter."""
    ids = torch.randint(0, shape["vocabulary"], (shape["batch"], shape["length"]))
    optimizer = torch.optim.AdamW(list(handle.parameters()), lr=1e-4)

    def step() -> None:
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def generation(model: Any, handle: Any, shape: dict[str, int]) -> Action:
    """``model.generate``: one prompt, greedy, with a KV cache."""
    ids = torch.randint(1, shape["vocabulary"], (1, shape["length"]))
    count = shape["tokens"]

    def generate() -> None:
        model.eval()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                       min_new_tokens=count, do_sample=False)  # fmt: skip

    return generate


def command_line(model: Any, handle: Any, shape: dict[str, int]) -> Callable[[], Figures]:
    """A step of ``zinit train`` on the embedded demo: the median of those that one short run logs."""

    def run() -> Figures:
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
    main = importlib.import_module("zinit.cli").main
    sys.argv = ["zinit", *arguments]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"zinit {' '.join(arguments)} ended with status {ended.code}") from ended


def timed(action: Action) -> Callable[[], Figures]:
    """Seconds of one call, by the wall clock and of this process's own time."""

    def measure() -> Figures:
        gc.collect()
        wall, own = time.perf_counter(), time.process_time()
        action()
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - own}

    return measure


class Operators(TorchDispatchMode):
    """Counts what torch does: operators, and numbers in their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.operators += 1
        self.numbers += sum(x.numel() for x in tree_leaves((args, kwargs, made)) if isinstance(x, torch.Tensor))
        return made


def counted(action: Action) -> Callable[[], Figures]:
    """What one call does, whatever else the machine does: torch's operators and Python's calls."""

    def measure() -> Figures:
        action()
        with Operators() as made:
            action()
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        action()
        sys.setprofile(None)
        return {"operators": made.operators, "numbers": made.numbers, "calls": calls}

    return measure


WORKS: dict[str, Callable[[Any, Any, dict[str, int]], Callable[[], Figures]]] = {
    "step": lambda *given: timed(training_step(*given)),
    "generate": lambda *given: timed(generation(*given)),
    "train": command_line,
    "step-counts": lambda *given: counted(training_step(*given)),
    "generate-counts": lambda *given: counted(generation(*given)),
}


def serve(checkout: Path, model: Any, shape: dict[str, int], asked: TextIO, answers: TextIO) -> None:
    """What a fork does: the works that it is asked for, with the zinit of its checkout."""
    sys.path.insert(0, str(checkout))
    handle = attached(model, shape)
    found = Path(str(sys.modules["zinit"].__file__)).resolve()
    if not found.is_relative_to(checkout.resolve()):
        raise SystemExit(f"imported {found}, expected the zinit of {checkout}")
    made: dict[str, Callable[[], Figures]] = {}
    for line in asked:
        name = line.strip()
        if name not in made:
            made[name] = WORKS[name](model, handle, shape)
        answers.write(json.dumps(made[name]()) + "\n")


def fork(checkout: Path, model: Any, shape: dict[str, int]) -> tuple[TextIO, TextIO]:
    """Starts the process of a checkout; returns where to ask, and where it answers."""
    (read_asked, write_asked), (read_answer, write_answer) = os.pipe(), os.pipe()
    if os.fork():
        os.close(read_asked)
        os.close(write_answer)
        return os.fdopen(write_asked, "w", buffering=1), os.fdopen(read_answer)
    os.close(write_asked)
    os.close(read_answer)
    try:
        serve(checkout, model, shape, os.fdopen(read_asked), os.fdopen(write_answer, "w", buffering=1))
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def main() -> None:
    checkouts, cpu, shape = [Path(name) for name in json.loads(sys.argv[1])], int(sys.argv[2]), json.loads(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed must not mix with the answers
    if cpu >= 0:
        os.sched_setaffinity(0, {cpu})
    torch.set_num_threads(1)
    model = random_llama(shape)
    forks = [fork(checkout, model, shape) for checkout in checkouts]
    for line in sys.stdin:
        number, work = line.split()
        ask, answer = forks[int(number)]
        ask.write(work + "\n")
        answers.write(answer.readline() or "\n")


if __name__ == "__main__":
    main()
