"""PEFT's prefix tuning as a method: PEFT's own arithmetic in training, and the same in generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    StoppingCriteriaList,
)

from tests.tiny import save_tiny_llama
from zinit.config import PrefixConfig
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.methods.base import Adapted, ApplyContext
from zinit.train.strategy import checkpoint_activations


def adapted(model: Any, backbone: str = "llama") -> Adapted:
    method = METHODS.get("peft-prefix-tuning")
    context = ApplyContext(prefix=PrefixConfig(length=3), adapter=None, backbone=backbone, seed=0)
    return method(method.Config()).apply(model, context)


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path)).eval()


def test_answers_are_those_of_one_pass_over_the_whole_text(llama: Any) -> None:
    found = adapted(llama).model
    texts = [torch.tensor([5, 9, 12, 31, 7]), torch.tensor([8, 4])]
    longest = max(map(len, texts))
    ids = torch.stack([torch.cat([torch.full((longest - len(text),), 2), text]) for text in texts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(text)).long() for text in texts])
    new = found.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert torch.equal(new[:, :longest], ids)
    assert new.shape == (2, longest + 6)
    for text, answer in zip(texts, new[:, longest:].tolist(), strict=True):
        so_far = text
        for token in answer:  # PEFT's forward, without a cache of the text
            with torch.no_grad():
                best = found(input_ids=so_far[None]).logits[0, -1].argmax().item()
            assert token == best
            so_far = torch.cat([so_far, torch.tensor([token])])


def test_padded_texts_are_answered_as_each_alone_where_a_window_slides() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=6)).eval()
    found = adapted(model, "transformers").model
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    ids = torch.tensor([[3, 5, 9, 12, 31, 7, 22, 17], [0, 0, 0, 0, 0, 0, 8, 4]])
    mask = torch.tensor([[1] * 8, [0] * 6 + [1, 1]])
    new = found.generate(input_ids=ids, attention_mask=mask, **how)
    alone = found.generate(input_ids=ids[1:, 6:], attention_mask=mask[1:, 6:], **how)
    assert new.shape == (2, 13)
    assert torch.equal(new[1, 6:], alone[0])
    with found.disable_adapter():
        base = model.generate(input_ids=ids[1:, 6:], attention_mask=mask[1:, 6:], **how)
    assert not torch.equal(alone, base)  # the prefix is there to be lost


def test_a_length_is_that_of_the_text(llama: Any) -> None:
    found = adapted(llama).model
    said = {"input_ids": torch.tensor([[5, 9, 12]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    how = {"do_sample": False, "eos_token_id": -1}
    assert found.generate(**said, max_length=7, **how).shape == (1, 7)
    config = GenerationConfig(max_length=8, **how)  # pyright: ignore
    assert found.generate(**said, generation_config=config).shape == (1, 8)
    first = int(found.generate(**said, max_new_tokens=1, do_sample=False)[0, 3])
    assert found.generate(**said, max_length=9, do_sample=False, eos_token_id=first).shape == (1, 4)
    longer = GenerationConfig(max_length=9, min_length=6, do_sample=False, eos_token_id=first, pad_token_id=0)
    assert found.generate(**said, generation_config=longer).shape[1] >= 6


def test_beams_and_several_answers_are_those_of_each_text_alone(llama: Any) -> None:
    found = adapted(llama).model
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "num_beams": 3, "num_return_sequences": 2}
    ids, mask = torch.tensor([[5, 9, 12], [2, 8, 4]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    together = found.generate(input_ids=ids, attention_mask=mask, **how)
    first = found.generate(input_ids=ids[:1], attention_mask=mask[:1], **how)
    second = found.generate(input_ids=ids[1:, 1:], attention_mask=mask[1:, 1:], **how)
    assert together.shape == (4, 7)
    assert torch.equal(together[:2], first)
    assert torch.equal(together[2:, 1:], second)
    assert not torch.equal(first[0], first[1])
    scores = []
    for answer in first:  # the better of the two is first, by PEFT's forward without a cache of the text
        with torch.no_grad():
            logits = found(input_ids=answer[None]).logits[0, 2:-1].log_softmax(-1)
        scores.append(logits.gather(1, answer[3:, None]).sum().item())
    assert scores[0] > scores[1]


def test_stopping_criteria_see_the_text_alone(llama: Any) -> None:
    found, seen = adapted(llama).model, []

    def criterion(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        seen.append(input_ids.tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    ids = torch.tensor([[5, 9, 12]])
    how = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": -1}
    criteria = StoppingCriteriaList([criterion])  # pyright: ignore
    new = found.generate(input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=criteria, **how)
    assert seen == [new[:, :4].tolist(), new.tolist()]
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    with pytest.raises(ConfigError, match="batch size 1"):
        found.generate(input_ids=ids.expand(2, -1), attention_mask=mask, stopping_criteria=criteria, **how)


def test_gradient_checkpointing_is_refused(llama: Any) -> None:
    with pytest.raises(ConfigError, match=r"-o train\.gradient_checkpointing=false"):
        checkpoint_activations(adapted(llama).model)


def test_switched_off_it_generates_as_the_base_does(llama: Any) -> None:
    said = {"input_ids": torch.tensor([[5, 9, 12]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    before = llama.generate(**said, **how)
    found = adapted(llama)
    on = found.model.generate(**said, **how)
    with found.disabled():
        with found.disabled():
            assert torch.equal(found.model.generate(**said, **how), before)
        assert torch.equal(found.model.generate(**said, **how), before)
    assert not torch.equal(on, before)
    assert torch.equal(found.model.generate(**said, **how), on)
