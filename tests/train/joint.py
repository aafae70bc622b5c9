"""A toy task of two streams with disjoint groups, and runs of it in processes of their own; see `test_streams`.

python -m tests.train.joint OUTPUT [--kill STEP] [--resume]
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from zinit.tasks.base import Batch, Evaluation, Split, Stream, Task
from zinit.train.config import TrainConfig
from zinit.train.events import Event, Step
from zinit.train.loop import fit

SETTINGS = {
    "epochs": 2,
    "batch_size": 8,
    "micro_batch_size": 3,
    "learning_rate": 0.05,
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "evaluate_every": 0,
    "save_every": 1,
}


class Joint(Task):
    """Two linear maps that add up, each with a gate. Both streams' losses depend on both of them.

    Args:
        ratios: of the streams "left" and "right".
        dropout: in the model, to see that the random numbers go on as they should.
    """

    name = "joint"

    def __init__(self, ratios: tuple[float, float] = (1.0, 1.0), dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.handle = None
        self.model = nn.ModuleDict({name: nn.Linear(4, 2) for name in ("left", "right")})
        self.gates = nn.ParameterDict({name: nn.Parameter(torch.full((2,), 0.5)) for name in ("left", "right")})
        self.dropout = nn.Dropout(dropout)
        generator = torch.Generator().manual_seed(1)
        self.examples = {
            name: torch.randn(count, 4, generator=generator) for name, count in (("left", 22), ("right", 30))
        }
        self.ratios = ratios
        self.train_stream = self.streams()[0]
        self.held_out_stream = Split(name="left", lengths=[4] * 5, counts=[1] * 5)

    def streams(self) -> Sequence[Stream]:
        return [
            Stream(name=name, lengths=[4] * len(rows), counts=[1] * len(rows), examples=rows, group=name, ratio=ratio)
            for (name, rows), ratio in zip(self.examples.items(), self.ratios, strict=True)
        ]

    def groups(self) -> dict[str, dict[str, list[nn.Parameter]]]:
        return {
            name: {"gates": [self.gates[name]], "head": list(self.model[name].parameters())}
            for name in ("left", "right")
        }

    def collate(self, stream: Split, indices: Sequence[int]) -> Batch:
        x = self.examples[stream.name][list(indices)]
        return {"x": x, "y": x[:, :2].pow(2) if stream.name == "left" else x[:, 2:].abs()}

    def forward(self, batch: Batch) -> Tensor:
        found = sum(self.gates[name] * self.model[name](self.dropout(batch["x"])) for name in ("left", "right"))
        return (found - batch["y"]).pow(2).sum()

    def evaluate(self, accelerator: Accelerator, *, limit: int | None = None) -> Evaluation:
        return Evaluation(metrics={})

    def fingerprint(self) -> str:
        return "fixed"


def trained(task: Task, **settings: Any) -> list[Step]:
    """The steps of a run in this process."""
    events: list[Event] = []
    config = TrainConfig(**{**SETTINGS, **settings})
    fit(task, config, seed=3, accelerator=Accelerator(cpu=True), on_event=events.append)
    return [event for event in events if isinstance(event, Step)]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("output", type=Path)
    options.add_argument("--kill", type=int, default=None)
    options.add_argument("--dropout", type=float, default=0.2)
    options.add_argument("--resume", action="store_true")
    options = options.parse_args()
    torch.set_num_threads(1)

    def listen(event: Event) -> None:
        if isinstance(event, Step) and event.step == options.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    task, accelerator = Joint(dropout=options.dropout), Accelerator(cpu=True)
    fit(
        task,
        TrainConfig(**SETTINGS),  # pyright: ignore[reportArgumentType]
        seed=3,
        accelerator=accelerator,
        directory=options.output,
        resume=options.resume,
        on_event=listen,
    )
    if accelerator.is_main_process:
        save_file({name: p.detach().clone() for name, p in task.named_parameters()}, options.output / "end.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main()
