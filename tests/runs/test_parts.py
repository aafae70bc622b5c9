"""An adapter of several parts on the command line: settings, a run, its adapter, its evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import save_records, save_tiny_llama
from zinit.errors import ConfigError
from zinit.runs.build import load_run
from zinit.runs.config import RunConfig
from zinit.runs.evaluate import evaluate_run
from zinit.runs.options import run_overrides
from zinit.runs.settings import override, resolve
from zinit.runs.train import train_run
from zinit.ui.inspection import inspect_model

OPTIONS = ("parts.early.length=2", "parts.early.layers=0,1", "parts.late.length=5", "parts.late.gate=identity",
           "prefix.length=3", "prefix.layers=2", "steps=4", "batch_size=8", "task.evaluation_limit=2",
           "task.max_new_tokens=4", "learning_rate=0.02", "warmup_steps=0")  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": str(save_tiny_llama(folder / "model")), "data": str(save_records(folder / "data.json"))}


@pytest.fixture(scope="module")
def run(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("run") / "run"
    config, preset = resolve(backbone="llama", options=OPTIONS, **inputs)
    return output, train_run(config, output, preset=preset)


def test_options_and_files_say_the_same_and_a_part_takes_the_rest_from_prefix(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(
        '[prefix]\nlength = 3\nlayers = 2\n[parts.early]\nlength = 2\nlayers = [0, 1]\n[parts.late]\nlength = 5\n'
        'gate = "identity"\n'
    )  # fmt: skip
    by_file = resolve(backbone="llama", config_file=str(tmp_path / "run.toml"), **inputs)[0]
    by_options = resolve(backbone="llama", options=OPTIONS[:6], **inputs)[0]
    assert by_file == by_options
    early, late = by_file.parts.values()
    assert list(by_file.parts) == ["early", "late"]
    assert (early.length, early.layers, early.gate) == (2, (0, 1), "tanh")
    assert (late.length, late.layers, late.gate) == (5, 2, "identity")
    assert RunConfig.from_dict(json.loads(json.dumps(by_file.to_dict()))) == by_file
    assert override(by_file, options=["parts.late.length=7"]).parts["late"].length == 7
    assert "parts" not in resolve(backbone="llama", **inputs)[0].to_dict(), "runs without parts are written as before"


def test_a_run_trains_every_part_and_saves_and_evaluates_them(
    run: tuple[Path, dict[str, Any]], inputs: dict[str, Any]
) -> None:
    output, results = run
    assert results["num_trainable"] == 2 * (2 * 32 + 4) + 2 * (5 * 32 + 4)
    tensors = load_file(output / "adapter.safetensors")
    assert {name.partition(".")[0] for name in tensors} == {"early", "late"}
    assert all(bool(tensor.any()) for name, tensor in tensors.items() if name.endswith("gate"))
    record = json.loads((output / "run.json").read_text())
    assert record["config"]["parts"]["late"]["length"] == 5
    found = evaluate_run(output)["metrics"]
    for model in ("base", "adapted"):
        assert found[model] == pytest.approx(results["metrics"][model], rel=1e-6)
    assert found["adapted"]["loss"] < found["base"]["loss"]
    _, model, _, handle = load_run(output, torch.device("cpu"))
    assert list(handle.parts) == ["early", "late"]
    assert all(torch.equal(handle.state_dict()[name], value) for name, value in tensors.items())


def test_the_report_shows_the_gates_of_every_part(run: tuple[Path, dict[str, Any]]) -> None:
    events = [json.loads(line) for line in (run[0] / "log.jsonl").read_text().splitlines()]
    gates = next(event["gates"] for event in events if event["event"] == "gates")
    assert len(gates) == 4
    assert (run[0] / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["parts.late.lenth=3"], r"no option named 'parts.late.lenth': parts.late is a prefix. Did you mean 'length'"),
        (["parts.late.length=0"], r"\[parts.late\] length must be a whole number"),
        (["parts.late=3"], "no option named 'parts.late'"),
        (["parts.2nd.length=3"], "a part's name must be an identifier"),
        (["parts.late.length=3", "method=lora"], "the method 'lora' attaches no adapter, which .parts. belong"),
        (["parts.a.length=3", "parts.b.length=3", "prefix.gating=false", "prefix.separate_softmax=false"],
         "shares the words' softmax .* stands alone"),
    ],
)  # fmt: skip
def test_wrong_parts(options: list[str], says: str, inputs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve(backbone="llama", options=options, **inputs)


def test_parts_in_a_file_are_tables(inputs: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[parts]\nlate = 3\n")
    with pytest.raises(ConfigError, match=r"parts must be tables, one for each part: \[parts.NAME\]; got"):
        resolve(backbone="llama", config_file=str(tmp_path / "run.toml"), **inputs)


def test_too_many_layers_of_a_part_are_refused_before_the_weights_are_loaded(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zinit.runs import train as module

    monkeypatch.setattr(module, "build_model", None)
    config, _ = resolve(backbone="llama", options=["parts.late.layers=9"], **inputs)
    with pytest.raises(Exception, match="has 3 attention layers, but layers=9 asks for more"):
        train_run(config, tmp_path / "run")


def test_other_methods_of_the_family_take_parts_too(inputs: dict[str, Any], tmp_path: Path) -> None:
    config, _ = resolve(backbone="llama", options=[*OPTIONS, "method=random-gate"], **inputs)
    train_run(config, tmp_path / "run")
    adapter = json.loads((tmp_path / "run" / "adapter.json").read_text())
    assert {part["gate_init"] for part in adapter["config"]["parts"].values()} == {"random"}


def test_inspect_knows_parts(inputs: dict[str, Any]) -> None:
    found = inspect_model(inputs["model"], options=["parts.a.length=2", "parts.b.length=3", "parts.b.layers=1"])
    assert found["num_trainable"] == 3 * (2 * 32 + 4) + 1 * (3 * 32 + 4)
    assert [site["adapted"] for site in found["sites"]] == [True, True, True]


def test_names_of_parts_are_no_settings_elsewhere() -> None:
    assert run_overrides(["parts.x.length=3"], task="alpaca", method="zero-init") == {"parts": {"x": {"length": 3}}}
