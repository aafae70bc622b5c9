"""V2's bias tuning: its start, its formula and gradients against folded weights, its sizes, its life on a model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zinit
from tests.contract.cases import CASES, Case, causal_lm, text_batch
from tests.contract.checks import assert_same, each_setting, run, set_implementation, snapshot
from zinit.errors import ConfigError

PREFIX = zinit.PrefixConfig(length=3, layers=2, gate_init=0.7)
PAPER = zinit.TuningConfig()
CHAT = zinit.TuningConfig(scale="input")
RELEASED = zinit.TuningConfig(
    linears=("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), scale="none", lora_rank=4, lora_linears=("all",)
)
READ_WEIGHTS = ("beit",)  # timm's multiplies by the weights of qkv without calling it
TUNINGS = {
    "paper": PAPER,
    "chat": CHAT,
    "chat-lora": replace(CHAT, lora_rank=2),
    "released": RELEASED,
    "head": zinit.TuningConfig(linears=("all", "head")),
}


def adapter(tuning: zinit.TuningConfig, prefix: zinit.PrefixConfig = PREFIX) -> zinit.AdapterConfig:
    return zinit.AdapterConfig(parts={"prefix": prefix}, tuning=tuning)


def randomize(handle: zinit.Handle, seed: int = 3) -> None:
    """Every learned number of the tuning gets a value that nothing else has."""
    generator = torch.Generator().manual_seed(seed)
    assert handle.tuning is not None
    with torch.no_grad():
        for parameter in handle.tuning.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any, **kwargs: Any) -> Tensor:
    return model(**text_batch("left"), **kwargs).logits


# --- the formula ------------------------------------------------------------------------------------------------------


def folded(host: nn.Module, handle: zinit.Handle, *, lora: bool) -> dict[str, Tensor]:
    """The host's tensors with the tuning in them: W' = diag(s) W + l2 l1, b' = s (b_host + b), norms replaced."""
    own = {name.removeprefix("tuning."): p for name, p in handle.named_parameters() if name.startswith("tuning.")}
    tensors: dict[str, Tensor] = dict(host.named_parameters())
    on_input = isinstance(handle.config, zinit.AdapterConfig) and handle.config.tuning in (CHAT, TUNINGS["chat-lora"])
    for path in {name.rpartition(".")[0] for name in own}:
        weight = tensors[f"{path}.weight"]
        if weight.dim() == 1:
            tensors[f"{path}.weight"] = own[f"{path}.weight"]
            continue
        bias = tensors.get(f"{path}.bias", torch.zeros(weight.shape[0])) + own.get(f"{path}.bias", torch.zeros(1))
        if (scale := own.get(f"{path}.scale")) is not None:
            weight = weight if on_input else scale[:, None] * weight
            bias = bias if on_input else scale * bias
        if lora and f"{path}.lora_up" in own:
            weight = weight + own[f"{path}.lora_up"] @ own[f"{path}.lora_down"]
        weight = weight * scale if on_input and scale is not None else weight
        tensors[f"{path}.weight"], tensors[f"{path}.bias"] = weight, bias
    return tensors


def with_biases(tuning: zinit.TuningConfig) -> Any:
    """A LLaMA whose every linear layer has a bias, which folding needs; zero but in attention."""
    model = causal_lm("Llama", attention_bias=True, mlp_bias=True, num_hidden_layers=3)
    if "head" in tuning.linears:
        model.lm_head.bias = nn.Parameter(torch.zeros(61))  # pyright: ignore
    return model


def by_folding(tuning: zinit.TuningConfig, handle: zinit.Handle) -> Tensor:
    """The logits of a host with folded weights: words see LoRA, prompts' keys and values are made without it."""
    host = with_biases(tuning)
    for_words, for_prompts = folded(host, handle, lora=True), folded(host, handle, lora=False)
    learned = dict(handle.named_parameters())
    config = zinit.PrefixConfig(length=3, layers=2, parametrization="key_value")
    plain = zinit.attach(host, config)
    for site in plain.prefixes:
        prompt = learned[f"{site}.prompt.weight"]
        for kind, projection in (("key", "k_proj"), ("value", "v_proj")):
            made = prompt @ for_prompts[f"{site}.{projection}.weight"].T + for_prompts[f"{site}.{projection}.bias"]
            for_words[f"{site}.zinit.default.{kind}"] = made.view(3, 2, 8).transpose(0, 1)
        for_words[f"{site}.zinit.default.gate"] = learned[f"{site}.gate"]
    return torch.func.functional_call(host, for_words, (), text_batch("left")).logits


@pytest.mark.parametrize("name", TUNINGS)
def test_the_tuned_model_is_the_folded_one_and_so_are_all_gradients(name: str) -> None:
    tuning = TUNINGS[name]
    model = with_biases(tuning)
    handle = zinit.attach(model, adapter(tuning), seed=1)
    randomize(handle)
    mask = text_batch("left")["attention_mask"].bool()
    weights = torch.linspace(-1, 1, 61)

    def gradients(of: Tensor) -> dict[str, Tensor]:
        handle.model.zero_grad()
        (of[mask] * weights).mean().backward()
        return {name: p.grad.clone() for name, p in handle.named_parameters() if p.grad is not None}

    ours, theirs = logits(model), by_folding(tuning, handle)
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-4, atol=1e-5)
    mine, expected = gradients(ours), gradients(theirs)
    assert mine.keys() == expected.keys() == dict(handle.named_parameters()).keys()
    for parameter, gradient in expected.items():
        assert gradient.abs().max() > 0, parameter
        torch.testing.assert_close(mine[parameter], gradient, rtol=1e-3, atol=1e-6, msg=parameter)


def test_prompts_of_the_base_pass_no_tuning() -> None:
    """With prompts_through="base" a tuning of k and v changes the words' keys and values, not the prompts'."""
    found = {}
    for through in ("base", "bias-scale"):
        model = causal_lm("Llama")
        handle = zinit.attach(model, adapter(zinit.TuningConfig(norms=False, prompts_through=through)), seed=1)
        randomize(handle)
        site = handle.sites[-1]
        slot: Any = site.module.zinit
        prefix = slot.prefix()
        found[through] = slot.keys_values(site.module, prefix, torch.float32)[0]
        prompt = handle.prefixes[site.name].prompt(None)
        base = nn.functional.linear(prompt, site.module.k_proj.weight)  # pyright: ignore
        if through == "base":
            expected = base.view(3, 2, 8).transpose(0, 1).repeat_interleave(2, 0)[None]
            torch.testing.assert_close(found["base"], expected)
    assert not torch.allclose(found["base"], found["bias-scale"], atol=1e-2)


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tuning", [PAPER, zinit.TuningConfig(scale="input", lora_rank=2)], ids=["paper", "input-lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_start_is_the_base_bit_for_bit(case: Case, tuning: zinit.TuningConfig, dtype: torch.dtype) -> None:
    model = case.build().to(dtype)
    before = snapshot(model)
    settings = list(each_setting(case))[:: 3 if dtype == torch.bfloat16 else 2]
    base = []
    for implementation, padding in settings:
        set_implementation(model, implementation)
        base.append(run(case, model, padding))
    config = adapter(tuning, zinit.PrefixConfig(length=5, layers=2))
    if case.name in READ_WEIGHTS:
        outside = r"without calling them.*outside of attention: linears=\['fc1', 'fc2'\]"
        with pytest.raises(ConfigError, match=outside):
            zinit.attach(model, config)
        assert_same(snapshot(model), before)
        config = adapter(replace(tuning, linears=("fc1", "fc2")), zinit.PrefixConfig(length=5, layers=2))
    handle = zinit.attach(model, config)
    for (implementation, padding), expected in zip(settings, base, strict=True):
        set_implementation(model, implementation)
        assert torch.equal(run(case, model, padding), expected)
    randomize(handle)
    assert not torch.equal(run(case, model, padding), expected)
    with handle.disabled():
        assert torch.equal(run(case, model, padding), expected)
    handle.detach()
    assert torch.equal(run(case, model, padding), expected)
    assert_same(snapshot(model), before)


# --- sizes ------------------------------------------------------------------------------------------------------------


def llama_7b() -> Any:
    import transformers

    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig())


SIZES = {
    "the paper's": (zinit.TuningConfig(), 2_985_984),
    "chat, as trained": (zinit.TuningConfig(scale="input", norms="blocks"), 2_760_704),
    "chat, with the last norm": (zinit.TuningConfig(scale="input"), 2_764_800),
    "released": (zinit.TuningConfig(linears=RELEASED.linears, scale="none"), 1_363_968),
    "released, LoRA": (zinit.TuningConfig(bias=False, scale="none", norms=False, lora_rank=16), 39_976_960),
}


@pytest.fixture(scope="module")
def big() -> Any:
    return llama_7b()


@pytest.mark.parametrize("name", SIZES)
def test_sizes_at_7b(name: str, big: Any) -> None:
    tuning, expected = SIZES[name]
    handle = zinit.attach(big, zinit.AdapterConfig(parts={}, tuning=tuning), device="meta")
    assert handle.num_trainable == expected
    handle.detach()


# --- life on a model --------------------------------------------------------------------------------------------------


def test_several_tunings_add_up() -> None:
    """s = 1 + sum(s_i - 1), b = sum b_i, w = w_0 + sum(w_i - w_0), by one tuning that has these numbers."""
    model = causal_lm("Llama")
    hosts = {name: tensor.clone() for name, tensor in model.named_parameters()}
    only = zinit.AdapterConfig(parts={}, tuning=PAPER)
    first, second = zinit.attach(model, only, name="first"), zinit.attach(model, only, name="second")
    randomize(first, 1)
    randomize(second, 2)
    first.activate("first", "second")
    both = logits(model)
    other = causal_lm("Llama")
    summed = zinit.attach(other, only)
    with torch.no_grad():
        parameters = zip(summed.named_parameters(), first.parameters(), second.parameters(), strict=True)
        for (name, parameter), one, two in parameters:
            neutral = hosts.get(name.removeprefix("tuning."), torch.tensor(1.0 if name.endswith("scale") else 0.0))
            parameter.copy_(one + (two - neutral))
    torch.testing.assert_close(both, logits(other), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both, logits(causal_lm("Llama")), atol=1e-2)
    second.activate()
    assert not torch.allclose(logits(model), both, atol=1e-2)


def test_each_adapters_prompts_pass_its_own_tuning() -> None:
    """Beside a tuned adapter, the prompts of an untuned one pass the base projections."""
    model = causal_lm("Llama")
    plain = zinit.attach(model, PREFIX, name="plain", seed=1)
    alone = {name: plain.state.at(slot)[0] for name, slot in plain.state.slots.items()}
    site = plain.sites[-1]
    slot: Any = site.module.zinit
    key = slot.keys_values(site.module, alone[site.name], torch.float32)[0]
    tuned = zinit.attach(model, zinit.AdapterConfig(parts={}, tuning=PAPER), name="tuned")
    randomize(tuned)
    plain.activate("plain", "tuned")
    torch.testing.assert_close(slot.keys_values(site.module, slot.prefix(), torch.float32)[0], key, rtol=0, atol=0)


def test_a_route_beside_a_tuned_adapter_is_the_base() -> None:
    model = causal_lm("Llama")
    base = logits(model)
    plain = zinit.attach(model, PREFIX, name="plain")
    tuned = zinit.attach(model, zinit.AdapterConfig(parts={}, tuning=PAPER), name="tuned")
    randomize(tuned)
    assert tuned.active
    with plain.route([None, None, None]), torch.no_grad():
        assert torch.equal(logits(model), base)


def test_generation_with_a_cache_gives_what_the_forward_gives() -> None:
    model: Any = causal_lm("Llama")
    handle = zinit.attach(model, adapter(RELEASED))
    randomize(handle)
    ids = text_batch("none")["input_ids"]
    made = model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    whole = model(made.sequences).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), whole, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    handle = zinit.attach(causal_lm("Llama"), adapter(RELEASED))
    randomize(handle)
    handle.save(tmp_path)
    again = zinit.load(causal_lm("Llama"), tmp_path)
    assert again.config == handle.config
    assert torch.equal(logits(again.model), logits(handle.model))


def test_copies_have_a_tuning_of_their_own() -> None:
    model = causal_lm("Llama")
    handle = zinit.attach(model, adapter(PAPER))
    copied = copy.deepcopy(model)
    base = logits(copied)
    randomize(handle)
    assert torch.equal(logits(copied), base)
    assert not torch.equal(logits(model), base)


def test_checkpointed_layers_give_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model: Any = causal_lm("Llama")
        handle = zinit.attach(model, adapter(PAPER), seed=1)
        randomize(handle)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        logits(model).square().mean().backward()
        found.append({name: p.grad for name, p in handle.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_a_tuned_model_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    model: Any = causal_lm("Llama")
    handle = zinit.attach(model, adapter(RELEASED), seed=1)
    base = logits(model)
    randomize(handle)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled), logits(model))
    found = []
    for one in (model, compiled):
        model.zero_grad()
        logits(one).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in handle.named_parameters() if p.grad is not None})
    assert found[0].keys() == dict(handle.named_parameters()).keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(logits(compiled), base, atol=1e-2)
    torch.compiler.reset()


def test_the_host_wants_no_gradients_and_roles_are_told_apart() -> None:
    model = causal_lm("Llama")
    handle = zinit.attach(model, adapter(PAPER))
    assert set(handle.roles()) == {"gates", "prompts", "tuning"}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in handle.parameters()}


@pytest.mark.parametrize("linears", [("q_projj",), ("all", "k")])
def test_unknown_layers_are_refused(linears: tuple[str, ...]) -> None:
    model = causal_lm("Llama")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"have no linear layer named .* Known: all, head, q_proj, k_proj"):
        zinit.attach(model, adapter(zinit.TuningConfig(linears=linears)))
    assert_same(snapshot(model), before)


def test_settings_that_tune_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="tunes nothing"):
        zinit.TuningConfig(bias=False, scale="none", norms=False)
    with pytest.raises(ConfigError, match="at least one part, or a tuning"):
        zinit.AdapterConfig(parts={})
