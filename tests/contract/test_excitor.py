"""LLaMA-Excitor: the key's addition written out, on every backbone whose keys leave a linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import zinit
from tests.contract.cases import Case, causal_lm, text_batch
from tests.contract.checks import run
from tests.contract.naive import NaivePrefix, naive_logits
from tests.contract.test_parts import SHAPE, compare
from zinit.backbones.layers import keys_of
from zinit.config import ExcitorConfig
from zinit.errors import ConfigError

CONFIG = zinit.AdapterConfig(parts={}, excitor=ExcitorConfig(length=3, rank=2, layers=2))
REFUSED = {"vit-norms-registers-unfused", "beit", "deepseek-v3"}  # keys that are normed, of weights alone, or of parts


def open_up(handle: zinit.Handle) -> None:
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.8)


def test_every_backbone(case: Case, tmp_path: Path) -> None:
    """Closed it changes no bit and only gates learn; open it changes the output, and comes back from a folder."""
    model = case.build()
    base = run(case, model)
    if case.name in REFUSED:
        with pytest.raises(ConfigError, match="leave none of its linear layers as they are"):
            zinit.attach(model, CONFIG, seed=0)
        assert torch.equal(run(case, model), base)
        return
    handle = zinit.attach(model, CONFIG, seed=0)
    assert torch.equal(run(case, model), base)
    case.output(model, case.batch("left")).sum().backward()
    for name, parameter in handle.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == name.endswith("gate"), name
    open_up(handle)
    opened = run(case, model)
    assert (opened - base).abs().max() > 1e-3
    with handle.disabled():
        assert torch.equal(run(case, model), base)
    handle.save(tmp_path)
    assert torch.equal(run(case, zinit.load(case.build(), tmp_path).model), opened)
    handle.detach()
    assert torch.equal(run(case, model), base)


@pytest.mark.parametrize("bias", [False, True])
def test_against_the_oracle(bias: bool) -> None:
    model: Any = causal_lm("Llama", attention_bias=bias)
    handle = zinit.attach(model, CONFIG, seed=0)
    open_up(handle)
    batch = text_batch("left")
    words = batch["attention_mask"].bool()
    deep = {name: p.detach().double().requires_grad_() for name, p in handle.named_parameters()}
    weights = {name: tensor.double() for name, tensor in model.state_dict().items() if "zinit" not in name}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = naive_logits(weights, SHAPE, ids, mask, NaivePrefix(), deep)[words]
    compare(model, model(**batch).logits[words], expected, dict(handle.named_parameters()), deep)


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX"])
def test_a_cache_holds_the_keys_with_their_additions(kind: str) -> None:
    model: Any = causal_lm(kind)
    open_up(zinit.attach(model, CONFIG, seed=0))
    ids = text_batch("none")["input_ids"]
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        whole = model(made.sequences).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), whole, rtol=1e-4, atol=1e-5)


def test_the_size_of_the_paper() -> None:
    """2 C r + K C + 1 numbers a layer: 7,618,590 in 30 layers at 7B, the paper's 7.6M."""
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    handle = zinit.attach(model, zinit.AdapterConfig(parts={}, excitor=ExcitorConfig()), device="meta")
    assert [2 * width * 16 + 30 * width + 1 for width in (64, 4096)] == [handle.num_trainable, 7_618_590 // 30]


def test_the_keys_are_found_in_a_fused_layer() -> None:
    """GPT-NeoX stores queries, keys and values of a head side by side: of heads of 8, numbers 8 to 15 of every 24."""
    from zinit.backbones import find_backbone

    site = find_backbone(model := causal_lm("GPTNeoX")).sites(model)[0]
    path, rows = keys_of(site)
    assert path.endswith("query_key_value")
    assert rows is not None
    assert rows.tolist() == [24 * head + 8 + number for head in range(4) for number in range(8)]


def test_what_it_cannot_do_is_refused() -> None:
    model = causal_lm("Llama")
    handle = zinit.attach(model, CONFIG, seed=0)
    with torch.no_grad(), pytest.raises(ConfigError, match="cannot be part of a route"), handle.route(["default"] * 3):
        run_batch(model)
    with pytest.raises(ConfigError, match="a tuning or an excitor, not both"):
        zinit.AdapterConfig(parts={}, excitor=ExcitorConfig(), tuning=zinit.TuningConfig())


def run_batch(model: Any) -> None:
    model(**text_batch("none"))
