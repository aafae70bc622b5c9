"""The one registry: lazy, closed to collisions, helpful."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import zinit
from zinit.backbones import BACKBONES
from zinit.errors import ConfigError
from zinit.registry import Registry, did_you_mean


@pytest.fixture
def registry() -> Registry:
    return Registry("backbone", {"llama": "zinit.backbones.llama:LLAMA", "roberta": "no.such.module:X"})


def test_it_lists_without_importing(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_entry.py").write_text("THING = object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.register("lazy", "lazy_entry:THING")
    assert list(registry) == ["lazy", "llama", "roberta"]
    assert "lazy" in registry
    assert registry.where("lazy") == "lazy_entry:THING"
    assert "lazy_entry" not in sys.modules
    thing = registry.get("lazy")
    assert thing is sys.modules["lazy_entry"].THING
    assert registry.get("lazy") is thing


def test_unknown_names_get_a_suggestion(registry: Registry) -> None:
    for ask in (registry.get, registry.where):
        with pytest.raises(
            ConfigError, match=r"no backbone named 'lama'. Did you mean 'llama'\? Known: llama, roberta"
        ):
            ask("lama")


def test_collisions_are_refused(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"'llama' exists already \(zinit.backbones.llama:LLAMA\)"):
        registry.register("llama", "mine:LLAMA")
    assert registry.where("llama") == "zinit.backbones.llama:LLAMA"
    registry.register("llama", "zinit.backbones.llama:LLAMA")  # the same again: a module imported twice


@pytest.mark.parametrize("where", ["", "nowhere", ":X", "module:", "mod ule:X", "module:a.b", "a..b:X", "module:X:Y"])
def test_malformed_addresses_are_refused(registry: Registry, where: str) -> None:
    with pytest.raises(ConfigError, match=r"package\.module:OBJECT"):
        registry.register("mine", where)
    assert "mine" not in registry


def test_what_cannot_be_loaded_is_named(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"'roberta' cannot be loaded from 'no.such.module:X': No module named"):
        registry.get("roberta")
    registry.register("gone", "zinit.registry:Gone")
    with pytest.raises(ConfigError, match="has no attribute 'Gone'"):
        registry.get("gone")


def test_one_registry_does_not_change_another() -> None:
    entries = {"a": "a:A"}
    one = Registry("task", entries)
    one.register("b", "b:B")
    assert list(Registry("task", entries)) == ["a"]


def test_did_you_mean() -> None:
    assert did_you_mean("x", []) == " Known: none."
    assert did_you_mean("x", ["b", "a"]) == " Known: a, b."
    assert did_you_mean("alpca", ["alpaca", "squad"]) == " Did you mean 'alpaca'? Known: alpaca, squad."


def test_the_public_function_fills_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKBONES, "_where", dict(BACKBONES._where))
    zinit.register_backbone("mine", "my_package.backbone:MINE")
    assert BACKBONES.where("mine") == "my_package.backbone:MINE"
    with pytest.raises(ConfigError, match="exists already"):
        zinit.register_backbone("llama", "my_package.backbone:MINE")


def test_every_shipped_entry_loads_and_knows_its_name() -> None:
    for name in BACKBONES:
        assert BACKBONES.get(name).name == name
