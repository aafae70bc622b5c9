"""The one registry: lazy, closed to collisions, helpful."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import zinit
from tests.processes import environment
from zinit.backbones import BACKBONES, find_backbone
from zinit.errors import BackboneError, ConfigError
from zinit.methods import METHODS
from zinit.registry import Address, Entry, Registry, did_you_mean
from zinit.tasks import TASKS
from zinit.ui.listing import REGISTRIES, list_kind


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


@pytest.mark.parametrize("code", ["class THING:\n    name = 'other'\n", "class A:\n    name = 'other'\nTHING = A()\n"])
def test_what_calls_itself_otherwise_is_refused(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's file names its backbone by the object's own name, and looks it up by the registered one."""
    (tmp_path / "alias.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "alias", raising=False)
    registry = Registry("backbone", {"mine": "alias:THING", "other": "alias:THING"})
    with pytest.raises(ConfigError, match=r"as the backbone 'mine', but calls itself 'other'.*Register it as 'other'"):
        registry.get("mine")
    assert registry.get("other") is sys.modules["alias"].THING


def test_one_registry_does_not_change_another() -> None:
    entries = {"a": "a:A"}
    one = Registry("task", entries)
    one.register("b", "b:B")
    assert list(Registry("task", entries)) == ["a"]


def test_did_you_mean() -> None:
    assert did_you_mean("x", []) == " Known: none."
    assert did_you_mean("x", ["b", "a", "b"]) == " Known: a, b."
    assert did_you_mean("alpca", ["alpaca", "squad"]) == " Did you mean 'alpaca'? Known: alpaca, squad."


def test_the_public_function_fills_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKBONES, "_where", dict(BACKBONES._where))
    zinit.register_backbone("mine", "my_package.backbone:MINE")
    assert BACKBONES.where("mine") == "my_package.backbone:MINE"
    with pytest.raises(ConfigError, match="exists already"):
        zinit.register_backbone("llama", "my_package.backbone:MINE")


def test_every_shipped_entry_loads_and_knows_its_name() -> None:
    for registry in (BACKBONES, METHODS, TASKS):
        for name in registry:
            assert registry.get(name).name == name


# --- entry points of installed packages ------------------------------------------------------------------------------


def install(folder: Path, package: str, entries: dict[str, str], code: str = "THING = object()\n") -> None:
    """What pip leaves behind: a module and the metadata of its distribution. ``entries``: {"group/name": address}."""
    information = folder / f"{package}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[{key.partition('/')[0]}]\n{key.partition('/')[2]} = {where}\n" for key, where in entries.items()]
    (information / "entry_points.txt").write_text("".join(lines))
    (folder / f"{package}.py").write_text(code)


def test_installed_packages_add_names_that_are_imported_on_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "plug_in", {"test.things/mine": "plug_in : THING", "test.others/other": "plug_in:THING"})
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("thing", {"own": "zinit.registry:Registry"}, group="test.things")
    assert list(registry) == ["mine", "own"]
    assert registry.where("mine") == "plug_in:THING"
    assert "plug_in" not in sys.modules
    assert registry.get("mine") is sys.modules["plug_in"].THING
    assert registry.shipped == {"own"}
    assert list(Registry("thing", {})) == []
    with pytest.raises(ConfigError, match=r"no thing named 'min'. Did you mean 'mine'\? Known: mine, own."):
        Registry("thing", {"own": "a:A"}, group="test.things").get("min")
    with pytest.raises(ConfigError, match=r"'mine' exists already \(plug_in:THING\)"):
        Registry("thing", {}, group="test.things").register("mine", "other:THING")


def test_entry_points_are_read_once_and_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: asked.append(group) or [])
    registry = Registry("thing", {"own": "zinit.registry:Registry"}, group="test.things")
    assert "own" in registry
    assert registry.get("own") is Registry
    assert asked == []
    for _ in range(2):
        assert "mine" not in registry
        assert list(registry) == ["own"]
    assert asked == ["test.things"]


def test_an_entry_point_that_cannot_be_used_is_left_out_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "pushy", {"test.things/own": "pushy:THING"})
    install(tmp_path, "sloppy", {"test.things/bad": "sloppy"})
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("thing", {"own": "zinit.registry:Registry"}, group="test.things")
    with pytest.warns(UserWarning, match="of the package") as caught:
        assert list(registry) == ["own"]
    said = sorted(str(warning.message) for warning in caught)
    assert "'pushy' is left out: a thing named 'own' exists already" in said[0]
    assert "'sloppy' is left out: the thing 'bad' needs an address" in said[1]
    assert registry.get("own") is Registry


def test_registered_backbones_are_asked_first_and_a_broken_one_harms_no_other_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    code = "class Z:\n    name = 'z_mine'\n    def matches(self, model): return hasattr(model, 'is_mine')\nZ = Z()\n"
    (tmp_path / "z_backbone.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(BACKBONES, "_where", dict(BACKBONES._where))
    zinit.register_backbone("broken", "no_such_module:X")
    zinit.register_backbone("z_mine", "z_backbone:Z")
    from tests.contract.cases import causal_lm

    model = causal_lm("Llama")
    with pytest.warns(UserWarning, match="'broken' cannot be loaded from 'no_such_module:X'"):
        assert find_backbone(model).name == "llama"
    model.is_mine = True
    with pytest.warns(UserWarning, match="'broken'"):
        assert find_backbone(model).name == "z_mine"
    with pytest.warns(UserWarning, match="'broken'"), pytest.raises(BackboneError, match="Known backbones: broken"):
        find_backbone(torch.nn.Linear(1, 1))


@pytest.mark.integration
def test_the_command_line_knows_installed_entries_and_its_help_reads_none(tmp_path: Path) -> None:
    groups = ("backbones", "tasks", "methods")
    install(tmp_path, "plug_in", {f"zinit.{group}/mine-{group}": "no_such_module:X" for group in groups})
    environ = environment() | {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{tmp_path}"}

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)

    forbid = "import sys, importlib.metadata as m; del m.entry_points; import zinit, zinit.cli, zinit.runs.settings;"
    done = run(f"{forbid} sys.argv = ['zinit', '--help']; zinit.cli.main()")
    assert (done.returncode, "Usage: zinit" in done.stdout) == (0, True), done.stderr
    done = run(f"{forbid} list(zinit.backbones.BACKBONES)")
    assert "cannot import name 'entry_points'" in done.stderr  # the check can fail
    for group in groups:
        done = run(f"import sys, zinit.cli; sys.argv = ['zinit', 'ls', '{group}', '--json']; zinit.cli.main()")
        assert done.returncode == 0, done.stderr
        assert f'"mine-{group}": "the {group[:-1]} ' in done.stdout


# --- descriptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(REGISTRIES))
def test_every_shipped_entry_is_described_in_one_line_of_its_own(kind: str) -> None:
    listed = list_kind(kind)
    assert list(listed) == list(REGISTRIES[kind])
    listed = {name: text for name, text in listed.items() if name in REGISTRIES[kind].shipped}
    assert listed.keys() == REGISTRIES[kind].shipped
    assert len(set(listed.values())) == len(listed)
    for name, text in listed.items():
        assert REGISTRIES[kind]._about[name] == text, f"{name} would be imported to be listed"
        assert text == text.strip() != ""
        assert "\n" not in text
        assert len(text) <= 100
        assert text[0].isupper() or name == "vit"  # timm's own spelling
        assert text.endswith(".")


def test_a_description_costs_no_import_and_a_docstring_serves_where_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = '"""Of the module.\n\nMore."""\nclass A:\n    """Of the class.\n\n    More."""\n'
    code += "class B: pass\nTHING, BARE = A(), B()\n"
    (tmp_path / "described.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "described", raising=False)
    registry = Registry("thing", {"told": Entry("described:A", "As told."), "class": "described:A"})
    registry.register("later", "described:B", "Told later.")
    assert (registry.about("told"), registry.about("later")) == ("As told.", "Told later.")
    assert "described" not in sys.modules
    assert registry.about("class") == "Of the class."
    for name, expected in {"B": "Of the module.", "THING": "Of the module.", "BARE": "Of the module."}.items():
        registry.register(name, f"described:{name}")
        assert registry.about(name) == expected
    with pytest.raises(ConfigError, match="no thing named 'tol'"):
        registry.about("tol")
    registry.register("gone", "no_such_module:X")
    with pytest.raises(ConfigError, match="'gone' cannot be loaded"):
        registry.about("gone")


def test_a_module_without_docstring_leaves_an_instance_the_one_of_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "undescribed.py").write_text('class A:\n    """Of the class."""\nTHING = A()\nclass B: pass\n')
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("thing", {"mine": "undescribed:THING", "bare": "undescribed:B"})
    assert registry.about("mine") == "Of the class."
    assert registry.about("bare") == ""


def test_unknown_lists_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no list of 'task'. Did you mean 'tasks'\? Known: backbones, benchmarks,"):
        list_kind("task")


@pytest.mark.parametrize("kind", ["backbones", "tasks", "methods"])
def test_what_is_known_without_importing_is_what_the_object_says(kind: str) -> None:
    registry, missing = REGISTRIES[kind], object()
    for name in registry.shipped:
        assert registry.facts[name], f"{name} says nothing of itself"
        for attribute in registry.facts[name]:
            assert getattr(registry.get(name), attribute, missing) == registry.fact(name, attribute), (name, attribute)


def test_a_fact_that_did_not_come_with_an_entry_is_asked_of_its_object(registry: Registry) -> None:
    assert registry.fact("llama", "default_task") == "alpaca"
    known = Registry(
        "thing", {"a": Entry("no.such:A", facts={"size": 3, "Config": Address("zinit.train.config:TrainConfig")})}
    )
    assert (known.fact("a", "size"), known.fact("a", "Config").__name__) == (3, "TrainConfig")
    with pytest.raises(ConfigError, match="'a' cannot be loaded"):
        known.fact("a", "weight")
    with pytest.raises(ConfigError, match="no thing named 'b'"):
        known.fact("b", "size")
