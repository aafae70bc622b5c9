"""Several examples in one row: the same loss and gradients as each alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import zinit
from tests.tiny import byte_tokenizer, save_records
from zinit.data.packing import pack_sequences, supports_packing
from zinit.errors import ConfigError
from zinit.tasks.alpaca.task import Alpaca, AlpacaConfig
from zinit.tasks.base import TaskInputs

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 264, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip


def llama(attention: str = "sdpa", **settings: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **settings}, attn_implementation=attention))


def mistral(attention: str) -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(**TINY, sliding_window=16, attn_implementation=attention))


def gpt2(attention: str) -> GPT2LMHeadModel:
    """Learned absolute positions."""
    tiny = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 264, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**tiny, attn_implementation=attention))


def task(model: nn.Module, handle: Any, folder: Path, **settings: Any) -> Alpaca:
    data = save_records(folder / "data.json", 20)
    return Alpaca(
        TaskInputs(model=model.eval(), processor=byte_tokenizer(), handle=handle, data=str(data)),
        AlpacaConfig(**settings),
    )


def tokens(rows: list[list[int]], lengths: list[int]) -> int:
    return len(rows) * max(sum(lengths[i] for i in row) for row in rows)


@pytest.mark.parametrize("capacity", [60, 100, 512, 10_000])
def test_rows_hold_every_example_once_and_no_more_than_fits(capacity: int) -> None:
    lengths = [(37 * i) % 53 + 5 for i in range(103)]
    rows = pack_sequences(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(103))
    assert max(sum(lengths[i] for i in row) for row in rows) <= capacity
    assert tokens(rows, lengths) <= 1.02 * sum(lengths), "hardly any padding"


def test_rows_never_cost_more_than_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 5, 8, 13):
        for _ in range(20):
            lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
            assert tokens(pack_sequences(lengths, 40), lengths) <= count * max(lengths)


def test_rows_by_hand() -> None:
    assert pack_sequences([3, 8, 5], 10) == [[1], [2, 0]]
    assert pack_sequences([5, 5, 5, 5], 20) == [[0], [1], [2], [3]], "no padding to save, so no masks"
    assert pack_sequences([12, 3, 4], 10) == [[0], [2, 1]], "what is too long has a row of its own"
    assert pack_sequences([3, 8, 5], None) == [[0, 1, 2]]
    assert pack_sequences([7, 4, 4, 4], 10) == [[0], [1, 3], [2]], "two sequences of 11 would hold fewer tokens"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, mistral, gpt2])
@pytest.mark.parametrize(
    "own",
    [{"gate_init": 0.5}, {"separate_softmax": False, "gating": False}, {"separate_softmax": False, "gate_init": 0.5}],
    ids=["gated", "joint", "joint-gated"],
)
def test_packed_equals_alone(make: Callable, attention: str, own: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make(attention)
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, layers=2, **own), seed=1)
    packed = task(model, handle, tmp_path, packing=True)
    indices = [4, 0, 7, 11, 2, 9]
    batch = packed.collate(packed.train_stream, indices)
    assert len(batch["input_ids"]) < len(indices)
    assert batch["input_ids"].shape[1] <= packed.config.max_length
    loss = packed(batch)
    expected = torch.zeros(())
    for example in (packed.train_examples[i] for i in indices):  # one by one, all logits
        logits = model(input_ids=torch.tensor([example.ids])).logits[0, example.prompt_length - 1 : -1]
        targets = torch.tensor(example.ids[example.prompt_length :])
        expected = expected + F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    parameters, count = list(handle.parameters()), sum(packed.train_stream.counts[i] for i in indices)
    found = torch.autograd.grad(loss / count, parameters)
    for a, b in zip(found, torch.autograd.grad(expected / count, parameters), strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()))


def test_one_example_needs_no_positions_and_no_mask(tmp_path: Path) -> None:
    t = task(llama(), None, tmp_path, packing=True)
    assert "position_ids" not in t.collate(t.train_stream, [3])
    plain = task(llama(), None, tmp_path)
    assert "position_ids" not in plain.collate(plain.train_stream, [3, 4])


def leaky(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Causal over the whole row, whatever the positions say."""
    return sdpa_attention_forward(module, query, key, value, None, scaling=kwargs["scaling"])


def one_row(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """As flash attention does it: from the positions, but only where the batch is a single row."""
    if query.shape[0] == 1 and kwargs.get("position_ids") is not None:
        example = (kwargs["position_ids"][0] == 0).cumsum(0)
        length = len(example)
        mask = (example[:, None] == example) & torch.ones(length, length, dtype=torch.bool).tril()
        mask = mask[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, scaling=kwargs["scaling"])


AttentionInterface.register("leaky", leaky)
AttentionInterface.register("one_row", one_row)


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=264))


@pytest.mark.parametrize(
    "make",
    [lambda: llama("leaky"), lambda: llama("leaky", initializer_range=5e-4), mamba],
    ids=["leaky", "hardly leaky", "recurrent"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_examples_is_refused(make: Callable, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"in a trial one saw another .* -o task.packing=false"):
        task(make().to(dtype), None, tmp_path, packing=True)


def test_bfloat16_models_are_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16)
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, layers=2), seed=1)
    t = task(model, handle, tmp_path, packing=True)
    assert "position_ids" in t.collate(t.train_stream, [0, 1, 2])


def test_where_one_row_is_all_that_works_there_is_one_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama("one_row")
    assert not supports_packing(model, sequences=2)
    packed, plain = task(model, None, tmp_path, packing=True), task(model, None, tmp_path)
    indices = list(range(12))
    batch = packed.collate(packed.train_stream, indices)
    assert batch["input_ids"].shape == (1, sum(packed.train_stream.lengths[i] for i in indices))
    torch.testing.assert_close(packed(batch), plain(plain.collate(plain.train_stream, indices)), rtol=1e-5, atol=1e-5)


def test_the_trial_sees_through_a_closed_gate_and_leaves_no_trace(tmp_path: Path) -> None:
    """A prefix that would mix examples once its gates open is found out before they do."""
    torch.manual_seed(0)
    model = llama()
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, layers=2), seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.train()
    assert supports_packing(model, sequences=2)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prefix = next(iter(handle.prefixes.values()))
    plain = prefix.forward
    prefix.forward = lambda q, k, v, scale: plain(q, k, v, scale) * (1 + q.mean(dim=(2, 3), keepdim=True))  # pyright: ignore
    assert not supports_packing(model, sequences=2)
