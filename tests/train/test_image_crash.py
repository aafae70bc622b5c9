"""A joint run with images that is killed, and one on two processes, give what one quiet run gives: V2's both halves."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import Process
from tests.tasks import caption
from tests.tiny import save_records, save_tiny_llama
from tests.train.test_crash import run, wait_for_step
from zinit.demo import vit_path

pytestmark = pytest.mark.integration

OPTIONS = ("steps=6", "batch_size=4", "micro_batch_size=3", "learning_rate=0.05", "warmup_steps=0", "save_every=1",
           "evaluate_every=0", "parts.early.length=3", "parts.late.length=3", "context.hidden=8", "context.blocks=1",
           "context.heads=2", "task.visual_options={evaluation_limit=0}", "task.language_options={evaluation_limit=0}",
           )  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    caption.draw(folder / "pictures", 12)
    (folder / "dataset.json").write_text(json.dumps(caption.karpathy(12)))
    data = ["--data", str(folder / "dataset.json"), "--data", str(save_records(folder / "texts.json", 30))]
    model = ["--model", str(save_tiny_llama(folder / "model")), "--encoder", str(vit_path())]
    options = [part for option in (*OPTIONS, f"encoder.cache={folder / 'cache'}") for part in ("-o", option)]
    return ["train", "--backbone", "llama", "--task", "joint", "--method", "v2", *model, *data, *options]


@pytest.fixture(scope="module")
def quiet(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quiet") / "run"
    done = run(*command, "--output", str(output))
    assert done.returncode == 0, done.stderr
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of both halves: what makes the context has a file of its own."""
    return {name: x for file in ("adapter", "source") for name, x in load_file(folder / f"{file}.safetensors").items()}


def test_killed_and_resumed_to_the_same_bits(command: list[str], quiet: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with Process("zinit", *command, "--output", output) as process:
        wait_for_step(process, output, 3)
        process.send_signal(signal.SIGKILL)
    assert not (output / "adapter.json").exists()
    done = run("train", "--resume", "--output", str(output))
    assert done.returncode == 0, done.stderr
    expected, found = weights(quiet), weights(output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_two_processes_give_what_one_gives(command: list[str], quiet: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run(*command, "--output", str(output), processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "run.json").read_text())["processes"] == 2
    expected, found = weights(quiet), weights(output)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
