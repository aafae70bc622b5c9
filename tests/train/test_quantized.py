"""Quantised hosts on two processes (DDP, gloo, CPU): the run of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_records, save_tiny_llama
from tests.train.test_crash import steps
from tests.train.test_strategies import make_runs
from zinit.models.quantization import QUANTIZATIONS
from zinit.runs.settings import resolve
from zinit.runs.train import train_run

OPTIONS = ("prefix.length=3", "prefix.gate_init=0.5", "steps=4", "batch_size=6", "micro_batch_size=2", "save_every=0",
           "evaluate_every=0", "task.evaluation_limit=0", "learning_rate=0.05", "warmup_steps=0")  # fmt: skip


def test_two_processes_are_one(tmp_path: Path) -> None:
    inputs: dict[str, Any] = {
        "model": str(save_tiny_llama(tmp_path / "model")),
        "data": str(save_records(tmp_path / "data.json")),
    }
    options = {kind: [*OPTIONS, f"quantize={kind}"] for kind in sorted(QUANTIZATIONS)}
    options |= {f"{kind}-tuned": [*given, "method=zero-init-tuned"] for kind, given in options.items()}
    make_runs(
        [
            {"output": str(tmp_path / f"{kind}-two"), "strategy": "ddp", "options": given, **inputs}
            for kind, given in options.items()
        ]
    )
    for kind, given in options.items():
        config, _ = resolve(backbone="llama", options=given, **inputs)
        train_run(config, tmp_path / kind)
        one, two = steps(tmp_path / kind), steps(tmp_path / f"{kind}-two")
        assert len(set(one.values())) == 4
        assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
