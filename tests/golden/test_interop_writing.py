"""Other implementations' formats: what is written and converted, and what cannot be."""

from __future__ import annotations

import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import zinit
from tests.golden.formats import (
    IDS,
    SHAPE,
    TENSORS,
    C,
    H,
    K,
    L,
    N,
    imagebind_tensors,
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
from zinit.adapter.encoding import Features
from zinit.adapter.registries import FORMATS
from zinit.interop.convert import convert

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


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("tuned", [False, True])
def test_imagebind_llm_survives_the_way_in_and_out_to_the_bit(tmp_path, tuned, legacy):
    theirs = imagebind_tensors(legacy=legacy, tuned=tuned)
    frozen = {"llama.layers.0.attention.wq.weight": torch.randn(C, C), "image_bind.logit_scale": torch.ones(1)}
    stored = {name.replace("llama.", "llma."): x for name, x in (theirs | frozen).items()}
    torch.save({"model": stored}, tmp_path / "7B.pth")
    handle = zinit.import_adapter(llama(), tmp_path / "7B.pth", format="imagebind-llm")
    assert (handle.tuning is not None) == tuned
    assert handle.config.context_options["legacy"] == legacy
    handle.export(tmp_path / "out.pth", format="imagebind-llm")
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert written.keys() == theirs.keys() - {name for name in theirs if name.endswith("new_gate")}
    assert all(torch.equal(theirs[name], tensor) for name, tensor in written.items())


@pytest.mark.parametrize(
    ("part", "whole", "reason"),
    [
        ({"length": 2}, {}, "one prompt for each layer"),
        ({"gate": "identity"}, {}, "with tanh gates"),
        ({"separate_softmax": False}, {}, "share one softmax"),
        ({"layers": 2}, {}, f"2 of {N} layers"),
        ({}, {"context_options": {"feature_width": 6, "blocks": 2}}, "2 blocks of"),
        ({}, {"context_options": {"feature_width": 6, "hidden": 5}}, "3 blocks of 5, and .* has 3 of 128"),
        ({}, {"tuning": zinit.TuningConfig()}, "no scales, all norms"),
        ({}, {"tuning": zinit.TuningConfig(scale="none", lora_rank=2)}, "biases of q_proj, o_proj"),
        ({}, {"context": None, "context_options": {}}, "a bind network"),
    ],
)
def test_what_imagebind_llm_has_no_room_for(tmp_path, part, whole, reason):
    own = zinit.PrefixConfig(**{"length": 1, "prompt": "table+context", **part})
    settings = {"context": "bind", "context_options": {"feature_width": 6}} | whole
    handle = zinit.attach(llama(), zinit.AdapterConfig(parts={"prefix": own}, **settings), seed=0)
    with pytest.raises(zinit.CheckpointError, match=f"cannot be written as imagebind-llm.*{reason}"):
        handle.export(tmp_path / "out.pth", format="imagebind-llm")
    assert not (tmp_path / "out.pth").exists()


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
        ("litgpt", llama, {}, r"reads 'litgpt' but does not write it. Formats it writes: .*litgpt-v2, .*peft"),
    ],
)
def test_what_a_format_cannot_express_is_not_written(tmp_path, format, make, settings, reason):
    handle = trained(make(), **settings)
    with pytest.raises(zinit.CheckpointError, match=reason):
        handle.export(tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


TABLE = zinit.PrefixConfig(length=K, layers=L)
SEES = zinit.PrefixConfig(length=K, layers=L, prompt="table+context")
BRIDGE = {"feature_width": 6, "hidden": 8, "blocks": 1, "heads": 2}


def tuned(make=llama, part: zinit.PrefixConfig | None = None, **settings) -> zinit.Handle:
    images = {"context": "visual-tokens", "context_options": BRIDGE} if part and part.prompt != "table" else {}
    options = settings.pop("context_options", {})
    if options:
        images["context_options"] = BRIDGE | options
    parts = {} if part is None else {"prefix": part}
    config = zinit.AdapterConfig(parts=parts, tuning=zinit.TuningConfig(**settings), **images)
    handle = zinit.attach(make(), config, seed=2)
    with torch.no_grad():
        for seed, parameter in enumerate(handle.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return handle


WRITTEN = {  # what a format expresses though its files usually hold more: the rest is written as what changes nothing
    "official-v2-chat": [
        (None, {"scale": "input", "norms": "blocks"}),
        (TABLE, {"scale": "input", "bias": False, "linears": ("q_proj", "down_proj"), "norms": False}),
        (None, {"scale": "none", "bias": False}),
    ],
    "official-v2": [
        (SEES, {"scale": "none", "linears": ("q_proj", "up_proj")}),
        (SEES, {"scale": "none", "bias": False, "norms": False, "lora_rank": 2, "lora_linears": ("k_proj",)}),
    ],
    "litgpt-v2": [(None, {}), (None, {"scale": "none", "linears": ("k_proj", "head"), "norms": False})],
    "litgpt-v2-legacy": [(TABLE, {"linears": ("v_proj", "o_proj")}), (None, {"norms": "blocks"})],
}


@pytest.mark.filterwarnings("ignore:.*wrong rows")
@pytest.mark.parametrize(("format", "part", "settings"), [(f, *how) for f, all in WRITTEN.items() for how in all])
def test_a_tuned_adapter_is_the_same_function_after_writing(tmp_path, format, part, settings):
    handle = tuned(part=part, **settings)
    handle.export(tmp_path / "file", format=format)
    heads = {"heads": 2} if format == "official-v2" else {}
    again = zinit.import_adapter(llama(), tmp_path / "file", format=format, length=K, **heads)
    features = Features(tokens=torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(5)))
    found = []
    for one in (handle, again):
        with one.given(features=features) if part is SEES else nullcontext():
            found.append(logits(one.model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], logits(llama()), atol=1e-2)


@pytest.mark.parametrize(
    ("format", "part", "settings", "reason"),
    [
        ("official-v1", None, {}, "several parts, images or a tuning"),
        ("official-v2-chat", None, {"scale": "output"}, "scales the output .* the format scales the input"),
        ("official-v2-chat", None, {"scale": "input", "lora_rank": 2}, "it has LoRA"),
        ("official-v2-chat", None, {"scale": "input", "linears": ("all", "head")}, "tunes the output head"),
        ("official-v2-chat", SEES, {"scale": "input"}, "it takes images"),
        ("official-v2-chat", TABLE, {"scale": "input", "prompts_through": "base"}, "pass the base's projections"),
        ("official-v2", SEES, {"scale": "input"}, "scales the input .* the format has no scales"),
        ("official-v2", SEES, {"scale": "none"}, "bias of self_attn.k_proj, and the format has none"),
        ("official-v2", TABLE, {"scale": "none"}, "adds the tokens of 'visual-tokens'"),
        ("official-v2", SEES, {"scale": "none", "linears": ("q_proj",), "context_options": {"mlp_ratio": 2.0}},
         "mlp_ratio=2.0, and the format's have 4"),
        ("litgpt-v2", TABLE, {}, "wrong rows"),
        ("litgpt-v2-legacy", TABLE, {"scale": "input"}, "scales the input .* the format scales the output"),
        ("litgpt-v2-legacy", SEES, {}, "prompts come from 'table.context'"),
        ("litgpt-v2-legacy", replace(TABLE, layers=(0, 1)), {}, r"layers \[0, 1\] of 4.*topmost"),
    ],
)  # fmt: skip
def test_a_tuning_that_a_format_cannot_express_is_not_written(tmp_path, format, part, settings, reason):
    handle = tuned(part=part, **settings)
    with pytest.raises(zinit.CheckpointError, match=reason):
        handle.export(tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_other_models_encoders_and_untuned_adapters_are_not_written_as_tuned_llamas(tmp_path):
    bare = zinit.attach(llama(), TABLE)
    seeing = tuned(part=SEES, scale="none", linears=("q_proj",))
    seeing.encoder_identity = {"source": "somewhere", "bgr": False}
    for handle, format, reason in (
        (bare, "official-v2-chat", "it tunes nothing"),
        (tuned(mistral), "litgpt-v2", "model is 'mistral'"),
        (tuned(lambda: llama(num_key_value_heads=2), scale="input"), "official-v2-chat", "2 of them with keys"),
        (seeing, "official-v2", r"channels in reverse \(bgr\)"),
    ):
        with pytest.raises(zinit.CheckpointError, match=reason):
            handle.export(tmp_path / "out", format=format)
    seeing.encoder_identity["bgr"] = True
    seeing.export(tmp_path / "out", format="official-v2")


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


@pytest.mark.integration
def test_the_function_attach_is_not_hidden_by_its_module():
    code = "import zinit; zinit.import_adapter; zinit.Handle; import zinit.adapter.handle; print(zinit.attach.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "attach"


def test_every_format_is_one_that_convert_knows():
    assert set(FORMATS) == {*TENSORS, "peft"}
    assert {name for name in FORMATS if not FORMATS.get(name).write} == {"litgpt", "litgpt-legacy"}
    assert all(FORMATS.get(name).title for name in FORMATS)


@pytest.mark.filterwarnings("ignore:.*wrong rows")
@pytest.mark.parametrize("format", TENSORS)
def test_every_format_takes_all_that_its_file_holds(tmp_path, format):
    """Each tensor of the file moves something that the adapter learns: none is left aside in silence."""
    make, options = TENSORS[format]
    tensors, model = make(), llama()

    def read(tensors):
        torch.save({"model": tensors}, tmp_path / "adapter.pth")
        handle = zinit.import_adapter(model, tmp_path / "adapter.pth", format=format, length=K, **options)
        handle.detach()
        return handle.state_dict()  # after detaching, which leaves it its own

    whole = read(tensors)
    for name, tensor in tensors.items():
        if name.endswith("gate") and "layers.0." in name:  # below the adapted layers
            continue
        moved = read({**tensors, name: tensor + 0.5})
        assert any(not torch.equal(moved[own], whole[own]) for own in whole), name
