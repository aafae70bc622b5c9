"""Numbers that other implementations produced, from their own files: logits, loss, gradients, greedy generation.

The files lie beside the repository, in ``../shared/golden``; where they are absent these tests are skipped.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import zinit
from tests.golden.cases import (
    CASES,
    GOLDEN,
    REFUSED,
    WITH_GENERATION,
    WITH_LOSS,
    adapted,
    adapter_path,
    assert_close,
    base_model,
    encoder_of,
    seen,
    tensors,
)
from tests.golden.gradients import gradients_in_file_layout
from zinit.adapter.encoding import Features

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden files: {GOLDEN} is absent")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_logits(case, implementation):
    model, handle = adapted(case, implementation)
    inputs, expected = tensors(case)
    rows = {"input_ids": inputs.get("full_ids", inputs["input_ids"])}
    if "attention_mask" in inputs:
        rows["attention_mask"] = inputs["attention_mask"]
    with torch.no_grad(), seen(handle, inputs):
        got = model(**rows).logits
        with handle.disabled():
            base = model(**rows).logits
    counted = torch.ones_like(rows["input_ids"], dtype=torch.bool)
    if "full_ids" in inputs:  # a row counts up to its own end
        ends = inputs["prompt_lengths"] + expected["generated_ids"].shape[1]
        counted = torch.arange(counted.shape[1]) < ends[:, None]
    assert_close(got[counted], expected["logits"][counted])
    assert_close(base[counted], expected["base_logits"][counted])
    if case == "official-v1-text-zero-gate":
        assert torch.equal(got, base)
    else:
        assert (got - base).abs().max() > 1  # the case shows something


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", WITH_LOSS)
def test_loss_and_gradients(case, implementation):
    model, handle = adapted(case, implementation)
    inputs, expected = tensors(case)
    with seen(handle, inputs):
        logits = model(inputs["input_ids"], attention_mask=inputs.get("attention_mask")).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=CASES[case][1])
    loss.backward()
    assert_close(loss.detach(), expected["loss"])
    got = gradients_in_file_layout(case, handle)
    wanted = {name.removeprefix("grad."): value for name, value in expected.items() if name.startswith("grad.")}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(got[name], gradient, absolute=1e-6)


def test_features_pass_the_bind_network_as_theirs_do():
    _, handle = adapted("imagebind-llm")
    inputs, expected = tensors("imagebind-llm")
    with torch.no_grad():
        made = handle.shared["context"](inputs["imagebind_feats"]).tokens
    assert_close(made.view_as(expected["visual_feats"]), expected["visual_feats"])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", WITH_GENERATION)
def test_greedy_generation(case, implementation):
    model, handle = adapted(case, implementation)
    inputs, expected = tensors(case)
    prompts = inputs.get("prompt_ids", inputs["input_ids"])
    for row, (prompt, length) in enumerate(zip(prompts, inputs["prompt_lengths"], strict=True)):
        with seen(handle, inputs, slice(row, row + 1)):
            out = model.generate(
                prompt[None, :length],
                do_sample=False,
                max_new_tokens=expected["generated_ids"].shape[1],
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        assert torch.equal(out.sequences[0, length:], expected["generated_ids"][row])
        assert_close(torch.cat(out.logits), expected["step_logits"][row])


def test_every_case_is_either_imported_or_refused():
    assert {path.name for path in GOLDEN.iterdir() if path.is_dir()} == CASES.keys() | REFUSED.keys()
    assert all((GOLDEN / case / "meta.json").is_file() for case in CASES)


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_prefix_cannot_express_is_refused_with_the_reason(case):
    model, (how, reason) = base_model(case), REFUSED[case]
    before = {name for name, _ in model.named_modules()}, dict(vars(model))
    with pytest.raises(zinit.CheckpointError, match=reason):
        zinit.import_adapter(model, adapter_path(case), **how)
    assert ({name for name, _ in model.named_modules()}, dict(vars(model))) == before


def test_litgpt_since_0_5_5_warns_that_keys_and_values_were_imported():
    with pytest.warns(UserWarning, match="wrong rows"):
        handle = zinit.import_adapter(
            base_model("litgpt-adapter-v1"), adapter_path("litgpt-adapter-v1"), format="litgpt"
        )
    assert handle.config.parametrization == "key_value"


def test_the_length_and_the_squashing_that_the_file_does_not_say_are_taken_from_the_caller():
    case = "official-v1-text"
    assert json.loads((GOLDEN / case / "meta.json").read_text())["sizes"]["K"] == 5
    for length, reason in ((4, "not 4 prompts"), (10, "not 10 prompts"), (15, "trained gate"), (3, "not 3 prompts")):
        with pytest.raises(zinit.CheckpointError, match=reason):
            zinit.import_adapter(base_model(case), adapter_path(case), length=length)
    model = base_model(case)
    zinit.import_adapter(model, adapter_path(case), length=5, gate="identity")
    inputs, expected = tensors(case)
    with torch.no_grad():
        difference = (model(inputs["input_ids"]).logits - expected["logits"]).abs().max()
    assert difference > 0.1 * expected["logits"].abs().max()  # 0.16 by the case's own account


def test_files_of_older_litgpt_versions_must_be_named_so():
    """The same file, read as of the other generation, is another adapter: nothing in it tells them apart."""
    case = "litgpt-adapter-v1"
    model = base_model(case)
    zinit.import_adapter(model, adapter_path(case), format="litgpt-legacy")
    inputs, expected = tensors(case)
    with torch.no_grad():
        difference = (model(inputs["input_ids"]).logits - expected["logits"]).abs().max()
    assert difference > 0.5 * expected["logits"].abs().max()  # 0.89 by the case's own account


@pytest.mark.parametrize("case", ["peft-llama", "peft-mistral"])
def test_peft_reads_what_we_write_of_its_own_adapter(case, tmp_path):
    peft = pytest.importorskip("peft")
    _, handle = adapted(case)
    handle.export(tmp_path, format="peft")
    original = load_file(adapter_path(case) / "adapter_model.safetensors")
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert original.keys() == written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)
    theirs = peft.PeftModel.from_pretrained(base_model(case), tmp_path).eval()
    inputs, expected = tensors(case)
    with torch.no_grad():
        got = theirs(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert_close(got, expected["logits"])


def test_an_official_file_survives_the_way_in_and_out_to_the_bit(tmp_path):
    case = "official-v1-text"
    _, handle = adapted(case)
    handle.export(tmp_path / "adapter.pth", format="official-v1")
    original = torch.load(adapter_path(case), weights_only=True)
    written = torch.load(tmp_path / "adapter.pth", weights_only=True)
    assert original.keys() - written.keys() == {"layers.0.attention.gate"}  # the one that nothing reads
    assert all(torch.equal(original[name], written[name]) for name in written)


def test_written_for_the_inference_script_it_holds_the_squashed_gates(tmp_path):
    case = "official-v1-text"
    _, handle = adapted(case)
    handle.export(tmp_path / "adapter.pth", format="official-v1", reader="inference")
    model = base_model(case)
    zinit.import_adapter(model, tmp_path / "adapter.pth", length=5, gate="identity")
    inputs, expected = tensors(case)
    with torch.no_grad():
        assert_close(model(inputs["input_ids"]).logits, expected["logits"])


TWICE = [case for case in CASES if case.startswith("official-v2") or case == "litgpt-adapter-v2-legacy"]


@pytest.mark.parametrize("case", TWICE)
def test_a_tuned_adapter_survives_the_way_in_and_out_to_the_bit(case, tmp_path):
    """What is read again is what was read; and so is the file, but for what nothing reads, and factors of gates."""
    _, handle = adapted(case)
    how = CASES[case][0]
    handle.export(tmp_path / "adapter.pth", format=how["format"])
    again = zinit.import_adapter(base_model(case), tmp_path / "adapter.pth", **how, **encoder_of(case))
    first, second = handle.state_dict(), again.state_dict()
    assert again.config == handle.config
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    original, written = (torch.load(path, weights_only=True) for path in (adapter_path(case), tmp_path / "adapter.pth"))
    if "config" in original:
        assert [written["config"][name] for name in ("w_bias", "w_lora")] == [True, case.endswith("lora")]
    unused = json.loads((GOLDEN / case / "meta.json").read_text()).get("unused_parameters", [])
    original, written = original["model"], written["model"]
    assert {name for name in original.keys() ^ written.keys() if ".layers.0." not in f".{name}"} <= set(unused)
    same = [name for name in written if "lora" not in case or not name.endswith("gate")]
    assert [name for name in same if not torch.equal(written[name], original[name])] == []


def test_v2_files_for_litgpt_since_0_5_5_hold_no_prompts(tmp_path):
    """Its tuning alone survives; a prompt read from the wrong rows cannot be told from its keys and values."""
    case = "litgpt-adapter-v2"
    _, handle = adapted(case)
    with pytest.raises(zinit.CheckpointError, match=r"wrong rows.*'litgpt-v2-legacy' can hold prompts"):
        handle.export(tmp_path / "adapter", format="litgpt-v2")
    model = base_model(case)
    config = zinit.AdapterConfig(parts={}, tuning=handle.config.tuning)
    alone = zinit.attach(model, config)
    alone.load_state_dict({name: x for name, x in handle.state_dict().items() if name.startswith("tuning.")})
    alone.export(tmp_path / "adapter", format="litgpt-v2")
    with pytest.warns(UserWarning, match="wrong rows"):
        again = zinit.import_adapter(base_model(case), tmp_path / "adapter", format="litgpt-v2")
    ids = tensors(case)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, model(ids).logits)
    assert not any(gates.any() for gates in again.gates().values())
    own = again.state_dict()
    assert all(torch.equal(own[name], x) for name, x in alone.state_dict().items())


def test_a_caption_file_is_read_as_v2s_bridge_on_v1s_prompts(tmp_path):
    """No such file was ever seen but by a mirror of its reader: V2's golden numbers under the names that it has."""
    case = "official-v2-multimodal-bias"
    stored = torch.load(adapter_path(case), weights_only=True)["model"]
    bridge = {name: x for name, x in stored.items() if name.startswith(("clip_proj", "visual_"))}
    gates = {f"layers.{i}.attention.cap_gate": stored[f"llama.layers.{i}.attention.gate"] for i in range(1, 4)}
    table = {"cap_adapter_query.weight": stored["adapter_query.weight"], "adapter_query.weight": torch.ones(15, 64)}
    text = {f"layers.{i}.attention.gate": torch.full((1,), float(i)) for i in range(4)}
    torch.save({**table, **bridge, **gates, **text}, tmp_path / "cap.pth")
    model, (inputs, expected) = base_model(case), tensors(case)
    with pytest.warns(UserWarning, match="two adapters.*branch='text'"):
        handle = zinit.import_adapter(model, tmp_path / "cap.pth", heads=4)
    features = Features(tokens=inputs["clip_feats"])
    with torch.no_grad():
        tokens = handle.shared["context"](features).tokens
        assert_close(tokens, expected["visual_query"])
        with handle.given(features=features):
            found = model(inputs["input_ids"]).logits
    other = base_model(case)
    plain = zinit.attach(other, zinit.PrefixConfig(length=5, layers=3))
    with torch.no_grad():
        for i, site in enumerate(plain.prefixes, 1):
            plain.prefixes[site].prompt.weight.copy_(stored["adapter_query.weight"][5 * (i - 1) : 5 * i])
            plain.prefixes[site].gate.copy_(gates[f"layers.{i}.attention.cap_gate"].flatten())
        with plain.context(tokens):
            assert_close(found, other(inputs["input_ids"]).logits)
        assert (found - model(inputs["input_ids"]).logits).abs().max() > 0.1 * found.abs().max()
    written = zinit.import_adapter(base_model(case), tmp_path / "cap.pth", branch="text", length=5)
    assert (written.config.gate_per, written.num_trainable) == ("layer", 15 * 64 + 3)
