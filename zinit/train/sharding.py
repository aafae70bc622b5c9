"""How FSDP2 and DeepSpeed's ZeRO-3 shard a run's frozen host; called by `zinit.train.strategy`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from zinit.compat import set_process_strategy, start_fsdp
from zinit.distributed import is_shard
from zinit.errors import ConfigError
from zinit.models.blocks import kinds_of_blocks
from zinit.tasks.base import Task
from zinit.train.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

FEW = 1 / 10  # of the blocks' parameters: up to so many, what trains stays whole


def use_fsdp2(accelerator: Accelerator, config: TrainConfig) -> None:
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state: Any = accelerator.state
    if accelerator.num_processes == 1:
        raise ConfigError("FSDP was asked for, but one process alone cannot shard. Launch at least two.")
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate shards on GPUs and their like only; on CPUs it would run plain data parallelism without a word.
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
        set_process_strategy(DistributedType.FSDP)
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


def use_zero3(accelerator: Accelerator, config: TrainConfig) -> None:
    from accelerate.utils import DeepSpeedPlugin, DistributedType
    from transformers.integrations import unset_hf_deepspeed_config

    state: Any = accelerator.state
    if accelerator.num_processes == 1:
        raise ConfigError("DeepSpeed was asked for, but one process alone cannot shard. Launch at least two.")
    if accelerator.distributed_type == DistributedType.MULTI_CPU:  # as above
        state.deepspeed_plugins = DeepSpeedPlugin()
        state.distributed_type = DistributedType.DEEPSPEED
        set_process_strategy(DistributedType.DEEPSPEED)
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


def place_fsdp2(task: Task, accelerator: Accelerator) -> None:
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    if isinstance(task, FSDPModule):
        return
    plugin: Any = accelerator.state.fsdp_plugin
    kinds = plugin.transformer_cls_names_to_wrap or sorted(kinds_of_blocks(task.model))
    blocks = _blocks(task, kinds)
    whole_ones = _kept_whole(task, blocks)
    for parameter in whole_ones:
        parameter.data = parameter.data.to(accelerator.device)
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, kinds
    plugin.ignored_modules = [nn.ParameterList(whole_ones)]
    fsdp2_prepare_model(accelerator, task)
    start_fsdp(task)  # now, since an evaluation may call a part of the task first


def place_zero3(task: Task, accelerator: Accelerator) -> None:
    """DeepSpeed shards the blocks' modules in which nothing trains, and gathers each when it is called.

    What else there is stays out of DeepSpeed's sight, with an optimizer, a backward pass and files of our own.
    """
    if any(map(is_shard, task.parameters())):
        return
    blocks = _blocks(task, sorted(kinds_of_blocks(task.model)))
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


def _kept_whole(task: Task, blocks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters outside the blocks, the prefix's, and what else trains inside if that is little."""
    inside = {parameter for block in blocks for parameter in block.parameters()}
    prefix = set() if task.handle is None else set(task.handle.parameters())
    trained = {parameter for parameter in inside - prefix if parameter.requires_grad}
    little = sum(p.numel() for p in trained) <= FEW * sum(p.numel() for p in inside - prefix)
    sharded = inside - prefix - (trained if little else set())
    return [parameter for parameter in task.parameters() if parameter not in sharded]
