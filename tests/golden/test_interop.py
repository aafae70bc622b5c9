"""Other implementations' formats on files made here: what is read, what is written, what is refused and why."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import zinit
from zinit.interop import FORMATS, convert

C, H, N, K, L = 32, 4, 4, 5, 3
SHAPE = {
    "hidden_size": C,
    "intermediate_size": 48,
    "num_hidden_layers": N,
    "num_attention_heads": H,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
IDS = torch.arange(1, 21).view(2, 10)


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **changes)).eval()


def mistral() -> MistralForCausalLM:
    torch.manual_seed(1)
    return MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2)).eval()


def trained(model, gates: float = 0.5, **settings) -> zinit.Handle:
    """An adapter whose gates are open, all different where the settings allow it."""
    handle = zinit.attach(model, zinit.PrefixConfig(**{"length": K, "layers": L, **settings}), seed=2)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if name.endswith(".gate"):
                parameter.uniform_(-gates, gates, generator=torch.Generator().manual_seed(len(name)))
                parameter.view(-1)[0] = gates
    return handle


@torch.no_grad()
def logits(model) -> Tensor:
    return model(IDS).logits


def state(model) -> tuple:
    """All that attaching could change."""
    handle = getattr(model, "_zinit", None)
    return (
        [name for name, _ in model.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        sorted(vars(model)),
        handle and {name: slot.active for name, slot in handle.slots.items()},
    )


def official_tensors(**changes) -> dict[str, Tensor]:
    made = {"adapter_query.weight": torch.randn(L * K, C)}
    for layer in range(N):
        made[f"layers.{layer}.attention.gate"] = torch.rand(1, H, 1, 1) if layer >= N - L else torch.zeros(1, H, 1, 1)
    return {name: value for name, value in {**made, **changes}.items() if value is not None}


def official_file(folder: Path, **changes) -> Path:
    torch.save(official_tensors(**changes), folder / "adapter.pth")
    return folder / "adapter.pth"


def peft_folder(folder: Path, tensors: dict[str, Tensor] | None = None, legacy=False, **changes) -> Path:
    if tensors is None:
        tensors = {}
        for layer in range(N - L, N):
            module = f"base_model.model.model.layers.{layer}.self_attn"
            tensors |= {f"{module}.adaption_prompt": torch.randn(1, K, C), f"{module}.adaption_gate": torch.rand(1)}
    config = {"peft_type": "ADAPTION_PROMPT", "adapter_len": K, "adapter_layers": L, "target_modules": "self_attn"}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    if legacy:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def litgpt_tensors(gate_shape=(1, 1, H, 1)) -> dict[str, Tensor]:
    made = {}
    for layer in range(N - L, N):
        made[f"transformer.h.{layer}.attn.adapter_wte.weight"] = torch.randn(K, C)
        made[f"transformer.h.{layer}.attn.gating_factor"] = torch.rand(gate_shape)
    return made


def litgpt_file(folder: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"model": tensors}, folder / "lit_model.pth.adapter")
    return folder / "lit_model.pth.adapter"


# What is read


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


# What is refused, and that refusing changes nothing


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refuses(path: Path, reason: str, model=None, **how) -> None:
    """Import fails with the reason; the model, which has an active adapter already, is as it was."""
    model = llama() if model is None else model
    first = zinit.attach(model, zinit.PrefixConfig(length=2), name="first", seed=0)
    before, answer = state(model), logits(model)
    with pytest.raises(zinit.CheckpointError, match=reason):
        zinit.import_adapter(model, path, **{"length": K, **how})
    assert state(model) == before
    assert first.active
    assert torch.equal(logits(model), answer)


@pytest.mark.parametrize("format", ["official-v1", "peft", "litgpt", "litgpt-legacy"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, format, zipped):
    trap = tmp_path / "trap"
    if format == "peft":
        folder = peft_folder(tmp_path / "peft", legacy=True)
        bad, path = folder / "adapter_model.bin", folder
    else:
        bad = path = tmp_path / "bad.pth"
    torch.save({"model": official_tensors(), "args": Malicious(trap)}, bad, _use_new_zipfile_serialization=zipped)
    refuses(path, "asks for posix.mkdir, which could run code", format=format)
    assert not trap.exists()
    with bad.open("wb") as file:
        pickle.dump(Malicious(trap), file)  # no torch file at all
    refuses(path, "not loaded|damaged", format=format)
    assert not trap.exists()


def test_only_the_official_format_may_hold_the_trainers_arguments(tmp_path):
    torch.save({"model": litgpt_tensors(), "args": argparse.Namespace()}, tmp_path / "lit.pth")
    refuses(tmp_path / "lit.pth", "asks for argparse.Namespace", format="litgpt-legacy")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4920000\n"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html>404</html>", "half", "most"])
def test_a_damaged_pickle_is_named_so(tmp_path, content):
    path = official_file(tmp_path)
    data = path.read_bytes()
    path.write_bytes({"half": data[: len(data) // 2], "most": data[:-30]}.get(content, content))
    refuses(path, r"adapter.pth is damaged, or not a file that torch.save wrote \([\d,]+ bytes\)")


@pytest.mark.parametrize("content", [b"", b"\x08\x00", "half", "most"])
def test_a_damaged_safetensors_file_is_named_so(tmp_path, content):
    path = peft_folder(tmp_path / "peft") / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"half": data[: len(data) // 2], "most": data[:-3]}.get(content, content))
    refuses(path.parent, r"adapter_model.safetensors is damaged", format="peft")


def test_a_git_lfs_pointer_is_named_so(tmp_path):
    path = official_file(tmp_path)
    path.write_bytes(LFS)
    refuses(path, "Git LFS pointer of 72 bytes")
    folder = peft_folder(tmp_path / "peft")
    (folder / "adapter_model.safetensors").write_bytes(LFS)
    refuses(folder, "Git LFS pointer", format="peft")


def test_what_is_not_there_is_named(tmp_path):
    refuses(tmp_path / "none.pth", "does not exist")
    refuses(tmp_path, "is a folder. Expected an adapter's file")
    refuses(tmp_path, "holds no adapter_config.json", format="peft")
    folder = peft_folder(tmp_path / "peft")
    (folder / "adapter_model.safetensors").unlink()
    refuses(folder, "holds neither", format="peft")


@pytest.mark.parametrize("content", [[torch.ones(2)], {"model": {}}, {"a": 1}, torch.ones(3)])
def test_a_pickle_without_named_tensors(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    refuses(tmp_path / "other.pth", "named tensors")


@pytest.mark.parametrize(
    ("length", "changes", "reason"),
    [
        (4, {}, r"shape \(15, 32\), which is not 4 prompts for each of at most 4 layers"),
        (3, {}, "not 3 prompts for each"),  # 5 layers of 3
        (15, {}, "layer 1 has a trained gate as well. Pass a smaller length"),
        (5, {"adapter_query.weight": torch.randn(L * K, 24)}, r"shape \(5, 24\) in layer 1.*takes \(K, 32\)"),
        (5, {"adapter_query.weight": torch.randn(L * K, C, 1)}, r"prompt table of shape \(15, 32, 1\)"),
        (5, {"adapter_query.weight": torch.full((L * K, C), torch.nan)}, "not finite"),
        (5, {"adapter_query.weight": torch.ones(L * K, C, dtype=torch.int8)}, "torch.int8"),
        (5, {"layers.2.attention.gate": torch.rand(1, 8, 1, 1)}, r"gate of shape \(1, 8, 1, 1\) in layer 2.*4 heads"),
        (5, {"layers.2.attention.gate": torch.rand(2, 2)}, r"gate of shape \(2, 2\) in layer 2"),
        (5, {"layers.2.attention.gate": None}, "no gate for layer 2"),
        (5, {"layers.7.attention.gate": torch.rand(1, H, 1, 1)}, "gates for 8 layers, but this model has 4"),
        (5, {"layers.3.attention.gate": None}, "gates for 3 layers, but this model has 4"),
    ],
)
def test_an_official_file_that_does_not_fit(tmp_path, length, changes, reason):
    refuses(official_file(tmp_path, **changes), reason, length=length)


def test_official_adapters_are_not_for_models_that_share_keys_and_values(tmp_path):
    refuses(official_file(tmp_path), "shares 2 key/value heads among 4 query heads", model=mistral())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "LORA"}, "of type LORA. Expected ADAPTION_PROMPT"),
        ({"adapter_len": 4}, r"says adapter_len 4, but .* has shape \(1, 5, 32\)"),
        ({"adapter_layers": 2}, "says adapter_layers 2, but there are prompts for 3 layers"),
        ({"adapter_len": None}, "has adapter_len None"),
    ],
)
def test_a_peft_config_that_does_not_fit(tmp_path, changes, reason):
    refuses(peft_folder(tmp_path / "peft", **changes), reason, format="peft")


def test_a_peft_folder_that_does_not_fit(tmp_path):
    folder = peft_folder(tmp_path / "peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("[1, 2")
    refuses(folder, "adapter_config.json is damaged", format="peft")
    module = "base_model.model.model.layers.2.self_attn"
    for name, value, reason in (
        (f"{module}.adaption_gate", None, "no gate for layer 2"),
        (f"{module}.adaption_gate", torch.rand(H), r"gate of shape \(4,\) in layer 2"),
        (f"{module}.adaption_prompt", torch.rand(1, K, 24), r"\(5, 24\) in layer 2"),
        (f"{module}.adaption_prompt", torch.rand(K, C), r"has shape \(5, 32\)"),
        ("base_model.model.model.layers.9.self_attn.adaption_prompt", torch.rand(1, K, C), "model.layers.9.self_attn"),
    ):
        changed = {key: x for key, x in {**tensors, name: value}.items() if x is not None}
        refuses(peft_folder(tmp_path / "peft", changed), reason, format="peft")


def test_peft_on_an_output_projection_with_bias_is_another_function(tmp_path):
    """Why it is refused both ways: with every gate closed PEFT changes such a model already."""
    peft = pytest.importorskip("peft")
    model = llama(attention_bias=True)
    torch.nn.init.normal_(model.model.layers[3].self_attn.o_proj.bias)
    refuses(peft_folder(tmp_path / "peft"), "output projection has a bias", model=model, format="peft")
    zinit.get_handle(model, "first").detach()
    with pytest.raises(zinit.CheckpointError, match="bias of this model's output projection twice"):
        trained(model, gate_per="layer").export(tmp_path / "out", format="peft")
    zinit.get_handle(model).detach()
    before = logits(model)
    config = peft.AdaptionPromptConfig(adapter_len=K, adapter_layers=L, task_type="CAUSAL_LM")
    assert (logits(peft.get_peft_model(model, config)) - before).abs().max() > 1e-3  # closed gates, another model


def test_peft_of_gpt2_is_another_function(tmp_path):
    tensors = {
        "base_model.model.transformer.h.3.attn.adaption_prompt": torch.randn(1, K, C),
        "base_model.model.transformer.h.3.attn.adaption_gate": torch.rand(1),
    }
    refuses(peft_folder(tmp_path / "peft", tensors, adapter_layers=1), "GPT-2.*after the output", format="peft")


@pytest.mark.parametrize(
    ("layer", "tensor", "value", "reason"),
    [
        (2, "adapter_wte.weight", torch.randn(K + 1, C), r"prompts of different lengths, \[5, 6\]"),
        (2, "gating_factor", torch.rand(1, 1, 8, 1), "gate of shape"),
        (2, "gating_factor", None, "no gate for layer 2"),
        (5, "adapter_wte.weight", torch.randn(K, C), "model of 6 layers"),
        (3, "adapter_wte.weight", None, "model of 3 layers"),
    ],
)
def test_a_litgpt_file_that_does_not_fit(tmp_path, layer, tensor, value, reason):
    tensors = {**litgpt_tensors(), f"transformer.h.{layer}.attn.{tensor}": value}
    path = litgpt_file(tmp_path, {name: value for name, value in tensors.items() if value is not None})
    refuses(path, reason, format="litgpt-legacy")
    refuses(path, reason, format="litgpt")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["image_bind_proj.weight", "prefix_query.weight"], "ImageBind-LLM"),
        (["cap_adapter_query.weight", "adapter_query.weight", "visual_blocks.0.norm1.bias"], "V1 caption"),
        (["visual_query.weight", "adapter_query.weight", "llama.layers.0.attention.wq.bias"], "V2 multi-modal"),
        (["adapter_query.weight", "layers.0.attention.wq_scale"], "V2 chat"),
        (["lm_head.adapter_bias", "transformer.h.2.attn.adapter_wte.weight"], "adapter_v2.*scales and biases"),
        (["transformer.h.2.attn.adapter_wte.weight"], "a LitGPT adapter. Import it with format='litgpt' or format="),
        (["base_model.model.model.layers.2.self_attn.adaption_prompt"], "PEFT AdaptionPrompt.*format='peft'"),
        (["lm_head.weight"], "holds no adapter that zinit knows. Its tensors are named lm_head.weight"),
    ],
)
def test_other_kinds_of_files_are_recognised(tmp_path, names, reason):
    torch.save({"model": {name: torch.ones(2) for name in names}}, tmp_path / "other.pth")
    refuses(tmp_path / "other.pth", reason)


def test_an_official_file_is_recognised_by_the_other_importers(tmp_path):
    path = official_file(tmp_path)
    refuses(path, "an official V1 adapter. Import it with format='official-v1'; got format='litgpt'", format="litgpt")
    torch.save(official_tensors(), peft_folder(tmp_path / "peft", legacy=True) / "adapter_model.bin")
    refuses(tmp_path / "peft", "an official V1 adapter", format="peft")


def test_wrong_settings(tmp_path):
    path = official_file(tmp_path)
    for how, reason in (
        ({"format": "oficial-v1"}, "Did you mean 'official-v1'"),
        ({"length": 0}, "at least 1; got 0"),
        ({"gate": "relu"}, "got 'relu'"),
    ):
        with pytest.raises(zinit.ZinitError, match=reason):
            zinit.import_adapter(llama(), path, **how)
    model = llama()
    zinit.attach(model)
    with pytest.raises(zinit.ConfigError, match="an adapter named 'default' already"):
        zinit.import_adapter(model, path, length=K)


def test_a_failure_while_loading_takes_the_adapter_off_again(tmp_path, monkeypatch):
    def fails(*_):
        raise zinit.CheckpointError("on purpose")

    monkeypatch.setattr(zinit.Handle, "load_state_dict", fails)
    refuses(official_file(tmp_path), "on purpose")


# What is written


def reread(handle: zinit.Handle, path: Path, **how) -> tuple[Tensor, Tensor, zinit.Handle]:
    """Logits of the adapter, of the file read back onto a fresh model, and the latter's handle."""
    model = type(handle.model)(handle.model.config).eval()
    model.load_state_dict({k: v for k, v in handle.model.state_dict().items() if ".zinit." not in k})
    again = zinit.import_adapter(model, path, **how)
    return logits(handle.model), logits(model), again


@pytest.mark.parametrize("reader", ["training", "inference"])
@pytest.mark.parametrize("per", ["head", "layer"])
@pytest.mark.parametrize("gate", ["tanh", "identity"])
def test_official_round_trip(tmp_path, gate, per, reader):
    handle = trained(llama(), gate=gate, gate_per=per)
    handle.export(tmp_path / "new" / "adapter.pth", format="official-v1", reader=reader)
    how = {"length": K, "gate": "tanh" if reader == "training" else "identity"}
    ours, theirs, again = reread(handle, tmp_path / "new" / "adapter.pth", **how)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    for site, gates in handle.gates().items():
        torch.testing.assert_close(again.gates()[site], gates, rtol=1e-6, atol=1e-7)
        assert torch.equal(again.prefixes[site].prompt.weight, handle.prefixes[site].prompt.weight)
    written = torch.load(tmp_path / "new" / "adapter.pth", weights_only=True)
    assert written.keys() == official_tensors(**{"layers.0.attention.gate": None}).keys()
    stored = written["layers.1.attention.gate"]
    assert stored.shape == (1, H, 1, 1)
    effective = handle.gates()["model.layers.1.self_attn"]
    torch.testing.assert_close(stored.flatten(), effective.atanh() if reader == "training" else effective)


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("gate", ["tanh", "identity"])
def test_peft_computes_the_same_with_what_we_write(tmp_path, make, gate):
    peft = pytest.importorskip("peft")
    handle = trained(make(), gates=1.5, gate=gate, gate_per="layer")
    handle.export(tmp_path / "out", format="peft")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "out").eval()
    ours = logits(handle.model)
    torch.testing.assert_close(logits(theirs), ours, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, logits(make()), atol=1e-2)
    _, again, _ = reread(handle, tmp_path / "out", format="peft")
    torch.testing.assert_close(again, ours, rtol=1e-5, atol=1e-6)


def test_peft_reads_what_we_write_of_a_bare_model(tmp_path):
    peft = pytest.importorskip("peft")

    def make() -> LlamaModel:
        torch.manual_seed(1)
        return LlamaModel(LlamaConfig(**SHAPE)).eval()

    handle = trained(make(), gate_per="layer")
    handle.export(tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    with torch.no_grad():
        ours = handle.model(IDS).last_hidden_state
        torch.testing.assert_close(theirs(input_ids=IDS).last_hidden_state, ours, rtol=1e-5, atol=1e-6)


def test_equal_gates_per_head_fit_peft_and_gates_of_one_fit_without_gating(tmp_path):
    handle = zinit.attach(llama(), zinit.PrefixConfig(length=K, layers=L, gate_init=0.3), seed=2)
    handle.export(tmp_path / "peft", format="peft")
    ours, theirs, _ = reread(handle, tmp_path / "peft", format="peft")
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    handle = zinit.attach(llama(), zinit.PrefixConfig(length=K, layers=L, gating=False), seed=2)
    for format, how in (("peft", {}), ("official-v1", {"reader": "inference"})):
        handle.export(tmp_path / format, format=format, **how)
        options = {"format": format, "length": K, "gate": "identity"}
        ours, theirs, again = reread(handle, tmp_path / format, **options)
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
        assert all((gates == 1).all() for gates in again.gates().values())


@pytest.mark.parametrize(
    ("format", "make", "settings", "reason"),
    [
        ("peft", llama, {}, "one gate per layer, and those of model.layers.1.self_attn differ from head to head"),
        ("peft", llama, {"gate_per": "layer", "layers": (0, 2, 3)}, r"layers \[0, 2, 3\] of 4.*topmost"),
        ("official-v1", llama, {"layers": (0, 1)}, r"layers \[0, 1\] of 4.*topmost"),
        ("peft", llama, {"parametrization": "key_value"}, "learns keys and values"),
        ("official-v1", llama, {"parametrization": "key_value"}, "learns keys and values"),
        ("peft", llama, {"separate_softmax": False, "gating": False}, "share one softmax"),
        ("official-v1", llama, {"separate_softmax": False, "gating": False}, "share one softmax"),
        ("official-v1", llama, {"gate": "identity", "gates": 1.25}, r"no tanh gives the gate 1.25 of layer 1"),
        ("official-v1", llama, {"gating": False}, r"no tanh gives the gate 1 of layer 1 \(reader='inference' can\)"),
        ("official-v1", mistral, {}, "runs LLaMA only, and this adapter's model is 'mistral'"),
        ("official-v1", lambda: llama(num_key_value_heads=2), {}, "4 heads of 8, 2 of them with keys and values"),
        ("official-v1", lambda: llama(head_dim=16), {}, "4 heads of 16, 4 of them .* width 32"),
        ("official-v1", lambda: llama(attention_bias=True), {}, "knows no biases"),
        ("peft", lambda: llama(head_dim=16), {"gate_per": "layer"}, "4 x 16 is not 32"),
        (
            "peft",
            lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=H)),
            {"gate_per": "layer"},
            "model is 'qwen2'",
        ),
        ("litgpt", llama, {}, "reads 'litgpt' but does not write it. Formats it writes: official-v1, peft"),
    ],
)
def test_what_a_format_cannot_express_is_not_written(tmp_path, format, make, settings, reason):
    handle = trained(make(), **settings)
    with pytest.raises(zinit.CheckpointError, match=reason):
        handle.export(tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_more_than_a_table_are_not_written(tmp_path):
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = torch.nn.Parameter(torch.randn(K, C)), torch.nn.Parameter(torch.ones(1))

    handle = trained(llama(), gate_per="layer")
    handle.prefixes["model.layers.2.self_attn"].prompt = Network()
    for format in ("official-v1", "peft"):
        with pytest.raises(zinit.CheckpointError, match="its prompts come from Network, and the format holds a table"):
            handle.export(tmp_path / "out", format=format)


def test_wrong_options_are_named(tmp_path):
    handle = trained(llama())
    for options, reason in (
        ({"format": "safetensors"}, "no adapter format named 'safetensors'"),
        ({"format": "official-v1", "reader": "trainer"}, "reader must be 'training' or 'inference'; got 'trainer'"),
        ({"format": "official-v1", "raeder": "training"}, "has no option 'raeder'. Did you mean 'reader'"),
        ({"format": "peft", "reader": "training"}, "has no option 'reader'"),
    ):
        with pytest.raises(zinit.ZinitError, match=reason):
            handle.export(tmp_path / "out", **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(zinit.CheckpointError, match="cannot be written to"):
        handle.export(tmp_path / "file" / "adapter.pth", format="official-v1")


# Conversion


@pytest.fixture
def base(tmp_path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_base(base: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(base).eval()


def test_convert_from_our_format_needs_no_model_where_the_file_names_it(tmp_path, base):
    handle = trained(load_base(base), gate_per="layer")
    handle.save(tmp_path / "ours")
    for format in ("official-v1", "peft"):
        done = convert(tmp_path / "ours", tmp_path / format, source_format="zinit", target_format=format)
        assert (done.num_trainable, list(done.prefixes)) == (handle.num_trainable, list(handle.prefixes))
        again = load_base(base)
        zinit.import_adapter(again, tmp_path / format, format=format, length=K)
        torch.testing.assert_close(logits(again), logits(handle.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["official-v1", "peft", "litgpt-legacy", "litgpt"])
def test_convert_to_our_format(tmp_path, base, source):
    path = {
        "official-v1": lambda: official_file(tmp_path),
        "peft": lambda: peft_folder(tmp_path / "peft"),
    }.get(source, lambda: litgpt_file(tmp_path, litgpt_tensors()))()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        convert(path, tmp_path / "ours", source_format=source, target_format="zinit", model=base, length=K)
        direct, converted = load_base(base), load_base(base)
        zinit.import_adapter(direct, path, format=source, length=K)
    zinit.load(converted, tmp_path / "ours")
    assert torch.equal(logits(converted), logits(direct))


def test_convert_between_the_others_on_a_model_that_has_adapters(tmp_path):
    model = llama()
    first = trained(model)
    zinit.attach(model, zinit.PrefixConfig(length=2), name="converted")
    first.activate()
    before, answer = state(model), logits(model)
    path = peft_folder(tmp_path / "peft")
    out = tmp_path / "adapter.pth"
    convert(path, out, source_format="peft", target_format="official-v1", model=model, reader="inference")
    assert state(model) == before
    assert torch.equal(logits(model), answer)
    assert first.active
    direct, converted = llama(), llama()
    zinit.import_adapter(direct, path, format="peft")
    zinit.import_adapter(converted, out, length=K, gate="identity")
    torch.testing.assert_close(logits(converted), logits(direct), rtol=1e-5, atol=1e-6)
    with pytest.raises(zinit.CheckpointError, match="differ from head to head"):  # nothing stays behind then either
        convert(official_file(tmp_path), tmp_path / "x", source_format="official-v1", target_format="peft",
                model=model, length=K)  # fmt: skip
    assert state(model) == before


def test_convert_does_not_overwrite_unasked(tmp_path):
    path = peft_folder(tmp_path / "peft")
    how = {"source_format": "peft", "target_format": "zinit", "model": llama()}
    (tmp_path / "ours").mkdir()
    with pytest.raises(zinit.ConfigError, match="exists already"):
        convert(path, tmp_path / "ours", **how)
    convert(path, tmp_path / "ours", **how, force=True)
    assert (tmp_path / "ours" / "adapter.json").is_file()


def test_convert_says_what_it_lacks(tmp_path):
    path = peft_folder(tmp_path / "peft")
    for changes, reason in (
        ({}, "converting from 'peft' needs the model"),
        ({"model": tmp_path / "nowhere"}, "there is no model folder"),
        ({"source_format": "pft"}, "Did you mean 'peft'"),
        ({"target_format": "onnx"}, "no adapter format named 'onnx'"),
    ):
        with pytest.raises(zinit.ZinitError, match=reason):
            convert(path, tmp_path / "out", **{"source_format": "peft", "target_format": "zinit", **changes})
    trained(llama()).save(tmp_path / "ours")  # of a model that came from nowhere
    with pytest.raises(zinit.ConfigError, match="converting from 'zinit' needs the model"):
        convert(tmp_path / "ours", tmp_path / "out", source_format="zinit", target_format="official-v1")
    with pytest.raises(zinit.CheckpointError, match="made for another model: num_kv_heads is 2 here"):
        convert(tmp_path / "ours", tmp_path / "out", source_format="zinit", target_format="peft",
                model=llama(num_key_value_heads=2))  # fmt: skip


def test_the_function_attach_is_not_hidden_by_its_module():
    code = "import zinit; zinit.import_adapter; zinit.Handle; import zinit.attach; print(zinit.attach.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "attach"


def test_every_format_is_one_that_convert_knows():
    assert set(FORMATS) == {"official-v1", "peft", "litgpt", "litgpt-legacy"}
    assert all(FORMATS.get(name).title for name in FORMATS)
