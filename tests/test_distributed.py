"""One map over examples that several processes divide among them; the processes are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from zinit.distributed import map_over_ranks

pytestmark = pytest.mark.fast


def on_every_rank(world: int, run: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ``run(accelerator)`` returns on each of several ranks; gathering works."""
    barrier, given = threading.Barrier(world, timeout=30), {}

    def gather(mine: list[Any]) -> list[Any]:
        given[threading.get_ident()] = mine
        barrier.wait()
        together = [pair for part in given.values() for pair in part]
        barrier.wait()
        return together

    monkeypatch.setattr("accelerate.utils.gather_object", gather)
    ranks = [SimpleNamespace(process_index=rank, num_processes=world) for rank in range(world)]
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, ranks))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [None, 1, 2, 100])
@pytest.mark.parametrize("count", [0, 1, 5, 6])
def test_every_rank_gets_all_results_in_order_in_as_many_calls(
    count: int, batch_size: int | None, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[int, list[list[int]]] = {rank: [] for rank in range(world)}

    def evaluate(accelerator: Any) -> list[str]:
        def run(indices: Sequence[int]) -> list[str]:
            calls[accelerator.process_index].append(list(indices))
            return [f"answer {index}" for index in indices]

        return map_over_ranks(accelerator, count, run, batch_size=batch_size)

    found = on_every_rank(world, evaluate, monkeypatch)
    assert found == [[f"answer {index}" for index in range(count)]] * world
    sizes = [[len(indices) for indices in made] for made in calls.values()]
    assert all(own == sizes[0] for own in sizes), "a sharded model needs as many passes on every rank"
    assert all(size <= (batch_size or count) for size in sizes[0])
    assert sum(map(sum, sizes)) < count + world


def test_one_result_for_each_index_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="shorter"):
        on_every_rank(1, lambda rank: map_over_ranks(rank, 3, lambda indices: ["one"]), monkeypatch)
