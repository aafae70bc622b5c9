"""Other implementations' formats on files made here: what is refused and why, and that refusing changes nothing."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zinit
from tests.golden.formats import (
    TENSORS,
    C,
    H,
    K,
    L,
    litgpt_file,
    litgpt_tensors,
    llama,
    logits,
    mistral,
    official_file,
    official_tensors,
    peft_folder,
    state,
    trained,
)


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


@pytest.mark.parametrize("format", [*TENSORS, "peft"])
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


def unsafe(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tensors of this shape that a file can claim, and that nothing may be computed with."""
    plain = torch.rand(shape)
    return {
        "claims the shape": torch.zeros(1).expand(shape),
        "torch.bool": plain > 0.5,
        "torch.int64": plain.long(),
        "torch.complex64": plain.to(torch.complex64),
        "torch.float8_e4m3fn": plain.to(torch.float8_e4m3fn),
        "torch.sparse_coo": plain.to_sparse(),
        "on 'meta'": plain.to("meta"),
        "is nested": torch.nested.nested_tensor([plain]),
        "is nested on 'cpu'": torch.nested.nested_tensor([plain], layout=torch.jagged),
        "is quantised": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "not finite: the run": plain.log() * torch.inf,
    }


@pytest.mark.parametrize("reason", unsafe((1,)))
@pytest.mark.parametrize("name", ["adapter_query.weight", "layers.0.attention.gate"])
def test_tensors_that_nothing_is_computed_with(tmp_path, name, reason):
    shape = tuple(official_tensors()[name].shape)
    refuses(official_file(tmp_path, **{name: unsafe(shape)[reason]}), rf"tensor '{re.escape(name)}' .*{reason}")


@pytest.mark.parametrize("name", ["adapter_query.weight", "layers.0.attention.gate"])
def test_a_huge_shape_is_refused_at_once(tmp_path, name):
    path = official_file(tmp_path, **{name: torch.zeros(1, 1).expand(2**40, C)})
    assert path.stat().st_size < 10_000
    refuses(path, r"claims the shape \(1099511627776, 32\), but stores 1 numbers")


def test_tensors_without_an_axis(tmp_path):
    refuses(official_file(tmp_path, **{"adapter_query.weight": torch.tensor(1.0)}), r"prompt table of shape \(\)")
    wrong = {name: torch.tensor(1.0) if "adapter_wte" in name else value for name, value in litgpt_tensors().items()}
    refuses(litgpt_file(tmp_path, wrong), r"prompts of shape \(\)", format="litgpt-legacy")


def test_what_lies_beside_an_adapter_is_not_looked_at(tmp_path):
    """A full training checkpoint holds the model's own buffers."""
    tensors = official_tensors()
    plain = zinit.import_adapter(llama(), official_file(tmp_path, **tensors), length=K).state_dict()
    beside = official_file(tmp_path, **tensors, mask=torch.ones(1).expand(9) > 0)
    found = zinit.import_adapter(llama(), beside, length=K).state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


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
        (["cap_adapter_query.weight", "adapter_query.weight", "visual_blocks.0.norm1.bias"], "no visual_query.weight"),
        (
            ["visual_query.weight", "adapter_query.weight", "llama.layers.0.attention.wq.bias"],
            "V2 multi-modal.*format='official-v2'",
        ),
        (["adapter_query.weight", "layers.0.attention.wq_scale"], "V2 chat"),
        (["lm_head.adapter_bias", "transformer.h.2.attn.adapter_wte.weight"], "adapter_v2.*format='litgpt-v2'"),
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
