"""What a task must answer. The engine sees only this."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor, nn

from zinit.config import JsonConfig
from zinit.errors import ConfigError
from zinit.models.quantization import is_quantized
from zinit.registry import import_object

if TYPE_CHECKING:
    from accelerate import Accelerator

    from zinit.adapter.handle import Handle
    from zinit.models.loading import Loading

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One source of training examples.

    Attributes:
        name: for logs and errors.
        lengths: of each example, in tokens (or patches): micro-batches are sorted by it.
        counts: supervised units of each example: what the loss is averaged over.
    """

    name: str
    lengths: Sequence[int]
    counts: Sequence[int]

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: name to value.
        counts: how many examples each part of it saw.
        samples: a few inputs with the expected and the model's output.
    """

    metrics: dict[str, float]
    counts: dict[str, int] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)


class Task(nn.Module, ABC):
    """Owns the adapted model, a head if it needs one, and the loss: batches in, a summed loss out.

    A task is one `nn.Module`, so that the engine can hand it whole to whatever wraps it (DDP, FSDP2). What it trains
    is what has ``requires_grad``: the prefix, and its own head.

    It is made by ``TheTask(model, processor, handle, options, data=..., seed=..., train=True)``, with ``labels=...``
    besides if it has some and a finished run kept them: the adapted model and what `load_model` gave with it, the
    prefix or None, the settings (of the class ``Config``), the source of the examples or None for its embedded ones.
    ``train=False`` leaves the training examples unread.

    Attributes:
        name: registered name.
        Config: its settings; ``held_out_data`` is what ``zinit eval --data`` sets.
        loader: address of the function that `load_model` calls, such as ``"zinit.models.loading:load_encoder"``.
        model: the adapted model.
        handle: the prefix on it; None for methods that have none.
        train_stream: what is trained on.
        held_out_stream: what is kept from training.
        labels: class names in the order of the head's outputs, for tasks that have classes. A finished run keeps
            them, and hands them to the constructor as ``labels`` when it is loaded.
        baseline: what `frozen_baseline` measures, in words.
        metric: what a benchmark compares, by its name in `Evaluation.metrics`.
        generates: whether it makes text: what ``zinit chat`` and ``zinit generate`` need.
    """

    name: str
    Config: type[JsonConfig]
    loader: str
    model: nn.Module
    handle: Handle | None
    labels: list[str] | None = None
    baseline = "the frozen model"
    metric = "accuracy"
    generates = False
    train_stream: Stream
    held_out_stream: Stream

    @classmethod
    def load_model(cls, source: str | Path, **loading: Unpack[Loading]) -> tuple[nn.Module, Any]:
        """The model, not yet adapted, and what goes with it: a tokenizer, statistics of pixels.

        Args:
            source: folder or Hub id.
            loading: see `zinit.models.loading.Loading`.
        """
        return import_object(cls.loader)(source, **loading)

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """The loss, summed over the batch's supervised units. A scalar, float32."""

    @abstractmethod
    def collate(self, stream: Stream, indices: Sequence[int]) -> Batch:
        """The examples of one micro-batch as tensors on the CPU. A pure function of its arguments."""

    @abstractmethod
    def evaluate(self, accelerator: Accelerator, *, limit: int | None = None) -> Evaluation:
        """Everything that is reported of the held-out examples, the loss aside; the same on every process.

        Args:
            accelerator: for sharing the work, with `zinit.distributed.share`: a sharded model's forward passes gather
                its weights from all processes, so these must make as many each.
            limit: at most so many examples where an example is expensive (generation); None is all.
        """

    def prepare(self) -> None:
        """Called once before a run measures or trains anything: on its device, with the adapter switched off."""
        return

    @contextmanager
    def frozen_baseline(self) -> Iterator[None]:
        """A scope, with the adapter switched off, in which the task is the ``baseline`` that stands beside the result.

        A task whose head knows nothing before training may put something more telling in its place.
        """
        yield

    def baseline_parameters(self) -> dict[str, nn.Parameter]:
        """What `frozen_baseline` sets from the training examples, by name.

        A run keeps the values: an evaluation on other data reads no training examples.
        """
        return {}

    def artifacts(self) -> dict[str, Any]:
        """JSON documents for the run's folder, by file name: what the last evaluation answered, say."""
        return {}

    def data_report(self) -> dict[str, Any]:
        """What was read, split, truncated and skipped: counts in equal counts out plus counts skipped."""
        return {"train": len(self.train_stream), "held_out": len(self.held_out_stream)}

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the examples and how they are encoded: a resumed run must find the same."""

    @classmethod
    def over_datasets(cls, results: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Figures over several data sets, as the task's literature has them; each under a name that says what it is.

        Args:
            results: {data set: {metric: mean over the seeds}}.
        """
        return {}

    @classmethod
    def paper_figure(cls, method: str, dataset: str, metric: str) -> float | None:
        """What the LLaMA-Adapter paper reports for a method on a data set, in the metric's unit; None if nothing.

        Args:
            method: registered name.
            dataset: as the benchmark names it.
            metric: as `evaluate` names it.
        """
        return None

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains beyond the prefix, by name: heads, biases, low-rank updates, a whole model."""
        prefix = set() if self.handle is None else {id(parameter) for parameter in self.handle.parameters()}
        return {n: p for n, p in self.named_parameters() if p.requires_grad and id(p) not in prefix}

    def parameter_groups(self, weight_decay: float, *, decay_gates: bool) -> Iterator[dict[str, Any]]:
        """Groups for the optimizer: gates apart, so that they can be spared weight decay.

        Args:
            weight_decay: of everything but the gates.
            decay_gates: whether the gates decay too, as in the reference's training code.
        """
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        gates = set()
        if self.handle is not None:
            gates = {id(prefix.gate) for prefix in self.handle.prefixes.values() if prefix.config.gating}
        yield {"params": [p for _, p in named if id(p) not in gates], "weight_decay": weight_decay}
        if gates:
            decay = weight_decay if decay_gates else 0.0
            yield {"params": [p for _, p in named if id(p) in gates], "weight_decay": decay}


def load_host(task: type[Task], source: str | Path, *, trains: bool, **loading: Any) -> tuple[nn.Module, Any]:
    """A task's model and its processor.

    Args:
        task: its ``load_model`` must take a ``dtype`` and a ``revision``; one that reads weights straight to a
            ``device``, or quantised (``quantize``), takes these too.
        source: folder or Hub id.
        trains: whether the model's own weights will be trained.
        loading: see `zinit.models.loading.Loading`.

    Raises:
        ConfigError: if the task's model is to be quantised and it does not know how, or is quantised and to be trained.
    """
    load_model: Any = task.load_model
    parameters = inspect.signature(load_model).parameters
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        if loading.get("quantize") is not None and "quantize" not in parameters:
            raise ConfigError(
                f"the task {task.name!r} cannot quantise its model: its load_model takes no 'quantize'. Leave it out."
            )
        loading = {name: value for name, value in loading.items() if name in parameters}
    model, processor = load_model(source, **loading)
    if trains and is_quantized(model):
        raise ConfigError(
            f"{source} is quantised, and quantised weights cannot be trained. Take the model as it was before, or "
            f"train beside it: -o method=zero-init, or -o method=lora."
        )
    return model, processor
