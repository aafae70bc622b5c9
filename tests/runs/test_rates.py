"""Whose learning rate a run takes: what is said, the preset's for its own method, else the method's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zinit.runs.config import RunConfig
from zinit.runs.settings import override, resolve
from zinit.train.config import RatesConfig

DEMO = 3e-2  # the demo's preset, for zero-init


def rate(*options: str, **said: Any) -> float:
    return resolve(backbone="llama", options=options, **said)[0].train.learning_rate


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), DEMO),
        (("method=random-gate",), DEMO),
        (("method=lora",), 3e-4),
        (("method=full",), 2e-5),
        (("method=lora", "train.learning_rate=0.5"), 0.5),
        (("learning_rate=0.5", "method=lora"), 0.5),
        (("method=lora", "train.epochs=2"), 3e-4),
    ],
)
def test_a_presets_rate_is_its_methods(options: tuple[str, ...], expected: float) -> None:
    assert rate(*options) == expected


def test_what_a_method_trains_in_the_model_has_a_rate_beside_the_heads() -> None:
    shared, apart = RatesConfig(head=0.5), RatesConfig(weights=2.0, head=0.5, groups={"visual": {"head": 3}})
    assert [rates.factor("main", "weights") for rates in (shared, apart)] == [0.5, 2.0]
    assert [RatesConfig(groups={"visual": {"head": 3}}).factor("visual", role) for role in ("weights", "head")] == [
        3,
        3,
    ]
    assert "weights" not in shared.to_dict()  # as earlier versions wrote it
    assert RatesConfig.from_dict(apart.to_dict()) == apart


def test_without_a_preset_and_in_files(tmp_path: Path) -> None:
    said = {"model": str(tmp_path), "data": "data.json"}
    assert rate(**said) == 9e-3 * 64 / 256
    assert rate("method=bitfit", **said) == 1e-3
    file = tmp_path / "run.toml"
    file.write_text('method = "lora"\n[train]\nlearning_rate = 0.125\n')
    assert rate(config_file=str(file)) == 0.125
    file.write_text('method = "lora"\n')
    assert rate(config_file=str(file)) == 3e-4
    assert rate("method=zero-init", config_file=str(file)) == DEMO


def test_the_rest_of_a_preset_stays() -> None:
    plain, lora = (resolve(backbone="llama", options=options)[0] for options in ((), ("method=lora",)))
    assert {**lora.train.to_dict(), "learning_rate": DEMO} == plain.train.to_dict()


def test_a_saved_run_keeps_its_rate() -> None:
    saved = resolve(backbone="llama", options=["method=lora", "learning_rate=0.5"])[0]
    assert RunConfig.from_dict(saved.to_dict()) == saved
    assert override(saved, options=["epochs=3"]).train.learning_rate == 0.5
