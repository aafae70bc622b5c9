"""Settings of a wrong type, as a user gives them: one message, status 2, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Outcome, Zinit


@pytest.mark.parametrize(
    ("task", "option", "says"),
    [
        ("alpaca", "task.fields=5", ["[task] fields must be a list of three names", "got 5"]),
        ("alpaca", "task.held_out_data=3", ["[task] held_out_data must be text, or none", "got 3"]),
        ("base-to-novel", "task.template=5", ["[task] template must be text, or a list of texts", "got 5"]),
        ("base-to-novel", "task.drop_classes=5", ["[task] drop_classes must be a list of names", "got 5"]),
        ("vtab", "prefix.length=[1]", ["[prefix] length must be a whole number", "got [1]"]),
    ],
)
def test_options(task: str, option: str, says: list[str], zinit: Zinit, tmp_path: Path) -> None:
    done = zinit("train", "--backbone", "llama", "--task", task, "-o", option, "--model", "m", "--data", "d",
                 "--output", tmp_path / "out")  # fmt: skip
    check(done, says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("backbone = 5", ["backbone must be text", "got 5"]),
        ("preset = [1]", ["preset must be text", "got [1]"]),
        ("model = 5", ["model must be text", "got 5"]),
        ("data = {}", ["data must be text", "got {}"]),
        ("[task]\nname = 7", ["[task] name must be text", "got 7"]),
        ("[method]\nname = 7", ["[method] name must be text", "got 7"]),
        ("method = 7", ["method must be a table: [method]", "got 7"]),
        ("task = 'ner'", ["task must be a table: [task]", "got 'ner'"]),
        ("[train]\nsteps = 'x'", ["[train] steps must be a whole number of at least 1, or none", "got 'x'"]),
        ("[trian]\nsteps = 3", ["no setting 'trian'", "Did you mean 'train'?"]),
        ("[train]\ntrunk_cache = 'a'\nactivation_cache = 'b'", ["train.trunk_cache is the old name", "one of the two"]),
    ],
)
def test_config_files(text: str, says: list[str], zinit: Zinit, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    backbone = [] if text.startswith("backbone") else ["--backbone", "llama"]
    check(zinit("train", *backbone, "--config", tmp_path / "run.toml", "--output", tmp_path / "out"), says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seeds = 3\n", ["seeds must be a list of whole numbers", "got 3", "write a list: [3]"]),
        ('methods = "zero-init"\n', ["methods must be a list of names", "write a list: ['zero-init']"]),
        ("experiment = 3\n", ["experiment must be one or more [[experiment]] tables", "got 3"]),
        ("description = 3\n", ["description must be text", "got 3"]),
        ("select = 3", ["experiment 'one'", "select must be a table of settings", "got 3"]),
        ("seeds = 3", ["experiment 'one'", "seeds must be a list of whole numbers", "got 3"]),
        ('options = "train.steps=3"', ["options must be a list of texts", "write a list: ['train.steps=3']"]),
        ("[experiment.select]\nvary = 3", ["[select] vary must be a table that maps a setting to a list", "got 3"]),
        ("[experiment.select]\nvari = 3", ["[select] Selection has no setting 'vari'", "Did you mean 'vary'"]),
        ("method_options = { lora = 'train.steps=3' }", ["method_options must be a table of lists of texts"]),
    ],
)
def test_benchmarks(text: str, says: list[str], zinit: Zinit, tmp_path: Path) -> None:
    top = text if text.endswith("\n") else ""
    experiment = "" if "experiment = " in top else '[[experiment]]\nname = "one"\nbackbone = "llama"\n'
    (tmp_path / "bench.toml").write_text(top + experiment + ("" if top else text))
    check(zinit("bench", "--config", tmp_path / "bench.toml", "--output", tmp_path / "out"), says)


def check(done: Outcome, says: list[str]) -> None:
    assert done.code == 2, (done.code, done.out, done.err)
    lines = [line for line in done.err.splitlines() if line.startswith("zinit: ")]
    assert len(lines) == 1, done.err
    assert "Traceback" not in done.err
    for text in says:
        assert text in lines[0], lines[0]
