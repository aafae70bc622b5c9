"""Settings that change how a step is computed but not what it computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import save_records, save_tiny_llama
from zinit.runs.settings import resolve
from zinit.runs.train import train_run

OPTIONS = ("prefix.length=3", "steps=4", "batch_size=8", "micro_batch_size=4", "task.evaluation_limit=0",
           "learning_rate=0.02", "warmup_steps=0", "evaluate_every=0", "save_every=0")  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": str(save_tiny_llama(folder / "model")), "data": str(save_records(folder / "data.json"))}


def losses(inputs: dict[str, str], output: Path, *options: str) -> list[float]:
    config, _ = resolve(backbone="llama", options=[*OPTIONS, *options], **inputs)
    train_run(config, output)
    events = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.fixture(scope="module")
def plain(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(inputs, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [
        ("train.gradient_checkpointing=true", 1e-6),
        ("train.mixed_precision=bf16", 2e-2),
        ("dtype=bfloat16", 2e-2),
        ("train.workers=1", 0.0),
        ("train.micro_batch_size=8", 1e-5),
        ("train.micro_batch_tokens=400", 1e-5),
        ("task.packing=true", 1e-5),
    ],
)
def test_same_losses(option: str, tolerance: float, inputs: dict[str, str], plain: list[float], tmp_path: Path) -> None:
    found = losses(inputs, tmp_path / "run", option)
    assert plain[-1] < plain[0]
    assert found == pytest.approx(plain, rel=tolerance, abs=0)


def test_adapters_stay_float32_over_a_bfloat16_host(inputs: dict[str, str], tmp_path: Path) -> None:
    from safetensors import safe_open

    losses(inputs, tmp_path / "run", "dtype=bfloat16")
    with safe_open(tmp_path / "run" / "adapter.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118
