"""An evaluation is shared out so that all processes make as many forward passes: a sharded model needs them in step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tasks.test_squad import document, make, write
from tests.tiny import save_records, save_tiny_llama
from zinit.distributed import shard_indices
from zinit.runs.build import build_model, build_task
from zinit.runs.settings import resolve
from zinit.train.held_out import held_out_loss


def process(rank: int, world: int) -> Any:
    return SimpleNamespace(process_index=rank, num_processes=world)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_process_gets_as_many_and_nothing_is_left_out(world: int) -> None:
    for count in range(13):
        shares = [shard_indices(count, process(rank, world)) for rank in range(world)]
        assert len({len(mine) for mine in shares}) == 1
        assert {index for mine in shares for index in mine} == set(range(count))
        assert sum(map(len, shares)) < count + world, "nothing comes twice that need not"


@pytest.mark.parametrize("world", [2, 3])
def test_questions_of_unlike_length_take_as_many_passes(world: int, tmp_path: Path) -> None:
    """Questions share a step by number, but are cut into windows, some into more of them."""
    held_out = document(7)
    paragraph = held_out["data"][0]["paragraphs"][0]
    paragraph["context"] += " A long way off." * 40
    task = make(tmp_path, document(4), held_out_data=write(tmp_path / "held_out.json", held_out))
    count = len(task.held_out_questions)
    alone = sorted(task._answer(range(count)))
    passes: list[int] = []
    scores = task._scores

    def counting(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        passes[-1] += 1
        return scores(batch)

    task._scores = counting
    for rank in range(world):
        passes.append(0)
        task._answer(shard_indices(count, process(rank, world)), batch_size=1)
    needed = list(passes)
    assert len(set(needed)) > 1, "else nothing is shown here"
    passes.clear()
    together = []
    for rank in range(world):
        passes.append(0)
        mine: Any = process(rank, world)
        mine.device, mine.gather = torch.device("cpu"), lambda own: torch.tensor(needed)
        together += task._answer(shard_indices(count, mine), mine, batch_size=1)
    assert passes == [max(needed)] * world
    assert sorted(dict.fromkeys((index, text) for index, text, _ in together)) == [(i, t) for i, t, _ in alone]


def test_the_held_out_loss_takes_as_many_passes(tmp_path: Path) -> None:
    config, _ = resolve(
        backbone="llama",
        model=str(save_tiny_llama(tmp_path / "model")),
        data=str(save_records(tmp_path / "data.json", 73)),
        options=["micro_batch_size=1", "held_out=7"],
    )
    task = build_task(config, build_model(config, torch.device("cpu")))
    passes = []
    for rank in range(3):
        mine: Any = process(rank, 3)
        mine.device, mine.reduce, mine.autocast = torch.device("cpu"), lambda own, how: own, torch.no_grad
        calls: list[int] = []
        held_out_loss(task, config.train, mine, runnable=lambda batch, calls=calls: calls.append(1) or task(batch))
        passes.append(len(calls))
    assert passes == [3, 3, 3]
