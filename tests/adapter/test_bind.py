"""ImageBind-LLM: the bind network written out, mixtures of senses, prompts of one vector, sizes at 7B."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zinit
from tests.contract.cases import causal_lm, text_batch
from zinit.adapter.bind import BindNetwork
from zinit.adapter.encoding import Features
from zinit.errors import ConfigError
from zinit.methods.base import ApplyContext
from zinit.methods.multimodal import ImageBind
from zinit.methods.settings import StageSettings

PART = zinit.PrefixConfig(length=1, prompt="table+context", gate_init=0.7)
OPTIONS: dict[str, Any] = {"feature_width": 6, "hidden": 10, "blocks": 2}
LORA = zinit.TuningConfig(scale="none", norms=False, bias=False, lora_rank=2)


def adapted(**changes: Any) -> tuple[Any, zinit.Handle]:
    whole = {"parts": {"prefix": PART}, "context": "bind", "context_options": OPTIONS} | changes
    model = causal_lm("Llama")
    return model, zinit.attach(model, zinit.AdapterConfig(**whole), seed=1)


def vectors(seed: int = 0, batch: int = 3) -> Tensor:
    return 5 * torch.randn(batch, 6, generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> Tensor:
    return model(**text_batch("left")).logits


def written_out(mixed: Tensor, own: dict[str, Tensor], blocks: int, legacy: bool) -> Tensor:
    """The network in float64 by its equations, of mixtures that are made already."""
    x = mixed.double() @ own["proj.weight"].T + own["proj.bias"]
    for j in range(blocks):
        t = {name.removeprefix(f"blocks.{j}."): p for name, p in own.items() if name.startswith(f"blocks.{j}.")}
        if legacy:
            centred = x - x.mean(-1, keepdim=True)
            n = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * t["norm.weight"] + t["norm.bias"]
        else:
            n = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * t["norm.weight"]
        gate, up = (n @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0) for name in ("gate", "up"))
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ t["down.weight"].T + t.get("down.bias", 0)
    return x


@pytest.mark.parametrize("legacy", [False, True])
def test_the_network_is_its_equations(legacy: bool) -> None:
    torch.manual_seed(0)
    network = BindNetwork(width=8, length=1, **OPTIONS, legacy=legacy)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    own = {name: p.detach().double() for name, p in network.named_parameters()}
    assert any(name.endswith("norm.bias") for name in own) == legacy
    x = vectors().double()
    unit = x / x.norm(dim=-1, keepdim=True) / (1 + 1e-6)
    made = network(vectors())
    assert made.present.all()
    torch.testing.assert_close(made.tokens[:, 0].double(), written_out(unit, own, 2, legacy), rtol=1e-5, atol=1e-5)


def test_senses_are_mixed_by_weights_that_a_sample_may_have_for_itself() -> None:
    network = BindNetwork(width=8, length=1, **OPTIONS)
    image, audio = vectors(1), vectors(2)
    own = {name: p.detach().double() for name, p in network.named_parameters()}
    unit = [x.double() / x.norm(dim=-1, keepdim=True) for x in (image, audio)]
    weights = torch.tensor([[1.0, 0.5], [0.0, 2.0], [0.0, 0.0]], dtype=torch.double)
    shares = weights / (weights.sum(1, keepdim=True) + 1e-6)
    expected = written_out(shares[:, :1] * unit[0] + shares[:, 1:] * unit[1], own, 2, legacy=False)
    made = network({"image": (image, weights[:, 0]), "audio": (audio, weights[:, 1])})
    torch.testing.assert_close(made.tokens[:, 0].double(), expected, rtol=1e-5, atol=1e-5)
    assert made.present.tolist() == [True, True, False]
    both = network({"image": image, "audio": (audio, 0.5)})
    assert torch.equal(both.tokens[0], made.tokens[0])
    encoded = network(Features(pooled=image, present=torch.tensor([True, False, True])))
    assert torch.equal(encoded.tokens, network(image).tokens)
    assert encoded.present.tolist() == [True, False, True]


def test_without_any_sense_a_sample_has_the_table_alone() -> None:
    model, handle = adapted()
    with torch.no_grad():
        without = logits(model)
        with handle.given(features={"audio": (vectors(), torch.tensor([1.0, 0.0, 1.0]))}):
            given = logits(model)
    torch.testing.assert_close(given[1], without[1], rtol=1e-5, atol=1e-6)
    assert ((given - without).abs().amax((1, 2)) > 1e-2).tolist() == [True, False, True]


def test_one_prompt_is_the_softmax_free_form() -> None:
    """K = 1: a softmax over one key is one, so every position gets tanh(g) W_v (e + T)."""
    _, handle = adapted()
    site = handle.sites[1]
    prefix, host = handle.prefixes[site.name], site.module
    with torch.no_grad():
        prefix.gate.normal_()
        tokens = handle.shared["context"](vectors()).tokens
        key, value = prefix.keys_values(lambda x: site.project_kv(host, x), torch.float32, tokens)
        query = torch.randn(3, site.num_heads, 5, site.head_dim)
        got = prefix(query, key, value, 0.3)
        v = F.linear(prefix.prompt.weight + tokens, host.v_proj.weight)  # pyright: ignore
        v = v.view(3, 1, site.num_kv_heads, -1).transpose(1, 2).repeat_interleave(2, dim=1)
        free = prefix.gate.tanh()[:, None, None] * v
    assert (got - free).abs().max() <= 1e-6 * free.abs().max()


def test_prompts_bypass_the_adapters_lora() -> None:
    """LoRA of the value projection alone changes what words give, and nothing of what prompts add."""
    _, handle = adapted(tuning=LORA)
    site = handle.sites[0]
    slot: Any = site.module.zinit
    with torch.no_grad():
        before = slot.keys_values(site.module, slot.prefix(vectors_context(handle)), torch.float32)
        for name, parameter in handle.named_parameters():
            if name.endswith("lora_up"):
                parameter.normal_()
        after = slot.keys_values(site.module, slot.prefix(vectors_context(handle)), torch.float32)
        words = torch.randn(2, 4, site.width)
        changed = site.module.v_proj(words) - F.linear(words, site.module.v_proj.weight)  # pyright: ignore
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert changed.abs().max() > 1e-2


def vectors_context(handle: zinit.Handle) -> Any:
    return handle.shared["context"](vectors())


def test_sizes_at_7b() -> None:
    """Stage one: gates, prompts and bind network, 608,322,560; with LoRA, biases and norms 649,663,488 ("650M")."""
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=32))
    linears = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tuning = zinit.TuningConfig(linears=linears, scale="none", lora_rank=16, lora_linears=("all",))
    whole = zinit.AdapterConfig(
        parts={"prefix": PART}, context="bind", context_options={"feature_width": 1024}, tuning=tuning
    )
    roles = zinit.attach(model, whole, device="meta").roles()
    sizes = {role: sum(p.numel() for p in own) for role, own in roles.items()}
    assert sizes["gates"] + sizes["prompts"] + sizes["source"] == 608_322_560
    assert sum(sizes.values()) == 649_663_488


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3, 5), r"vectors of features must be \(3, 6\), one for each sample; got \(3, 5\)"),
        ({"image": torch.zeros(3, 6), "audio": torch.zeros(2, 6)}, r"vectors of audio must be \(3, 6\).*got \(2, 6\)"),
        ({"image": (torch.zeros(3, 6), torch.ones(2))}, "image must weigh .* one for each of the 3 samples"),
        ({"image": (torch.zeros(3, 6), -1.0)}, "image must weigh a number of at least 0"),
        ({}, "no features of any sense"),
        (Features(), "takes one vector of each image"),
    ],
)
def test_wrong_features_are_one_message(features: Any, message: str) -> None:
    _, handle = adapted()
    with pytest.raises(ConfigError, match=message), handle.given(features=features):
        pass


def staged(**settings: Any) -> zinit.Handle:
    whole = zinit.AdapterConfig(parts={"prefix": PART}, context="bind", context_options=OPTIONS, tuning=LORA)
    method = ImageBind(StageSettings(**settings))
    context = ApplyContext(prefix=PART, adapter=whole, backbone="llama", seed=1)
    handle = method.apply(causal_lm("Llama"), context).handle
    assert handle is not None
    return handle


def test_two_stages() -> None:
    """The first has no tuning; the second trains the tuning alone. That it starts from the first is the run's."""
    assert staged(stage="bind").tuning is None
    second = staged(stage="tuning")
    own = second.state_dict()
    trained = [name for name, parameter in second.named_parameters() if parameter.requires_grad]
    assert trained == [name for name in own if name.startswith("tuning.")]
    assert trained
    with second.given(features=vectors()):
        logits(second.model).sum().backward()
    assert {name for name, p in second.named_parameters() if p.grad is not None} == set(trained)
