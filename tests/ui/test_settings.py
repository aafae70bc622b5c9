"""``zinit ls settings`` and docs/settings.md: every setting with its type, default, limit and description."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from scripts.make_settings import DOCUMENT, render
from zinit.adapter.registries import SOURCES
from zinit.config import PrefixConfig, SettingDescription
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.runs.options import run_overrides
from zinit.runs.settings import resolve
from zinit.tasks import TASKS
from zinit.tasks.alpaca.config import AlpacaConfig
from zinit.train.config import RatesConfig, TrainConfig
from zinit.ui.settings import SettingsTable, settings_tables, shown_default


@pytest.fixture(scope="module", autouse=True)
def shipped_alone() -> Iterator[None]:
    """Without what other tests have registered."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in (TASKS, METHODS, SOURCES):
            patch.setattr(registry, "_where", {name: registry.where(name) for name in registry.shipped})
        yield


@pytest.fixture(scope="module")
def tables() -> list[SettingsTable]:
    return settings_tables()


def of(tables: list[SettingsTable], table: str, entry: str | None = None) -> dict[str, SettingDescription]:
    found = [one for one in tables if (one.of, one.table, one.entry) == ("run", table, entry)]
    assert len(found) == 1
    return {setting.name: setting for setting in found[0].settings}


def test_the_document_is_what_its_script_writes() -> None:
    assert render() == DOCUMENT.read_text(encoding="utf-8"), "run: python -m scripts.make_settings"


def test_no_setting_is_left_out(tables: list[SettingsTable]) -> None:
    fields = {field.name for field in dataclasses.fields(TrainConfig)} - {"rates"}
    rates = {f"rates.{field.name}" for field in dataclasses.fields(RatesConfig)}
    assert set(of(tables, "train")) == {f"train.{name}" for name in fields | rates}
    assert set(of(tables, "prefix")) == {f"prefix.{field.name}" for field in dataclasses.fields(PrefixConfig)}
    alpaca = {f"task.{field.name}" for field in dataclasses.fields(AlpacaConfig)}
    assert set(of(tables, "task", "alpaca")) == alpaca
    assert {"seed", "dtype", "quantize", "warm_start"} <= set(of(tables, ""))
    assert {one.entry for one in tables if one.table == "task"} == set(TASKS)
    assert {one.entry for one in tables if one.table == "context"} == set(SOURCES)
    assert {"lora", "bottleneck", "excitor", "imagebind-llm"} <= {one.entry for one in tables if one.table == "method"}
    assert [one.table for one in tables if one.of == "benchmark"] == ["", "experiment"]
    retrieval = next(one for one in tables if one.of == "index")
    assert [one.name for one in retrieval.settings] == [
        "retrieval.neighbours",
        "retrieval.sharpness",
        "retrieval.weight",
    ]


def test_types_defaults_limits_and_descriptions(tables: list[SettingsTable]) -> None:
    length = of(tables, "prefix")["prefix.length"]
    assert (length.type, length.default) == ("a whole number of at least 1 (prompts per layer)", 10)
    assert length.largest == 65_536
    assert of(tables, "train")["train.workers"].largest == 1024
    assert of(tables, "train")["train.beta1"].largest is None
    heads = of(tables, "context", "visual-tokens")["context.heads"]
    assert (heads.type, heads.default, heads.largest) == ("a whole number of at least 1", 4, 65_536)
    assert heads.description == "of a block. Released: 16."
    for table in tables:
        assert table.about, table.title
        for setting in table.settings:
            assert setting.description, setting.name
            assert setting.type, setting.name


def test_a_limit_is_where_it_says(tables: list[SettingsTable]) -> None:
    for name, limit in (("prefix.length", 65_536), ("train.workers", 1024), ("train.batch_size", 10**9)):
        assert resolve(backbone="llama", options=[f"{name}={limit}"])
        with pytest.raises(ConfigError, match=f"The largest that is taken is {limit:,}"):
            resolve(backbone="llama", options=[f"{name}={limit + 1}"])
        assert of(tables, name.partition(".")[0])[name].largest == limit


def test_every_name_is_an_option_and_every_default_a_value_of_it(tables: list[SettingsTable]) -> None:
    taken = 0
    for table in tables:
        if table.of != "run":
            continue
        task = table.entry if table.table == "task" and table.entry else "alpaca"
        method = table.entry if table.table == "method" and table.entry else "zero-init"
        for setting in table.settings:
            option = f"{setting.name}={'x' if setting.required else shown_default(setting)}"
            nested: Any = run_overrides([option], task=task, method=method)
            for part in setting.name.split("."):
                nested = nested[part]
            assert setting.required or nested == setting.default, option
            taken += 1
    assert taken > 150


def test_of_a_foreign_entry_that_cannot_be_imported_the_reason_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (METHODS, SOURCES):
        monkeypatch.setattr(registry, "_where", {**registry._all(), "broken": "no_such_module:X"})
        monkeypatch.setattr(registry, "_about", {**registry._about, "broken": ""})
    found = [table for table in settings_tables() if table.entry == "broken"]
    assert [table.table for table in found] == ["method", "context"]
    assert all("no_such_module" in table.about and not table.settings for table in found)


def test_the_command_prints_all_of_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from zinit.ui.tools import list_entries

    list_entries("settings", as_json=True)
    document = json.loads(capsys.readouterr().out)
    train = next(table for table in document if table["table"] == "train")
    epochs = next(setting for setting in train["settings"] if setting["name"] == "train.epochs")
    assert epochs == {
        "name": "train.epochs", "type": "a number above 0", "default": 5, "required": False, "largest": 10**9,
        "description": "passes over the training examples.",
    }  # fmt: skip
    list_entries("settings")
    shown = capsys.readouterr().out
    for table in document:
        for setting in table["settings"]:
            assert setting["name"] in shown
    assert "in the user's cache" in shown
    assert "None" not in shown
    with pytest.raises(ConfigError, match=r"there is no list of 'setings'\. Did you mean 'settings'"):
        list_entries("setings")
