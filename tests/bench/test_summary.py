"""What is made of finished cells: differences by seed, choices, rates, and a table that fits a terminal."""

from __future__ import annotations

import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from zinit.bench.cells import Cell
from zinit.bench.plan import Benchmark, make_benchmark
from zinit.bench.runner import final_cells, read_cells
from zinit.bench.summary import Row, _difference, show, summarise, table
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.methods import rates as rates_of
from zinit.ui import console
from zinit.ui.benchmark import fit

PLAN = """
seeds = [0, 1, 2]
methods = ["zero-init", "lora"]
[[experiment]]
name = "one"
backbone = "llama"
"""


def benchmark(folder: Path, text: str = PLAN, **said: Any) -> Benchmark:
    (folder / "bench.toml").write_text(text)
    return make_benchmark(config_file=str(folder / "bench.toml"), **said)


def finish(output: Path, cell: Cell, *, status: str = "done", **adapted: Any) -> None:
    (output / "cells").mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"cell": cell.to_dict(), "id": cell.id, "status": status, "wall_seconds": 1.0}
    document |= {"metrics": {"adapted": adapted, "base": {"exact_match": 0.1, "loss": 4.0}}, "counts": {}}
    document |= {"num_trainable": 7, "seconds": 1.0, "curves": {}, "rates": {"": 0.25}, "error": "why"}
    if status == "refused":
        document |= {"by_settings": True, "metrics": None}
    (output / "cells" / f"{cell.id}.json").write_text(json.dumps(document))


def rows(plan: Benchmark, output: Path, values: dict[tuple[str, int], tuple[float, float]]) -> dict[str, Row]:
    for cell in final_cells(plan, output):
        if (cell.method, cell.seed) in values:
            score, loss = values[cell.method, cell.seed]
            finish(output, cell, exact_match=score, loss=loss)
    return {row.method: row for row in summarise(plan, output)}


def test_differences_are_between_the_same_seeds(tmp_path: Path) -> None:
    zero = {("zero-init", 0): (0.5, 2.0), ("zero-init", 1): (0.9, 1.0), ("zero-init", 2): (0.7, 1.5)}
    found = rows(benchmark(tmp_path), tmp_path, {**zero, ("lora", 1): (0.5, 3.0), ("lora", 2): (0.8, 1.25)})
    lora = found["lora"]
    assert lora.missing == [0]
    assert lora.pairs == 2
    assert lora.difference == pytest.approx((-0.4 + 0.1) / 2)
    assert lora.difference_std == pytest.approx(statistics.stdev([-0.4, 0.1]))
    assert lora.loss_difference == pytest.approx((2.0 - 0.25) / 2)
    assert lora.loss_difference_std == pytest.approx(statistics.stdev([2.0, -0.25]))
    header, (_, line) = table(found.values())
    shown = dict(zip(header, line, strict=True))
    assert shown["minus zero-init"] == "-0.150 ± 0.354 (2)"
    assert (shown["loss"], shown["base loss"], shown["loss minus zero-init"]) == (
        "2.125",
        "4.000",
        "+0.875 ± 1.591 (2)",
    )
    assert shown["rate"] == "0.25"
    turned = {row.method: row for row in summarise(benchmark(tmp_path), tmp_path, reference="lora")}
    assert turned["lora"].difference is None
    assert turned["zero-init"].difference == pytest.approx((0.4 - 0.1) / 2)
    assert turned["zero-init"].loss_difference == pytest.approx((-2.0 + 0.25) / 2)


SELECT = """
seeds = [5, 6]
methods = ["zero-init"]
[[experiment]]
name = "chosen"
backbone = "llama"
metric = "METRIC"
[experiment.select]
vary = { "train.learning_rate" = [1, 2, 3, 4] }
"""


@pytest.mark.parametrize(
    ("metric", "found", "best"),
    [
        ("loss", [3.0, 1.0, 2.0, None], "2"),
        ("loss", [math.inf, math.nan, 2.0, 9.0], "3"),
        ("perplexity", [30.0, 10.0, 9.0, 20.0], "3"),
        ("exact_match", [0.3, 0.1, None, 0.2], "1"),
        ("exact_match", [math.nan, 0.1, None, 0.2], "4"),
    ],
)
def test_the_best_is_chosen_when_all_have_ended(
    metric: str, found: list[float | None], best: str, tmp_path: Path
) -> None:
    plan = benchmark(tmp_path, SELECT.replace("METRIC", metric))
    trials = list(plan.experiments[0].selection_cells())
    for trial, value in zip(trials, found, strict=True):
        assert final_cells(plan, tmp_path) == []
        finish(tmp_path, trial, status="refused" if value is None else "done", **{metric: value})
    assert [cell.options[-1] for cell in final_cells(plan, tmp_path)] == [f"train.learning_rate={best}"] * 2


def test_a_refusal_of_an_earlier_version_is_tried_again(tmp_path: Path) -> None:
    cell, other, *_ = final_cells(benchmark(tmp_path), tmp_path)
    finish(tmp_path, cell, status="refused")
    finish(tmp_path, other, status="refused")
    file = tmp_path / "cells" / f"{cell.id}.json"
    document = json.loads(file.read_text())
    del document["by_settings"]
    file.write_text(json.dumps(document))
    assert [found["id"] for found in read_cells(tmp_path)] == [other.id]


def test_methods_train_at_their_own_rates_unless_told(tmp_path: Path) -> None:
    def rates(plan: Benchmark) -> dict[str, float]:
        return {cell.method: cell.resolve().train.learning_rate for cell in final_cells(plan, tmp_path / "none")}

    methods = [name for name in METHODS if name != "logistic-regression"]
    own = {name: next(iter(METHODS.get(name).default_rates.values())).value for name in methods}
    # The demo's preset is for these: zero-init attention, its ablations, and the methods with images.
    of_prefixes = {name: 3e-2 for name in methods if METHODS.get(name).default_rates is rates_of.ZERO_INIT}
    assert {"zero-init", "random-gate", "prefix-tuning", "v2"} < set(of_prefixes)
    plan = benchmark(tmp_path, methods=methods, seeds=[0])
    plan.check()
    assert rates(plan) == {**own, **of_prefixes}
    assert "train.learning_rate=0.0003" in {c.method: c for c in final_cells(plan, tmp_path)}["lora"].command()
    said = benchmark(tmp_path, seeds=[0], options=["lora:train.learning_rate=0.5"])
    assert rates(said) == {"zero-init": 3e-2, "lora": 0.5}
    said = benchmark(tmp_path, seeds=[0], options=["all:learning_rate=0.5", "lora:train.learning_rate=0.25"])
    assert rates(said) == {"zero-init": 0.5, "lora": 0.25}
    said.check()
    with pytest.raises(
        ConfigError, match=r"learning_rate=1 is a rate for one method.*-o zero-init:learning_rate=1.*all"
    ):
        benchmark(tmp_path, options=["learning_rate=1"]).check()
    benchmark(tmp_path, methods=["zero-init", "random-gate"], options=["learning_rate=1"]).check()
    benchmark(tmp_path, methods=["lora"], options=["learning_rate=1"]).check()


def test_a_terminal_of_100_columns_breaks_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = range(3)
    values = {(m, s): (0.5 + s / 7, 100 + s / 3) for m in ("zero-init", "random-gate", "prefix-tuning") for s in seeds}
    plan = benchmark(tmp_path, methods=["zero-init", "random-gate", "prefix-tuning"])
    header, lines = table(rows(plan, tmp_path, values).values())
    for width in (60, 80, 100, 160):
        text = io.StringIO()
        monkeypatch.setattr(console, "_output", lambda: Console(file=text, width=width, markup=False))  # noqa: B023
        shared, names, shown = fit(header, lines, width)
        console.print_table("\n".join(["one", *shared]), names, shown)
        printed = text.getvalue()
        cells = [cell for line in shown for cell in line]
        assert all(cell in printed for cell in cells)
        assert all(word in printed for name in names for word in name.split("\n"))
        assert "random-gate" in printed
        assert ("too narrow for: seconds" in printed) == (width < 160)
    assert "exact_match" in shared[0]


def test_an_interval_stands_beside_a_mean_alone() -> None:
    """Where the metric is the loss, the column of the loss says nothing once more."""
    assert _difference(None, None, (-0.5, 0.25), 5) == show(None)
    assert _difference(0.125, 0.5, (-0.5, 0.25), 5) == "+0.125 [-0.500, +0.250] (5)"
