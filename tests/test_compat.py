"""Private names that the installed libraries must still have, and old words in old files."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from zinit import compat
from zinit.errors import ConfigError

# --- old words --------------------------------------------------------------------------------------------------------

OLD_RUN = {  # a part of a run.json of zinit 0.1
    "backbone": "llama",
    "method": {"name": "zero-init"},
    "train": {"epochs": 8, "trunk_cache": "cache", "workers": 0},
    "task": {"name": "alpaca", "fields": ["instruction", "input", "output"]},
}
OLD_METRICS = {  # a part of a metrics.json of zinit 0.1
    "metrics": {"frozen": {"loss": 3.73}, "adapted": {"loss": 0.07}},
    "baseline": "the frozen model",
    "samples": [{"prompt": "a", "frozen": "x", "adapted": "y"}, {"prompt": "b", "frozen": "z", "adapted": "frozen"}],
}


def test_old_settings_get_their_new_names_in_place() -> None:
    modern = compat.modern_settings(OLD_RUN)
    assert modern["train"] == {"epochs": 8, "activation_cache": "cache", "workers": 0}
    assert list(modern["train"]) == ["epochs", "activation_cache", "workers"]
    assert {k: v for k, v in modern.items() if k != "train"} == {k: v for k, v in OLD_RUN.items() if k != "train"}
    assert "trunk_cache" in OLD_RUN["train"], "the document itself was changed"


def test_old_settings_may_be_flat() -> None:
    assert compat.modern_settings({"train.trunk_cache": "x", "train.epochs": 1}) == {
        "train.activation_cache": "x",
        "train.epochs": 1,
    }
    assert compat.modern_setting("train.trunk_cache") == "train.activation_cache"
    assert compat.modern_setting("train.epochs") == "train.epochs"


def test_a_word_is_old_only_in_its_place() -> None:
    assert compat.modern_settings({"task": {"trunk_cache": 1}}) == {"task": {"trunk_cache": 1}}
    assert compat.modern_results({"baseline": {"frozen": 1}, "frozen": 2}) == {"baseline": {"frozen": 1}, "frozen": 2}


def test_old_results_get_their_new_names() -> None:
    modern = compat.modern_results(OLD_METRICS)
    assert modern["metrics"] == {"base": {"loss": 3.73}, "adapted": {"loss": 0.07}}
    assert list(modern["metrics"]) == ["base", "adapted"]
    assert modern["samples"][1] == {"prompt": "b", "base": "z", "adapted": "frozen"}
    assert modern["baseline"] == "the frozen model"


@pytest.mark.parametrize(("read", "old"), [(compat.modern_settings, OLD_RUN), (compat.modern_results, OLD_METRICS)])
def test_what_is_modern_stays_as_it_is(read: Any, old: dict[str, Any]) -> None:
    assert read(read(old)) == read(old)


@pytest.mark.parametrize("order", [("trunk_cache", "activation_cache"), ("activation_cache", "trunk_cache")])
@pytest.mark.parametrize("flat", [True, False])
def test_both_names_at_once_are_refused(order: tuple[str, str], flat: bool) -> None:
    values = {f"train.{n}" if flat else n: "x" for n in order}
    with pytest.raises(ConfigError, match=r"train\.trunk_cache is the old name of train\.activation_cache"):
        compat.modern_settings(values if flat else {"train": values})


def test_a_setting_may_leave_its_table() -> None:
    """The first stage of ImageBind-LLM is a warm start as any other."""
    old = {"method": {"name": "imagebind-llm", "stage": "tuning", "start": "runs/one"}, "seed": 0}
    assert compat.modern_settings(old) == {
        "method": {"name": "imagebind-llm", "stage": "tuning"},
        "seed": 0,
        "warm_start": "runs/one",
    }
    assert old["method"]["start"] == "runs/one", "the document itself was changed"
    assert compat.modern_settings({"method.start": "a", "seed": 1}) == {"warm_start": "a", "seed": 1}
    assert compat.modern_settings({"method": {"start": None}, "warm_start": "b"}) == {"method": {}, "warm_start": "b"}
    with pytest.raises(ConfigError, match=r"method\.start is the old name of warm_start"):
        compat.modern_settings({"method": {"start": "a"}, "warm_start": "b"})


@pytest.mark.parametrize("table", [compat.OLD_SETTINGS, compat.OLD_RESULTS])
def test_rows_of_the_tables_stay_in_their_section(table: dict[str, str]) -> None:
    for old, new in table.items():
        assert old.rpartition(".")[0] == new.rpartition(".")[0], "a renamed key may not move to another place"
        assert new not in table, "a new name is not itself an old one"


# --- private names ----------------------------------------------------------------------------------------------------


def test_torch_keeps_the_module_inside_a_compiled_one() -> None:
    module = nn.Linear(2, 2)
    assert compat.uncompiled(torch.compile(module)) is module
    assert compat.uncompiled(module) is module


def test_torch_keeps_hooks_where_they_are_looked_for() -> None:
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        module = nn.Linear(2, 2)
        assert not compat.has_forward_hooks(module)
        getattr(module, register)(lambda *args: None)
        assert compat.has_forward_hooks(module)


def test_torch_applies_to_a_modules_own_tensors() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module.register_buffer("own", torch.zeros(2))
    compat.apply_to_own_tensors(module, lambda tensor: tensor.double())
    assert module.own.dtype == torch.float64
    assert module[0].weight.dtype == torch.float32


def test_torch_tells_a_backward_pass() -> None:
    seen = []
    tensor = torch.ones(2, requires_grad=True)
    (2 * tensor).register_hook(lambda gradient: seen.append(compat.is_in_backward()))
    doubled = 2 * tensor
    doubled.register_hook(lambda gradient: seen.append(compat.is_in_backward()))
    assert not compat.is_in_backward()
    doubled.sum().backward()
    assert seen == [True]
    assert not compat.is_in_backward()


def test_torch_tells_when_a_tensors_memory_is_gone() -> None:
    tensor = torch.ones(2)
    reference, key = compat.storage_reference(tensor), compat.storage_key(tensor)
    assert key == compat.storage_key(tensor) is not None
    assert not reference.expired()
    view = tensor[1:]
    del tensor
    assert not reference.expired(), "a view uses the same memory"
    del view
    assert reference.expired()
    assert torch.func.vmap(lambda row: (assert_without_memory(row), row)[1])(torch.ones(2, 2)).shape == (2, 2)


def assert_without_memory(tensor: torch.Tensor) -> None:
    assert compat.storage_key(tensor) is None


def test_torch_lets_ddp_leave_tensors_out() -> None:
    from torch.nn.parallel import DistributedDataParallel

    module = nn.Linear(2, 2)
    compat.exclude_from_ddp(module, iter(["weight"]))
    assert list(module._ddp_params_and_buffers_to_ignore) == ["weight"]  # pyright: ignore[reportArgumentType]
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(DistributedDataParallel.__init__)


def test_torch_can_start_fsdp_early() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    assert callable(fully_shard.state)  # pyright: ignore[reportFunctionMemberAccess]
    assert callable(FSDPState._lazy_init)


def test_torch_names_its_sharded_tensors() -> None:
    from torch.distributed.tensor import DTensor

    assert DTensor.__name__ == "DTensor"
    assert callable(DTensor.full_tensor)
    assert not compat.is_shard(torch.zeros(1))


def test_deepspeed_marks_its_sharded_tensors() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero import partition_parameters  # pyright: ignore[reportMissingImports]

    assert "ds_id" in inspect.getsource(partition_parameters)


def test_ray_prints_what_daemons_tell_by_one_function() -> None:
    pytest.importorskip("ray", reason="needs the package ray")
    from ray._private import worker  # pyright: ignore[reportMissingImports]

    assert "print_to_stdstream(" in inspect.getsource(worker.listen_error_messages)


def test_accelerate_notes_the_strategy_of_a_process() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    shared = dict(PartialState._shared_state), dict(AcceleratorState._shared_state)
    try:
        compat.reset_accelerator_state()
        accelerator = Accelerator(cpu=True)
        assert compat.process_strategy() == accelerator.distributed_type
        compat.set_process_strategy("another")
        assert compat.process_strategy() == "another"
        assert PartialState().distributed_type == "another"
        compat.reset_accelerator_state()
        assert not AcceleratorState._shared_state
    finally:
        for state, content in zip((PartialState, AcceleratorState), shared, strict=True):
            state._shared_state.clear()
            state._shared_state.update(content)


def test_transformers_names_attention_and_origin_of_a_config(tmp_path: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    assert compat.name_or_path(config) is None
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert compat.attention_implementation(model.config) == "eager"
    assert compat.name_or_path(model.config) == str(tmp_path)
    assert compat.commit_hash(model.config) is None
    model.config._commit_hash = "abc"  # as transformers 5.0 sets it; 5.24 has stopped to
    assert compat.commit_hash(model.config) == "abc"
    assert compat.attention_implementation(None) is compat.name_or_path(None) is compat.commit_hash(None) is None


def test_transformers_asks_whether_a_model_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.fsdp import is_fsdp_managed_module

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    module = nn.Linear(1, 1)
    assert not is_fsdp_managed_module(module)
    compat.mark_sharded(module)
    assert is_fsdp_managed_module(module)


def test_transformers_keeps_a_blocks_checkpointing_function() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    class Wrapper:
        def __init__(self, checkpoint: Any) -> None:
            self.checkpoint = checkpoint

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    model: Any = LlamaForCausalLM(config)
    block = model.model.layers[0]
    compat.wrap_checkpointing(block, Wrapper, Wrapper)
    assert "_gradient_checkpointing_func" not in vars(block), "a block that is not computed again stays as it is"
    model.gradient_checkpointing_enable()
    own = vars(block)["_gradient_checkpointing_func"]
    for _ in range(2):
        compat.wrap_checkpointing(block, Wrapper, Wrapper)
        assert vars(block)["_gradient_checkpointing_func"].checkpoint is own
    compat.unwrap_checkpointing(block, Wrapper)
    assert vars(block)["_gradient_checkpointing_func"] is own


def test_transformers_makes_generates_processors_of_scores() -> None:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    model, ids = LlamaForCausalLM(config), torch.tensor([[1, 2]])
    plain = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": [4]}
    assert not compat.logits_processors(model, GenerationConfig(**plain), ids)
    found = compat.logits_processors(model, GenerationConfig(**{**plain, "min_new_tokens": 1}), ids)
    assert found(ids, torch.zeros(1, 8))[0].isinf().nonzero().tolist() == [[4]]


def test_timm_gives_biases_of_relative_position() -> None:
    from timm.models.beit import Attention as Beit
    from timm.models.swin_transformer import WindowAttention

    swin = WindowAttention(dim=8, num_heads=2, window_size=2)
    assert compat.has_window_bias(swin)
    assert compat.window_bias(swin).shape == (1, 2, 4, 4)
    beit = Beit(8, num_heads=2, window_size=(2, 2))
    assert compat.has_window_bias(beit)
    assert compat.window_bias(beit).shape == (1, 2, 5, 5)
    assert not compat.has_window_bias(nn.Linear(1, 1))
