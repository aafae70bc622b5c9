"""What depends on names that may change: private names of libraries, and old words in old files of zinit's own.

Nothing else in zinit touches a private name of a library. Each function here says why it has to, and since which
version the name exists; ``tests/test_compat.py`` checks that the installed libraries still have it. No library is
imported before a function needs it.

Old words: a setting or a key of a file that was renamed is one row of `OLD_SETTINGS` or `OLD_RESULTS`. Readers of
files pass what they read through `modern_settings` or `modern_results`; new files hold the new words only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from zinit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

# --- old words in old files -------------------------------------------------------------------------------------------

# Renamed settings, as options write them: in TOML files, options, `run.json`, checkpoints and plans of benchmarks.
OLD_SETTINGS = {
    "train.trunk_cache": "train.activation_cache",
    "train.tensorboard": "train.tracker",
}

# Settings that are in another table now, or in none.
MOVED_SETTINGS = {
    "method.start": "warm_start",
}

# Values of renamed settings, by the old name.
OLD_VALUES: dict[str, dict[Any, Any]] = {"tensorboard": {True: "tensorboard", False: None}}

# Settings that version 0.1.0 did not know, and what it did: a run that it began goes on where they are so still.
NEW_SETTINGS: dict[str, Any] = {
    "prefix.prompt": "table",
    "prefix.prompts": "table",
    "train.keep_best": None,
    "train.patience": None,
}

# Renamed keys of `metrics.json` and of the cells and summaries of a benchmark: (place, old key) to new key. A place is
# the path to the mapping that holds the key; lists on the way are passed through.
OLD_RESULTS = {
    "metrics.frozen": "metrics.base",
    "samples.frozen": "samples.base",
}


def modern_setting(name: str) -> str:
    """The name that a setting has today.

    Args:
        name: with its section, as in an option: "train.trunk_cache".
    """
    return OLD_SETTINGS.get(name) or MOVED_SETTINGS.get(name, name)


def modern_value(name: str, value: Any) -> Any:
    """What the value of a setting is today.

    Args:
        name: that it is given under, with or without its section.
        value: of the setting.
    """
    return OLD_VALUES.get(name.rpartition(".")[2], {}).get(value, value) if isinstance(value, bool) else value


def modern_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of any age under the names of today.

    Args:
        values: nested ({"train": {"trunk_cache": ...}}), or flat with dotted names ({"train.trunk_cache": ...}). Not
            changed.

    Raises:
        ConfigError: if a setting is given under its old name and its new one.
    """
    modern = _renamed(values, OLD_SETTINGS)
    for old, new in MOVED_SETTINGS.items():
        section, _, key = old.rpartition(".")
        table, key = (modern[section], key) if isinstance(modern.get(section), dict) else (modern, old)
        if (value := table.pop(key, None)) is not None:
            if modern.get(new) is not None:
                raise ConfigError(f"{old} is the old name of {new}: give one of the two.")
            modern[new] = value
    return modern


def modern_results(document: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``metrics.json``, or of a benchmark's cell, of any age under the names of today.

    Args:
        document: as the file holds it. Not changed.

    Raises:
        ConfigError: if it holds a result under its old name and its new one.
    """
    return _renamed(document, OLD_RESULTS)


def _renamed(value: Any, table: Mapping[str, str], place: str = "") -> Any:
    """A copy in which every key of the table has its new name; the order of keys is kept."""
    if isinstance(value, list):
        return [_renamed(item, table, place) for item in value]
    if not isinstance(value, Mapping):
        return value
    renamed: dict[str, Any] = {}
    for key, inner in value.items():
        old = f"{place}{key}"
        name = _new_key(old, place, table) if isinstance(key, str) else key
        if name in renamed or (name != key and name in value):
            raise ConfigError(f"{old} is the old name of {table[old]}: give one of the two.")
        renamed[name] = modern_value(old, _renamed(inner, table, f"{place}{name}."))
    return renamed


def _new_key(old: str, place: str, table: Mapping[str, str]) -> str:
    """The last part of a path's new name, in the same table."""
    return table.get(old, old).removeprefix(place)


# --- torch ------------------------------------------------------------------------------------------------------------


def uncompiled(model: Any) -> Any:
    """The module inside `torch.compile`'s wrapper; any other module is returned as it is.

    ``_orig_mod`` (torch 2.0) is the only way back to the module: handles and weights belong to it, not to the wrapper.
    """
    return getattr(model, "_orig_mod", model)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward. Hooks that say ``only_takes_context`` do not count.

    ``_forward_hooks`` and ``_forward_pre_hooks`` (torch 1.0, the second since 1.1): torch has no question for it.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(getattr(hook, "only_takes_context", False) for hook in hooks)


def apply_to_own_tensors(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replaces a module's own parameters and buffers, those of its children excepted.

    ``Module._apply(..., recurse=False)`` (torch 2.0) is what ``Module.to`` is made of; ``to`` itself cannot leave the
    children out, and assigning ``parameter.data`` does not serve tensors of quantisation libraries.
    """
    module._apply(change, recurse=False)


def exclude_from_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Names parameters and buffers that data parallelism does not broadcast when it starts.

    ``_set_params_and_buffers_to_ignore_for_model`` (torch 1.8) is the only way to exclude them.
    """
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


def start_fsdp(module: nn.Module) -> None:
    """Makes a module the root of its FSDP2 modules now, instead of at its first forward.

    ``fully_shard.state(...)._lazy_init`` (torch 2.6): torch takes the module that is called first for the root, and an
    evaluation may call a part of the task before the task.
    """
    from torch.distributed.fsdp import fully_shard

    fully_shard.state(module)._lazy_init()  # pyright: ignore[reportFunctionMemberAccess]


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds only its part of a tensor: FSDP2's kind or DeepSpeed ZeRO-3's.

    ``ds_id`` is what DeepSpeed's own code asks for; torch's ``DTensor`` is asked by name, which imports nothing.
    """
    return type(tensor).__name__ == "DTensor" or hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")


# --- accelerate -------------------------------------------------------------------------------------------------------


def reset_accelerator_state() -> None:
    """Forgets the precision and strategy of this process's last run.

    ``AcceleratorState._reset_state`` (accelerate 0.20): Accelerate allows one precision and strategy per process, and
    a process may make several runs.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def process_strategy() -> Any:
    """The `DistributedType` that Accelerate noted for this process; None before the first `Accelerator`.

    ``PartialState._shared_state`` (accelerate 0.18): making a `PartialState` to ask it would already choose one.
    """
    from accelerate.state import PartialState

    return PartialState._shared_state.get("distributed_type")


def set_process_strategy(strategy: Any) -> None:
    """Notes a `DistributedType` for this process; states that Accelerate makes later copy it.

    ``PartialState._shared_state`` (accelerate 0.18): Accelerate shards on GPUs and their like only; on CPUs it would
    run plain data parallelism without a word.
    """
    from accelerate.state import PartialState

    PartialState._shared_state["distributed_type"] = strategy


# --- transformers -----------------------------------------------------------------------------------------------------


def attention_implementation(config: Any) -> str | None:
    """The name of the attention function a config selects ("sdpa"); None if it selects none.

    ``_attn_implementation`` (transformers 4.36) is what every attention module reads.
    """
    return getattr(config, "_attn_implementation", None)


def name_or_path(config: Any) -> str | None:
    """The folder or Hub id a config was read from; None if it was not read, or the model has no config.

    ``_name_or_path`` (transformers 4.0): the public property raises where a config was made by hand.
    """
    return getattr(config, "_name_or_path", None) or None


def commit_hash(config: Any) -> str | None:
    """The Hub's commit a config was read at; None for folders, and where transformers does not note it.

    ``_commit_hash`` (transformers 4.21) has no public name. 5.24 no longer sets it, so that it may be missing.
    """
    return getattr(config, "_commit_hash", None)


def mark_sharded(model: nn.Module) -> None:
    """Tells transformers that a model's weights are sharded: generating processes wait for the last of them.

    ``_is_fsdp_managed_module`` (transformers 4.39) is what ``is_fsdp_managed_module`` there asks.
    """
    model._is_fsdp_managed_module = True  # pyright: ignore[reportArgumentType]


class GuardedPatterns(dict[str, str]):
    """Patterns for tied weights that do not reach a child's parameters.

    Attributes:
        before: what the model itself held (not its class); None if nothing.
    """

    before: dict[str, str] | None = None


def guard_tied_weights(model: nn.Module, child: str) -> None:
    r"""Keeps parameters of children by a name out of reach of the patterns by which a model ties its weights.

    ``_tied_weights_keys`` (transformers 5.0: {target: source}) may hold patterns, as Zamba's ``layers.\d+.shared``:
    ``tie_weights`` and ``resize_token_embeddings`` would tie whatever was added below those modules.
    """
    for module in model.modules():
        patterns = getattr(module, "_tied_weights_keys", None)
        if not isinstance(patterns, dict) or isinstance(patterns, GuardedPatterns):
            continue
        if all(re.fullmatch(r"[\w.]+(weight|bias)", name) for name in (*patterns, *patterns.values())):
            continue  # whole names, no patterns
        hidden = rf"(?!(?:.*\.)?{child}\.)"
        guarded = GuardedPatterns({hidden + target: hidden + source for target, source in patterns.items()})
        guarded.before = vars(module).get("_tied_weights_keys")
        vars(module)["_tied_weights_keys"] = guarded


def unguard_tied_weights(model: nn.Module) -> None:
    """Undoes `guard_tied_weights`."""
    for module in model.modules():
        guarded = vars(module).get("_tied_weights_keys")
        if isinstance(guarded, GuardedPatterns):
            if guarded.before is None:
                del vars(module)["_tied_weights_keys"]
            else:
                vars(module)["_tied_weights_keys"] = guarded.before


def logits_processors(model: Any, config: Any, ids: Tensor) -> Any:
    """What ``generate`` does to the scores of the next token under a configuration, warpers of sampling included.

    ``_get_logits_processor`` and ``_prepare_special_tokens`` (transformers 4.40): ``generate`` chooses all tokens of a
    batch itself, and nothing public makes its list of processors for one sequence.

    Args:
        model: of transformers.
        config: complete in itself; with ``max_new_tokens``. Not changed.
        ids: (1, T) of the prompt.
    """
    import copy

    import torch

    own = copy.copy(config)
    own.max_length = ids.shape[1] + config.max_new_tokens
    model._prepare_special_tokens(own, True, device=ids.device)
    return model._get_logits_processor(
        generation_config=own,
        input_ids_seq_length=ids.shape[1],
        encoder_input_ids=ids,
        device=ids.device,
        model_kwargs={"attention_mask": torch.ones_like(ids)},
    )


# --- timm -------------------------------------------------------------------------------------------------------------


def save_all_but(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Sets which weights ``save_pretrained`` leaves out, and the Trainer does not miss when it loads a checkpoint.

    Private: transformers has it for weights that a model makes anew, and no public way to leave out frozen ones.

    Args:
        model: of transformers.
        names: in its state dict.

    Returns:
        What was left out before.
    """
    before: set[str] = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    setattr(model, "_keys_to_ignore_on_save", set(names))  # noqa: B010
    return before


def has_window_bias(module: Any) -> bool:
    """Whether an attention module can give its biases of relative position (BEiT's and Swin's kind)."""
    return hasattr(module, "_get_rel_pos_bias")


def window_bias(module: Any) -> Tensor:
    """The biases of relative position of an attention module, (1, H, T, T).

    ``_get_rel_pos_bias`` (timm 0.6): the module's forward adds them to the scores, and nothing public gives them.
    """
    return module._get_rel_pos_bias()


# --- datasets: names that are no data sets ----------------------------------------------------------------------------


def packaged_datasets() -> Iterable[str]:
    """What ``load_dataset`` takes for a reader's name ("json"), not a data set's; no public list (datasets 1.0)."""
    from datasets import packaged_modules

    return packaged_modules._PACKAGED_DATASETS_MODULES


# --- torch: what a layer that is computed again can be known by -------------------------------------------------------


def is_in_backward() -> bool:
    """Whether this thread is running a backward pass; torch has no public name for it (torch 2.0)."""
    import torch

    return torch._C._current_graph_task_id() != -1


def storage_key(tensor: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """What a tensor is known by as long as its memory is in use; None where it has none (inside torch.func)."""
    try:
        return tensor.data_ptr(), tuple(tensor.shape)
    except RuntimeError:
        return None


def storage_reference(tensor: Tensor) -> Any:
    """A reference that does not keep a tensor's memory, and says by ``expired()`` when it is gone (torch 1.0)."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())


def wrap_checkpointing(block: nn.Module, wrap: Callable[[Any], Any], wrapper: type) -> None:
    """Puts a wrapper around a block's own checkpointing function, once; transformers sets it per block (4.35)."""
    checkpoint = vars(block).get("_gradient_checkpointing_func")
    if checkpoint is not None and not isinstance(checkpoint, wrapper):
        vars(block)["_gradient_checkpointing_func"] = wrap(checkpoint)


def unwrap_checkpointing(block: nn.Module, wrapper: Any) -> None:
    """Undoes `wrap_checkpointing`."""
    checkpoint: Any = vars(block).get("_gradient_checkpointing_func")
    if isinstance(checkpoint, wrapper):
        vars(block)["_gradient_checkpointing_func"] = checkpoint.checkpoint


def watch_operations(tell: Callable[[int, int, list[Any]], None]) -> AbstractContextManager[Any]:
    """A scope that tells of every operation of torch: its multiplications and additions, the bytes it reads and writes,
    and the storages of what it makes. Attention runs there as one kernel, as it does on devices that have values.

    Private: torch's own counters of memory and of operations are built on the same mode.

    Args:
        tell: called with (operations, bytes, storages).
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
                return args[0].dtype == torch.bool  # "is all of it the same?": masks that hide nothing are left out
            made = func(*args, **(kwargs or {}))
            if not func.is_view:
                read, written = ([x for x in tree_leaves(y) if isinstance(x, torch.Tensor)] for y in (args, made))
                count = flop_registry.get(func._overloadpacket)
                flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=made)
                tell(flops, sum(t.nbytes for t in (*read, *written)), [t.untyped_storage() for t in written])
            return made

    class OneKernel(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is scaled_dot_product_attention:
                return attend(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **options: Any) -> Any:
        if options.get("enable_gqa"):
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, attn_mask=attn_mask)[0]

    scope = ExitStack()
    scope.enter_context(OneKernel())
    scope.enter_context(Operations())
    return scope


def silence_ray() -> None:
    """Keeps what Ray's daemons tell, such as the death of a machine, off the standard output: that is the command's.

    Ray prints it from a thread of its own, whatever ``ray.init`` was told (2.60).
    """
    from ray._private import worker  # pyright: ignore[reportMissingImports]

    worker.print_to_stdstream = lambda *_, **__: None
