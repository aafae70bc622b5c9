"""Other implementations' formats on files made here: what is read."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import zinit
from tests.golden.formats import (
    SHAPE,
    C,
    H,
    K,
    L,
    N,
    litgpt_file,
    litgpt_tensors,
    llama,
    mistral,
    official_file,
    official_tensors,
    peft_folder,
)


@pytest.mark.parametrize("gate", ["tanh", "identity"])
def test_official_rows_go_to_the_topmost_layers_lowest_first(tmp_path, gate):
    path = official_file(tmp_path)
    handle = zinit.import_adapter(llama(), path, length=K, gate=gate)
    file, own = torch.load(path), handle.state_dict()
    assert handle.config == zinit.PrefixConfig(length=K, layers=L, gate=gate)
    assert list(handle.prefixes) == [f"model.layers.{layer}.self_attn" for layer in (1, 2, 3)]
    for block, layer in enumerate((1, 2, 3)):
        rows = file["adapter_query.weight"][block * K : (block + 1) * K]
        assert torch.equal(own[f"model.layers.{layer}.self_attn.prompt.weight"], rows)
        assert torch.equal(
            own[f"model.layers.{layer}.self_attn.gate"], file[f"layers.{layer}.attention.gate"].flatten()
        )


@pytest.mark.parametrize("shape", [(1,), (1, 1, 1, 1)])
def test_one_official_gate_per_layer_is_never_squashed(tmp_path, shape):
    gates = {f"layers.{layer}.attention.gate": torch.full(shape, float(layer)) for layer in range(N)}
    handle = zinit.import_adapter(llama(), official_file(tmp_path, **gates), length=K, gate="tanh")
    assert (handle.config.gate, handle.config.gate_per) == ("identity", "layer")
    assert [gates.tolist() for gates in handle.gates().values()] == [[1.0] * H, [2.0] * H, [3.0] * H]


def test_official_half_precision_and_files_without_unused_gates(tmp_path):
    tensors = {name: value.half() for name, value in official_tensors().items()}
    torch.save({name: value for name, value in tensors.items() if "layers.0." not in name}, tmp_path / "half.pth")
    handle = zinit.import_adapter(llama(), tmp_path / "half.pth", length=K)
    assert all(parameter.dtype == torch.float32 for parameter in handle.parameters())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_full_official_training_checkpoint(tmp_path, zipped):
    adapter = official_tensors()
    content = {
        "model": adapter | {"layers.0.attention.wq.weight": torch.randn(C, C), "norm.weight": torch.ones(C)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 9e-3}]},
        "epoch": 4,
        "args": argparse.Namespace(adapter_len=K, data_path="alpaca.json", blr=9e-3, resume=None),
    }
    torch.save(content, tmp_path / "checkpoint-4.pth", _use_new_zipfile_serialization=zipped)
    handle = zinit.import_adapter(llama(), tmp_path / "checkpoint-4.pth", length=K)
    got = torch.cat([handle.state_dict()[f"{site.name}.prompt.weight"] for site in handle.sites])
    assert torch.equal(got, adapter["adapter_query.weight"])


@pytest.mark.parametrize("legacy", [False, True])
def test_peft_folder(tmp_path, legacy):
    path = peft_folder(tmp_path / "peft", legacy=legacy)
    handle = zinit.import_adapter(llama(), path, format="peft")
    assert handle.config == zinit.PrefixConfig(length=K, layers=L, gate="identity", gate_per="layer")
    assert handle.num_trainable == L * (K * C + 1)


def test_peft_names_follow_the_class_that_was_wrapped(tmp_path):
    path = peft_folder(tmp_path / "peft")
    zinit.import_adapter(llama().model, path, format="peft")
    tensors = load_file(path / "adapter_model.safetensors")
    bare = {name.replace("model.model.", "model.", 1): value for name, value in tensors.items()}
    handle = zinit.import_adapter(llama(), peft_folder(tmp_path / "bare", bare), format="peft")
    assert torch.equal(
        handle.state_dict()["model.layers.2.self_attn.prompt.weight"],
        tensors["base_model.model.model.layers.2.self_attn.adaption_prompt"][0],
    )


@pytest.mark.parametrize(
    ("shape", "per"), [((1, 1, H, 1), "head"), ((1, H, 1, 1), "head"), ((1,), "layer")], ids=["new", "old", "oldest"]
)
def test_litgpt_legacy_in_all_three_gate_shapes(tmp_path, shape, per):
    tensors = litgpt_tensors(shape)
    handle = zinit.import_adapter(llama(), litgpt_file(tmp_path, tensors), format="litgpt-legacy")
    assert handle.config == zinit.PrefixConfig(length=K, layers=L, gate="identity", gate_per=per)
    gate = tensors["transformer.h.2.attn.gating_factor"].flatten().expand(H)
    assert torch.equal(handle.gates()["model.layers.2.self_attn"], gate)


@pytest.mark.parametrize("make", [llama, mistral])
def test_litgpt_keys_and_values_come_from_the_rows_it_was_trained_against(tmp_path, make):
    model, tensors = make(), litgpt_tensors()
    with pytest.warns(UserWarning, match=r"0\.5\.5.*wrong rows.*keys and values"):
        handle = zinit.import_adapter(model, litgpt_file(tmp_path, tensors), format="litgpt")
    assert handle.config.parametrization == "key_value"
    host, groups, width = model.model.layers[3].self_attn, model.config.num_key_value_heads, C // H
    fused = torch.cat([host.q_proj.weight, host.k_proj.weight, host.v_proj.weight])
    projected = tensors["transformer.h.3.attn.adapter_wte.weight"] @ fused.T
    by_group = projected.view(K, groups, H // groups + 2, width)  # as if stored by group: queries, key, value
    own = handle.state_dict()
    torch.testing.assert_close(own["model.layers.3.self_attn.key"], by_group[:, :, -2].transpose(0, 1))
    torch.testing.assert_close(own["model.layers.3.self_attn.value"], by_group[:, :, -1].transpose(0, 1))


def test_litgpt_needs_weights(tmp_path):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with pytest.raises(zinit.CheckpointError, match="needs the weights"):
        zinit.import_adapter(model, litgpt_file(tmp_path, litgpt_tensors()), format="litgpt")
    handle = zinit.import_adapter(model, litgpt_file(tmp_path, litgpt_tensors()), format="litgpt-legacy")
    assert not any(parameter.is_meta for parameter in handle.parameters())
