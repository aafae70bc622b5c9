"""Every error a user can cause says what was got, what was expected and what to do next."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zinit
from tests.contract.cases import causal_lm, text_batch
from zinit.backbones import BACKBONES
from zinit.config import PrefixConfig
from zinit.errors import BackboneError, CheckpointError, ConfigError, DataError, ZinitError
from zinit.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Message:
    """One mistake, and the parts that its message must have."""

    mistake: Callable[[Path], Any]
    error: type[ZinitError]
    got: str
    expected: str
    next_step: str


def adapted(**settings: Any) -> tuple[Any, zinit.Handle]:
    model = causal_lm("Llama")
    return model, zinit.attach(model, PrefixConfig.from_dict({"length": 4, "layers": 2} | settings), seed=0)


def with_context(shape: tuple[int, ...]) -> None:
    model, handle = adapted()
    with handle.context(torch.zeros(shape)):
        model(**text_batch("none"))


def load_elsewhere(folder: Path, kind: str = "Llama", **changes: Any) -> None:
    adapted()[1].save(folder)
    zinit.load(causal_lm(kind, **changes), folder)


def load_edited(folder: Path, **changes: Any) -> None:
    adapted()[1].save(folder)
    path = folder / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    zinit.load(causal_lm("Llama"), folder)


def load_spoiled(folder: Path) -> None:
    adapted()[1].save(folder)
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    zinit.load(causal_lm("Llama"), folder)


def load_reinitialized(folder: Path) -> None:
    adapted()[1].save(folder)
    other = causal_lm("Llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    zinit.load(other, folder)


def joint_on_flash() -> None:
    model, _ = adapted(layers=3, gating=False, separate_softmax=False)
    model.config._attn_implementation_internal = "flash_attention_2"  # refused before it is called
    model(**text_batch("none"))


def nameless_projection() -> None:
    model: Any = causal_lm("Llama")
    del model.model.layers[1].self_attn.k_proj
    zinit.attach(model)


MESSAGES: dict[str, Message] = {
    "length": Message(
        mistake=lambda _: PrefixConfig(length=0),
        error=ConfigError,
        got="got 0",
        expected="whole number of at least 1",
        next_step="length must be a whole number of at least 1 (prompts per layer)",
    ),
    "layers-type": Message(
        mistake=lambda _: PrefixConfig(layers="all"),  # pyright: ignore[reportArgumentType]
        error=ConfigError,
        got="got 'all'",
        expected="a count of topmost layers",
        next_step="none for all",
    ),
    "layers-order": Message(
        mistake=lambda _: PrefixConfig(layers=(2, 1)),
        error=ConfigError,
        got="got (2, 1)",
        expected="ascending",
        next_step="without repeats",
    ),
    "gate": Message(
        mistake=lambda _: PrefixConfig(gate="relu"),  # pyright: ignore[reportArgumentType]
        error=ConfigError,
        got="got 'relu'",
        expected="'tanh', 'identity'",
        next_step="must be one of",
    ),
    "context-alone-in-one-softmax": Message(
        mistake=lambda _: PrefixConfig(prompt="context", separate_softmax=False),
        error=ConfigError,
        got="prompt='context'",
        expected="no context",
        next_step="leave separate_softmax at True",
    ),
    "setting": Message(
        mistake=lambda _: PrefixConfig.from_dict({"lenght": 3}),
        error=ConfigError,
        got="'lenght'",
        expected="Known: gate,",
        next_step="Did you mean 'length'?",
    ),
    "backbone-name": Message(
        mistake=lambda _: zinit.attach(causal_lm("Llama"), backbone="lama"),
        error=ConfigError,
        got="'lama'",
        expected="Known:",
        next_step="Did you mean 'llama'?",
    ),
    "unknown-model": Message(
        mistake=lambda _: zinit.attach(nn.Linear(2, 2)),
        error=BackboneError,
        got="Linear",
        expected="Known backbones:",
        next_step="zinit.register_backbone(",
    ),
    "address": Message(
        mistake=lambda _: Registry("task", {}).register("mine", "module"),
        error=ConfigError,
        got="got 'module'",
        expected="'package.module:OBJECT'",
        next_step="needs an address like",
    ),
    "collision": Message(
        mistake=lambda _: zinit.register_backbone("llama", "mine:LLAMA"),
        error=ConfigError,
        got="'llama'",
        expected="exists already (zinit.backbones.llama:LLAMA)",
        next_step="Choose another name",
    ),
    "layers-too-many": Message(
        mistake=lambda _: zinit.attach(causal_lm("Llama"), PrefixConfig(layers=4)),
        error=BackboneError,
        got="layers=4",
        expected="has 3 attention layers",
        next_step="Choose 1 to 3, or none for all",
    ),
    "layers-too-high": Message(
        mistake=lambda _: zinit.attach(causal_lm("Llama"), PrefixConfig(layers=(1, 3))),
        error=BackboneError,
        got="layers=[1, 3]",
        expected="attention layers 0 to 2",
        next_step="Choose layers up to 2",
    ),
    "projection": Message(
        mistake=lambda _: nameless_projection(),
        error=BackboneError,
        got="model.layers.1.self_attn (LlamaAttention)",
        expected="linear projection 'k_proj'",
        next_step="zinit.register_backbone(",
    ),
    "no-attention": Message(
        mistake=lambda _: zinit.attach(nn.Linear(2, 2), backbone="llama"),
        error=BackboneError,
        got="Linear",
        expected="no module named 'self_attn'",
        next_step="zinit.register_backbone(",
    ),
    "joint-on-flash": Message(
        mistake=lambda _: joint_on_flash(),
        error=BackboneError,
        got="not 'flash_attention_2'",
        expected="'sdpa' or 'eager'",
        next_step="model.set_attn_implementation('sdpa')",
    ),
    "attached-twice": Message(
        mistake=lambda _: zinit.attach(adapted()[0]),
        error=ConfigError,
        got="'default'",
        expected="already",
        next_step="Detach it first, or pass another name",
    ),
    "attached-to-a-part": Message(
        mistake=lambda _: zinit.attach(adapted()[0].model),
        error=ConfigError,
        got="LlamaModel",
        expected="shares layers with a model that has an adapter already",
        next_step="detach there first",
    ),
    "adapter-name": Message(
        mistake=lambda _: zinit.attach(causal_lm("Llama"), name="my adapter"),
        error=ConfigError,
        got="got 'my adapter'",
        expected="must be an identifier",
        next_step="such as 'default' or 'chat_v2'",
    ),
    "reserved-name": Message(
        mistake=lambda _: zinit.attach(causal_lm("Llama"), name="train"),
        error=ConfigError,
        got="got 'train'",
        expected="no attribute of a torch module",
        next_step="such as 'default' or 'chat_v2'",
    ),
    "no-such-adapter": Message(
        mistake=lambda _: zinit.get_handle(adapted()[0], "defautl"),
        error=ConfigError,
        got="'defautl'",
        expected="Known: default",
        next_step="Did you mean 'default'?",
    ),
    "no-adapter": Message(
        mistake=lambda _: zinit.get_handle(causal_lm("Llama")),
        error=ConfigError,
        got="'default'",
        expected="Known: none",
        next_step="zinit.attach",
    ),
    "context": Message(
        mistake=lambda _: with_context((3, 2, 32)),
        error=ConfigError,
        got="got (3, 2, 32)",
        expected="must be (batch, 1 or 4, 32)",
        next_step="a context must be",
    ),
    "context-batch": Message(
        mistake=lambda _: with_context((2, 1, 32)),
        error=ConfigError,
        got="for 2 samples",
        expected="batch of 3",
        next_step="give one for each",
    ),
    "context-without-prompts": Message(
        mistake=lambda _: adapted(parametrization="key_value")[1].context(torch.zeros(3, 1, 32)).__enter__(),
        error=ConfigError,
        got="learned keys and values",
        expected="take no context",
        next_step="use parametrization='prompt'",
    ),
    "detached": Message(
        mistake=lambda _: [(handle := adapted()[1]).detach(), handle.activate()],
        error=ConfigError,
        got="'default'",
        expected="no longer attached",
        next_step="Attach or load it again",
    ),
    "folder": Message(
        mistake=lambda folder: zinit.load(causal_lm("Llama"), folder),
        error=CheckpointError,
        got="holds no adapter.json",
        expected="Expected a folder that zinit saved an adapter to",
        next_step="Expected a folder",
    ),
    "version": Message(
        mistake=lambda folder: load_edited(folder, format_version=9),
        error=CheckpointError,
        got="format version 9",
        expected="reads up to 2",
        next_step="Upgrade zinit",
    ),
    "description": Message(
        mistake=lambda folder: load_edited(folder, config={"length": 0}),
        error=CheckpointError,
        got="adapter.json is damaged",
        expected="whole number of at least 1",
        next_step="Save or copy the adapter again",
    ),
    "tensors": Message(
        mistake=load_spoiled,
        error=CheckpointError,
        got="adapter.safetensors is damaged",
        expected="not the file that adapter.json beside it describes",
        next_step="Copy the folder again",
    ),
    "tensor-names": Message(
        mistake=lambda _: adapted()[1].load_state_dict({"gate": torch.zeros(4)}),
        error=CheckpointError,
        got="unexpected ['gate']",
        expected="missing ['model.layers.1.self_attn.gate'",
        next_step="(4 and 1 in all)",
    ),
    "other-model": Message(
        mistake=lambda folder: load_elsewhere(folder, num_hidden_layers=4),
        error=CheckpointError,
        got="num_layers is 4 here",
        expected="but 3 where it was trained",
        next_step="Load it onto",
    ),
    "other-family": Message(
        mistake=lambda folder: load_elsewhere(folder, "Qwen2"),
        error=CheckpointError,
        got="type is 'qwen2' here",
        expected="but 'llama'",
        next_step="Load it onto",
    ),
    "other-weights": Message(
        mistake=load_reinitialized,
        error=CheckpointError,
        got="agrees only to",
        expected="It was trained on",
        next_step="Pass check_weights=False if",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_got_expected_next_step(name: str, tmp_path: Path) -> None:
    message = MESSAGES[name]
    with pytest.raises(ZinitError) as caught:
        message.mistake(tmp_path)
    text = str(caught.value)
    assert type(caught.value) is message.error, text
    for part in (message.got, message.expected, message.next_step):
        assert part in text, text
    assert "\n" not in text
    assert ".." not in text.replace("...", "")
    assert len(text) < 500


def test_all_of_ours_are_one_family() -> None:
    for error in (ConfigError, BackboneError, CheckpointError, DataError):
        assert issubclass(error, ZinitError)
        assert not issubclass(error, ValueError)


def test_nothing_here_was_left_registered() -> None:
    assert BACKBONES.where("llama") == "zinit.backbones.llama:LLAMA"
