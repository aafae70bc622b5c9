"""Numbers that other implementations produced, from their own files: logits, loss, gradients, greedy generation.

The files lie beside the repository, in ``../shared/golden``; where they are absent these tests are skipped.
"""

from __future__ import annotations

import json
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import zinit
from zinit.adapter.encoding import Features

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden files: {GOLDEN} is absent")

CASES = {  # case: how it is imported, and the label that its loss ignores (None: no loss in the case)
    "official-v1-text": ({"format": "official-v1", "length": 5}, 0),
    "official-v1-text-zero-gate": ({"format": "official-v1", "length": 5}, 0),
    "official-v1-text-greedy": ({"format": "official-v1", "length": 5, "gate": "identity"}, None),
    "official-v1-initial-scalar-greedy": ({"format": "official-v1", "length": 5}, None),
    "peft-llama": ({"format": "peft"}, -100),
    "peft-mistral": ({"format": "peft"}, -100),
    "litgpt-adapter-v1": ({"format": "litgpt"}, -100),
    "litgpt-adapter-v1-legacy": ({"format": "litgpt-legacy"}, -100),
    "official-v2-chat": ({"format": "official-v2-chat", "length": 5}, 0),
    "official-v2-chat-noprompt": ({"format": "official-v2-chat"}, 0),
    "official-v2-multimodal-bias": ({"format": "official-v2", "length": 5, "heads": 4}, 0),
    "official-v2-multimodal-lora": ({"format": "official-v2", "length": 5, "heads": 4}, 0),
    "imagebind-llm": ({"format": "imagebind-llm"}, 0),
    "litgpt-adapter-v2": ({"format": "litgpt-v2"}, -100),
    "litgpt-adapter-v2-legacy": ({"format": "litgpt-v2-legacy"}, -100),
}
WITH_LOSS = [case for case, (_, ignored) in CASES.items() if ignored is not None]
WITH_GENERATION = [case for case in CASES if not case.startswith("official-v1-text") or case.endswith("greedy")]
REFUSED = {  # case: how one might try, and what the message must name
    "peft-gpt2": ({"format": "peft"}, r"after the output projection.*off by up to 145% of its size"),
}


def adapter_path(case: str) -> Path:
    folder = GOLDEN / case
    return next(path for name in ("adapter.pth", "adapter", "lit_model.pth.adapter*") for path in folder.glob(name))


def base_model(case: str, implementation: str = "sdpa") -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        GOLDEN / case / "base", attn_implementation=implementation, dtype=torch.float32
    ).eval()


def adapted(case: str, implementation: str = "sdpa") -> tuple[torch.nn.Module, zinit.Handle]:
    model = base_model(case, implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model, zinit.import_adapter(model, adapter_path(case), **CASES[case][0], **encoder_of(case))


def encoder_of(case: str) -> dict:
    """The case's own vision tower, where it has one."""
    return {"encoder": GOLDEN / case / "vision"} if (GOLDEN / case / "vision").is_dir() else {}


def seen(handle: zinit.Handle, inputs: dict, rows: slice = slice(None)) -> AbstractContextManager:
    """The images of a case's rows, or their features, where it has some."""
    if "imagebind_feats" in inputs:
        return handle.given(features=inputs["imagebind_feats"][rows])
    return handle.given(image=inputs["images"][rows]) if "images" in inputs else nullcontext()


def tensors(case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return load_file(GOLDEN / case / "inputs.safetensors"), load_file(GOLDEN / case / "expected.safetensors")


def assert_close(got: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5, absolute: float = 0.0) -> None:
    assert got.shape == expected.shape
    difference, bound = (got - expected).abs().max().item(), relative * expected.abs().max().item() + absolute
    assert difference <= bound, f"{difference:.3g} > {bound:.3g}"


def fused_blocks(module: torch.nn.Module) -> torch.Tensor:
    """LitGPT's fused projection by blocks of D rows, (H + 2G, D, C): all queries, all keys, all values."""
    weight = torch.cat([module.q_proj.weight, module.k_proj.weight, module.v_proj.weight])
    return weight.unflatten(0, (-1, module.head_dim))


def gradients_in_file_layout(case: str, handle: zinit.Handle) -> dict[str, torch.Tensor]:
    """Gradients of the imported parameters, under the names and in the shapes of the adapter's own file."""
    own = {name: parameter.grad for name, parameter in handle.named_parameters()}
    prompts = {site.name: own.get(f"{site.name}.prompt.weight") for site in handle.sites}
    found = {}
    for index, site in enumerate(handle.sites, start=4 - len(handle.sites)):
        gate = own[f"{site.name}.gate"]
        if case == "imagebind-llm":
            found[f"llama.layers.{index}.attention.gate"] = gate.view(1, -1, 1, 1)
        elif case.startswith("official-v2-multimodal"):
            found |= gate_gradients(case, index, gate)
        elif case.startswith("official"):
            found[f"layers.{index}.attention.gate"] = gate.view(1, -1, 1, 1)
        elif case.startswith("peft"):
            found[f"base_model.model.{site.name}.adaption_gate"] = gate
            found[f"base_model.model.{site.name}.adaption_prompt"] = prompts[site.name][None]
        else:
            found[f"transformer.h.{index}.attn.gating_factor"] = gate.view(1, 1, -1, 1)
            prompt = prompts[site.name]
            if prompt is None:  # through the rows that LitGPT used: key of group g is block g(H/G + 2) + H/G
                blocks, per_group = fused_blocks(site.module), site.num_heads // site.num_kv_heads
                prompt = torch.zeros(own[f"{site.name}.key"].shape[1], site.width)
                scale = fused_vector(handle, site, "scale")
                for group in range(site.num_kv_heads):
                    row = group * (per_group + 2) + per_group
                    prompt += (own[f"{site.name}.key"][group] * scale[row]) @ blocks[row]
                    prompt += (own[f"{site.name}.value"][group] * scale[row + 1]) @ blocks[row + 1]
            found[f"transformer.h.{index}.attn.adapter_wte.weight"] = prompt
    if case.startswith("official") and prompts:
        found["adapter_query.weight"] = torch.cat(list(prompts.values()))
    if case == "imagebind-llm":
        found["prefix_query.weight"] = torch.cat(list(prompts.values()))
    tuned = tuned_gradients(case, handle, own)
    if with_images(case):
        made = bind_gradients(own) if case == "imagebind-llm" else bridge_gradients(own)
        tuned = {f"llama.{name}": gradient for name, gradient in tuned.items()} | made
    return found | tuned


def gate_gradients(case: str, index: int, effective: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a gate and, in files with LoRA, of its factor, by that of their product."""
    stored = torch.load(adapter_path(case), weights_only=True)["model"]
    name = f"llama.layers.{index}.attention."
    factor, squashed = stored.get(f"{name}new_gate"), stored[f"{name}gate"].flatten().tanh()
    if factor is None:
        return {f"{name}gate": effective.view(1, -1, 1, 1)}
    through_tanh = effective * factor.flatten() * (1 - squashed**2)
    return {
        f"{name}gate": through_tanh.view(1, -1, 1, 1),
        f"{name}new_gate": (effective * squashed).sum().view(1, 1, 1, 1),
    }


BRIDGE = {"proj_in": "clip_proj", "norm_in": "clip_proj_norm", "proj_out": "visual_proj",
          "norm_out": "visual_proj_norm"}  # fmt: skip
BLOCK = {"norm1": "norm1", "norm2": "norm2", "self_attn.out_proj": "attn.proj", "linear1": "mlp.fc1",
         "linear2": "mlp.fc2"}  # fmt: skip


BIND = {"gate": "f1", "down": "f2", "up": "f3"}


def with_images(case: str) -> bool:
    """Whether its names begin with the language model's or the bridge's."""
    return "multimodal" in case or case == "imagebind-llm"


def bridge_gradients(own: dict) -> dict[str, torch.Tensor]:
    """Of the module that makes visual tokens."""
    found = {}
    for name, gradient in own.items():
        path, _, kind = name.removeprefix("shared.context.").rpartition(".")
        if name == "shared.context.query":
            found["visual_query.weight"] = gradient
        elif name.startswith("shared.context.blocks."):
            _, number, inside = path.split(".", 2)
            if kind.startswith("in_proj_"):
                inside, kind = "attn.qkv", kind.removeprefix("in_proj_")
            found[f"visual_blocks.{number}.{BLOCK.get(inside, inside)}.{kind}"] = gradient
        elif name.startswith("shared.context."):
            found[f"{BRIDGE[path]}.{kind}"] = gradient
    return found


def bind_gradients(own: dict) -> dict[str, torch.Tensor]:
    """Of the bind network."""
    found = {}
    for name, gradient in own.items():
        if name.startswith("shared.context."):
            *block, layer, kind = name.removeprefix("shared.context.").split(".")
            number = f"_{int(block[1]) + 1}" if block else ""
            found[f"image_bind_{BIND.get(layer, layer)}{number}.{kind}"] = gradient
    return found


def fused_vector(handle: zinit.Handle, site: zinit.AttentionSite, kind: str, gradient: bool = False) -> torch.Tensor:
    """(H + 2G, D), a scale or bias of LitGPT's fused projection; neutral where there is none."""
    tensors = dict(handle.named_parameters())
    found = [tensors.get(f"tuning.{site.name}.{part}_proj.{kind}") for part in "qkv"]
    if any(vector is None for vector in found):
        return torch.ones(site.num_heads + 2 * site.num_kv_heads, site.head_dim)
    return torch.cat([vector.grad if gradient else vector for vector in found]).detach().view(-1, site.head_dim)


OFFICIAL = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "down_proj": "w2",
            "up_proj": "w3"}  # fmt: skip
LITGPT = {"self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2",
          "mlp.down_proj": "mlp.proj"}  # fmt: skip
NORMS = {"input_layernorm": ("attention_norm", "norm_1"), "post_attention_layernorm": ("ffn_norm", "norm_2")}


def tuned_gradients(case: str, handle: zinit.Handle, own: dict) -> dict[str, torch.Tensor]:
    """As `gradients_in_file_layout`, of scales, biases and norms."""
    found, official = {}, case.startswith("official") or with_images(case)
    for name, gradient in own.items():
        if not name.startswith("tuning."):
            continue
        module, _, kind = name.removeprefix("tuning.").rpartition(".")
        parts = module.split(".")
        if module == "model.norm":
            found["norm.weight" if official else "transformer.ln_f.weight"] = gradient
        elif module == "lm_head":
            found[f"lm_head.adapter_{kind}"] = gradient
        elif parts[3] in NORMS:
            mine = NORMS[parts[3]][0 if official else 1]
            found[f"{'layers' if official else 'transformer.h'}.{parts[2]}.{mine}.weight"] = gradient
        elif official:
            if kind in ("bias", "lora_up") and parts[4] in (
                "q_proj",
                "k_proj",
            ):  # Meta's rows: a head's halves in turns
                gradient = gradient.unflatten(0, (4, 2, -1)).transpose(1, 2).flatten(0, 2)
            where = {"self_attn": "attention", "mlp": "feed_forward"}[parts[3]]
            found[f"layers.{parts[2]}.{where}.{official_name(case, OFFICIAL[parts[4]], kind)}"] = gradient
        elif (place := f"{parts[3]}.{parts[4]}") in LITGPT:
            found[f"transformer.h.{parts[2]}.{LITGPT[place]}.adapter_{kind}"] = gradient
    return found if official else found | fused_gradients(case, handle, own)


def official_name(case: str, linear: str, kind: str) -> str:
    if kind.startswith("lora"):
        return f"lora_{linear}_l{1 if kind == 'lora_down' else 2}.weight"
    return f"{linear}.{kind}" if with_images(case) else f"{linear}_{kind}"


def fused_gradients(case: str, handle: zinit.Handle, own: dict) -> dict[str, torch.Tensor]:
    """Gradients of the fused projection's scale and bias, what reached them through wrong rows of prompts included."""
    if handle.tuning is None:
        return {}
    found, stored = {}, torch.load(adapter_path(case), weights_only=True)["model"]
    for index, site in enumerate(handle.state.sites.values()):
        per_group = site.num_heads // site.num_kv_heads
        scale, bias = (fused_vector(handle, site, kind) for kind in ("scale", "bias"))
        total = {kind: fused_vector(handle, site, kind, gradient=True) for kind in ("scale", "bias")}
        for group in range(site.num_kv_heads) if f"{site.name}.key" in own else ():
            row = group * (per_group + 2) + per_group
            for block, kind in ((row, "key"), (row + 1, "value")):
                reached = own[f"{site.name}.{kind}"][group]
                prompt = stored[f"transformer.h.{index}.attn.adapter_wte.weight"]
                total["scale"][block] += (reached * (prompt @ fused_blocks(site.module)[block].T + bias[block])).sum(0)
                total["bias"][block] += reached.sum(0) * scale[block]
        for kind, blocks in total.items():
            if case.endswith("legacy"):  # by group: its queries, its key, its value
                heads, groups = site.num_heads, site.num_kv_heads
                query, key, value = blocks.split([heads, groups, groups])
                blocks = torch.cat([query.view(groups, per_group, -1), key[:, None], value[:, None]], dim=1)
            fused = "attn.attn" if case.endswith("legacy") else "attn.qkv"
            found[f"transformer.h.{index}.{fused}.adapter_{kind}"] = blocks.detach().flatten()
    return found


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
