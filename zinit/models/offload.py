"""Frozen matrices that stay in CPU memory and come to the device while their layer runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zinit.backbones.base import PrefixSlot
from zinit.errors import ConfigError
from zinit.models.blocks import kinds_of_blocks


def move(module: nn.Module, device: torch.device, *, offload: bool = False) -> None:
    """Moves a model or a task to where it runs.

    Args:
        module: everything in it goes to the device, but what is lent out already.
        device: that it runs on.
        offload: the frozen matrices of the blocks stay on the CPU, see `_lend`.
    """
    if offload:
        _lend(module, device)
    if not is_lent(module):
        module.to(device)
        return
    for part in module.modules():
        if not any(parameter.is_meta for parameter in part.parameters(recurse=False)):
            part._apply(lambda tensor: tensor.to(device), recurse=False)


def is_lent(module: nn.Module) -> bool:
    """Whether some of a model's weights stay on the CPU and come to the device while their layer runs, see `_lend`.

    Checkpointing must then compute a block again to its end (``set_checkpoint_early_stop(False)``): where torch breaks
    off as soon as it has what it needs, the last layer would not give its weights back.
    """
    return any(parameter.is_meta for parameter in module.parameters())


def _lend(module: nn.Module, device: torch.device) -> None:
    """Keeps the frozen matrices of a host's blocks on the CPU; each comes to the device while its layer runs.

    Accelerate's hooks do it, layer by layer, and leave an empty tensor behind. They run whoever calls a layer, be it
    the host, the prefix (for its keys and values) or a block that is computed again in the backward pass. Autograd
    holds on to a matrix until its backward pass is done, so training must recompute its blocks one at a time.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    kinds = kinds_of_blocks(module)
    for block in [part for part in module.modules() if type(part).__name__ in kinds]:
        beside = {part for slot in block.modules() if isinstance(slot, PrefixSlot) for part in slot.modules()}
        for layer in block.modules():
            own = list(layer.parameters(recurse=False))
            frozen = layer not in beside and not any(parameter.requires_grad for parameter in own)
            if frozen and any(parameter.dim() > 1 and not parameter.is_meta for parameter in own):
                add_hook_to_module(layer, AlignDevicesHook(device, offload=True))
    if not is_lent(module):
        raise ConfigError(f"offload=true finds no repeated blocks in {type(module).__name__}. Leave it out.")


class _NoEmptyWeights(TorchFunctionMode):
    """Refuses to multiply by a weight that is not there, for which torch gives any numbers on some devices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [*args, *(kwargs or {}).values()] if func is F.linear else ()
        if len({x.is_meta for x in tensors if isinstance(x, torch.Tensor)}) > 1:
            raise ConfigError(
                "offload=true does not go with this host: one of its modules reads a layer's weights without calling "
                "the layer, which then does not fetch them. Leave offload out."
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def weights_in_place(module: nn.Module) -> Iterator[None]:
    """A scope in which a model whose weights are lent must find each where it is used.

    Raises:
        ConfigError: if it does not.
    """
    if not is_lent(module):
        yield
        return
    with _NoEmptyWeights():
        yield
