"""Settings: strict, frozen, round-tripping."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from zinit.config import JsonConfig, PrefixConfig
from zinit.errors import ConfigError
from zinit.train.config import TrainConfig

SETTINGS: list[dict[str, Any]] = [
    {},
    {"length": 1, "layers": 30},
    {"layers": (0, 3, 7), "gate": "identity", "gate_per": "layer", "gate_init": 0.25},
    {"gate_init": "random", "init_std": 0},
    {"gating": False, "separate_softmax": False, "parametrization": "key_value"},
    {"separate_softmax": False},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_prefix_config_round_trips_through_json(settings: dict[str, Any]) -> None:
    config = PrefixConfig(**settings)
    assert PrefixConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(PrefixConfig)}


def test_a_train_config_round_trips_through_json() -> None:
    config = TrainConfig(steps=7, clip_norm=None, mixed_precision="bf16")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_defaults_are_the_papers() -> None:
    config = PrefixConfig()
    assert (config.length, config.gate, config.gate_per, config.gate_init) == (10, "tanh", "head", 0.0)
    assert config.gating
    assert config.separate_softmax
    assert config.parametrization == "prompt"
    assert config.layers is None


def test_layers_may_come_as_a_list() -> None:
    config = PrefixConfig(layers=[1, 2])  # pyright: ignore[reportArgumentType]
    assert config.layers == (1, 2)
    assert hash(config) == hash(PrefixConfig(layers=(1, 2)))


def test_settings_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PrefixConfig().length = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        PrefixConfig(3)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    "settings",
    [
        {"length": 0},
        {"length": -1},
        {"length": True},
        {"length": 2.0},
        {"length": "10"},
        {"length": None},
        {"layers": 0},
        {"layers": True},
        {"layers": 1.5},
        {"layers": "all"},
        {"layers": ()},
        {"layers": (2, 1)},
        {"layers": (1, 1)},
        {"layers": (-1, 0)},
        {"layers": (0, True)},
        {"layers": (0, 1.5)},
        {"gate": "sigmoid"},
        {"gate": None},
        {"gate_per": "token"},
        {"gate_init": "zero"},
        {"gate_init": True},
        {"gate_init": None},
        {"gate_init": float("nan")},
        {"gate_init": float("inf")},
        {"gating": 1},
        {"separate_softmax": "no", "gating": False},
        {"parametrization": "lora"},
        {"init_std": -1.0},
        {"init_std": float("nan")},
        {"init_std": float("inf")},
        {"init_std": True},
        {"init_std": "1"},
    ],
    ids=str,
)
def test_an_impossible_setting_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        PrefixConfig(**settings)
    assert next(iter(settings)) in str(caught.value)
    with pytest.raises(ConfigError):
        PrefixConfig.from_dict(settings)


@pytest.mark.parametrize("values", [None, 3, "text", [], ["length"], [["length", 3]]])
def test_settings_come_from_a_dictionary(values: Any) -> None:
    with pytest.raises(ConfigError, match="named settings"):
        PrefixConfig.from_dict(values)


def test_a_misspelt_setting_names_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"'lenght'\. Did you mean 'length'\? Known: .*init_std"):
        PrefixConfig.from_dict({"lenght": 3})


def test_a_missing_setting_is_named() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Needy(JsonConfig):
        path: str
        steps: int = 3
        names: list[str] = dataclasses.field(default_factory=list)

    with pytest.raises(ConfigError, match="Needy needs path"):
        Needy.from_dict({"steps": 2})
    assert Needy.from_dict({"path": "x"}).steps == 3


def test_every_choice_is_listed() -> None:
    with pytest.raises(ConfigError, match="gate must be one of 'tanh', 'identity', 'query'; got 'relu'"):
        PrefixConfig(gate="relu")  # pyright: ignore[reportArgumentType]


def test_defaults_are_written_out() -> None:
    """An adapter saved with the default gate says so: a reader needs no knowledge of our defaults."""
    assert PrefixConfig().to_dict()["gate"] == "tanh"
    assert PrefixConfig().to_dict()["layers"] is None
