"""What all tasks and methods share: how they are made, also those written to the first signatures; prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests.tiny import byte_tokenizer
from zinit.config import PrefixConfig
from zinit.methods.base import Adapted, ApplyContext, Method, NoSettings, apply_method
from zinit.tasks.base import Batch, Evaluation, LoadedModel, Stream, Task, TaskInputs, make_task

pytestmark = pytest.mark.fast


class Least(Task):
    """The least that a task can be."""

    name = "least"

    def forward(self, batch: Batch) -> Tensor:
        return torch.zeros(())

    def collate(self, stream: Stream, indices: Sequence[int]) -> Batch:
        return {}

    def evaluate(self, accelerator: Accelerator, *, limit: int | None = None) -> Evaluation:
        return Evaluation(metrics={})

    def fingerprint(self) -> str:
        return ""


class First(Least):
    """Takes its inputs one by one."""

    def __init__(
        self, model: Any, processor: Any, handle: Any, config: Any, *, data: Any, seed: int, train: bool = True
    ) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.given = (processor, handle, data, seed, train)


class Labelled(First):
    """Has labels besides."""

    def __init__(self, *inputs: Any, data: Any, seed: int, train: bool = True, labels: Any = None) -> None:
        super().__init__(*inputs, data=data, seed=seed, train=train)
        self.labels = labels


def test_a_task_is_made_of_its_inputs() -> None:
    model, eye = nn.Linear(2, 2), nn.Linear(3, 3)
    extra = LoadedModel(model=eye, processor="pixels")
    inputs = TaskInputs(model=model, processor="words", data="here", seed=4, models={"eye": extra})
    task: Any = make_task(Least, inputs, "settings")
    assert (task.model, task.eye, task.processor, task.handle, task.config) == (model, eye, "words", None, "settings")
    assert list(dict(task.named_children())) == ["model", "eye"]


def test_tasks_and_methods_written_to_the_first_signatures_work() -> None:
    model = nn.Linear(2, 2)
    inputs = TaskInputs(model=model, processor="words", data="here", seed=4, train=False)
    first: Any = make_task(First, inputs, "settings")
    assert (first.model, first.config, first.given) == (model, "settings", ("words", None, "here", 4, False))
    assert first.train().training
    labelled = TaskInputs(model=model, labels=["a", "b"])
    assert make_task(Labelled, labelled, None).labels == ["a", "b"]
    with pytest.raises(TypeError, match="labels"):
        make_task(First, labelled, None)

    class Old(Method):
        name = "old"

        def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, model: nn.Module, *, prefix: PrefixConfig, backbone: str, seed: int, saved: Path | None = None
        ) -> Adapted:
            self.given = (prefix.length, backbone, seed, saved)
            return Adapted(model=model)

    method = Old(NoSettings())
    context = ApplyContext(prefix=PrefixConfig(length=7), backbone="llama", seed=3, saved=Path("run"))
    assert apply_method(method, model, context).model is model
    assert method.given == (7, "llama", 3, Path("run"))


def test_a_task_without_a_template_prompts_with_the_bare_words() -> None:
    assert Least.format_prompt("Sing.") == "Sing."
    assert Least.format_prompt("Add.", "1 2") == "Add.\n\n1 2"
    assert Least.format_conversation([("Hi", "Hello")], "Sing.") == "Hi\n\nHello\n\nSing."
    tokenizer = byte_tokenizer()
    assert Least.encode_prompt(tokenizer, "a</s>")[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in Least.encode_prompt(tokenizer, "a</s>"), "text, not the end"
