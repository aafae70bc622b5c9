"""A run that is killed at any instant, and a run on two processes, give what one quiet run gives."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import Process, run_ranks
from tests.processes import run as run_process
from tests.tiny import save_records, save_tiny_llama

pytestmark = pytest.mark.integration

SEED = int(os.environ.get("ZINIT_CRASH_SEED", "0"))  # of the moments of kills
SETTINGS = ("-o", "prefix.length=4", "-o", "steps=14", "-o", "batch_size=8", "-o", "micro_batch_size=3",
            "-o", "save_every=1", "-o", "evaluate_every=0", "-o", "task.evaluation_limit=0", "-o", "warmup_steps=2",
            "-o", "learning_rate=0.05")  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    model = save_tiny_llama(folder / "model")
    return ["--backbone", "llama", "--model", str(model), "--data", str(save_records(folder / "data.json", 60))]


def run(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return run_process("zinit", *arguments) if processes == 1 else run_ranks("zinit", *arguments)


def steps(directory: Path) -> dict[int, float]:
    lines = (directory / "log.jsonl").read_text().splitlines()
    return {e["step"]: e["loss"] for e in map(json.loads, lines) if e["event"] == "step"}


@pytest.fixture(scope="module")
def quiet_run(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quiet") / "run"
    done = run("train", *inputs, *SETTINGS, "--output", str(output))
    assert done.returncode == 0, done.stderr
    return output


def wait_for_step(process: Process, directory: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    log = directory / "log.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and f'"event": "step", "step": {step},' in log.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was never reached")


def test_killed_at_three_random_steps_and_resumed_to_the_same_bits(
    inputs: list[str], quiet_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    draws = random.Random(SEED)
    moments = sorted(draws.sample(range(1, 13), 3))
    print(f"ZINIT_CRASH_SEED={SEED}: kills at steps {moments}")
    for kill, moment in enumerate(moments):
        arguments = ["--resume"] if kill else [*inputs, *SETTINGS]
        with Process("zinit", "train", *arguments, "--output", output) as process:
            wait_for_step(process, output, moment)
            time.sleep(draws.random() * 0.01)
            process.send_signal(signal.SIGKILL)
    done = run("train", "--resume", "--output", str(output))
    assert done.returncode == 0, done.stderr
    expected, found = (load_file(folder / "adapter.safetensors") for folder in (quiet_run, output))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name} differs after kills at {moments}, seed {SEED}"
    assert steps(output) == steps(quiet_run)


def test_sigterm_saves_and_says_how_to_go_on(inputs: list[str], quiet_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ["train", *inputs, *SETTINGS, "-o", "save_every=0", "--output", str(output)]
    with Process("zinit", *arguments) as process:
        wait_for_step(process, output, 3)
        process.send_signal(signal.SIGTERM)
        errors = process.done(timeout=60).stderr
    assert process.returncode == 130
    assert f"zinit train --resume --output {output}" in errors
    assert "Traceback" not in errors
    done = run("train", "--resume", "--output", str(output))
    assert done.returncode == 0, done.stderr
    expected, found = (load_file(folder / "adapter.safetensors") for folder in (quiet_run, output))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_two_processes_give_the_losses_of_one(inputs: list[str], quiet_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run("train", *inputs, *SETTINGS, "--output", str(output), processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "run.json").read_text())["processes"] == 2
    one, two = steps(quiet_run), steps(output)
    assert one.keys() == two.keys()
    assert max(abs(one[step] - two[step]) / abs(one[step]) for step in one) < 1e-5


def test_resume_under_other_settings_names_the_setting(quiet_run: Path) -> None:
    done = run("train", "--resume", "--output", str(quiet_run), "-o", "learning_rate=0.1")
    assert done.returncode == 2
    assert "train.learning_rate was 0.05 when it was saved and is 0.1 now" in done.stderr
    assert "Traceback" not in done.stderr
