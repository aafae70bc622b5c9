"""Adapters on the disk: small, whole, and only for the model they were made for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import zinit
from tests.contract.cases import causal_lm, text_batch
from zinit.adapter import file as adapter_file
from zinit.adapter.file import AdapterFile
from zinit.adapter.state import ATTRIBUTE
from zinit.errors import CheckpointError, ConfigError
from zinit.files import write_atomically

OPEN = zinit.PrefixConfig(length=5, layers=2, gate_init=0.7)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**text_batch("left")).logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter of the tiny LLaMA."""
    model = causal_lm("Llama")
    model.config._name_or_path = "tiny/llama"  # pyright: ignore
    zinit.attach(model, OPEN, seed=0).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_refused(model: Any, folder: Path | str, match: str, **settings: Any) -> None:
    """Loading raises `CheckpointError` with this text and leaves the model as it was."""
    keys, output, flags = list(model.state_dict()), logits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(CheckpointError, match=match):
        zinit.load(model, folder, **settings)
    assert not hasattr(model, ATTRIBUTE)
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize("wrong", [torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.nan, torch.inf])
def test_tensors_with_other_numbers_are_refused(saved: Path, wrong: torch.dtype | float) -> None:
    file = AdapterFile.read(saved)
    name, tensor = next(iter(file.tensors.items()))
    file.tensors[name] = tensor.to(wrong) if isinstance(wrong, torch.dtype) else torch.full_like(tensor, wrong)
    file.write(saved)
    says = str(wrong) if isinstance(wrong, torch.dtype) else "not finite"
    assert_refused(causal_lm("Llama"), saved, rf"its tensor '{name}' .*{says}")


def test_a_dtype_that_safetensors_does_not_know_is_one_message(saved: Path) -> None:
    data = (saved / "adapter.safetensors").read_bytes()
    changed = data.replace(b'"F32"', b'"F6_E2M3"', 1)
    size = int.from_bytes(data[:8], "little")
    changed = (size + len(changed) - len(data)).to_bytes(8, "little") + changed[8:]
    (saved / "adapter.safetensors").write_bytes(changed)
    description = json.loads((saved / "adapter.json").read_text())
    description["sha256"] = hashlib.sha256(changed).hexdigest()
    (saved / "adapter.json").write_text(json.dumps(description))
    assert_refused(causal_lm("Llama"), saved, "is no safetensors file that can be read: .* Save it again")


# --- size ---------------------------------------------------------------------------------------------------------


def test_seven_billion_parameters_need_five_megabytes(tmp_path: Path) -> None:
    """The paper's table: K=10, L=30 on LLaMA-7B trains 1.2 M parameters and stores 4.9 MB."""
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())  # its defaults are LLaMA-7B
    handle = zinit.attach(model, zinit.PrefixConfig(length=10, layers=30), device="cpu", seed=0)
    assert handle.num_trainable == 1_229_760
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_229_760
    assert [site.name for site in handle.sites] == [f"model.layers.{i}.self_attn" for i in range(2, 32)]
    handle.save(tmp_path)
    size = (tmp_path / "adapter.safetensors").stat().st_size
    assert 4.90e6 < size < 4.95e6
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == 4_919_040  # noqa: SIM118


def test_what_the_description_says(saved: Path) -> None:
    description = json.loads((saved / "adapter.json").read_text())
    assert description["format_version"] == 1
    assert description["backbone"] == "llama"
    since = {"prompt": "table", "prompts": "table"}  # version 1 of the format is still written, without these
    assert description["config"] | since == OPEN.to_dict()
    assert not since.keys() & description["config"].keys()
    assert description["versions"]["torch"] == torch.__version__
    assert len(description["sha256"]) == 64
    model = description["model"]
    expected = {"type": "llama", "num_layers": 3, "width": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    assert {name: model[name] for name in expected} == expected
    assert model["name_or_path"] == "tiny/llama"
    assert len(model["key_probe"]) == 16


@pytest.mark.parametrize("new", [{"gate": "query"}, {"separate_softmax": False}, {"prompts": "hyper"}], ids=str)
def test_what_version_1_has_no_words_for_is_version_2(tmp_path: Path, new: dict[str, Any]) -> None:
    """So that an older zinit says that it is too old, and not that the file is damaged."""
    zinit.attach(causal_lm("Llama"), zinit.PrefixConfig(length=3, **new), seed=0).save(tmp_path)
    assert json.loads((tmp_path / "adapter.json").read_text())["format_version"] == 2
    assert zinit.load(causal_lm("Llama"), tmp_path).config == zinit.PrefixConfig(length=3, **new)


def test_saving_creates_folders_and_replaces(tmp_path: Path) -> None:
    handle = zinit.attach(causal_lm("Llama"), OPEN, seed=0)
    handle.save(tmp_path / "a" / "b")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(1)
    handle.save(tmp_path / "a" / "b")
    loaded = zinit.load(causal_lm("Llama"), tmp_path / "a" / "b")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in handle.state_dict().items())
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"adapter.safetensors", "adapter.json"}


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    model = causal_lm("Llama")
    before = torch.get_rng_state()
    zinit.load(model, saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bfloat16_host_loads_what_a_float32_host_saved(saved: Path) -> None:
    loaded = zinit.load(causal_lm("Llama").to(torch.bfloat16), saved)
    expected = zinit.attach(causal_lm("Llama"), OPEN, seed=0).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


# --- another model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        (
            "Llama",
            {"num_hidden_layers": 4},
            "num_layers is 4 here, but 3 where it was trained. Load it onto tiny/llama",
        ),
        ("Llama", {"hidden_size": 48, "head_dim": 8}, "width is 48 here, but 32"),
        ("Llama", {"num_attention_heads": 8, "head_dim": 8}, "num_heads is 8 here, but 4"),
        ("Llama", {"num_key_value_heads": 4}, "num_kv_heads is 4 here, but 2"),
        ("Llama", {"head_dim": 12}, "head_dim is 12 here, but 8"),
        ("Mistral", {"sliding_window": None}, "type is 'mistral' here, but 'llama'"),
    ],
)
def test_another_shape_is_refused_by_the_field(saved: Path, kind: str, changes: dict[str, Any], match: str) -> None:
    assert_refused(causal_lm(kind, **changes), saved, match)


def test_other_weights_of_the_same_shape_are_refused(saved: Path) -> None:
    other: Any = causal_lm("Llama")
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.std() * torch.empty(parameter.shape).normal_(generator=generator))
    assert_refused(other, saved, "key_probe .* agrees only to .* check_weights=False")
    assert zinit.load(other, saved, check_weights=False).active


def test_a_slightly_tuned_base_is_accepted(saved: Path) -> None:
    base = causal_lm("Llama")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
    assert zinit.load(base, saved).active


def test_a_model_of_another_kind_is_refused(saved: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"made for another model: backbone is 'llama'.*Sequential"):
        zinit.load(model, saved)


def test_an_adapter_of_an_unknown_backbone_is_refused(saved: Path) -> None:
    edit(saved, lambda description: description.update(backbone="lama"))
    assert_refused(causal_lm("Llama"), saved, "backbone is 'lama'.*Did you mean 'llama'")


# --- damage -------------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "adapter.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-tensors": (lambda f: (f / "adapter.safetensors").unlink(), "holds no adapter.safetensors"),
    "no-description": (lambda f: (f / "adapter.json").unlink(), "holds no adapter.json"),
    "tensors-cut": (lambda f: cut(f / "adapter.safetensors", 0.5), "adapter.safetensors is damaged"),
    "tensors-empty": (lambda f: cut(f / "adapter.safetensors", 0), "adapter.safetensors is damaged"),
    "header-flipped": (lambda f: flip(f / "adapter.safetensors", 30), "adapter.safetensors is damaged"),
    "tensor-flipped": (lambda f: flip(f / "adapter.safetensors", -5), "adapter.safetensors is damaged"),
    "tensors-grown": (
        lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes() + b"\0"),
        "adapter.safetensors is damaged",
    ),
    "description-cut": (lambda f: cut(f / "adapter.json", 0.5), "adapter.json is damaged"),
    "description-empty": (lambda f: cut(f / "adapter.json", 0), "adapter.json is damaged"),
    "not-json": (lambda f: (f / "adapter.json").write_text("K = 10"), "adapter.json is damaged"),
    "not-text": (lambda f: (f / "adapter.json").write_bytes(b"\xff\xfe\x00"), "adapter.json is damaged"),
    "a-list": (lambda f: (f / "adapter.json").write_text("[]"), "adapter.json is damaged"),
    "null": (lambda f: (f / "adapter.json").write_text("null"), "adapter.json is damaged"),
    "a-folder": (
        lambda f: ((f / "adapter.json").unlink(), (f / "adapter.json").mkdir()),
        "holds no adapter.json",
    ),
    "no-version": (lambda f: edit(f, lambda d: d.pop("format_version")), "lacks 'format_version'"),
    "no-config": (lambda f: edit(f, lambda d: d.pop("config")), "lacks 'config'"),
    "no-sum": (lambda f: edit(f, lambda d: d.pop("sha256")), "lacks 'sha256'"),
    "odd-probe": (lambda f: edit(f, lambda d: d["model"].update(key_probe=[1.0])), "key_probe .* agrees only to 0.00"),
    "no-probe-numbers": (lambda f: edit(f, lambda d: d["model"].update(key_probe=["a"] * 16)), "key_probe"),
    "later-version": (lambda f: edit(f, lambda d: d.update(format_version=3)), "format version 3.*Upgrade zinit"),
    "odd-version": (lambda f: edit(f, lambda d: d.update(format_version="one")), "adapter.json is damaged"),
    "odd-config": (lambda f: edit(f, lambda d: d.update(config=[])), "adapter.json is damaged"),
    "unknown-setting": (lambda f: edit(f, lambda d: d["config"].update(lenght=3)), "Did you mean 'length'"),
    "odd-model": (lambda f: edit(f, lambda d: d.update(model="llama")), "adapter.json is damaged"),
    "odd-backbone": (lambda f: edit(f, lambda d: d.update(backbone=3)), "adapter.json is damaged"),
    "other-length": (lambda f: edit(f, lambda d: d["config"].update(length=6)), r"prompt.weight has shape \(5, 32\)"),
    "other-gate": (lambda f: edit(f, lambda d: d["config"].update(gate_per="layer")), r"gate has shape \(4,\)"),
    "fewer-layers": (lambda f: edit(f, lambda d: d["config"].update(layers=1)), "unexpected"),
    "more-layers": (lambda f: edit(f, lambda d: d["config"].update(layers=3)), "missing"),
    "too-many-layers": (lambda f: edit(f, lambda d: d["config"].update(layers=9)), "has 3 attention layers"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_the_model_unchanged(saved: Path, damage: str) -> None:
    spoil, match = DAMAGE[damage]
    spoil(saved)
    assert_refused(causal_lm("Llama"), saved, match)


def test_tensors_that_are_no_safetensors_are_refused(saved: Path) -> None:
    """The sum may be right and the file still nonsense: somebody made it by hand."""
    import hashlib

    (saved / "adapter.safetensors").write_bytes(b"not tensors")
    edit(saved, lambda d: d.update(sha256=hashlib.sha256(b"not tensors").hexdigest()))
    assert_refused(causal_lm("Llama"), saved, "is no safetensors file")


def test_any_flipped_bit_is_noticed_or_harmless(saved: Path, tmp_path: Path) -> None:
    """Every 11th bit of the description and many of the tensors' file: refused, or the adapter is the very same."""
    model = causal_lm("Llama")
    with_adapter = zinit.load(model, saved)
    expected = logits(model)
    with_adapter.detach()
    frozen = logits(model)
    assert not torch.equal(expected, frozen)
    refused = 0
    for name, every in (("adapter.json", 11), ("adapter.safetensors", 331)):
        original = (saved / name).read_bytes()
        for position in range(0, 8 * len(original), every):
            flip(saved / name, position // 8, position % 8)
            try:
                handle = zinit.load(model, saved)
            except CheckpointError:
                refused += 1
            else:
                assert name == "adapter.json"
                assert torch.equal(logits(model), expected), f"bit {position} of {name}"
                handle.detach()
            (saved / name).write_bytes(original)
    assert refused > 150
    assert torch.equal(logits(model), frozen)


def test_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    model = causal_lm("Llama")
    assert_refused(model, tmp_path / "nowhere", "there is no adapter folder")
    assert_refused(model, "./nowhere", "there is no adapter folder")
    assert_refused(model, "nobody/no-such-adapter", "there is no adapter folder .*, and the Hub did not give one")
    (tmp_path / "file").write_text("")
    assert_refused(model, tmp_path / "file", "there is no adapter folder")


def test_a_failed_load_keeps_the_adapter_that_was_there(saved: Path) -> None:
    model = causal_lm("Llama")
    first = zinit.attach(model, OPEN, name="first", seed=3)
    output = logits(model)
    edit(saved, lambda description: description["config"].update(length=6))
    with pytest.raises(CheckpointError, match="has shape"):
        zinit.load(model, saved, name="second")
    assert first.active
    assert torch.equal(logits(model), output)
    assert all(parameter.requires_grad for parameter in first.parameters())
    with pytest.raises(ConfigError, match="no adapter named 'second'"):
        zinit.get_handle(model, "second")


def test_state_of_another_shape_changes_nothing() -> None:
    handle = zinit.attach(causal_lm("Llama"), OPEN, seed=0)
    before = {name: tensor.clone() for name, tensor in handle.state_dict().items()}
    wrong = {name: tensor + 1 for name, tensor in before.items()}
    last = list(wrong)[-1]
    for spoiled in (
        {name: tensor for name, tensor in wrong.items() if name != last},
        wrong | {"more": torch.zeros(1)},
        wrong | {last: torch.zeros(2, 2)},
    ):
        with pytest.raises(CheckpointError):
            handle.load_state_dict(spoiled)
        assert all(torch.equal(tensor, before[name]) for name, tensor in handle.state_dict().items())


# --- atomic writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_a_clear_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    handle = zinit.attach(causal_lm("Llama"), zinit.PrefixConfig(length=2))
    with pytest.raises(CheckpointError, match=r"cannot be written to .*No space left"):
        handle.save(saved)
    monkeypatch.undo()
    assert zinit.load(causal_lm("Llama"), saved).config == OPEN


def test_a_kill_between_the_two_files_never_mixes_adapters(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def killed(path: Path, data: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_atomically(path, data)

    monkeypatch.setattr(adapter_file, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        zinit.attach(causal_lm("Llama"), OPEN, seed=7).save(saved)
    monkeypatch.undo()
    assert_refused(causal_lm("Llama"), saved, "not the file that adapter.json beside it describes")


def test_files_have_the_usual_permissions(saved: Path) -> None:
    (saved / "plain").write_text("")
    usual = (saved / "plain").stat().st_mode
    assert (saved / "adapter.safetensors").stat().st_mode == usual
    assert (saved / "adapter.json").stat().st_mode == usual


def test_what_is_read_is_what_was_written(saved: Path) -> None:
    file = AdapterFile.read(saved)
    handle = zinit.attach(causal_lm("Llama"), OPEN, seed=0)
    assert file.config == OPEN
    assert file.backbone == "llama"
    assert file.fingerprint["num_layers"] == 3
    assert set(file.tensors) == set(handle.state_dict())
