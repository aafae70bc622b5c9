"""The best weights of a run, and when it ends early: also of a run that was killed and resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.train.test_fit import Regression, weights
from zinit.errors import CheckpointError, ConfigError
from zinit.tasks.base import Task
from zinit.train import checkpoint
from zinit.train.best import Best
from zinit.train.config import TrainConfig
from zinit.train.events import Evaluated, Event, Step
from zinit.train.held_out import held_out_loss
from zinit.train.loop import fit

SETTINGS = {"steps": 12, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 0.05, "warmup_steps": 2}


def trained(
    task: Task, best: Best | None, directory: Path | None = None, *, resume: bool = False,
    on_event: Callable[[Event], None] = lambda event: None, **settings: int,
) -> int:  # fmt: skip
    config = TrainConfig(**{"evaluate_every": 2, "save_every": 1, **SETTINGS, **settings})
    accelerator = Accelerator(cpu=True)
    return fit(
        task, config, seed=3, accelerator=accelerator, directory=directory, resume=resume, best=best, on_event=on_event
    )


def scored(task: Task, values: list[float]) -> tuple[list[dict[str, Tensor]], Callable[[], Mapping[str, float]]]:
    """A figure with the given values, and the weights that it saw."""
    seen: list[dict[str, Tensor]] = []

    def figures() -> Mapping[str, float]:
        seen.append(weights(task))
        return {"score": values[len(seen) - 1]}

    return seen, figures


@pytest.mark.parametrize(
    ("direction", "values", "index"),
    [
        ("higher", [0.1, 0.5, math.nan, 0.5, math.inf, 0.2], 1),  # the first of equals; what is no number is not best
        ("lower", [0.5, 0.1, 0.3, 0.1, 0.4, 0.2], 1),
        ("lower", [0.5, math.nan, 0.3, 0.4, -math.inf, 0.1], 5),  # the last step counts too
    ],
)
def test_the_run_ends_with_the_weights_whose_figure_was_best(direction, values: list[float], index: int) -> None:
    task = Regression()
    seen, figures = scored(task, values)
    best = Best(metric="score", direction=direction, figures=figures)
    assert trained(task, best) == 12
    assert len(seen) == 6
    assert (best.step, best.value) == (2 * (index + 1), values[index])
    assert all(torch.equal(value, seen[index][name]) for name, value in weights(task).items())


def test_without_one_number_the_last_weights_stay() -> None:
    task, plain = Regression(), Regression()
    trained(plain, None)
    trained(task, Best(metric="score", direction="lower", figures=lambda: {"score": math.nan}))
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(task).items())


def test_the_loss_needs_no_further_evaluation() -> None:
    task, events = Regression(), []
    best = Best(metric="loss", direction="higher")  # the worst loss, on purpose: not the last weights
    trained(task, best, on_event=events.append)
    losses = {event.step: event.metrics["loss"] for event in events if isinstance(event, Evaluated)}
    assert (best.step, best.value) == max(losses.items(), key=lambda item: item[1])
    assert best.step < 12
    config = TrainConfig(**SETTINGS)
    assert held_out_loss(task, config, Accelerator(cpu=True))[0] == best.value


def test_training_ends_when_nothing_better_comes(tmp_path: Path) -> None:
    task = Regression()
    seen, figures = scored(task, [0.4, 0.6, 0.5, 0.6, 0.9])
    best = Best(metric="score", direction="higher", patience=2, figures=figures)
    assert trained(task, best, tmp_path, save_every=5) == 8
    assert checkpoint.latest(tmp_path).name == "step-00000008", "the last step is saved, as that of every run"
    again = Regression(seed=9)
    again.model[0].load_state_dict(task.model[0].state_dict())
    resumed = Best(metric="score", direction="higher", patience=2)
    assert trained(again, resumed, tmp_path, resume=True, save_every=5) == 8
    assert (resumed.step, resumed.value, resumed.since) == (4, 0.6, 2)
    assert all(torch.equal(value, seen[1][name]) for name, value in weights(again).items())


def by_weights(task: Regression) -> Best:
    """A figure that jumps about, and depends on the weights alone."""
    return Best(
        metric="score", direction="lower", patience=4,
        figures=lambda: {"score": math.sin(1e4 * task.model[2].weight.sum().item())},
    )  # fmt: skip


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_killed_run_keeps_the_same_weights(tmp_path: Path, stop_at: int) -> None:
    class Killed(Exception):
        pass

    def kill(event: Event) -> None:
        if isinstance(event, Step) and event.step == stop_at + 1:
            raise Killed

    whole = Regression(dropout=0.3)
    expected = by_weights(whole)
    done = trained(whole, expected, evaluate_every=1)
    cut = Regression(dropout=0.3)
    with pytest.raises(Killed):
        trained(cut, by_weights(cut), tmp_path, on_event=kill, evaluate_every=1)
    fresh = Regression(seed=99, dropout=0.3)
    fresh.model[0].load_state_dict(whole.model[0].state_dict())
    found = by_weights(fresh)
    assert trained(fresh, found, tmp_path, resume=True, evaluate_every=1) == done
    assert found.to_dict() == expected.to_dict()
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(fresh).items())


def test_best_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    task = Regression()
    trained(task, by_weights(task), tmp_path, steps=4)
    folder = checkpoint.latest(tmp_path)
    state, manifest = folder / "state.safetensors", folder / "manifest.json"
    tensors, before = load_file(state), checkpoint._sha256(state)
    assert sorted(name for name in tensors if name.startswith("best:")) == ["best:model.2.bias", "best:model.2.weight"]
    del tensors["best:model.2.bias"]
    save_file(tensors, state)
    manifest.write_text(manifest.read_text().replace(before, checkpoint._sha256(state)))
    with pytest.raises(CheckpointError, match="does not fit the run"):
        trained(task, by_weights(task), tmp_path, resume=True, steps=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 2}, r"patience needs a figure to look at: -o train\.keep_best=loss"),
        ({"keep_best": "loss", "evaluate_every": 0}, "leave out evaluate_every, or give it steps"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)
