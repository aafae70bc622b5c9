"""Time and memory of one training step: zinit against the floor and against PEFT's AdaptionPrompt.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --width 4096 --layers 32 --heads 32 --kv-heads 32 --vocabulary 32000 --length 512

The floor is the same frozen model with one trainable vector at the lowest adapted layer: no way of tuning that layer
costs less. V2's bias tuning has a floor at the first layer; a step with the cached features of an image is measured
against the same step without. All run in one process, interleaved; the figures are medians of ratios within a round.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

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


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--length", type=int, default=256, help="tokens per example")
    options = options.parse_args()
    prepare(options)
    ids = torch.randint(0, options.vocabulary, (options.batch, options.length), device=options.device)
    steps = {
        name: step_of(make(options), ids)
        for name, make in (("floor", floor), ("zinit", with_zinit), ("peft", with_peft), ("tuning", with_tuning))
    }
    steps["floor_of_all"] = step_of(floor(options, adapted=options.layers), ids)
    layers = torch.randn(4, options.batch, IMAGE_WIDTH, device=options.device).unbind()
    steps["image"] = step_of(with_image(options), ids, Features(layers=layers))
    seconds = interleaved(steps, rounds=options.rounds, device=options.device)
    memory = {name: peak_bytes(step) for name, step in steps.items()}
    figures = {
        "zinit_over_floor": round(ratio(seconds, "zinit", "floor"), 4),
        "peft_over_zinit": round(ratio(seconds, "peft", "zinit"), 4),
        "tuning_over_its_floor": round(ratio(seconds, "tuning", "floor_of_all"), 4),
        "image_over_zinit": round(ratio(seconds, "image", "zinit"), 4),
        "zinit_memory_over_floor": round(memory["zinit"] / memory["floor"], 4) if memory["floor"] else None,
        "peft_memory_over_floor": round(memory["peft"] / memory["floor"], 4) if memory["floor"] else None,
        "median_seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
        "step_peak_bytes": memory,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    save("train_step", options, figures)


if __name__ == "__main__":
    main()
