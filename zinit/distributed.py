"""What runs over several processes need to know of one another and of tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from zinit.compat import is_shard as is_shard

if TYPE_CHECKING:
    from accelerate import Accelerator

Found = TypeVar("Found")


def launched_rank() -> int:
    """Which of the launched processes this is, before they have come together; 0 writes."""
    return int(os.environ.get("RANK", "0"))


def sum_over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on each of them."""
    total = accelerator.reduce(tensor, "sum")
    assert isinstance(total, Tensor)
    return total


def most_over_processes(accelerator: Accelerator, count: int) -> int:
    """The largest of the processes' counts, on each of them."""
    counts = accelerator.gather(torch.tensor([count], device=accelerator.device))
    assert isinstance(counts, Tensor)
    return int(counts.max())


def shard_indices(count: int, accelerator: Accelerator) -> list[int]:
    """Which of ``count`` examples this process works on: as many on every process, so some may occur twice.

    A forward pass of a sharded model gathers its weights from all processes: with as many examples in batches of one
    size, all make the same number of passes.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    return [(rank + world * turn) % count for turn in range(math.ceil(count / world))]


def map_over_ranks(
    accelerator: Accelerator,
    count: int,
    run: Callable[[Sequence[int]], Iterable[Found]],
    *,
    batch_size: int | None = None,
) -> list[Found]:
    """What ``run`` finds for each of ``count`` examples, in their order, on every process.

    The processes divide the examples with `shard_indices`; all of them must call this.

    Args:
        accelerator: the run's.
        count: of the examples.
        run: from the indices of some examples to one result for each, in the same order. Results are gathered with
            pickle, so they are plain objects, not tensors on a device.
        batch_size: indices per call of ``run``; None is one call with all indices of the process.
    """
    from accelerate.utils import gather_object

    mine = shard_indices(count, accelerator)
    size = batch_size or max(1, len(mine))
    pairs: list[tuple[int, Found]] = []
    for start in range(0, len(mine), size):
        indices = mine[start : start + size]
        pairs += zip(indices, run(indices), strict=True)
    if accelerator.num_processes > 1:
        pairs = gather_object(pairs)
    found = dict(pairs)
    return [found[index] for index in range(count)]
