"""How a run is spread over processes: the strategy that the launcher asked for is the one that runs, or nothing does.

Data parallelism (DDP) is Accelerate's. Under FSDP2 and DeepSpeed's ZeRO-3 the blocks of the frozen host are sharded,
which is nearly all of it; embeddings, heads and what is trained beside the host are small and stay whole on every
process, so that saving, gates and precision are what they are elsewhere. Only a method that trains the host itself has
sharded parameters to train: under FSDP2, for DeepSpeed's optimizer is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zinit.compat import exclude_from_ddp, mark_sharded, process_strategy, reset_accelerator_state, set_process_strategy
from zinit.distributed import is_shard
from zinit.errors import ConfigError, install_extra
from zinit.models.offload import move
from zinit.models.quantization import is_quantized, quantized_weights
from zinit.tasks.base import Task
from zinit.train.config import TrainConfig
from zinit.train.sharding import is_sharded, is_zero3, place_fsdp2, place_zero3, use_fsdp2, use_zero3

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer


def make_accelerator(config: TrainConfig, **options: Any) -> Accelerator:
    """An Accelerator for this run; how many processes there are is its launcher's business.

    Raises:
        ConfigError: if not as many processes came together as were launched, or under a strategy that is not supported.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    if _asked_for("DEEPSPEED") and find_spec("deepspeed") is None:
        raise ConfigError(f"DeepSpeed was asked for, but is not installed. {install_extra('deepspeed')}")
    _join_after_restart()
    # Stated explicitly: without an accelerator, Accelerate would take each process for a run of its own.
    cpu = not torch.accelerator.is_available()
    reset_accelerator_state()  # a process may make several runs, each with a precision and a strategy of its own
    if cpu and process_strategy() in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        set_process_strategy(DistributedType.MULTI_CPU)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=cpu, **options)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched, but {accelerator.num_processes} came together "
            f"({accelerator.distributed_type}). Launch with 'torchrun -m zinit' or 'accelerate launch -m zinit'."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            "zinit accumulates by itself (train.batch_size over train.micro_batch_size): leave "
            "gradient_accumulation_steps out of the launcher's configuration."
        )
    if _asked_for("FSDP"):
        use_fsdp2(accelerator, config)
        return accelerator
    if _asked_for("DEEPSPEED"):
        use_zero3(accelerator, config)
        return accelerator
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ConfigError(f"training under {kind} is not supported; launch with data parallelism (torchrun) or FSDP2.")
    return accelerator


def describe(accelerator: Accelerator) -> str:
    """How a run is spread, for people: "2 processes on cpu, FSDP2"."""
    count, kind = accelerator.num_processes, accelerator.device.type
    kind = "mps (Apple's GPUs are not tested)" if kind == "mps" else kind
    if count == 1:
        return f"one process on {kind}"
    how = "ZeRO-3" if is_zero3(accelerator) else "FSDP2" if is_sharded(accelerator) else "data parallelism"
    return f"{count} processes on {kind}, {how}"


def _join_after_restart() -> None:
    """Forms the group of processes anew after torchrun restarted them on one machine (--max-restarts).

    The store they meet at (of --standalone and c10d) still holds the addresses of the group that died, so that each
    life needs names of its own there. On several machines lives are not counted alike, and this is left to torch.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if life == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1" or dist.is_initialized():
        return
    store, rank, world = next(rendezvous("env://"))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, store=dist.PrefixStore(f"life-{life}", store), rank=rank, world_size=world)


def _asked_for(strategy: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{strategy}", "false").lower() == "true"


def loading_device(accelerator: Accelerator, *, offload: bool = False) -> torch.device:
    """Where a host's weights are read to: straight to where it runs, unless they are shared or lent out from the CPU.

    Raises:
        ConfigError: if several processes would offload.
    """
    if offload and accelerator.num_processes > 1:
        raise ConfigError(
            f"offload=true is for one process; {accelerator.num_processes} were launched. Several hold a host that is "
            f"too large for one GPU under FSDP2: accelerate launch --config_file configs/accelerate/fsdp2.yaml ..."
        )
    return torch.device("cpu") if offload or is_sharded(accelerator) else accelerator.device


def place(task: Task, accelerator: Accelerator, *, offload: bool = False) -> None:
    """Moves a task to where it runs; of a sharded host's blocks each process keeps its shard.

    Args:
        task: on the CPU, or there already.
        accelerator: the run's.
        offload: see `move`.

    Raises:
        ConfigError: if the host has no blocks to shard, or is quantised, or ZeRO-3 cannot shard most of them.
    """
    if not is_sharded(accelerator):
        move(task, accelerator.device, offload=offload)
        # Each process has quantised the same file. DDP would send them around; torchao's cannot be sent.
        exclude_from_ddp(task, quantized_weights(task))
        return
    if is_quantized(task):
        raise ConfigError(
            "a quantised model cannot be sharded. Leave quantize out, or launch with data parallelism (torchrun): "
            "every process then holds all of the quantised model."
        )
    if is_zero3(accelerator):
        place_zero3(task, accelerator)
    else:
        place_fsdp2(task, accelerator)
    mark_sharded(task.model)


def prepare(
    task: Task, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """What the loop calls and steps, as Accelerate prepares them for the strategy.

    Raises:
        ConfigError: if that is not the strategy that was asked for.
    """
    wrapped: Any
    stepped: Any
    if is_zero3(accelerator):  # the host has been prepared already (`place`), the rest is not DeepSpeed's
        wrapped, stepped = task, accelerator.prepare_optimizer(optimizer)
    else:
        # It is on its device already.
        wrapped, stepped = accelerator.prepare(task, optimizer, device_placement=[False, None])
    check_prepared(wrapped, accelerator)
    return wrapped, stepped


def check_prepared(wrapped: nn.Module, accelerator: Accelerator) -> None:
    """What Accelerate prepared is what was asked for.

    Raises:
        ConfigError: if it is not.
    """
    from torch.distributed.fsdp import FSDPModule

    if _asked_for("FSDP"):
        sharded = isinstance(wrapped, FSDPModule) and any(map(is_shard, wrapped.parameters()))
        prepared = bool(accelerator.is_fsdp2) and sharded
    elif _asked_for("DEEPSPEED"):
        prepared = is_zero3(accelerator) and any(map(is_shard, wrapped.parameters()))
    else:
        prepared = accelerator.num_processes == 1 or isinstance(wrapped, DistributedDataParallel)
    if not prepared:
        raise ConfigError(
            f"{accelerator.distributed_type} over {accelerator.num_processes} processes was asked for, but the model "
            f"was prepared as {type(wrapped).__name__}. Check the launcher's configuration."
        )


def backward(loss: Tensor, accelerator: Accelerator) -> None:
    """The backward pass. Under DeepSpeed it is torch's own: no trained parameter is DeepSpeed's."""
    if is_zero3(accelerator):
        loss.backward()
    else:
        accelerator.backward(loss)


def clip(groups: Sequence[Sequence[nn.Parameter]], limit: float, accelerator: Accelerator) -> list[Tensor]:
    """Clips the gradients of each group to a norm and returns the norms that they had, over all processes.

    Args:
        groups: each is clipped by itself; those of a group without gradients have the norm 0.
        limit: the largest norm.
        accelerator: the run's.
    """
    if is_zero3(accelerator):
        return [nn.utils.clip_grad_norm_(group, limit) for group in groups]
    if len(groups) == 1:
        return [gather_full(torch.as_tensor(accelerator.clip_grad_norm_(groups[0], limit)))]
    accelerator.unscale_gradients()  # once for all groups: a scaler refuses a second time
    return [nn.utils.clip_grad_norm_(group, limit) for group in groups]


def average_whole_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Averages the gradients of what stays whole beside a sharded host, in one all-reduce; FSDP2 averages the rest."""
    if not is_sharded(accelerator):
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not is_shard(p)]
    if gradients:
        _average(gradients, accelerator)


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Averages gradients over processes in one all-reduce, where DDP does not; what has none anywhere keeps none.

    A process without a gradient that others have counts as zero.
    """
    if accelerator.num_processes == 1:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=accelerator.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    _average([*gradients, present], accelerator)
    for parameter, gradient, found in zip(parameters, gradients, present.tolist(), strict=True):
        parameter.grad = gradient if found else None


def _average(tensors: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Replaces tensors by their means over processes, in one all-reduce."""
    flat = accelerator.reduce(torch.cat([tensor.flatten() for tensor in tensors]), "mean")
    assert isinstance(flat, Tensor)
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def gather_full(tensor: Tensor) -> Tensor:
    """A detached tensor itself; a sharded one gathered, which all processes do together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_shard(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """What this process keeps of a whole value that belongs to a parameter: all of it, or its shard."""
    if not is_shard(parameter):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    value = value.to(parameter.device)
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)


def checkpoint_activations(model: Any) -> None:
    """Makes a host recompute its activations in the backward pass.

    Raises:
        ConfigError: if it cannot.
    """
    # transformers; the second is the name before 5.23
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if enable is not None:
        enable({"use_reentrant": False})
        # It makes embeddings require gradients for the re-entrant kind; layers below the prefix need no backward.
        if hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()
    elif hasattr(model, "set_grad_checkpointing"):  # timm
        model.set_grad_checkpointing(True)
    else:
        raise ConfigError(f"{type(model).__name__} does not support gradient checkpointing; set it to false.")
