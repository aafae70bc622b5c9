"""What happens between optimizer steps: the log, gates, evaluation, stopping, checkpoints."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zinit.distributed import sum_over_processes
from zinit.tasks.base import Batch, Task
from zinit.train import checkpoint
from zinit.train.best import Best
from zinit.train.events import Evaluated, Gates, Listener, PlanMade, Step
from zinit.train.held_out import held_out_loss
from zinit.train.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        plan: of all steps.
        done: optimizer steps done.
        stopping: set by a callback that wants the loop to end; the callbacks after it are still called.
        finished: set by a callback for which enough has been trained: this step was the last.
    """

    plan: Plan
    done: int
    stopping: bool = False
    finished: bool = False


class Callback:
    """Called by the loop on every process, in the order of the list; does nothing by itself."""

    def on_start(self, progress: Progress) -> None:
        """Before the first step, and again after a resume."""

    def on_step(self, progress: Progress, step: Step) -> None:
        """After the update of a step.

        Args:
            progress: where the run is.
            step: what was measured.
        """


class LogSteps(Callback):
    """Tells the plan and every step.

    Args:
        tell: takes the events.
    """

    def __init__(self, tell: Listener) -> None:
        self.tell = tell

    def on_start(self, progress: Progress) -> None:
        plan = progress.plan
        self.tell(PlanMade(plan.steps, progress.done, plan.steps_per_epoch))

    def on_step(self, progress: Progress, step: Step) -> None:
        self.tell(step)


class LogGates(Callback):
    """Tells every gate, a hundred times a run.

    Args:
        task: whose prefix has the gates.
        tell: takes the events.
    """

    def __init__(self, task: Task, tell: Listener) -> None:
        self.handle, self.tell = task.handle, tell

    def on_start(self, progress: Progress) -> None:
        if progress.done == 0:
            self._log(0)

    def on_step(self, progress: Progress, step: Step) -> None:
        every = max(1, progress.plan.steps // 100)
        if progress.done % every == 0 or progress.done == progress.plan.steps:
            self._log(progress.done)

    def _log(self, step: int) -> None:
        if self.handle is not None:
            self.tell(Gates(step, {site: gates.tolist() for site, gates in self.handle.gates().items()}))


class EvaluateHeldOut(Callback):
    """Evaluates every ``train.evaluate_every`` steps: the held-out loss, or what ``best`` is chosen by.

    After the last step the run evaluates everything, so that only ``best`` asks for it here.

    Args:
        task: to evaluate.
        runnable: the task as the loop calls it.
        accelerator: the run's.
        tell: takes the events.
        best: takes the weights where they are the best so far, and ends training when none came for long.
    """

    def __init__(
        self,
        task: Task,
        runnable: Callable[[Batch], torch.Tensor],
        accelerator: Accelerator,
        tell: Listener,
        best: Best | None = None,
    ) -> None:
        self.task, self.runnable, self.accelerator, self.tell, self.best = task, runnable, accelerator, tell, best

    def on_start(self, progress: Progress) -> None:
        progress.finished = self.best is not None and self.best.is_over

    def on_step(self, progress: Progress, step: Step) -> None:
        done, steps, best = progress.done, progress.plan.steps, self.best
        every = _or_ten_times(progress.plan.config.evaluate_every, steps)
        if not every or (done % every and done < steps) or (done == steps and best is None):
            return
        figures = self._loss(progress) if best is None or best.figures is None else best.figures()
        if figures:
            self.tell(Evaluated(done, figures))
        if best is not None:
            best.see(done, figures, checkpoint.trainable(self.task))
            progress.finished = best.is_over

    def _loss(self, progress: Progress) -> Mapping[str, float]:
        loss, count = held_out_loss(self.task, progress.plan.config, self.accelerator, runnable=self.runnable)
        return {"loss": loss, "count": count} if count else {}


class StopOnRequest(Callback):
    """Ends the loop on every process when one of them is asked to stop.

    Args:
        requested: whether this process is; see `stop_requests`.
        accelerator: the run's.
    """

    def __init__(self, requested: Callable[[], bool], accelerator: Accelerator) -> None:
        self.requested, self.accelerator = requested, accelerator

    def on_step(self, progress: Progress, step: Step) -> None:
        # Every process must leave together, so they ask one another.
        asked = torch.tensor(float(self.requested()), device=self.accelerator.device)
        progress.stopping = sum_over_processes(self.accelerator, asked).item() > 0


class SaveCheckpoints(Callback):
    """Writes a resume checkpoint every ``train.save_every`` steps, after the last one, and when the loop stops.

    Args:
        directory: of the run.
        task: what trains.
        optimizer: torch's own.
        identity: what a resumed run must have in common with this one.
        accelerator: the run's.
        best: weights that are kept beside the last ones.
    """

    def __init__(
        self,
        directory: Path,
        task: Task,
        optimizer: torch.optim.Optimizer,
        identity: dict[str, Any],
        accelerator: Accelerator,
        best: Best | None = None,
    ) -> None:
        self.directory, self.task, self.optimizer, self.best = directory, task, optimizer, best
        self.identity, self.accelerator = identity, accelerator

    def on_step(self, progress: Progress, step: Step) -> None:
        done, steps = progress.done, progress.plan.steps
        every = _or_ten_times(progress.plan.config.save_every, steps)
        last = done == steps or progress.finished
        if progress.stopping or (every and (last or done % every == 0)):
            checkpoint.save(
                self.directory, done, self.task, self.optimizer, self.identity, self.accelerator, best=self.best
            )


def _or_ten_times(every: int | None, steps: int) -> int:
    return max(1, steps // 10) if every is None else every


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a flag that is looked at between steps."""
    asked: list[int] = []
    previous = {}

    def note(number: int, frame: Any) -> None:
        if asked:  # asked twice: stop now, without saving
            signal.default_int_handler(number, frame)
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, note)
        except ValueError:  # not in the main thread: the host program owns the signals
            break
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
