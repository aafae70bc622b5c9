"""The batches of a run, one micro-batch at a time and in the order of the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from zinit.tasks.base import Batch, Stream
from zinit.train.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator

Collate = Callable[[Stream, Sequence[int]], Batch]
"""Makes one micro-batch, on the CPU: `Task.collate`, or what adds to it."""

_Key = tuple[int, list[int]]  # the stream's place in the plan, the examples


def load_batches(plan: Plan, collate: Collate, accelerator: Accelerator, *, start: int) -> Iterator[Batch]:
    """This process's micro-batches, prepared ahead by ``train.workers`` processes.

    Args:
        plan: what each step takes.
        collate: see `Collate`.
        accelerator: the run's.
        start: the step that is first.
    """
    loader = DataLoader(
        _Collated(collate, [draws.stream for draws in plan.draws]),
        sampler=_Keys(plan, accelerator.process_index, accelerator.num_processes, start),
        batch_size=None,
        generator=torch.Generator().manual_seed(plan.seed),  # its own, so that a loader draws nothing from torch's
        num_workers=plan.config.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    return iter(loader)


class _Keys(Iterable[_Key]):
    """The micro-batches of one process, step after step; no step is planned before it is near."""

    def __init__(self, plan: Plan, rank: int, world: int, start: int) -> None:
        self.plan, self.rank, self.world, self.start = plan, rank, world, start

    def __iter__(self) -> Iterator[_Key]:
        for step in range(self.start, self.plan.steps):
            for place, draws in enumerate(self.plan.draws):
                for part, _ in draws.micro_batches(step, self.rank, self.world):
                    yield place, part


class _Collated(Dataset[Batch]):
    """Streams as torch's data loader wants them: a key is a whole micro-batch."""

    def __init__(self, collate: Collate, streams: Sequence[Stream]) -> None:
        self.collate, self.streams = collate, streams

    def __getitem__(self, key: _Key) -> Batch:
        place, part = key
        return self.collate(self.streams[place], part)
