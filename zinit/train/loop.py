"""The one training loop, on Accelerate: forward and backward, one guarded optimizer step, callbacks.

How it is spread over processes is `zinit.train.strategy`, which examples a step takes `zinit.train.plan`, what happens
between steps `zinit.train.callbacks`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from zinit.config import HEAD
from zinit.distributed import sum_over_processes
from zinit.errors import ConfigError, ZinitError
from zinit.models.offload import is_offloaded
from zinit.tasks.base import MAIN, Batch, Task
from zinit.train import checkpoint
from zinit.train.batches import Collate, load_batches
from zinit.train.best import Best
from zinit.train.callbacks import (
    Callback,
    EvaluateHeldOut,
    LogGates,
    LogSteps,
    Progress,
    SaveCheckpoints,
    StopOnRequest,
    stop_requests,
)
from zinit.train.config import TrainConfig
from zinit.train.events import Event, Listener, Resumed, Step
from zinit.train.plan import Draws, Plan
from zinit.train.sharding import is_sharded
from zinit.train.strategy import (
    average_gradients,
    average_whole_gradients,
    backward,
    checkpoint_activations,
    clip,
    place,
    prepare,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST_SKIPPED = 20  # steps in a row whose float16 gradients overflowed


class Interrupted(Exception):
    """A signal asked the run to stop; everything is saved.

    Args:
        step: optimizer steps done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class NonFiniteLoss(ZinitError):
    """The loss or its gradient is no longer a number. Nothing was updated by the step that found it."""


def ignore(event: Event) -> None:
    """A listener that does nothing."""


def fit(
    task: Task,
    config: TrainConfig,
    *,
    seed: int,
    accelerator: Accelerator,
    directory: Path | None = None,
    identity: dict[str, Any] | None = None,
    resume: bool = False,
    on_event: Listener = ignore,
    batches: AbstractContextManager[Collate] | None = None,
    best: Best | None = None,
) -> int:
    """Trains what the task marks as trainable.

    Args:
        task: owns model, loss and examples.
        config: how.
        seed: of the order of the examples.
        accelerator: devices and processes.
        directory: where ``resume/`` checkpoints go; None keeps none.
        identity: what a resumed run must have in common with the one that saved.
        resume: go on from the last checkpoint in ``directory``, if there is one.
        on_event: gets every event, on the main process.
        batches: what makes the micro-batches while it is open; default: `Task.collate`.
        best: chooses the weights that the task has afterwards; default: the last ones.

    Returns:
        Steps done in all.

    Raises:
        NonFiniteLoss: before the update, naming step and examples.
        Interrupted: on SIGINT or SIGTERM, after saving.
        CheckpointError: if a checkpoint cannot be written, read or used.
    """
    tell = on_event if accelerator.is_main_process else ignore
    stepper = Stepper(task, Plan.of(task, config, seed), accelerator)
    optimizer, identity, done = stepper.optimizer.optimizer, identity or {}, 0
    if resume and directory is not None:
        done = checkpoint.load_latest(directory, task, optimizer, identity, accelerator, best=best)
        if done:
            tell(Resumed(done))
    with (
        nullcontext(task.collate) if batches is None else batches as collate,
        stop_requests() as stop_requested,
        set_checkpoint_early_stop(not is_offloaded(task)),
    ):
        callbacks = [
            LogSteps(tell),
            LogGates(task, tell),
            EvaluateHeldOut(task, stepper.runnable, accelerator, tell, best),
            StopOnRequest(stop_requested, accelerator),
        ]
        if directory is not None:
            callbacks.append(SaveCheckpoints(directory, task, optimizer, identity, accelerator, best))
        batches_left = load_batches(stepper.plan, collate, accelerator, start=done)
        done = run_steps(stepper, batches_left, callbacks, start=done)
    if best is not None:
        best.restore(checkpoint.trainable(task))
    return done


def run_steps(stepper: Stepper, batches: Iterator[Batch], callbacks: list[Callback], *, start: int) -> int:
    """The loop itself.

    Args:
        stepper: takes the steps.
        batches: the micro-batches of the steps from ``start`` on.
        callbacks: called after each step, in this order.
        start: steps done before.

    Returns:
        Steps done in all.

    Raises:
        Interrupted: if a callback asks to stop.
    """
    progress = Progress(stepper.plan, start)
    for callback in callbacks:
        callback.on_start(progress)
    for step in range(start, stepper.plan.steps):
        if progress.finished:
            break
        measured = stepper.step(step, batches)
        progress.done = step + 1
        for callback in callbacks:
            callback.on_step(progress, measured)
        if progress.stopping:
            raise Interrupted(progress.done)
    return progress.done


class Stepper:
    """Takes one optimizer step at a time.

    Args:
        task: owns model, loss and what trains.
        plan: the examples and the rate of each step.
        accelerator: devices and processes.

    Raises:
        ConfigError: if several groups were to be trained on a sharded host.
    """

    def __init__(self, task: Task, plan: Plan, accelerator: Accelerator) -> None:
        self.task, self.plan, self.accelerator, config = task, plan, accelerator, plan.config
        if config.gradient_checkpointing:
            checkpoint_activations(task.model)
        place(task, accelerator)
        optimizer = torch.optim.AdamW(
            list(task.parameter_groups(config.weight_decay, decay_gates=config.decay_gates)),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            foreach=False if is_sharded(accelerator) else None,  # whole and sharded parameters share no list
        )
        self.wrapped, self.optimizer = prepare(task, optimizer, accelerator)
        self.runnable = torch.compile(self.wrapped) if config.compile else self.wrapped
        self.groups: dict[str, list[torch.nn.Parameter]] = {}
        for group in optimizer.param_groups:
            self.groups.setdefault(group.get("group", MAIN), []).extend(group["params"])
        self.joint = len(self.groups) > 1
        if self.joint and is_sharded(accelerator):
            raise ConfigError(
                f"the task trains several groups of parameters ({', '.join(self.groups)}), which needs plain data "
                f"parallelism: launch with torchrun, without FSDP or DeepSpeed."
            )
        self.skipped = 0

    def step(self, step: int, batches: Iterator[Batch]) -> Step:
        """Forward and backward over the step's micro-batches, then one update.

        Args:
            step: counted from 0.
            batches: gives the step's micro-batches.

        Raises:
            NonFiniteLoss: before the update.
        """
        started = time.perf_counter()
        self.wrapped.train()
        means = [self._accumulate(draws, step, batches) for draws in self.plan.draws]
        self._average_gradients()
        norms = clip(list(self.groups.values()), self.plan.config.clip_norm or math.inf, self.accelerator)
        # The one wait for the device in a step.
        numbers = torch.stack([*means, *(norm.to(means[0].device).float() for norm in norms)]).tolist()
        losses = dict(zip([draws.stream.name for draws in self.plan.draws], numbers, strict=False))
        grad_norms = dict(zip(self.groups, numbers[len(means) :], strict=True))
        self._guard(step, losses, math.hypot(*grad_norms.values()))
        rate = self._update(step)
        return self._event(step, losses, grad_norms, rate, time.perf_counter() - started)

    def _accumulate(self, draws: Draws, step: int, batches: Iterator[Batch]) -> Tensor:
        """Forward and backward over one stream's micro-batches; its mean loss over all processes."""
        accelerator, world = self.accelerator, self.accelerator.num_processes
        micro_batches = draws.micro_batches(step, accelerator.process_index, world)
        count, losses = draws.count(step), list[Tensor]()
        with self._training_only(draws.stream.group):
            for position, (_, counts) in enumerate(micro_batches):
                batch = {k: v.to(accelerator.device, non_blocking=True) for k, v in next(batches).items()}
                last = draws is self.plan.draws[-1] and position == len(micro_batches) - 1
                with nullcontext() if last and not self.joint else accelerator.no_sync(self.wrapped):
                    loss_sum = self.runnable(batch) * (1.0 if counts else 0.0)
                    if not loss_sum.requires_grad:
                        raise ConfigError(_trains_nothing(draws))
                    # Normalised once, over the whole step's supervised units; processes are averaged over later.
                    backward(loss_sum * (world / count), accelerator)
                losses.append(loss_sum.detach().float())
        return sum_over_processes(accelerator, torch.stack(losses).sum()) / count

    @contextmanager
    def _training_only(self, group: str) -> Iterator[None]:
        """Inside, no other group gets a gradient. Its parameters' gradients stay None, so that AdamW passes them by."""
        others = [p for name, parameters in self.groups.items() if name != group for p in parameters]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _average_gradients(self) -> None:
        """Averages over processes what neither DDP nor FSDP2 has averaged."""
        parameters = [parameter for group in self.groups.values() for parameter in group]
        if self.joint:
            average_gradients(parameters, self.accelerator)
        else:
            average_whole_gradients(parameters, self.accelerator)

    def _guard(self, step: int, losses: dict[str, float], norm: float) -> None:
        """Stops before an update that is not a number. A float16 scaler skips some updates while it settles."""
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        finite = all(map(math.isfinite, losses.values()))
        if finite and self.skipped <= (0 if self.accelerator.scaler is None else MOST_SKIPPED):
            return
        draws = next((d for d in self.plan.draws if not math.isfinite(losses[d.stream.name])), self.plan)
        name, examples = draws.stream.name, draws.examples(step)
        raise NonFiniteLoss(
            f"the loss is {losses[name]} and the gradient's norm {norm} at step {step + 1} of {self.plan.steps} "
            f"(stream {name!r}, rate {self.plan.learning_rate(step):.3g}, examples {examples[:8]}"
            f"{', ...' if len(examples) > 8 else ''}). Nothing was updated by this step. Look at these examples, "
            f"or start a new run with a lower train.learning_rate, with train.clip_norm, or in bfloat16 instead of "
            f"float16."
        )

    def _update(self, step: int) -> float:
        """The optimizer's step; its learning rate."""
        rate = self.plan.learning_rate(step)
        rates = self.plan.config.rates
        for group in self.optimizer.param_groups:
            group["lr"] = rate * rates.factor(group.get("group", MAIN), group.get("role", HEAD))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return rate

    def _event(
        self, step: int, losses: dict[str, float], grad_norms: dict[str, float], rate: float, seconds: float
    ) -> Step:
        drawn = [(draws, draws.examples(step)) for draws in self.plan.draws]
        examples = sum(len(chosen) for _, chosen in drawn)
        tokens = sum(draws.stream.lengths[index] for draws, chosen in drawn for index in chosen)
        return Step(
            step=step + 1,
            epoch=round((step + 1) / self.plan.steps_per_epoch, 4),
            loss=sum(losses.values()),
            lr=rate,
            grad_norm=math.hypot(*grad_norms.values()),
            supervised=sum(draws.count(step) for draws in self.plan.draws),
            examples=examples,
            seconds=seconds,
            examples_per_second=examples / seconds,
            tokens_per_second=tokens / seconds,
            losses=losses if len(losses) > 1 else {},
            grad_norms=grad_norms if self.joint else {},
        )


def _trains_nothing(draws: Draws) -> str:
    name, group = draws.stream.name, draws.stream.group
    return (
        f"the loss of the stream {name!r} depends on no parameter of the group {group!r} that it trains. "
        f"Give the stream another group, or the ratio 0."
    )
