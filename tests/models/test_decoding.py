"""Sequences that are continued together come out as ``generate`` gives each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.contract.cases import causal_lm
from zinit.errors import BackboneError
from zinit.models.decoding import ROOM, Batch, Chooser, check_batches, choose
from zinit.models.generation import OwnGenerationConfig, greedy

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 3], [4, 4, 4, 9], [30, 31, 32, 33, 34]]
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Gemma3Text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "OPT": {"word_embed_proj_dim": 32},
}


def alone(model: Any, prompt: list[int], config: Any) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_join_and_leave_and_are_as_alone(kind: str) -> None:
    """The second pair joins after three tokens, and the first row leaves after five."""
    model: Any = causal_lm(kind, **KINDS[kind]).eval()
    check_batches(model)
    config = greedy(max_new_tokens=10, eos_token_id=60)
    config.eos_token_id = None
    expected = [alone(model, prompt, config) for prompt in PROMPTS]
    answers: list[list[int]] = [[] for _ in PROMPTS]
    batch, rows = Batch(model), [0, 1]
    logits = batch.start([PROMPTS[row] for row in rows])
    for step in range(10):
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            answers[row].append(token)
        if step == 5:
            batch.keep([1, 2, 3])
            rows = rows[1:]
        logits = batch.step([answers[row][-1] for row in rows])
        if step == 2:
            new = Batch(model)
            logits = torch.cat([logits, new.start([PROMPTS[2], PROMPTS[3]])])
            batch.join(new)
            rows = [*rows, 2, 3]
    for row, answer in enumerate(answers):
        assert answer[: len(expected[row])] == expected[row][: len(answer)]
        assert len(answer) >= 6


def test_the_columns_that_all_rows_pad_are_given_back() -> None:
    model: Any = causal_lm("Llama").eval()
    batch = Batch(model)
    batch.start([[1] * 20, [2, 3]])
    batch.keep([1])
    assert batch.width == 2
    assert batch._cache.layers[0].keys.shape[:3] == (1, 2, 2)
    batch = Batch(model)
    batch.start([[1] * 200, [2, 3]])
    batch.step([1, 1])
    batch.keep([1])
    assert batch._cache.layers[0].memory[0].shape[2] <= 3 + ROOM


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 50.0},
        {"no_repeat_ngram_size": 2, "suppress_tokens": [16, 33]},
        {"min_new_tokens": 4, "eos_token_id": list(range(30))},
    ],
    ids=str,
)
def test_settings_of_generate_count(settings: dict[str, Any]) -> None:
    model: Any = causal_lm("Llama").eval()
    given = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": [60], "pad_token_id": 0, **settings}
    plain = OwnGenerationConfig(**{**given, **dict.fromkeys(settings), "eos_token_id": [60]})
    config = OwnGenerationConfig(**given)
    expected = alone(model, PROMPTS[0], config)
    assert expected != alone(model, PROMPTS[0], plain), "else the settings change nothing here"
    batch, chooser, answer = Batch(model), Chooser(model, config, PROMPTS[0], 0), list[int]()
    logits = batch.start(PROMPTS[:1])
    while len(answer) < len(expected):
        answer += choose(logits, [chooser], [answer])[0]
        logits = batch.step(answer[-1:])
    assert answer == expected


def test_what_is_drawn_has_the_models_frequencies() -> None:
    """Temperature and top_p as in their definitions: the rarest tokens never come."""
    model: Any = causal_lm("Llama").eval()
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    config = OwnGenerationConfig(
        max_new_tokens=1, do_sample=True, temperature=0.5, top_p=0.9, top_k=0, eos_token_id=[3], pad_token_id=3
    )
    chooser = Chooser(model, config, [1], 5)
    drawn = torch.bincount(torch.tensor([chooser(logits, []) for _ in range(600)]), minlength=4) / 600
    expected = torch.tensor([0.25, 0.09, 0.0, 0.0]) / 0.34  # squared, and the two likeliest are 0.93 of all
    torch.testing.assert_close(drawn, expected, atol=0.06, rtol=0)
    first, second = (Chooser(model, config, [1], 5) for _ in range(2))
    assert [first(logits, []) for _ in range(20)] == [second(logits, []) for _ in range(20)]


class Forgetful(nn.Module):
    """A language model that keeps no keys and values."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, **rest: Any) -> Any:
        raise AttributeError("no cache")


class Mixing(Forgetful):
    """One whose rows know of each other."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any = None, **rest: Any) -> Any:
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache, use_cache=True
        )
        output.logits = output.logits + output.logits.flip(0)
        return output


def test_models_that_cannot_be_batched_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"Forgetful cannot be served in batches: AttributeError.*zinit generate"):
        check_batches(Forgetful())
    with pytest.raises(BackboneError, match="Mixing cannot be served in batches: its rows differ by"):
        check_batches(Mixing(causal_lm("Llama").eval()))
