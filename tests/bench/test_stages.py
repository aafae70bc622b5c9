"""Experiments that go on from others, take their rates, and show further figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.test_bench import FAKE, benchmark, started
from zinit.bench.runner import Event, Runner, final_cells, read_cells
from zinit.bench.summary import table
from zinit.bench.write import write_summary
from zinit.errors import ConfigError

pytestmark = pytest.mark.integration

STAGES = """
description = "two stages"
seeds = [0, 1]
methods = ["zero-init", "random-gate", "bitfit"]
[[experiment]]
name = "first"
backbone = "llama"
metric = "accuracy"
select = { vary = { "train.learning_rate" = [1.0, 3.0] } }
[[experiment]]
name = "second"
backbone = "llama"
metric = "accuracy"
after = "first"
select = { like = "first" }
columns = ["loss", "base.accuracy", "nothing"]
"""


def test_runs_start_from_the_finished_ones_of_the_same_method_and_seed(
    tmp_path: Path,
    journal: Path,
) -> None:
    events: list[Event] = []
    plan = benchmark(tmp_path, STAGES)
    plan.check()
    assert [cell for cell in final_cells(plan, tmp_path / "out") if cell.after] == [], "nothing is chosen yet"
    for _ in range(2):
        Runner(plan, tmp_path / "out", jobs=3, launcher=FAKE, on_event=events.append).run()
    assert not [event for event in events if event.get("status") == "failed"], "none began before its start was there"
    found = {cell["id"]: cell["cell"] for cell in read_cells(tmp_path / "out")}
    second = {name: cell for name, cell in found.items() if cell["experiment"] == "second"}
    assert {(cell["method"], cell["seed"]) for cell in second.values()} == {
        (method, seed) for method in ("zero-init", "random-gate") for seed in (0, 1)
    }
    assert len(started(journal)) == 6 + 6 + 4, "each once"
    for name, cell in second.items():
        said = json.loads((tmp_path / "out" / "runs" / name / "run.json").read_text())["said"]
        (start,) = [Path(part.partition("=")[2]) for part in said if part.startswith("warm_start=")]
        assert start.parent == tmp_path / "out" / "runs"
        assert (found[start.name]["method"], found[start.name]["seed"]) == (cell["method"], cell["seed"])
        assert found[start.name]["experiment"] == "first"
        assert "train.learning_rate=3.0" in cell["options"], "as the first stage chose"
    waiting = [event["text"] for event in events if event["event"] == "notice"]
    assert sum("second.bitfit" in text and "waits for first.bitfit" in text for text in waiting) == 4
    rows = [row for row in write_summary(plan, tmp_path / "out") if row.experiment == "second"]
    assert {row.method: row.missing for row in rows} == {"zero-init": [], "random-gate": [], "bitfit": [0, 1]}
    header, lines = table(rows)
    assert header[3:8] == ["mean", "std", "loss", "base.accuracy", "nothing"]
    assert lines[0][5:8] == ["0.390 ± 0.014", "0.100 ± 0.000", "-"]
    assert "| 0.390 ± 0.014 | 0.100 ± 0.000 | - |" in (tmp_path / "out" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('after = "first"', 'after = "frist"', r"experiment 'second': after names an experiment above it: first; got"),
        ('like = "first"', 'like = "second"', r"experiment 'second': select\.like names an experiment above it: first"),
        ('like = "first"', 'options = ["train.epochs=1"]', r"choose no settings of their own.*select = \{ like = NAME"),
        ('like = "first"', 'like = "first", vary = {seed=[1]}', r"takes what 'first' chose, or tries .* not both"),
        ('after = "first"', 'after = "first"\nseeds = [0, 7]', r"after='first' must have .*; it lacks 7"),
        ('after = "first"', 'after = "first"\nvary = {"prefix.length" = [1]}', r"must have the same vary.*prefix"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be(before: str, after: str, message: str, tmp_path: Path) -> None:
    assert before in STAGES
    with pytest.raises(ConfigError, match=message):
        benchmark(tmp_path, STAGES.replace(before, after)).check()
