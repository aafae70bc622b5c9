"""The interface for tunings, proven by a toy: a learned shift of the output of some linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zinit
from tests.contract.cases import causal_lm, text_batch
from tests.contract.checks import assert_same, snapshot
from zinit.adapter.tuning import TunedCall, Tuning, build_tuning
from zinit.errors import ConfigError

NAMES = ("model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj")


class Shift(Tuning):
    """W x + b, with b = 0 at the start; several shifts add up."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.names = tuple(widths)
        self.shifts = nn.ParameterList(torch.zeros(width) for width in widths.values())

    def targets(self) -> Sequence[str]:
        return self.names

    @classmethod
    def changed(cls, on: Sequence[Any], call: TunedCall, output: Any) -> Tensor:
        return output + torch.stack([own.shifts[own.names.index(call.name)] for own in on]).sum(0)


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(zinit.TuningConfig):
    names: tuple[str, ...] = NAMES


@build_tuning.register
def _(config: ShiftConfig, model: nn.Module, sites: Sequence[Any], **options: Any) -> Shift:
    return Shift({name: model.get_submodule(name).out_features for name in config.names})  # pyright: ignore


def tuned(length: int = 3, names: tuple[str, ...] = NAMES) -> zinit.AdapterConfig:
    parts = {"prefix": zinit.PrefixConfig(length=length, layers=1)}
    return zinit.AdapterConfig(parts=parts, tuning=ShiftConfig(names=names))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**text_batch("none")).logits


def fill(handle: zinit.Handle, value: float) -> None:
    assert isinstance(handle.tuning, Shift)
    with torch.no_grad():
        for shift in handle.tuning.shifts:
            shift.fill_(value)


def by_hand(shift: float, names: tuple[str, ...] = NAMES) -> Tensor:
    """The shifts as biases of the host's own layers."""
    model = causal_lm("Llama")
    for name in names:
        layer = model.get_submodule(name)
        layer.bias = nn.Parameter(torch.full((layer.out_features,), shift))
    return logits(model)


def test_a_tuning_is_part_of_its_adapter() -> None:
    model = causal_lm("Llama")
    before, base = snapshot(model), logits(model)
    handle = zinit.attach(model, tuned())
    assert torch.equal(logits(model), base)  # at its start it changes no bit
    widths = [model.get_submodule(name).out_features for name in NAMES]
    assert handle.num_trainable == 3 * 32 + 4 + sum(widths)
    assert {name: len(own) for name, own in handle.roles().items()} == {"gates": 1, "prompts": 1, "tuning": 2}
    assert [name for name in handle.state_dict() if name.startswith("tuning.")] == [
        "tuning.shifts.0",
        "tuning.shifts.1",
    ]
    fill(handle, 0.25)
    shifted = logits(model)
    with handle.disabled():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), shifted)
    model(**text_batch("none")).logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in handle.tuning.parameters())  # pyright: ignore
    handle.detach()
    model.zero_grad()
    assert_same(snapshot(model), before)
    torch.testing.assert_close(shifted, by_hand(0.25))


def test_tunings_of_adapters_that_are_on_add_up() -> None:
    model = causal_lm("Llama")
    base = logits(model)
    first = zinit.attach(model, tuned(), name="first")
    second = zinit.attach(model, tuned(names=NAMES[:1]), name="second")
    fill(first, 0.25)
    fill(second, 0.5)
    second.activate()
    torch.testing.assert_close(logits(model), by_hand(0.5, NAMES[:1]))
    first.activate("first", "second")
    together = logits(model)
    assert not torch.allclose(together, by_hand(0.25))
    second.detach()
    torch.testing.assert_close(logits(model), by_hand(0.25))
    fill(first, 0.0)
    assert torch.equal(logits(model), base)


def test_a_tuned_adapter_in_a_route_is_refused() -> None:
    model = causal_lm("Llama")
    handle = zinit.attach(model, tuned())
    with pytest.raises(ConfigError, match="tunes modules of the host"), handle.route(["default"]):
        pass


def test_tensors_of_a_tuning_are_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    handle = zinit.attach(causal_lm("Llama"), tuned())
    fill(handle, 0.75)
    handle.save(tmp_path)
    assert load_file(tmp_path / "adapter.safetensors")["tuning.shifts.0"].unique().tolist() == [0.75]
    other = zinit.attach(causal_lm("Llama"), tuned())
    other.load_state_dict(load_file(tmp_path / "adapter.safetensors"))
    assert torch.equal(logits(other.model), logits(handle.model))
