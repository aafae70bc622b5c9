"""Intervals of differences: against a plain loop that draws seeds and examples itself, and where there is none."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.bench.test_summary import benchmark
from zinit.bench.intervals import interval
from zinit.bench.runner import final_cells
from zinit.bench.summary import summarise, table
from zinit.files import write_atomically

SEEDS = range(5)


def examples(shift: float, *, seeds: Any = SEEDS, count: int = 40) -> dict[int, list[tuple[float, float]]]:
    """Of a figure such as F1: x over y, y of uneven size; ``shift`` moves it, in every seed by another amount."""
    found = {}
    for seed in seeds:
        draw = random.Random(seed)
        effect = draw.gauss(0, 0.1)
        found[seed] = [(size * (draw.random() + shift + effect * shift), size) for size in (1, 2, 3, 4) * (count // 4)]
    return found


def by_hand(these: dict[int, Any], those: dict[int, Any], draws: int) -> tuple[float, float]:
    draw, differences = random.Random(1), []
    for _ in range(draws):
        seeds = draw.choices(list(these), k=len(these))
        chosen = draw.choices(range(len(these[0])), k=len(these[0]))
        found = []
        for seed in seeds:
            figures = [
                sum(own[seed][i][0] for i in chosen) / sum(own[seed][i][1] for i in chosen) for own in (these, those)
            ]
            found.append(figures[0] - figures[1])
        differences.append(statistics.fmean(found))
    cuts = statistics.quantiles(differences, n=40)
    return cuts[0], cuts[-1]


def test_as_a_plain_loop_draws_them() -> None:
    these, those = examples(0.6), {seed: [(y * 0.5, y) for _, y in own] for seed, own in examples(0.0).items()}
    found, expected = interval(these, those), by_hand(these, those, 1500)
    assert found is not None
    assert found == pytest.approx(expected, abs=0.02)
    assert found[1] - found[0] > 0.05
    assert found == interval(these, those)  # the same every time


def test_what_both_have_in_common_cancels() -> None:
    """Paired by example: hard and easy ones are so for both."""
    these = examples(0.5)
    those = {seed: [(x - 0.25 * y, y) for x, y in own] for seed, own in these.items()}
    assert interval(these, those) == pytest.approx((0.25, 0.25))


def test_where_there_is_none() -> None:
    assert interval(examples(0.1, seeds=range(4)), examples(0.2)) is None
    assert interval(examples(0.1), examples(0.2, seeds=range(1, 6))) is None  # four in common
    assert interval(examples(0.1), examples(0.2, count=44)) is None
    assert interval({}, {}) is None


def test_the_table_shows_intervals_of_five_seeds_and_deviations_of_fewer(tmp_path: Path) -> None:
    plan = benchmark(tmp_path, seeds=list(SEEDS))
    (tmp_path / "cells").mkdir()
    own = {"zero-init": examples(0.5), "lora": examples(0.4)}
    for cell in final_cells(plan, tmp_path):
        found = own[cell.method][cell.seed]
        score = sum(x for x, _ in found) / sum(y for _, y in found)
        document: dict[str, Any] = {"cell": cell.to_dict(), "id": cell.id, "status": "done", "counts": {}, "curves": {}}
        document |= {"metrics": {"adapted": {"exact_match": score}, "base": {}}, "num_trainable": 1, "seconds": 1.0}
        document |= {"examples": {"exact_match": found}, "rates": {"gates": 0.3, "prompts": 0.3}}
        write_atomically(tmp_path / "cells" / f"{cell.id}.json", json_bytes(document))
    rows = {row.method: row for row in summarise(plan, tmp_path)}
    expected = interval(own["lora"], own["zero-init"])
    assert expected is not None
    assert rows["lora"].interval == expected
    header, lines = table(rows.values())
    shown = dict(zip(header, lines[1], strict=True))
    low, high = expected
    assert shown["minus zero-init"] == f"{rows['lora'].difference:+.3f} [{low:+.3f}, {high:+.3f}] (5)"
    assert shown["rate"] == "0.3"
    fewer = {row.method: row for row in summarise(benchmark(tmp_path, seeds=[0, 1]), tmp_path)}
    assert fewer["lora"].interval is None
    assert fewer["lora"].difference_std is not None


def json_bytes(document: Any) -> bytes:
    from zinit.config import to_json

    return to_json(document).encode()
