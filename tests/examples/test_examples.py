"""The examples run as they stand, on the embedded demo."""

from __future__ import annotations

import json
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file

import zinit
from tests.shared import ROOT
from zinit import demo

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def example(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]


def trained_adapter() -> dict[str, list[float]]:
    """The gates of the adapter that an example has saved; it loads onto the base."""
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.llama_path())
    return {site: gates.tolist() for site, gates in zinit.load(model, "adapter").gates().items()}


def test_the_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    losses = example("loop.py")()
    assert losses[-1] < losses[0] - 1
    assert "parameters train" in capsys.readouterr().out
    assert any(abs(gate) > 1e-3 for gates in trained_adapter().values() for gate in gates)


def check_log(log: list[dict[str, float]]) -> None:
    """Losses fall, gates open, and the checkpoint holds the adapter alone."""
    training = [line for line in log if "loss" in line]
    assert training[-1]["loss"] < training[0]["loss"]
    assert 0 < training[0]["gates"] < training[-1]["gates"]
    gates = trained_adapter()
    assert {name for name in training[-1] if name.startswith("gates/")} == {f"gates/{site}" for site in gates}
    names = load_file("checkpoints/checkpoint-12/model.safetensors")
    assert names
    assert all(".zinit." in name for name in names)
    assert zinit.load(transformers.AutoModelForCausalLM.from_pretrained(demo.llama_path()), "checkpoints/checkpoint-12")


def test_the_trainer() -> None:
    log = example("trainer.py")("checkpoints", steps=12)
    assert [line["step"] for line in log if "eval_loss" in line] == [6, 12]
    check_log(log)


def test_trls_trainer() -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    check_log(example("sft.py")("checkpoints", steps=12))


def test_the_script_with_its_dependencies(capsys: pytest.CaptureFixture[str]) -> None:
    text = (EXAMPLES / "script.py").read_text()
    block = text.split("# /// script\n")[1].split("# ///\n")[0]
    needs = tomllib.loads(
        "".join(line.removeprefix("# ").removeprefix("#") for line in block.splitlines(keepends=True))
    )
    assert needs["dependencies"] == ["zinit"]
    about = text.split('"""')[1]
    assert "No package index has zinit" in about
    for key in ("path", "git"):
        assert f"{key} = " in about, "what to write where the script lies elsewhere"
    assert (EXAMPLES / needs["tool"]["uv"]["sources"]["zinit"]["path"]).resolve() == ROOT
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert needs["requires-python"] == project["requires-python"]
    example("script.py")("run", steps=5)
    assert Path("run/report.html").is_file()


def test_the_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        assert cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "without what one machine printed"
            exec(compile("".join(cell["source"]), "notebook", "exec"), names)
    printed = capsys.readouterr().out
    assert "True" in printed
    assert names["losses"][-1] < names["losses"][0]


def test_every_example_is_in_the_list() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{path.name}`" in listed for path in EXAMPLES.iterdir() if path.name != "README.md")
