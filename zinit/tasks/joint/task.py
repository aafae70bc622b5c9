"""Joint training with disjoint parameters (LLaMA-Adapter V2, section 3.3): every step takes a batch of each stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zinit.errors import ConfigError
from zinit.tasks import TASKS
from zinit.tasks.base import MAIN, Batch, DataInputs, Evaluation, Stream, Task, TaskInputs
from zinit.tasks.conversation.task import ANOTHER
from zinit.tasks.joint.config import PARTS, JointConfig
from zinit.tasks.text import TextTask

if TYPE_CHECKING:
    from accelerate import Accelerator

    from zinit.data.images import ImageSource


class Joint(Task):
    """A task with images and one of texts on one model, both of causal language models.

    The parameters that serve images alone (`zinit.adapter.handle.Handle.groups`) get gradients of the stream with
    images, the others of the stream of texts; without such parameters, both streams train all.
    """

    name = "joint"
    hub_task = "text-generation"
    Config = JointConfig
    loader = "zinit.models.loading:load_causal_lm"
    metric = "language_exact_match"
    generates = True
    reads_texts = True
    reads_several = True
    lower_is_better = (*Task.lower_is_better, ANOTHER)
    config: JointConfig

    def __init__(self, inputs: TaskInputs, config: JointConfig) -> None:
        super().__init__(inputs, config)
        examples = self.take_data(inputs, config)
        self.language = self._part("language", inputs, examples)
        self.visual = self._part("visual", inputs, examples)
        self.groups_apart = config.disjoint and self._tells_apart()
        self.train_stream = self._stream("language")
        self.held_out_stream = _together(self.visual.held_out_stream, self.language.held_out_stream)

    def _part(self, part: str, inputs: TaskInputs, examples: Mapping[str, Any]) -> TextTask:
        own = replace(inputs, data=_sources(inputs, part), examples=examples[part])
        return _kind(self.config, part)(own, self.config.of(part))

    def _tells_apart(self) -> bool:
        parts = {} if self.handle is None else self.handle.parts
        return any(part.config.prompt == "context" for part in parts.values())

    @classmethod
    def read_data(cls, inputs: DataInputs, config: JointConfig) -> dict[str, Any]:
        """{part: what its task reads}."""
        return {
            part: kind.read_data(replace(inputs, data=_sources(inputs, part)), config.of(part))
            for part, kind in {part: _kind(config, part) for part in PARTS}.items()
        }

    # --- streams ---

    def _stream(self, part: str) -> Stream:
        own: TextTask = getattr(self, part)
        ratio = self.config.ratios[PARTS.index(part)]
        return replace(own.train_stream, name=part, group=part if self.groups_apart else MAIN, ratio=ratio)

    def streams(self) -> Sequence[Stream]:
        return self.train_stream, self._stream("visual")

    def groups(self) -> dict[str, dict[str, list[nn.Parameter]]]:
        if not self.groups_apart or self.handle is None:
            return super().groups()
        roles = {id(p): role for role, parameters in self.handle.roles().items() for p in parameters}
        found: dict[str, dict[str, list[nn.Parameter]]] = {}
        for group, parameters in self.handle.groups().items():
            for parameter in parameters:
                found.setdefault(group, {}).setdefault(roles[id(parameter)], []).append(parameter)
        return found

    def collate(self, stream: Stream, indices: Sequence[int]) -> Batch:
        """As the stream's own task does; held-out examples of both may share a batch."""
        return (self.language if stream.name == "language" else self.visual).collate(stream, indices)

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss of one stream's examples."""
        return (self.visual if "image_present" in batch else self.language)(batch)

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self, accelerator: Accelerator, *, limit: int | None = None) -> Evaluation:
        """The figures of both tasks, "visual_..." and "language_..."; samples of both."""
        whole = Evaluation(metrics={})
        for part in PARTS:
            own = getattr(self, part).evaluate(accelerator, limit=limit)
            whole.metrics |= {f"{part}_{name}": value for name, value in own.metrics.items()}
            whole.counts |= {f"{part}_{name}": value for name, value in own.counts.items()}
            whole.samples += own.samples[:4]
        return whole

    @classmethod
    def direction(cls, metric: str) -> Any:
        return super().direction(metric.removeprefix("visual_").removeprefix("language_"))

    def image_sources(self) -> Mapping[bytes, ImageSource]:
        return self.visual.image_sources()

    def controls(self) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        return self.visual.controls()

    def data_report(self) -> dict[str, Any]:
        """Counts of both tasks."""
        own = {f"{part}_{name}": n for part in PARTS for name, n in getattr(self, part).data_report().items()}
        return {"train": len(self.language.train_stream) + len(self.visual.train_stream),
                "held_out": len(self.held_out_stream), **own}  # fmt: skip

    def fingerprint(self) -> str:
        return f"{self.visual.fingerprint()} {self.language.fingerprint()}"


def _kind(config: JointConfig, part: str) -> type[TextTask]:
    """The task of one part."""
    kind = TASKS.get(getattr(config, part))
    if not issubclass(kind, TextTask):
        raise ConfigError(f"task.{part}={kind.name} is no task of a causal language model, which both must be.")
    return kind


def _sources(inputs: DataInputs, part: str) -> str | None:
    """The data of one part."""
    if not inputs.sources:
        return None
    if len(inputs.sources) != len(PARTS):
        raise ConfigError(
            f"the task joint reads two sources, first that of the images, then that of the language; got "
            f"{len(inputs.sources)}: {', '.join(inputs.sources)}. Give --data twice."
        )
    return inputs.sources[PARTS.index(part)]


def _together(first: Stream, second: Stream) -> Stream:
    return Stream(
        name="held_out",
        examples=[*first.examples, *second.examples],
        lengths=[*first.lengths, *second.lengths],
        counts=[*first.counts, *second.counts],
    )
