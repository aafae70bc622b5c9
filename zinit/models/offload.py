"""Frozen matrices stay in CPU memory and are copied to the device while their layer runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zinit.backbones.base import PrefixSlot
from zinit.compat import apply_to_own_tensors
from zinit.errors import ConfigError
from zinit.models.blocks import kinds_of_blocks


def move(module: nn.Module, device: torch.device, *, offload: bool = False) -> None:
    """Moves a model or a task to the device it runs on.

    Args:
        module: everything in it moves, except for weights that are offloaded already.
        device: the target.
        offload: keep the frozen matrices of the blocks on the CPU, see `_offload`.

    Raises:
        ConfigError: if ``offload`` is asked for and the module has no repeated blocks.
    """
    if offload:
        _offload(module, device)
    if not is_offloaded(module):
        module.to(device)
        return
    for part in module.modules():
        if not any(parameter.is_meta for parameter in part.parameters(recurse=False)):
            apply_to_own_tensors(part, lambda tensor: tensor.to(device))


def is_offloaded(module: nn.Module) -> bool:
    """Whether some weights stay on the CPU and reach the device only while their layer runs, see `_offload`.

    Checkpointing must then recompute a block to its end (``set_checkpoint_early_stop(False)``): if torch stopped as
    soon as it has what it needs, the last layer would not release its weights.
    """
    return any(parameter.is_meta for parameter in module.parameters())


def _offload(module: nn.Module, device: torch.device) -> None:
    """Keeps the frozen matrices of a host's blocks on the CPU; each is copied to the device while its layer runs.

    Accelerate's hooks do this layer by layer and leave an empty tensor behind. They run for every caller of a layer:
    the host, the prefix (for its keys and values), and a block that is recomputed in the backward pass. Autograd holds
    a matrix until its backward pass is done, so training must recompute the blocks one at a time.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for layer in _layers_of_blocks(module):
        parameters = list(layer.parameters(recurse=False))
        frozen = not any(parameter.requires_grad for parameter in parameters)
        if frozen and any(parameter.dim() > 1 and not parameter.is_meta for parameter in parameters):
            add_hook_to_module(layer, AlignDevicesHook(device, offload=True))
    if not is_offloaded(module):
        raise ConfigError(f"offload=true finds no repeated blocks in {type(module).__name__}. Leave it out.")


def _layers_of_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """All modules of the blocks, except for those an adapter added."""
    kinds = kinds_of_blocks(module)
    for block in [part for part in module.modules() if type(part).__name__ in kinds]:
        added = {part for slot in block.modules() if isinstance(slot, PrefixSlot) for part in slot.modules()}
        yield from (layer for layer in block.modules() if layer not in added)


class _NoEmptyWeights(TorchFunctionMode):
    """Refuses to multiply by an empty weight: on some devices torch returns arbitrary numbers for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [*args, *(kwargs or {}).values()] if func is F.linear else ()
        if len({x.is_meta for x in tensors if isinstance(x, torch.Tensor)}) > 1:
            raise ConfigError(
                "offload=true does not work with this host: one of its modules reads a layer's weights without calling "
                "the layer, so they are never copied to the device. Leave offload out."
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def weights_in_place(module: nn.Module) -> Iterator[None]:
    """A scope in which every layer of an offloaded model must have its weights when they are used.

    Raises:
        ConfigError: if a weight is missing.
    """
    if not is_offloaded(module):
        yield
        return
    with _NoEmptyWeights():
        yield
