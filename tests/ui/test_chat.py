"""A chat follows the model's own generation settings, says which, and what is wrong with them is one message."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from tests.tiny import byte_tokenizer
from zinit.adapter.attach import attach
from zinit.config import PrefixConfig
from zinit.errors import ConfigError
from zinit.ui import chat
from zinit.ui.chat import ChatSession


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model with learned positions, in the place of a run's."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 264, "n_positions": 120, "n_embd": 32, "n_layer": 1, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=1)).eval()
    handle = attach(model, PrefixConfig(length=2))
    monkeypatch.setattr(chat, "read_finished_run", lambda where: (SimpleNamespace(task="alpaca"), None))
    monkeypatch.setattr(chat, "load_run", lambda where, device: (None, model.to(device), byte_tokenizer(), handle))
    return model


def answer(prompt: str = "red", **settings: Any) -> str:
    session = ChatSession("run", **{"temperature": 0, "max_new_tokens": 8, **settings})
    return session.answer(prompt, raw=True, stream=False)


def test_the_models_own_settings_count_and_are_named(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plain = answer()
    assert capsys.readouterr().err == ""
    model.generation_config = GenerationConfig(suppress_tokens=list(range(3, 200)), num_beams=2, temperature=0.3)
    assert answer() != plain
    said = capsys.readouterr().err
    assert "generation settings this uses suppress_tokens=[3, 4" in said
    assert "it does not use num_beams)" in said


@pytest.mark.parametrize("entry", [{"bad_words_ids": [["x"]]}, {"sequence_bias": [[[900], 1.0]]}], ids=str)
def test_settings_that_cannot_be_used_are_one_message(model: Any, entry: dict[str, Any]) -> None:
    for name, value in entry.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ConfigError, match=r"generation_config\.json cannot be used: .*Correct the file, or remove it"):
        answer()


def test_an_answer_ends_where_the_positions_do(model: Any) -> None:
    passes: list[None] = []
    model.register_forward_hook(lambda *_: passes.append(None))
    answer("a" * 110, max_new_tokens=50)
    assert len(passes) == 120 - 111
    with pytest.raises(ConfigError, match="the prompt has 121 tokens, but the model has room for 120"):
        answer("a" * 120)
