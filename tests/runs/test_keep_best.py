"""Runs that keep their best weights: what is evaluated, recorded, and refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import save_records, save_tiny_llama
from zinit.errors import CheckpointError, ConfigError
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import resolve
from zinit.runs.train import Interrupted, train_run
from zinit.train.events import Evaluated, Event, Notice, Step, read_log

OPTIONS = ("prefix.length=2", "steps=8", "batch_size=4", "micro_batch_size=4", "task.evaluation_limit=4",
           "max_new_tokens=6", "learning_rate=0.5", "warmup_steps=0", "evaluate_every=2", "save_every=1",
           "train.keep_best=rouge_l", "train.patience=2")  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": str(save_tiny_llama(folder / "model")), "data": str(save_records(folder / "data.json", 20))}


def run(inputs: dict[str, str], output: Path, *options: str, **more: Any) -> dict[str, Any]:
    config, preset = resolve(backbone="llama", options=[*OPTIONS, *options], **inputs)
    return train_run(config, output, preset=preset, **more)


@pytest.fixture(scope="module")
def kept(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kept") / "run"
    run(inputs, output)
    return output


def test_the_result_is_that_of_the_best_evaluation(kept: Path) -> None:
    results = json.loads((kept / "metrics.json").read_text())
    log = read_log(kept / "log.jsonl")
    evaluations = {event.step: event.metrics["rouge_l"] for event in log.of(Evaluated) if event.step}
    best = max(evaluations.values())
    first = min(step for step, value in evaluations.items() if value == best)
    assert results["best"] == {"metric": "rouge_l", "value": best, "step": first}
    assert results["metrics"]["adapted"]["rouge_l"] == best
    assert evaluate_run(kept)["metrics"] == results["metrics"]
    assert results["steps"] == min(8, first + 4), "two evaluations without a better one end it"
    assert f"Kept: the weights of step {first}, where rouge_l was best" in (kept / "report.html").read_text()
    assert any(isinstance(event, Notice) and f"kept the weights of step {first}" in event.text for event in log.events)


def test_a_stopped_run_keeps_the_same_weights(inputs: dict[str, str], kept: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(inputs, tmp_path / "run", on_event=stop)
    for other in ("evaluate_every=1", "train.keep_best=loss", "task.evaluation_limit=2", "train.patience=3"):
        with pytest.raises(CheckpointError, match=rf"cannot go on: .*{other.partition('=')[0].partition('.')[2]}"):
            run(inputs, tmp_path / "run", other, resume=True)
    results = run(inputs, tmp_path / "run", resume=True)
    assert results["best"] == json.loads((kept / "metrics.json").read_text())["best"]
    whole, resumed = (load_file(folder / "adapter.safetensors") for folder in (kept, tmp_path / "run"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_figure_that_there_is_not(inputs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep_best='acuracy' is none of the figures.* loss, perplexity, .*rouge_l"):
        run(inputs, tmp_path / "run", "train.keep_best=acuracy")
