"""The processes of one life of `benchmarks.old_new`: one that builds the model, and a fork of it for each checkout.

They share the frozen weights, in memory too: where these lie decides about several per cent of a round, and would be
another luck for each process. A fork imports the zinit of its checkout, and uses only what old and new both have:
`zinit.attach`, `zinit.PrefixConfig`, the handle's ``parameters()``, and the command line.

With ``together`` there are no forks: the checkouts take turns in one process, each with its own modules and its own
registered attention function while it is its turn. So everything else in memory is shared as well.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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


class Side:
    """A model with the adapter of one checkout.

    Args:
        checkout: whose zinit is imported.
        model: random LLaMA.
        shape: of the model and its inputs.

    Attributes:
        modules: of its zinit. ``function``: what it registered with transformers.
    """

    def __init__(self, checkout: Path, model: Any, shape: dict[str, int]) -> None:
        self.checkout, self.model, self.shape = checkout, model, shape
        self.made: dict[str, Callable[[], Figures]] = {}
        self.modules: dict[str, Any] = {}
        sys.path.insert(0, str(checkout))
        self.handle = attached(model, shape)
        found = Path(str(sys.modules["zinit"].__file__)).resolve()
        if not found.is_relative_to(checkout.resolve()):
            raise SystemExit(f"imported {found}, expected the zinit of {checkout}")
        self.function = ALL_ATTENTION_FUNCTIONS["zinit"]

    def figures(self, work: str) -> Figures:
        """One round of a work."""
        if work not in self.made:
            self.made[work] = WORKS[work](self.model, self.handle, self.shape)
            self.made[work]()
            gc.collect()
            gc.freeze()  # else the search for garbage before each round would take longer than a short round
        return self.made[work]()

    def come(self) -> None:
        """Its turn begins, in a process with others."""
        sys.path.insert(0, str(self.checkout))
        sys.modules.update(self.modules)
        ALL_ATTENTION_FUNCTIONS.register("zinit", self.function)

    def go(self) -> None:
        """Its turn ends: no module of its zinit is left."""
        sys.path.remove(str(self.checkout))
        names = [name for name in sys.modules if name.partition(".")[0] == "zinit"]
        self.modules = {name: sys.modules.pop(name) for name in names}


def serve(checkout: Path, model: Any, shape: dict[str, int], asked: TextIO, answers: TextIO) -> None:
    """What a fork does: the works that it is asked for, with the zinit of its checkout."""
    side = Side(checkout, model, shape)
    for line in asked:
        answers.write(json.dumps(side.figures(line.strip())) + "\n")


def serve_together(checkouts: Sequence[Path], shape: dict[str, int], answers: TextIO) -> None:
    """What the only process does: models of all checkouts, whose frozen weights lie at the same place."""
    first = random_llama(shape)
    sides: list[Side] = []
    for checkout in checkouts:
        model = random_llama(shape)
        for name, parameter in model.named_parameters():
            parameter.data = first.get_parameter(name).data
        sides.append(Side(checkout, model, shape))
        sides[-1].go()
    for line in sys.stdin:
        number, work = line.split()
        side = sides[int(number)]
        side.come()
        answers.write(json.dumps(side.figures(work)) + "\n")
        side.go()


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
    together = sys.argv[4] == "together"
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed must not mix with the answers
    if cpu >= 0:
        os.sched_setaffinity(0, {cpu})
    torch.set_num_threads(1)
    if together:
        return serve_together(checkouts, shape, answers)
    model = random_llama(shape)
    forks = [fork(checkout, model, shape) for checkout in checkouts]
    for line in sys.stdin:
        number, work = line.split()
        ask, answer = forks[int(number)]
        ask.write(work + "\n")
        answers.write(answer.readline() or "\n")


if __name__ == "__main__":
    main()
