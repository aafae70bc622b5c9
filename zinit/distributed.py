"""What runs over several processes need to know of one another and of tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zinit.compat import is_shard as is_shard

if TYPE_CHECKING:
    from accelerate import Accelerator


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


def share(count: int, accelerator: Accelerator) -> list[int]:
    """This process's part of ``count`` examples: as many on every process, so some may come twice.

    A forward pass of a sharded model gathers its weights from all processes: with as many examples in batches of one
    size, all make the same number of passes.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    return [(rank + world * turn) % count for turn in range(math.ceil(count / world))]
