"""The loop on one process: normalisation, checkpoints, failures."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from zinit.errors import CheckpointError
from zinit.tasks.base import Batch, Evaluation, Stream, Task
from zinit.train import checkpoint
from zinit.train.config import TrainConfig
from zinit.train.events import Event, Step
from zinit.train.held_out import held_out_loss
from zinit.train.loop import NonFiniteLoss, fit
from zinit.train.plan import Plan


class Regression(Task):
    """Ten lines of task: rows of uneven length, each element supervised."""

    name = "regression"

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model, self.handle = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), None
        self.dropout = nn.Dropout(dropout)
        self.model[0].requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        self.rows = [torch.randn(1 + i % 7, 4, generator=generator) for i in range(30)]
        lengths = [len(row) for row in self.rows]
        self.train_stream = Stream(name="train", lengths=lengths[:22], counts=lengths[:22])
        self.held_out_stream = Stream(name="held_out", lengths=lengths[22:], counts=lengths[22:])

    def collate(self, stream: Stream, indices: Sequence[int]) -> Batch:
        offset = 0 if stream is self.train_stream else 22
        rows = [self.rows[offset + i] for i in indices]
        return {"x": torch.cat(rows), "y": torch.cat(rows).pow(2).sum(1, keepdim=True)}

    def forward(self, batch: Batch) -> Tensor:
        return (self.model(self.dropout(batch["x"])) - batch["y"]).pow(2).sum()

    def evaluate(self, accelerator: Accelerator, *, limit: int | None = None) -> Evaluation:
        return Evaluation(metrics={})

    def fingerprint(self) -> str:
        return "fixed"


def run(task: Task, directory: Path | None = None, *, resume: bool = False, identity: dict | None = None, **settings):
    events: list[dict] = []
    config = TrainConfig(
        **{"epochs": 4, "batch_size": 8, "micro_batch_size": 3, "learning_rate": 0.05, "warmup_epochs": 1, **settings}
    )
    fit(
        task,
        config,
        seed=3,
        accelerator=Accelerator(cpu=True),
        directory=directory,
        identity=identity or {"seed": 3},
        resume=resume,
        on_event=lambda event: events.append(event.to_dict()),
    )
    return events


def weights(task: Task) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in task.named_parameters()}


def losses(events: list[dict]) -> list[float]:
    return [event["loss"] for event in events if event["event"] == "step"]


def norms(events: list[dict]) -> list[float]:
    return [event["grad_norm"] for event in events if event["event"] == "step"]


@pytest.mark.parametrize("micro", [1, 3, 5, 8])
def test_micro_batches_do_not_change_the_step(micro: int) -> None:
    """The gradient of a step is that of the mean over its true number of supervised units."""
    whole, parts = Regression(), Regression()
    expected, found = run(whole, micro_batch_size=100), run(parts, micro_batch_size=micro)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert norms(found) == pytest.approx(norms(expected), rel=1e-4)  # Adam hides a wrong scale, the norm shows it
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-4, atol=1e-6)


def test_first_step_against_plain_torch() -> None:
    task, reference = Regression(), Regression()
    events = run(task, steps=1, weight_decay=0.0, clip_norm=None, warmup_steps=0)
    config = TrainConfig(epochs=4, batch_size=8, learning_rate=0.05, steps=1, warmup_steps=0)
    chosen = Plan(config, reference.train_stream, 3).examples(0)
    batch = reference.collate(reference.train_stream, chosen)
    loss = reference(batch) / len(batch["x"])
    optimizer = torch.optim.AdamW(reference.model[2].parameters(), lr=0.05, betas=(0.9, 0.95), weight_decay=0.0)
    loss.backward()
    optimizer.step()
    assert losses(events)[0] == pytest.approx(loss.item(), rel=1e-6)
    norm = torch.stack([p.grad.norm() for p in reference.model[2].parameters()]).norm().item()
    assert norms(events)[0] == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(task.model[2].weight, reference.model[2].weight, rtol=1e-5, atol=1e-7)
    assert torch.equal(task.model[0].weight, reference.model[0].weight)


def test_every_step_against_plain_torch() -> None:
    """Settings that no default hides: betas, decay, and a clipping that some steps need and others do not."""
    settings = {"beta1": 0.6, "beta2": 0.7, "weight_decay": 0.3, "clip_norm": 10.0, "steps": 9, "warmup_steps": 2}
    task, reference = Regression(), Regression()
    found = norms(run(task, **settings))
    plan = Plan(TrainConfig(batch_size=8, learning_rate=0.05, **settings), reference.train_stream, 3)
    weight, bias = reference.model[2].parameters()
    optimizer = torch.optim.AdamW([weight, bias], betas=(0.6, 0.7), weight_decay=0.3)
    expected = []
    for step in range(9):
        batch = reference.collate(reference.train_stream, plan.examples(step))
        (reference(batch) / len(batch["x"])).backward()
        expected.append(nn.utils.clip_grad_norm_([weight, bias], 10.0).item())
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    assert found == pytest.approx(expected, rel=1e-5)
    assert min(found) < 10.0 < max(found)
    for name, value in weights(reference).items():
        torch.testing.assert_close(weights(task)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_resume_is_exact_to_the_bit(tmp_path: Path, stop_at: int, dropout: float) -> None:
    straight = Regression(dropout=dropout)
    expected = losses(run(straight, tmp_path / "a", save_every=1))
    # The same run, cut after stop_at steps: only that checkpoint is left.
    cut = Regression(dropout=dropout)
    run(cut, tmp_path / "b", save_every=1)
    for folder in (tmp_path / "b" / "resume").iterdir():
        shutil.rmtree(folder)
    again = Regression(dropout=dropout)

    class Cut(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == stop_at + 1:
            raise Cut

    config = TrainConfig(epochs=4, batch_size=8, micro_batch_size=3, learning_rate=0.05, warmup_epochs=1, save_every=1)
    with pytest.raises(Cut):
        fit(again, config, seed=3, accelerator=Accelerator(cpu=True), directory=tmp_path / "b",
            identity={"seed": 3}, on_event=stop)  # fmt: skip
    assert checkpoint.latest(tmp_path / "b").name == f"step-{stop_at:08d}"
    fresh = Regression(seed=99, dropout=dropout)  # other weights: everything must come from the checkpoint
    fresh.model[0].load_state_dict(straight.model[0].state_dict())
    rest = losses(run(fresh, tmp_path / "b", resume=True, save_every=1))
    assert rest == expected[stop_at:]
    for name, value in weights(straight).items():
        assert torch.equal(weights(fresh)[name], value), name


def test_a_checkpoint_holds_only_what_trains(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    task = Regression()
    run(task, tmp_path)
    folder = checkpoint.latest(tmp_path)
    names = set(load_file(folder / "state.safetensors"))
    assert {n for n in names if n.startswith("parameter:")} == {"parameter:model.2.weight", "parameter:model.2.bias"}
    assert not any("model.0" in name for name in names)
    assert len(list((tmp_path / "resume").iterdir())) == checkpoint.KEEP


def test_damage_and_another_run_are_refused_by_name(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    with pytest.raises(CheckpointError, match=r"seed was 3 when it was saved and is 4 now"):
        run(Regression(), tmp_path, resume=True, identity={"seed": 4})
    file = checkpoint.latest(tmp_path) / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"state.safetensors is damaged"):
        run(Regression(), tmp_path, resume=True)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = checkpoint._write, []

    def full_disk(path: Path, data: bytes) -> None:
        calls.append(path)
        if "step-00000006" in str(path) and path.name == "state.safetensors":
            path.write_bytes(data[:10])
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "_write", full_disk)
    with pytest.raises(CheckpointError, match=r"No space left on device.*step-00000004"):
        run(Regression(), tmp_path, save_every=2)
    left = sorted(folder.name for folder in (tmp_path / "resume").iterdir())
    assert left == ["step-00000002", "step-00000004"]
    assert json.loads((tmp_path / "resume" / left[-1] / "manifest.json").read_text())["step"] == 4
    monkeypatch.undo()
    straight = Regression()
    run(straight)
    resumed = Regression()
    run(resumed, tmp_path, resume=True, save_every=2)
    assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(straight).items())


def test_stops_before_an_update_that_is_not_a_number(tmp_path: Path) -> None:
    task = Regression()
    task.rows[5] = task.rows[5] * float("nan")
    with pytest.raises(NonFiniteLoss, match=r"loss is nan.*step \d+ of 12 \(stream 'train'"):
        run(task, tmp_path, save_every=1)
    assert all(value.isfinite().all() for value in weights(task).values())


def test_stops_before_a_gradient_that_is_not_a_number_though_the_loss_is(tmp_path: Path) -> None:
    class Root(Regression):
        def forward(self, batch: Batch) -> Tensor:
            return super().forward(batch) + (self.model[2].weight * 0).sum().sqrt()  # 0, and its slope is 0 * inf

    task = Root()
    before = weights(task)
    with pytest.raises(NonFiniteLoss, match=r"the loss is \d.* and the gradient's norm nan at step 1 of 12"):
        run(task, tmp_path, save_every=1)
    assert all(torch.equal(weights(task)[name], value) for name, value in before.items())
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize(("save_every", "kept"), [(2, [4, 5]), (3, [3, 5]), (9, [5]), (0, [])])
def test_the_last_step_is_saved_whether_or_not_its_number_divides(
    tmp_path: Path, save_every: int, kept: list[int]
) -> None:
    run(Regression(), tmp_path, steps=5, save_every=save_every)
    assert sorted(folder.name for folder in (tmp_path / "resume").glob("*")) == [f"step-{n:08d}" for n in kept]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def killed_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Kills a run at one of the moments, counted from 0, at which the files of its checkpoints change."""
    write, replace, rmtree = checkpoint._write, os.replace, shutil.rmtree
    moments = itertools.count()

    def half_written(path: Path, data: bytes) -> None:
        if next(moments) == number:
            path.write_bytes(data[: len(data) // 2])
            raise Killed
        write(path, data)

    def not_renamed(*arguments: Any) -> None:
        if next(moments) == number:
            raise Killed
        replace(*arguments)

    def half_removed(path: Path, **options: Any) -> None:
        if path.exists() and next(moments) == number:
            sorted(path.iterdir())[0].unlink()
            raise Killed
        rmtree(path, **options)

    patch.setattr(checkpoint, "_write", half_written)
    patch.setattr(os, "replace", not_renamed)
    patch.setattr(shutil, "rmtree", half_removed)


def test_a_checkpoint_is_whole_or_absent_whenever_a_kill_comes(tmp_path: Path) -> None:
    straight = Regression()
    run(straight)
    for number in itertools.count():
        directory = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, number)
            try:
                run(Regression(), directory, save_every=3)
                break
            except Killed:
                pass
        for folder in (directory / "resume").glob("step-*"):
            names = json.loads((folder / "manifest.json").read_text())["sha256"]
            assert {path.name for path in folder.iterdir()} == {"manifest.json", *names}, number
        resumed = Regression()
        checkpoint.tidy(directory)  # as whoever claims the folder
        run(resumed, directory, resume=True, save_every=3)
        assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(straight).items()), number
        assert len(list((directory / "resume").iterdir())) == checkpoint.KEEP, "what was half written is gone"
    assert number > 4 * 4, "four checkpoints of three files and a folder, two of them removed"


def test_held_out_loss_is_the_mean_over_units() -> None:
    task = Regression()
    loss, count = held_out_loss(task, TrainConfig(micro_batch_size=2), Accelerator(cpu=True))
    batch = task.collate(task.held_out_stream, range(len(task.held_out_stream)))
    assert count == len(batch["x"])
    assert loss == pytest.approx(task(batch).item() / count, rel=1e-6)
