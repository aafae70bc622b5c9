"""Prefix-Tuning+, a matrix for each head in the place of prompts, on every backbone; its formula: `test_oracle.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zinit
from tests.contract.cases import Case, causal_lm, text_batch
from tests.contract.checks import run
from zinit.errors import CheckpointError, ConfigError

CONFIG = zinit.PrefixConfig(layers=2, parametrization="matrix", gating=False, init_std=0.0)


def test_every_backbone(case: Case, tmp_path: Path) -> None:
    """At its start no bit differs and all of it learns; opened it goes through scopes, routes and a folder."""
    model = case.build()
    base = run(case, model)
    handle = zinit.attach(model, CONFIG)
    assert torch.equal(run(case, model), base)
    case.output(model, case.batch("left")).float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in handle.parameters())
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    opened = run(case, model)
    assert (opened - base).abs().max() > 1e-3
    with handle.disabled():
        assert torch.equal(run(case, model), base)
    with handle.cached_kv():
        assert torch.equal(run(case, model), opened)
    handle.save(tmp_path)
    assert torch.equal(run(case, zinit.load(case.build(), tmp_path).model), opened)
    prompts = zinit.attach(model, zinit.PrefixConfig(length=3, gate_init=0.7), name="prompts", seed=1)
    with prompts.alone():
        by_prompts = run(case, model)
    with torch.no_grad(), handle.route(["default", "prompts", None]):
        routed = run(case, model)
    for row, alone in enumerate((opened, by_prompts, base)):
        torch.testing.assert_close(routed[row], alone[row], rtol=1e-4, atol=1e-5)
    prompts.detach()
    handle.detach()
    assert torch.equal(run(case, model), base)


def test_a_width_of_values_of_their_own() -> None:
    prefix = zinit.prefix.ZeroGatedPrefix(CONFIG, width=8, num_heads=2, num_kv_heads=1, head_dim=6, value_dim=4)
    assert {name: tuple(p.shape) for name, p in prefix.named_parameters()} == {"matrix": (2, 6, 4)}


def test_it_is_written_in_no_format_of_prompts_and_takes_no_context(tmp_path: Path) -> None:
    model = causal_lm("Llama")
    handle = zinit.attach(model, CONFIG)
    with pytest.raises(CheckpointError, match="learns matrices directly"):
        handle.export(tmp_path / "adapter.pth", format="official-v1")
    with pytest.raises(ConfigError, match="learned matrices take no context"), handle.context(torch.zeros(3, 1, 32)):
        model(**text_batch("none"))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"length": 5}, "leave out length=5"),
        ({"separate_softmax": False}, "leave out length=10 and separate_softmax=False"),
        ({"prompt": "context"}, "learned matrices have no prompts: leave out prompt='context'"),
        ({"prompts": "hyper"}, "learned matrices have no prompts"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        zinit.PrefixConfig(**{**vars(CONFIG), **settings})  # pyright: ignore[reportArgumentType]
