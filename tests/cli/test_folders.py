"""A run's folder belongs to one living run; runs without --output have one each."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.cli.conftest import QUICK, Zinit
from tests.test_files import dies, ignore
from zinit.errors import ConfigError
from zinit.runs.directory import claimed, new_folder
from zinit.runs.settings import resolve
from zinit.runs.train import train_run
from zinit.train.events import Event, Notice, Stage, Step


def test_of_several_processes_the_main_one_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with claimed(tmp_path / "run", resume=False, on_event=ignore):
        assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")
    with claimed(tmp_path / "run", resume=False, on_event=ignore):
        monkeypatch.setenv("RANK", "1")
        with claimed(tmp_path / "run", resume=False, on_event=ignore):
            pass  # the others find the main one's claim, which is theirs too


@pytest.mark.parametrize("moment", [Stage, Step])
def test_nothing_runs_beside_a_living_run(moment: type[Event], model: Path, data: Path, tmp_path: Path) -> None:
    config, _ = resolve(backbone="llama", model=str(model), data=str(data), options=QUICK[1::2])
    output, refused = tmp_path / "run", []

    def beside(event: Event) -> None:
        if isinstance(event, moment) and not refused:
            for resume in (False, True) if (output / "run.json").exists() else (False,):
                with pytest.raises(ConfigError) as error:
                    train_run(config, output, resume=resume)
                refused.append(str(error.value))

    train_run(config, output, on_event=beside)
    assert len(refused) == (1 if moment is Stage else 2)
    assert all(f"{output} is in use by process {os.getpid()}" in text and "--resume" not in text for text in refused)
    steps = [json.loads(line)["step"] for line in (output / "log.jsonl").open() if '"event": "step"' in line]
    assert steps == [1, 2, 3, 4]
    assert {".claim.lock", ".claim.json"}.isdisjoint(path.name for path in output.iterdir())


def test_a_run_says_that_it_takes_over(model: Path, data: Path, tmp_path: Path) -> None:
    config, _ = resolve(backbone="llama", model=str(model), data=str(data), options=QUICK[1::2])
    output, told = tmp_path / "run", list[Event]()

    def die(event: Event) -> None:
        if isinstance(event, Step):
            os._exit(9)

    dies(lambda: train_run(config, output, on_event=die))
    train_run(config, output, resume=True, on_event=told.append)
    assert isinstance(told[0], Notice)
    assert "was killed" in told[0].text


def test_folders_of_one_name_are_several(tmp_path: Path) -> None:
    wished = tmp_path / "runs" / "llama-alpaca"
    with new_folder(wished) as one, new_folder(wished) as two, new_folder(wished) as three:
        assert [path.name for path in (one, two, three)] == ["llama-alpaca", "llama-alpaca-2", "llama-alpaca-3"]
        (two / "run.json").touch()
    assert [path.name for path in wished.parent.iterdir()] == ["llama-alpaca-2"]


def test_runs_without_output_that_start_in_one_second(
    zinit: Zinit, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    strftime = time.strftime
    monkeypatch.setattr(time, "strftime", lambda form, *of: "now" if form == "%Y%m%d-%H%M%S" else strftime(form, *of))
    arguments = ("train", "--backbone", "llama", "--model", model, "--data", data, *QUICK, "-o", "steps=1", "--json")
    refused = zinit(*arguments, "-o", "max_length=20")
    assert refused.code == 2
    assert not (tmp_path / "runs").exists()
    outputs = [json.loads(zinit(*arguments).out)["output"] for _ in range(2)]
    assert outputs == ["runs/llama-alpaca-now", "runs/llama-alpaca-now-2"]
