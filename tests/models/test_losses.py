"""Chunked cross-entropy against the plain formula, and which models it is used for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import zinit
from tests.tiny import byte_tokenizer, save_records
from zinit.models.losses import chunked_cross_entropy, split_head
from zinit.tasks.alpaca.task import Alpaca, AlpacaConfig
from zinit.tasks.base import TaskInputs

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 264, "pad_token_id": 0,
}  # fmt: skip


def inputs(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 16, dtype=dtype), torch.randn(101, 16, dtype=dtype)
    return hidden, weight, torch.randn(101, dtype=dtype) if bias else None, torch.randint(0, 101, (23,))


@pytest.mark.parametrize("chunk", [1, 7, 23, 100, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_loss_and_gradients_equal_those_of_full_logits(chunk: int | None, bias: bool, trained: bool) -> None:
    hidden, weight, offset, targets = inputs(bias)
    leaves = [hidden] + [x for x in (weight, offset) if trained and x is not None]
    for leaf in leaves:
        leaf.requires_grad_(True)
    expected = F.cross_entropy(F.linear(hidden, weight, offset), targets, reduction="sum")
    found = chunked_cross_entropy(hidden, weight, offset, targets, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(found / 3, leaves), torch.autograd.grad(expected / 3, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_bfloat16_keeps_the_softmax_in_float32() -> None:
    hidden, weight, _, targets = inputs(False, torch.bfloat16)
    hidden.requires_grad_(True)
    expected = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    found = chunked_cross_entropy(hidden, weight, None, targets, chunk=7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (a,), (b,) = torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_no_tensor_holds_the_logits_of_all_tokens(trained: bool) -> None:
    """Nothing that autograd keeps for the backward pass is of size tokens x vocabulary, nor even a chunk of it."""
    hidden, weight, _, targets = inputs(False)
    hidden.requires_grad_(True)
    weight.requires_grad_(trained)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked_cross_entropy(hidden, weight, None, targets, chunk=20).backward()
    assert max(kept, default=0) <= max(weight.numel(), hidden.numel()) < 20 * 101


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, **settings)).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_head_is_found(tied: bool, dtype: torch.dtype) -> None:
    model = llama(tie_word_embeddings=tied).to(dtype)
    found = split_head(model)
    assert found is not None
    assert found[0] is model.model
    assert found[1] is model.lm_head
    assert not model.model._forward_hooks
    assert not model.training


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=264)),
        lambda: OPTForCausalLM(
            OPTConfig(
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=264,
                word_embed_proj_dim=16,
            )
        ),
    ],
    ids=["gpt2", "opt"],
)
def test_other_families_have_plain_heads_too(make: Any) -> None:
    assert split_head(make().eval()) is not None


def softcapped() -> nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(**TINY, final_logit_softcapping=30.0))


def scaled() -> nn.Module:
    return CohereForCausalLM(CohereConfig(**{k: v for k, v in TINY.items() if k != "head_dim"}, logit_scale=0.0625))


def wrapped_head() -> nn.Module:
    model = llama()
    model.lm_head = nn.Sequential(model.lm_head)
    return model


def hooked() -> nn.Module:
    model = llama()
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    return model


def not_of_transformers() -> nn.Module:
    return nn.Linear(3, 3)


@pytest.mark.parametrize("make", [softcapped, scaled, wrapped_head, hooked, not_of_transformers])
def test_any_other_head_is_refused(make: Any) -> None:
    torch.manual_seed(0)
    assert split_head(make().eval()) is None


@pytest.mark.parametrize("make", [llama, softcapped])
def test_a_task_trains_by_the_gradients_of_full_logits(make: Any, tmp_path: Path) -> None:
    """With the chunked loss, and with that of a model whose logits are capped."""
    torch.manual_seed(0)
    model = make().eval()
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, layers=2, gate_init=0.5), seed=1)
    data = save_records(tmp_path / "data.json", 20)
    task = Alpaca(TaskInputs(model=model, processor=byte_tokenizer(), handle=handle, data=str(data)), AlpacaConfig())
    indices = [4, 0, 7]
    loss = task(task.collate(task.train_stream, indices))
    expected = torch.zeros(())
    for example in (task.train_examples[i] for i in indices):
        logits = model(input_ids=torch.tensor([example.ids])).logits[0, example.prompt_length - 1 : -1]
        targets = torch.tensor(example.ids[example.prompt_length :])
        expected = expected + F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    parameters, count = list(handle.parameters()), sum(task.train_stream.counts[i] for i in indices)
    found = torch.autograd.grad(loss / count, parameters)
    for a, b in zip(found, torch.autograd.grad(expected / count, parameters), strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
