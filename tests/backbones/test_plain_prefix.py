"""Plain prefix tuning (separate_softmax=False) on hosts whose scores have more than a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

import zinit
from tests.contract.cases import causal_lm, randomized, text_batch
from zinit.backbones._hf import attend

JOINT = zinit.PrefixConfig(length=3, gating=False, separate_softmax=False)


def t5(kind: str = "T5") -> Any:
    sizes = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_model": 32, "vocab_size": 61}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, pad_token_id=0, decoder_start_token_id=0, eos_token_id=None
    )
    return randomized(transformers.AutoModelForSeq2SeqLM.from_config(config))


Given = dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]


def by_hand(model: nn.Module, handle: zinit.Handle, name: str, given: Given) -> Tensor:
    """softmax over [prompts, words] of one layer, biases and masks on the words alone; its scale is 1."""
    query, key, value, mask, bias = given[name]
    site = next(site for site in handle.sites if site.name == name)
    prompt_key, prompt_value = site.project_kv(site.module, handle.prefixes[name].get_parameter("prompt.weight"))
    words = query @ key.transpose(2, 3) + (0 if bias is None else bias)
    if mask is not None:
        words = words.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else words + mask
    scores = torch.cat([query @ prompt_key.transpose(2, 3), words], dim=-1).softmax(dim=-1)
    values = torch.cat([prompt_value.expand(len(query), -1, -1, -1), value], dim=2)
    return (scores @ values).transpose(1, 2)


@pytest.mark.parametrize("kind", ["T5", "UMT5"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [1, 2, 5])
@torch.no_grad()
def test_prompts_take_no_position_bias(
    kind: str, implementation: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = t5(kind)
    model.set_attn_implementation(implementation)
    handle = zinit.attach(model, JOINT, seed=0)
    names = {id(site.module): site.name for site in handle.sites}
    given: Given = {}
    got: dict[str, Tensor] = {}

    def note(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        output = attend(module, query, key, value, mask, **kwargs)
        given[names[id(module)]], got[names[id(module)]] = (query, key, value, mask, kwargs["position_bias"]), output[0]
        return output

    monkeypatch.setitem(AttentionInterface._global_mapping, "zinit", note)
    ids = torch.randint(3, 61, (3, tokens), generator=torch.Generator().manual_seed(3))
    model(**text_batch("right"), decoder_input_ids=ids, use_cache=False)
    assert len(got) == 4
    for name in got:
        if "decoder" in name and tokens > 1 and given[name][3] is None:
            causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
            given[name] = (*given[name][:3], causal, given[name][4])
        torch.testing.assert_close(got[name], by_hand(model, handle, name, given), atol=1e-5, rtol=1e-4)


def roberta(implementation: str) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.RobertaConfig(
        **sizes, vocab_size=61, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, pad_token_id=0
    )
    model = randomized(transformers.AutoModel.from_config(config))
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_closed_gate_draws_no_other_dropout(implementation: str) -> None:
    model, batch = roberta(implementation).train(), text_batch("right")
    torch.manual_seed(4)
    frozen = model(**batch).last_hidden_state
    zinit.attach(model, zinit.PrefixConfig(length=3, separate_softmax=False), seed=0)
    torch.manual_seed(4)
    assert torch.equal(model(**batch).last_hidden_state, frozen)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gates_learn_from_prompts_and_not_from_dropout(implementation: str) -> None:
    """Of one module alone, whose output is linear in the gate: its gradient is the same with dropout and without."""
    model = roberta(implementation)
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, separate_softmax=False, gate_init=0.3), seed=0)
    site = handle.sites[0]
    states, found = torch.randn(3, 7, 32), []
    weight = torch.randn(3, 7, 32)
    for training in (True, False):
        output = site.module.train(training)(states, attention_mask=None)[0]
        (gate,) = torch.autograd.grad((output * weight).sum(), [handle.prefixes[site.name].gate])
        found.append((gate, output.detach()))
    (noisy, with_dropout), (clean, without) = found
    assert not torch.allclose(with_dropout, without, atol=0.1)
    torch.testing.assert_close(noisy, clean, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generates_what_a_whole_forward_gives() -> None:
    model = t5()
    zinit.attach(model, zinit.PrefixConfig(length=3, gating=False, separate_softmax=False, init_std=1.0), seed=0)
    batch = text_batch("right")
    ids = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(model(**batch, decoder_input_ids=ids[:, :-1]).logits.argmax(-1), ids[:, 1:])


def test_what_it_cannot_follow_is_refused() -> None:
    model: Any = causal_lm("Llama")
    zinit.attach(model, JOINT)
    states, rotation = torch.randn(1, 4, 32), (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
    with pytest.raises(zinit.BackboneError, match="cannot follow slopes"):
        model.model.layers[0].self_attn(states, rotation, None, slopes=torch.ones(1, 4, 4, 4))
