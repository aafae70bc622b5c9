"""The one training loop, on Accelerate. How it is spread over processes is `zinit.train.strategy`."""

from __future__ import annotations

import functools
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.data import DataLoader

from zinit.config import TrainConfig
from zinit.distributed import sum_over_processes
from zinit.errors import ConfigError, ZinitError
from zinit.models.offload import is_offloaded
from zinit.tasks.base import Batch, Stream, Task
from zinit.train import activation_cache, checkpoint
from zinit.train.sharding import is_sharded
from zinit.train.strategy import average_whole_gradients, backward, clip, place, prepare
from zinit.train.strategy import make_accelerator as make_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

Event = dict[str, Any]
WARMUP_SHARE = 2 / 5  # of the run, in the paper
MOST_SKIPPED = 20  # steps in a row whose float16 gradients overflowed


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    """The order of one epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator).tolist()


@dataclass(frozen=True)
class Plan:
    """Which examples each step trains on, at which rate: pure functions of the step, so a resumed run needs no state.

    Args:
        config: batch sizes, epochs, rates.
        stream: the examples.
        seed: of the order.
    """

    config: TrainConfig
    stream: Stream
    seed: int

    def __post_init__(self) -> None:
        if self.warmup >= self.steps:
            raise ConfigError(
                f"the warm-up of {self.warmup} steps covers the whole run of {self.steps}: shorten it with "
                f"-o train.warmup_steps={self.steps // 5}."
            )

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be smaller; every example comes once."""
        return math.ceil(len(self.stream) / self.config.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.config.steps is not None:
            return self.config.steps
        return max(1, round(self.config.epochs * self.steps_per_epoch))

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        if self.config.warmup_steps is not None:
            return self.config.warmup_steps
        if self.config.warmup_epochs is not None:
            return round(self.config.warmup_epochs * self.steps_per_epoch)
        return int(WARMUP_SHARE * self.steps)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to the peak, then half a cosine; ``step`` counts from 0 and none has rate 0."""
        config, total, warmup = self.config, self.steps, self.warmup
        if step < warmup:
            return config.learning_rate * (step + 1) / (warmup + 1)
        progress = (step - warmup) / (total - warmup)
        span = config.learning_rate - config.min_learning_rate
        return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))

    def examples(self, step: int) -> list[int]:
        """The examples of one step, over all processes, longest first (a too large batch fails at once)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.config.batch_size
        chosen = _order(self.seed, epoch, len(self.stream))[position * size : (position + 1) * size]
        return sorted(chosen, key=lambda index: (-self.stream.lengths[index], index))

    def count(self, step: int) -> int:
        """Supervised units of one step, over all processes: what its loss is divided by."""
        return max(1, sum(self.stream.counts[index] for index in self.examples(step)))

    def micro_batches(self, step: int, rank: int, world: int) -> list[tuple[list[int], bool]]:
        """What one process runs in one step: neighbours in length together, the same number on every process.

        Returns:
            (examples, whether they count); those that do not count only keep processes in step.
        """
        examples = self.examples(step)
        parts = cut(self.config, self.stream, examples, world)[rank::world]
        return [(part, True) if part else (examples[:1], False) for part in parts]


def cut(config: TrainConfig, stream: Stream, examples: Sequence[int], world: int) -> list[list[int]]:
    """Micro-batches: neighbours in length together, a multiple of ``world`` in number (some may be empty).

    Args:
        config: how many examples or tokens they hold.
        stream: the examples' lengths.
        examples: longest first.
        world: processes that share them in turn.
    """
    if config.micro_batch_tokens is None:
        slots = math.ceil(len(examples) / (config.micro_batch_size * world)) * world
        if not slots:
            return []
        bounds = [round(i * len(examples) / slots) for i in range(slots + 1)]
        return [list(examples[a:b]) for a, b in itertools.pairwise(bounds)]
    parts: list[list[int]] = []
    for index in examples:
        if parts and stream.lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= config.micro_batch_tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
    while len(parts) % world:  # the fullest is halved until every process has as many
        fullest = max(range(len(parts)), key=lambda i: len(parts[i]))
        part, half = parts[fullest], (len(parts[fullest]) + 1) // 2
        parts[fullest : fullest + 1] = [part[:half], part[half:]]
    return parts


class _Collated(torch.utils.data.Dataset):
    """A task's stream as torch's data loader wants it: an index is a whole micro-batch."""

    def __init__(
        self, task: Task, stream: Stream, parts: Sequence[list[int]], rows: activation_cache.Rows | None
    ) -> None:
        self.task, self.stream, self.parts, self.rows = task, stream, parts, rows

    def __getitem__(self, index: int) -> Batch:
        part = self.parts[index]
        stored = {} if self.rows is None else {activation_cache.KEY: self.rows[part]}
        return self.task.collate(self.stream, part) | stored

    def __len__(self) -> int:
        return len(self.parts)


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


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
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


def fit(
    task: Task,
    config: TrainConfig,
    *,
    seed: int,
    accelerator: Accelerator,
    directory: Path | None = None,
    identity: dict[str, Any] | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
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
        on_event: gets a dictionary per step, evaluation and checkpoint, on the main process.

    Returns:
        Steps done in all.

    Raises:
        NonFiniteLoss: before the update, naming step and examples.
        Interrupted: on SIGINT or SIGTERM, after saving.
        CheckpointError: if a checkpoint cannot be written, read or used.
    """
    plan = Plan(config, task.train_stream, seed)
    rank, world = accelerator.process_index, accelerator.num_processes
    if config.gradient_checkpointing:
        _checkpoint_activations(task.model)
    place(task, accelerator)
    optimizer = torch.optim.AdamW(
        list(task.parameter_groups(config.weight_decay, decay_gates=config.decay_gates)),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        foreach=False if is_sharded(accelerator) else None,  # whole and sharded parameters do not go into one list
    )
    wrapped, optimizer = prepare(task, optimizer, accelerator)
    runnable = torch.compile(wrapped) if config.compile else wrapped
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    done = 0
    if resume and directory is not None:
        done = checkpoint.load_latest(directory, task, optimizer.optimizer, identity or {}, accelerator)
        if done and accelerator.is_main_process:
            on_event({"event": "resume", "step": done})

    def save(step: int) -> None:
        if directory is not None:
            checkpoint.save(directory, step, task, optimizer.optimizer, identity or {}, accelerator)

    def evaluate(step: int) -> None:
        loss, count = held_out_loss(task, config, accelerator, runnable=runnable)
        if accelerator.is_main_process and count:
            on_event({"event": "eval", "step": step, "loss": loss, "count": count})

    def gates(step: int) -> None:
        if task.handle is not None and accelerator.is_main_process:
            on_event({"event": "gates", "step": step, "gates": {k: v.tolist() for k, v in task.handle.gates().items()}})

    save_every = max(1, plan.steps // 10) if config.save_every is None else config.save_every
    evaluate_every = max(1, plan.steps // 10) if config.evaluate_every is None else config.evaluate_every
    gates_every = max(1, plan.steps // 100)
    ahead = [plan.micro_batches(step, rank, world) for step in range(done, plan.steps)]
    skipped = 0
    with (
        activation_cache.kept_trunk(task, config, accelerator, on_event) as rows,
        _stop_requests() as stop_requested,
        set_checkpoint_early_stop(not is_offloaded(task)),
    ):
        loader = DataLoader(
            _Collated(task, plan.stream, [part for step in ahead for part, _ in step], rows),
            batch_size=None,
            generator=torch.Generator().manual_seed(seed),  # its own, so that a loader draws nothing from torch's
            num_workers=config.workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        batches = iter(loader)
        if accelerator.is_main_process:
            on_event({"event": "plan", "steps": plan.steps, "done": done, "steps_per_epoch": plan.steps_per_epoch})
        if done == 0:
            gates(0)
        for step, micro_batches in enumerate(ahead, start=done):
            started = time.perf_counter()
            wrapped.train()
            count = plan.count(step)
            losses: list[Tensor] = []
            for position, (_, counts) in enumerate(micro_batches):
                batch = {k: v.to(accelerator.device, non_blocking=True) for k, v in next(batches).items()}
                last = position == len(micro_batches) - 1
                with nullcontext() if last else accelerator.no_sync(wrapped):
                    loss_sum = runnable(batch) * (1.0 if counts else 0.0)
                    # Normalised once, over the whole step's supervised units; DDP averages over processes.
                    backward(loss_sum * (world / count), accelerator)
                losses.append(loss_sum.detach().float())
            total = sum_over_processes(accelerator, torch.stack(losses).sum())
            average_whole_gradients(parameters, accelerator)
            norm = clip(parameters, config.clip_norm or math.inf, accelerator)
            # The one wait for the device in a step.
            loss, norm = torch.stack([total / count, norm.to(total.device).float()]).tolist()
            skipped = 0 if math.isfinite(norm) else skipped + 1  # a float16 scaler skips some updates while it settles
            if not math.isfinite(loss) or skipped > (0 if accelerator.scaler is None else MOST_SKIPPED):
                raise NonFiniteLoss(_non_finite(plan, step, loss, norm))
            rate = plan.learning_rate(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            seconds = time.perf_counter() - started
            if accelerator.is_main_process:
                examples = plan.examples(step)
                on_event(
                    {
                        "event": "step",
                        "step": done,
                        "epoch": round(done / plan.steps_per_epoch, 4),
                        "loss": loss,
                        "lr": rate,
                        "grad_norm": norm,
                        "supervised": count,
                        "examples": len(examples),
                        "seconds": seconds,
                        "examples_per_second": len(examples) / seconds,
                        "tokens_per_second": sum(plan.stream.lengths[i] for i in examples) / seconds,
                    }
                )
            if done % gates_every == 0 or done == plan.steps:
                gates(done)
            if evaluate_every and done % evaluate_every == 0 and done < plan.steps:
                evaluate(done)
            # Every process must leave together, so they ask one another.
            asked = torch.tensor(float(stop_requested()), device=accelerator.device)
            stopping = sum_over_processes(accelerator, asked).item() > 0
            if stopping or (save_every and (done == plan.steps or done % save_every == 0)):
                save(done)
            if stopping:
                raise Interrupted(done)
    return done


@torch.no_grad()
def held_out_loss(
    task: Task, config: TrainConfig, accelerator: Accelerator, *, runnable: Callable[[Batch], Tensor] | None = None
) -> tuple[float, int]:
    """Mean loss per supervised unit over the held-out examples, and how many units there were."""
    stream = task.held_out_stream
    task.eval()
    order = sorted(range(len(stream)), key=lambda index: (-stream.lengths[index], index))
    world = accelerator.num_processes
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    for part in cut(config, stream, order, world)[accelerator.process_index :: world]:
        batch = task.collate(stream, part or order[:1])
        with accelerator.autocast():  # the same precision before, in and after training
            loss = (runnable or task)({k: v.to(accelerator.device) for k, v in batch.items()})
        total += loss.double() if part else 0.0
    count = sum(stream.counts)
    return sum_over_processes(accelerator, total).item() / max(1, count), count


def _checkpoint_activations(model: Any) -> None:
    # transformers; the second is the name before 5.23
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if enable is not None:
        enable({"use_reentrant": False})
        # It makes embeddings require gradients for the re-entrant kind; layers below the prefix need no backward.
        if hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()
    elif hasattr(model, "set_grad_checkpointing"):  # timm
        model.set_grad_checkpointing(True)
    else:
        raise ConfigError(f"{type(model).__name__} does not support gradient checkpointing; set it to false.")


def _non_finite(plan: Plan, step: int, loss: float, norm: float) -> str:
    examples = plan.examples(step)
    return (
        f"the loss is {loss} and the gradient's norm {norm} at step {step + 1} of {plan.steps} "
        f"(stream {plan.stream.name!r}, rate {plan.learning_rate(step):.3g}, examples {examples[:8]}"
        f"{', ...' if len(examples) > 8 else ''}). Nothing was updated by this step. Look at these examples, or start "
        f"a new run with a lower train.learning_rate, with train.clip_norm, or in bfloat16 instead of float16."
    )
