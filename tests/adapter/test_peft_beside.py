"""PEFT and zinit on one model: each freezes what the other trains, and that is said."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch

import zinit
from tests.contract.cases import causal_lm
from tests.contract.cases import text_batch as batch

SETTINGS: Any = {"target_modules": ["q_proj"], "init_lora_weights": False}


def test_attaching_says_that_pefts_weights_are_frozen() -> None:
    model: Any = causal_lm("Llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**SETTINGS))
    count = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    with pytest.warns(UserWarning, match=rf"{count:,} weights of a PEFT adapter were trained and are frozen"):
        handle = zinit.attach(model)
    assert {id(p) for p in wrapped.parameters() if p.requires_grad} == {id(p) for p in handle.parameters()}
    handle.detach()
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == count


def test_a_prefix_that_peft_froze_is_named_at_the_first_training_step_and_once() -> None:
    model: Any = causal_lm("Llama")
    handle = zinit.attach(model, name="mine")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**SETTINGS))
    with torch.no_grad():
        wrapped(**batch("none"))
    wrapped.train()
    with pytest.warns(UserWarning, match=r"'mine' is on and does not train, .*handle\.activate\(\) lets it train"):
        wrapped(**batch("none"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(**batch("none"))
    handle.activate()
    assert all(p.requires_grad for p in handle.parameters())


def test_nothing_is_said_without_cause() -> None:
    model: Any = causal_lm("Llama")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        handle = zinit.attach(model)
        model.train()
        model(**batch("none"))
        handle.detach()
        handle = zinit.attach(
            peft.get_peft_model(causal_lm("Llama"), peft.LoraConfig(**SETTINGS)).requires_grad_(False)
        )
        for p in handle.parameters():  # a user's own choice: nothing at all trains
            p.requires_grad_(False)
        handle.model.train()
        handle.model(**batch("none"))
    assert not [str(w.message) for w in said if "PEFT" in str(w.message) or "does not train" in str(w.message)]
