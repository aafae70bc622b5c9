"""Time and memory of one training step: zinit against the floor and against PEFT's AdaptionPrompt.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --width 4096 --layers 32 --heads 32 --kv-heads 32 --vocabulary 32000 --length 512

The floor is the same frozen model with one trainable vector at the lowest adapted layer: no way of tuning that layer
costs less. V2's bias tuning has a floor at the first layer; a step with the cached features of an image is measured
against the same step without. Each comparison has a process of its own, in which nothing but its two models lives and
takes rounds in turn; the figures are medians of ratios within a round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

import zinit
from benchmarks.common import (
    IMAGE_WIDTH,
    floor,
    interleaved,
    parser,
    prepare,
    ratio,
    save,
    with_image,
    with_peft,
    with_tuning,
    with_zinit,
)
from zinit.adapter.encoding import Features


def step_of(model: nn.Module, ids: torch.Tensor, features: Features | None = None) -> Callable[[], None]:
    """Forward, backward and update of what trains; with the features of an image for each example, if given."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()

    def given() -> AbstractContextManager[None]:
        return nullcontext() if features is None else zinit.get_handle(model).given(features=features)

    def step() -> None:
        with given():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_bytes(step: Callable[[], None]) -> int:
    """The peak of what a step allocates, beyond what is allocated before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # the allocator's own record, in order
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


COMPARISONS = {
    "zinit_over_floor": ("zinit", "floor"),
    "peft_over_zinit": ("peft", "zinit"),
    "tuning_over_its_floor": ("tuning", "floor_of_all"),
    "image_over_zinit": ("image", "zinit"),
}


def made(name: str, options: argparse.Namespace, ids: torch.Tensor) -> Callable[[], None]:
    """The step of one side of a comparison."""
    if name == "image":
        layers = torch.randn(4, options.batch, IMAGE_WIDTH, device=options.device).unbind()
        return step_of(with_image(options), ids, Features(layers=layers))
    if name == "floor_of_all":
        return step_of(floor(options, adapted=options.layers), ids)
    make = {"floor": floor, "zinit": with_zinit, "peft": with_peft, "tuning": with_tuning}[name]
    return step_of(make(options), ids)


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The median ratio of a comparison's two steps, the seconds of each and the peak of what each allocates."""
    prepare(options)
    ids = torch.randint(0, options.vocabulary, (options.batch, options.length), device=options.device)
    over, under = COMPARISONS[name]
    steps = {side: made(side, options, ids) for side in (over, under)}
    seconds = interleaved(steps, rounds=options.rounds, device=options.device)
    return {
        "ratio": round(ratio(seconds, over, under), 4),
        "median_seconds": {side: round(statistics.median(values), 5) for side, values in seconds.items()},
        "step_peak_bytes": {side: peak_bytes(step) for side, step in steps.items()},
    }


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--length", type=int, default=256, help="tokens per example")
    options.add_argument("--comparisons", nargs="+", choices=list(COMPARISONS), default=list(COMPARISONS))
    options = options.parse_args()
    prepare(options)
    figures: dict[str, Any] = {}
    for name in options.comparisons:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            figures[name] = process.submit(compare, name, options).result()
    save("train_step", options, figures)


if __name__ == "__main__":
    main()
