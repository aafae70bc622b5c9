"""Which examples each step trains on, at which rate: pure functions of the step, so resuming needs no state."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zinit.errors import ConfigError
from zinit.tasks.base import Split, Stream
from zinit.train.config import TrainConfig

if TYPE_CHECKING:
    from zinit.tasks.base import Task

WARMUP_PART = 2 / 5  # of the run, in the paper
ORDERS_KEPT = 16  # epochs' orders in memory: two for each stream
APART, SOURCES_APART = 15_485_863, 7_368_787  # primes: streams and sources of one length are in orders of their own


@functools.lru_cache(maxsize=ORDERS_KEPT)
def _order(seed: int, epoch: int, count: int) -> torch.Tensor:
    """The order of one epoch; as a tensor, which takes a quarter of a list's memory."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


@functools.lru_cache(maxsize=ORDERS_KEPT)
def _mixed(seed: int, epoch: int, stream: Stream) -> torch.Tensor:
    """The order of one epoch of several sources. Each is gone through again and again, every pass in a new order."""
    parts, start = [], 0
    for number, ((count, _), taken) in enumerate(zip(stream.passes, stream.taken, strict=True), start=1):
        first = epoch * taken
        while first < (epoch + 1) * taken:
            number_of_pass, place = divmod(first, count)
            order = _order(seed + SOURCES_APART * number, number_of_pass, count)
            parts.append(start + order[place : place + (epoch + 1) * taken - first])
            first += len(parts[-1])
        start += count
    mixed = torch.cat(parts)
    return mixed[_order(seed, epoch, len(mixed))]


@dataclass(frozen=True)
class Draws:
    """Which examples of one stream each step takes.

    Args:
        config: batch sizes.
        stream: the examples.
        seed: of the order.
    """

    config: TrainConfig
    stream: Stream
    seed: int

    @property
    def size(self) -> int:
        """Examples per step, over all processes."""
        return max(1, round(self.config.batch_size * self.stream.ratio))

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be smaller. Every example comes once, or as the stream's passes say."""
        return math.ceil(sum(self.stream.taken) / self.size)

    def examples(self, step: int) -> list[int]:
        """The examples of one step, over all processes, longest first (a too large batch fails at once)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        stream = self.stream
        order = _mixed(self.seed, epoch, stream) if stream.passes else _order(self.seed, epoch, len(stream))
        chosen = order[position * self.size : (position + 1) * self.size]
        return sorted(chosen.tolist(), key=lambda index: (-self.stream.lengths[index], index))

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


@dataclass(frozen=True)
class Plan(Draws):
    """The plan of a run: its first stream, which counts the epochs, the streams beside it, and the rates.

    Args:
        beside: what each step takes of other streams.

    Raises:
        ConfigError: if the warm-up covers the whole run.
    """

    beside: tuple[Draws, ...] = ()

    def __post_init__(self) -> None:
        if self.warmup >= self.steps:
            raise ConfigError(
                f"the warm-up of {self.warmup} steps covers the whole run of {self.steps}: shorten it with "
                f"-o train.warmup_steps={self.steps // 5}."
            )

    @classmethod
    def of(cls, task: Task, config: TrainConfig, seed: int) -> Plan:
        """The plan of a task's streams.

        Raises:
            ConfigError: if no stream is trained on, one is empty or names no group, or a warm-up is too long.
        """
        groups, streams, draws = task.groups(), task.streams(), []
        for group in config.rates.groups:
            if group not in groups:
                raise ConfigError(f"[train.rates] the task has no group {group!r}. Its groups: {', '.join(groups)}.")
        if len({stream.name for stream in streams}) < len(streams):
            raise ConfigError(f"streams need names of their own; got {', '.join(stream.name for stream in streams)}.")
        for index, stream in enumerate(streams):
            if stream.group not in groups:
                raise ConfigError(
                    f"the stream {stream.name!r} trains the group {stream.group!r}, which the task has not. "
                    f"Its groups: {', '.join(groups)}."
                )
            if stream.ratio and not len(stream):
                raise ConfigError(f"the stream {stream.name!r} has no examples. Give it some, or the ratio 0.")
            if stream.ratio:
                draws.append(Draws(config, stream, seed + APART * index))
        if not draws:
            raise ConfigError("every stream has the ratio 0, so there is nothing to train on.")
        first, *rest = draws
        return cls(config, first.stream, first.seed, tuple(rest))

    @property
    def draws(self) -> tuple[Draws, ...]:
        """What each step takes, stream by stream."""
        return (self, *self.beside)

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
        return int(WARMUP_PART * self.steps)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to the peak, then half a cosine; ``step`` counts from 0 and none has rate 0."""
        config, total, warmup = self.config, self.steps, self.warmup
        if step < warmup:
            return config.learning_rate * (step + 1) / (warmup + 1)
        progress = (step - warmup) / (total - warmup)
        span = config.learning_rate - config.min_learning_rate
        return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def rates_by_role(task: Task, config: TrainConfig) -> dict[str, dict[str, float]]:
    """{role: {"rate": its highest, "numbers": how many train at it}}; "group.role" where there are several groups.

    Args:
        task: what trains.
        config: the rate, and the factors on it.
    """
    several, found = len(task.groups()) > 1, {}
    for own in task.parameter_groups(0.0, decay_gates=False):
        name = f"{own['group']}.{own['role']}" if several else own["role"]
        rate = config.learning_rate * config.rates.factor(own["group"], own["role"])
        entry = found.setdefault(name, {"rate": rate, "numbers": 0})
        entry["numbers"] += sum(parameter.numel() for parameter in own["params"])
    return found


def cut(config: TrainConfig, split: Split, examples: Sequence[int], world: int) -> list[list[int]]:
    """Micro-batches: neighbours in length together, a multiple of ``world`` in number (some may be empty).

    Args:
        config: how many examples or tokens they hold.
        split: the examples' lengths.
        examples: longest first.
        world: processes that take them in turn.
    """
    if config.micro_batch_tokens is None:
        slots = math.ceil(len(examples) / (config.micro_batch_size * world)) * world
        if not slots:
            return []
        bounds = [round(i * len(examples) / slots) for i in range(slots + 1)]
        return [list(examples[a:b]) for a, b in itertools.pairwise(bounds)]
    parts: list[list[int]] = []
    for index in examples:
        if parts and split.lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= config.micro_batch_tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
    while len(parts) % world:  # the fullest is halved until every process has as many
        fullest = max(range(len(parts)), key=lambda i: len(parts[i]))
        part, half = parts[fullest], (len(parts[fullest]) + 1) // 2
        parts[fullest : fullest + 1] = [part[:half], part[half:]]
    return parts
