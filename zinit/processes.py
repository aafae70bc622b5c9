"""What runs over several processes need to know of one another and of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


def sum_over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on each of them."""
    total = accelerator.reduce(tensor, "sum")
    assert isinstance(total, Tensor)
    return total


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds only its share of a tensor: FSDP2's kind or DeepSpeed ZeRO-3's."""
    return type(tensor).__name__ == "DTensor" or hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")
