"""The loss on the held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zinit.distributed import sum_over_processes
from zinit.tasks.base import Batch, Task
from zinit.train.config import TrainConfig
from zinit.train.plan import cut

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def held_out_loss(
    task: Task,
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    runnable: Callable[[Batch], Tensor] | None = None,
    parts: list[tuple[float, float]] | None = None,
    chosen: Sequence[int] | None = None,
) -> tuple[float, int]:
    """Mean loss per supervised unit over the held-out examples, and how many units there were.

    Args:
        task: owns loss and examples.
        config: sizes of the micro-batches.
        accelerator: whose processes take the examples in turn.
        runnable: the task as the loop calls it; default: the task itself.
        parts: gets (summed loss, units) of every micro-batch of this process, longest examples first.
        chosen: the examples; None is all.
    """
    split = task.held_out_stream
    task.eval()
    chosen = range(len(split)) if chosen is None else chosen
    order = sorted(chosen, key=lambda index: (-split.lengths[index], index))
    world = accelerator.num_processes
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    for part in cut(config, split, order, world)[accelerator.process_index :: world]:
        batch = task.collate(split, part or order[:1])
        with accelerator.autocast():  # the same precision before, in and after training
            loss = (runnable or task)({k: v.to(accelerator.device) for k, v in batch.items()})
        total += loss.double() if part else 0.0
        if parts is not None and part:
            parts.append((loss.item(), float(sum(split.counts[index] for index in part))))
    count = sum(split.counts[index] for index in chosen)
    return sum_over_processes(accelerator, total).item() / max(1, count), count
