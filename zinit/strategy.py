"""How a run is spread over processes: the strategy that the launcher asked for is the one that runs, or nothing does.

Data parallelism (DDP) is Accelerate's. Under FSDP2 and DeepSpeed's ZeRO-3 the blocks of the frozen host are sharded,
which is nearly all of it; embeddings, heads and what is trained beside the host are small and stay whole on every
process, so that saving, gates and precision are what they are elsewhere. Only a method that trains the host itself has
sharded parameters to train: under FSDP2, for DeepSpeed's optimizer is not used.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zinit.backbones.base import PrefixSlot
from zinit.config import TrainConfig
from zinit.errors import ConfigError
from zinit.processes import is_shard
from zinit.quantization import is_quantized, quantized_weights
from zinit.tasks.base import Task

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

FEW = 1 / 10  # what trains stays whole up to this share of the blocks' parameters


def make_accelerator(config: TrainConfig, **options: Any) -> Accelerator:
    """An Accelerator for this run; how many processes there are is its launcher's business.

    Raises:
        ConfigError: if not as many processes came together as were launched, or under a strategy that is not supported.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if _asked_for("DEEPSPEED") and find_spec("deepspeed") is None:
        raise ConfigError("DeepSpeed was asked for, but is not installed: pip install 'zinit[deepspeed]'.")
    _join_after_restart()
    # Said outright: else, without an accelerator, Accelerate takes each process for a run of its own.
    cpu = not torch.accelerator.is_available()
    AcceleratorState._reset_state()  # a process may make several runs, each with a precision and a strategy of its own
    if cpu and PartialState._shared_state.get("distributed_type") in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
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
        _use_fsdp2(accelerator, config)
        return accelerator
    if _asked_for("DEEPSPEED"):
        _use_zero3(accelerator, config)
        return accelerator
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ConfigError(f"training under {kind} is not supported; launch with data parallelism (torchrun) or FSDP2.")
    return accelerator


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


def _use_fsdp2(accelerator: Accelerator, config: TrainConfig) -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state: Any = accelerator.state
    if accelerator.num_processes == 1:
        raise ConfigError("FSDP was asked for, but one process has nobody to share with. Launch at least two.")
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate shards on GPUs and their like only; on CPUs it would run plain data parallelism without a word.
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # states that are made later copy it
    if not accelerator.is_fsdp2:
        raise ConfigError("FSDP1 is not supported. Set fsdp_version: 2, as in configs/accelerate/fsdp2.yaml.")
    plugin: Any = state.fsdp_plugin
    wrong = {
        "fsdp_cpu_ram_efficient_loading: false (every process reads the weights)": plugin.cpu_ram_efficient_loading,
        "-o train.gradient_checkpointing=true, not fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "-o train.mixed_precision=no (a host of -o dtype=bfloat16 needs none)": config.mixed_precision != "no",
        "-o train.compile=false": config.compile,
    }
    if asked := [text for text, found in wrong.items() if found]:
        raise ConfigError(f"under FSDP2 this run needs {'; '.join(asked)}.")


def _use_zero3(accelerator: Accelerator, config: TrainConfig) -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType
    from transformers.integrations import unset_hf_deepspeed_config

    state: Any = accelerator.state
    if accelerator.num_processes == 1:
        raise ConfigError("DeepSpeed was asked for, but one process has nobody to share with. Launch at least two.")
    if accelerator.distributed_type == DistributedType.MULTI_CPU:  # as above
        state.deepspeed_plugins = DeepSpeedPlugin()
        state.distributed_type = DistributedType.DEEPSPEED
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    unset_hf_deepspeed_config()  # else transformers loads the host in shards, before a prefix is attached
    plugin: Any = accelerator.deepspeed_plugin
    offloads = {plugin.offload_optimizer_device, plugin.offload_param_device} - {None, "none"}
    wrong = {
        "zero_stage: 3 (for less, launch with plain data parallelism)": plugin.zero_stage != 3,
        "zero3_init_flag: false (a prefix is attached to whole weights)": plugin.zero3_init_flag,
        "offload_optimizer_device: none and offload_param_device: none": offloads,
        "-o train.clip_norm, not gradient_clipping": plugin.gradient_clipping not in (None, "auto"),
        "-o train.mixed_precision=no (a host of -o dtype=bfloat16 needs none)": config.mixed_precision != "no",
        "-o train.compile=false": config.compile,
    }
    if asked := [text for text, found in wrong.items() if found]:
        raise ConfigError(f"under DeepSpeed this run needs {'; '.join(asked)}.")


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed shards the run's host."""
    return accelerator.distributed_type.value == "DEEPSPEED"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the run shards its host."""
    return bool(accelerator.is_fsdp2) or is_zero3(accelerator)


def loading_device(accelerator: Accelerator, *, offload: bool = False) -> torch.device:
    """Where a host's weights are read to: straight to where it runs, unless they are shared or lent out from the CPU.

    Raises:
        ConfigError: if several processes would offload.
    """
    if offload and accelerator.num_processes > 1:
        raise ConfigError(
            f"offload=true is for one process; {accelerator.num_processes} were launched. Several share a host that is "
            f"too large for one GPU under FSDP2: accelerate launch --config_file configs/accelerate/fsdp2.yaml ..."
        )
    return torch.device("cpu") if offload or is_sharded(accelerator) else accelerator.device


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

    kinds = _kinds_of_blocks(module)
    for block in [part for part in module.modules() if type(part).__name__ in kinds]:
        beside = {part for slot in block.modules() if isinstance(slot, PrefixSlot) for part in slot.modules()}
        for layer in block.modules():
            own = list(layer.parameters(recurse=False))
            frozen = layer not in beside and not any(parameter.requires_grad for parameter in own)
            if frozen and any(parameter.dim() > 1 and not parameter.is_meta for parameter in own):
                add_hook_to_module(layer, AlignDevicesHook(device, offload=True))


def place(task: Task, accelerator: Accelerator, *, offload: bool = False) -> None:
    """Moves a task to where it runs; of a sharded host's blocks each process keeps its share.

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
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, quantized_weights(task))
        return
    if is_quantized(task.model):
        raise ConfigError(
            "a quantised model cannot be sharded. Leave quantize out, or launch with data parallelism (torchrun): "
            "every process then holds all of the quantised model."
        )
    if is_zero3(accelerator):
        _place_zero3(task, accelerator)
    else:
        _place_fsdp2(task, accelerator)
    # transformers' name for it: generating processes then go on until the last of them is done.
    task.model._is_fsdp_managed_module = True  # pyright: ignore[reportArgumentType]


def _place_fsdp2(task: Task, accelerator: Accelerator) -> None:
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    if isinstance(task, FSDPModule):
        return
    plugin: Any = accelerator.state.fsdp_plugin
    kinds = plugin.transformer_cls_names_to_wrap or sorted(_kinds_of_blocks(task.model))
    blocks = _blocks(task, kinds)
    whole_ones = _kept_whole(task, blocks)
    for parameter in whole_ones:
        parameter.data = parameter.data.to(accelerator.device)
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, kinds
    plugin.ignored_modules = [nn.ParameterList(whole_ones)]
    fsdp2_prepare_model(accelerator, task)
    # Now, since an evaluation may call a part of the task first, and torch would take that part for the root.
    fully_shard.state(task)._lazy_init()  # pyright: ignore[reportFunctionMemberAccess]


def _place_zero3(task: Task, accelerator: Accelerator) -> None:
    """DeepSpeed shards the blocks' modules in which nothing trains, and gathers each when it is called.

    What else there is stays out of DeepSpeed's sight, with an optimizer, a backward pass and files of our own.
    """
    if any(map(is_shard, task.parameters())):
        return
    blocks = _blocks(task, sorted(_kinds_of_blocks(task.model)))
    inside = {parameter for block in blocks for parameter in block.parameters()}
    kept = {parameter for parameter in inside if parameter.requires_grad}
    if task.handle is not None:
        kept |= set(task.handle.parameters())  # also where they are switched off
    frozen = nn.ModuleList(_without(block, kept) for block in blocks)
    sharded = set(frozen.parameters())
    if sum(p.numel() for p in sharded) < sum(p.numel() for p in inside) / 2:
        raise ConfigError(
            "under DeepSpeed zinit shards the layers in which nothing trains, and this run trains something in most of "
            "the host's. Launch it under FSDP2 (configs/accelerate/fsdp2.yaml) or plain data parallelism."
        )
    import deepspeed  # pyright: ignore[reportMissingImports]

    for tensor in [*(p for p in task.parameters() if p not in sharded), *task.buffers()]:
        tensor.data = tensor.data.to(accelerator.device)
    plugin: Any = accelerator.deepspeed_plugin
    # Numbers that DeepSpeed insists on: batches, accumulation and clipping are the loop's.
    sizes = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": accelerator.num_processes}
    plugin.deepspeed_config |= {**sizes, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    deepspeed.init_distributed(auto_mpi_discovery=False)  # takes up the group of processes that there is
    deepspeed.zero.Init(module=frozen, config_dict_or_path=plugin.deepspeed_config)  # one weight at a time
    accelerator.prepare(frozen)


def _without(module: nn.Module, kept: set[nn.Parameter]) -> nn.ModuleList:
    """The largest parts of a module that have parameters, none of them to be kept whole."""
    parameters = set(module.parameters())
    if not parameters:
        return nn.ModuleList()
    if not parameters & kept:
        return nn.ModuleList([module])
    return nn.ModuleList(part for child in module.children() for part in _without(child, kept))


def _blocks(task: Task, kinds: Collection[str]) -> list[nn.Module]:
    blocks = [module for module in task.model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise ConfigError(
            f"{type(task.model).__name__} has no repeated blocks to shard. Launch with plain data parallelism, or name "
            f"their class (FSDP2 only): fsdp_transformer_layer_cls_to_wrap."
        )
    return blocks


def _kinds_of_blocks(module: nn.Module) -> set[str]:
    """Class names of the blocks that a model is a row of: the outermost lists of several modules of one kind."""
    members = list(module.children())
    several = isinstance(module, nn.ModuleList | nn.Sequential) and len(members) > 1
    if several and len({type(member) for member in members}) == 1 and any(members[0].children()):
        return {type(members[0]).__name__}
    return set().union(*map(_kinds_of_blocks, members))


def _kept_whole(task: Task, blocks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """What lies outside the blocks, the prefix, and what else trains inside if that is little."""
    inside = {parameter for block in blocks for parameter in block.parameters()}
    prefix = set() if task.handle is None else set(task.handle.parameters())
    trained = {parameter for parameter in inside - prefix if parameter.requires_grad}
    little = sum(p.numel() for p in trained) <= FEW * sum(p.numel() for p in inside - prefix)
    sharded = inside - prefix - (trained if little else set())
    return [parameter for parameter in task.parameters() if parameter not in sharded]


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


def clip(parameters: Iterable[nn.Parameter], limit: float, accelerator: Accelerator) -> Tensor:
    """Clips the gradients to a norm and returns the norm that they had, over all processes."""
    if is_zero3(accelerator):
        return nn.utils.clip_grad_norm_(parameters, limit)
    return whole(torch.as_tensor(accelerator.clip_grad_norm_(parameters, limit)))


def average_whole_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Averages the gradients of what stays whole beside a sharded host, in one all-reduce; FSDP2 averages the rest."""
    if not is_sharded(accelerator):
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not is_shard(p)]
    if not gradients:
        return
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    assert isinstance(flat, Tensor)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def whole(tensor: Tensor) -> Tensor:
    """A detached tensor itself; a sharded one gathered, which all processes do together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_shard(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def share_of(value: Tensor, parameter: Tensor) -> Tensor:
    """What this process keeps of a whole value that belongs to a parameter: all of it, or its shard."""
    if not is_shard(parameter):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    value = value.to(parameter.device)
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
