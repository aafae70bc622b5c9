"""Finished cells to tables: mean, standard deviation, seeds and sample counts, and differences paired by seed."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zinit.bench.plan import REFERENCE, Benchmark, Cell, Experiment
from zinit.bench.runner import final_cells, read_cells
from zinit.files import write_atomically
from zinit.runs.directory import write_json
from zinit.tasks import TASKS

SAMPLES = ("evaluated", "answered", "questions", "sentences", "test", "held_out")  # names of the count of examples


@dataclass(kw_only=True)
class Row:
    """One method in one setting of one experiment, over its seeds.

    Attributes:
        experiment: its name.
        metric: of which the figures are.
        method: registered name.
        vary: the settings that the experiment goes through, at this row's values.
        values: the metric by seed.
        metrics: mean over the seeds of everything that was measured.
        frozen: the metric of the frozen model, mean over the seeds; None where it has none.
        difference: mean of (this - zero-init) over the seeds that both have; None for zero-init itself.
        difference_std: its standard deviation.
        pairs: how many seeds both have.
        num_trainable: parameters.
        samples: examples that the metric is over.
        seconds: of training, mean.
        dataset: name of its data.
        missing: seeds that are not finished.
        problem: why a seed was refused, if one was.
        paper: the paper's figure for this row, if it is known.
    """

    experiment: str
    metric: str
    method: str
    vary: dict[str, Any]
    dataset: str
    values: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    frozen: float | None = None
    difference: float | None = None
    difference_std: float | None = None
    pairs: int = 0
    num_trainable: int | None = None
    samples: int | None = None
    seconds: float | None = None
    missing: list[int] = field(default_factory=list)
    problem: str = ""
    paper: float | None = None

    @property
    def mean(self) -> float | None:
        """Over the seeds."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def std(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None with fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "mean": self.mean, "std": self.std}


def summarise(benchmark: Benchmark, output: Path) -> list[Row]:
    """One row per experiment, setting and method, in the benchmark's order.

    Args:
        benchmark: what was to be run.
        output: its folder.
    """
    finished = {cell["id"]: cell for cell in read_cells(output)}
    planned = final_cells(benchmark, output)
    rows: dict[str, Row] = {}
    for experiment in benchmark.experiments:
        for cell in experiment.cells():  # also those whose selection is still open
            key = _key(experiment.name, cell.method, cell.vary)
            row = Row(
                experiment=experiment.name,
                metric=experiment.metric,
                method=cell.method,
                vary=cell.vary,
                dataset=dataset_of(cell),
            )
            rows.setdefault(key, row)
            rows[key].missing.append(cell.seed)
    collected: dict[str, list[dict[str, Any]]] = {}
    for cell in planned:
        row, found = rows[_key(cell.experiment, cell.method, cell.vary)], finished.get(cell.id)
        if found is None:
            continue
        if found["status"] != "done":
            row.problem = found["error"]
            row.missing.remove(cell.seed)
            continue
        value = found["metrics"]["adapted"].get(row.metric)
        if value is None:
            row.problem = f"the task reports no {row.metric}, but {', '.join(found['metrics']['adapted'])}."
            continue
        row.values[cell.seed] = value
        row.missing.remove(cell.seed)
        collected.setdefault(_key(cell.experiment, cell.method, cell.vary), []).append(found)
    for key, cells in collected.items():
        row = rows[key]
        frozen = [c["metrics"]["frozen"].get(row.metric) for c in cells]
        row.frozen = statistics.fmean(frozen) if all(value is not None for value in frozen) else None
        row.num_trainable = cells[0]["num_trainable"]
        row.samples = next((cells[0]["counts"][name] for name in SAMPLES if name in (cells[0]["counts"] or {})), None)
        row.seconds = statistics.fmean(c["seconds"] for c in cells)
        measured = [c["metrics"]["adapted"] for c in cells]
        names = [name for name in measured[0] if all(m.get(name) is not None for m in measured)]
        row.metrics = {name: statistics.fmean(m[name] for m in measured) for name in names}
    tasks = {experiment.name: TASKS.get(str(experiment.task)) for experiment in benchmark.experiments}
    for row in rows.values():
        row.paper = tasks[row.experiment].paper_figure(row.method, row.dataset, row.metric)
        reference = rows.get(_key(row.experiment, REFERENCE, row.vary))
        if reference is not None and reference is not row:
            pairs = [value - reference.values[seed] for seed, value in row.values.items() if seed in reference.values]
            row.pairs = len(pairs)
            row.difference = statistics.fmean(pairs) if pairs else None
            row.difference_std = statistics.stdev(pairs) if len(pairs) > 1 else None
    return list(rows.values())


def _key(experiment: str, method: str, vary: dict[str, Any]) -> str:
    return json.dumps([experiment, method, vary], sort_keys=True)


def curves(benchmark: Benchmark, output: Path) -> dict[tuple[str, str, str], list[list[list[float]]]]:
    """{(experiment, curve, method): [points of a seed, ...]} of experiments that vary nothing."""
    still = {experiment.name for experiment in benchmark.experiments if not experiment.vary}
    planned = {cell.id for cell in final_cells(benchmark, output)}
    found: dict[tuple[str, str, str], list[list[list[float]]]] = {}
    for cell in read_cells(output):
        if cell["id"] in planned and cell["status"] == "done" and cell["cell"]["experiment"] in still:
            for name, points in cell["curves"].items():
                found.setdefault((cell["cell"]["experiment"], name, cell["cell"]["method"]), []).append(points)
    return found


def show(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A figure for a table; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else format(value, f"{sign}.{digits}f")


COLUMNS = (
    "method",
    "setting",
    "metric",
    "mean",
    "std",
    "seeds",
    "samples",
    "frozen",
    "minus zero-init",
    "trainable",
    "seconds",
)
PAPER = "the paper's (other models and data)"


def table(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines; a column for the paper only where it says something."""
    rows = list(rows)
    header = [
        *COLUMNS,
        *(["the paper's, on other models and data"] if any(row.paper is not None for row in rows) else []),
    ]
    lines = []
    for row in rows:
        difference = show(row.difference, sign="+")
        if row.difference_std is not None:
            difference += f" ± {show(row.difference_std)} ({row.pairs})"
        seeds = ", ".join(map(str, row.values)) or "-"
        if row.missing:
            seeds += f" (not run: {', '.join(map(str, row.missing))})"
        line = [
            row.method,
            ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row.vary.items()) or "-",
            row.metric,
            show(row.mean),
            show(row.std),
            seeds,
            "-" if row.samples is None else str(row.samples),
            show(row.frozen),
            difference,
            "-" if row.num_trainable is None else f"{row.num_trainable:,}",
            show(row.seconds, 1),
        ]
        if len(header) > len(COLUMNS):
            line.append(show(row.paper))
        lines.append(line)
    return header, lines


def markdown(benchmark: Benchmark, rows: list[Row], notes: dict[str, list[str]]) -> str:
    """The whole report as Markdown."""
    parts = ["# zinit bench", benchmark.description]
    if benchmark.demo:
        parts.append(
            "**Demo figures**: tiny models and data that are embedded in zinit. They say nothing about the paper's "
            "results."
        )
    for experiment in benchmark.experiments:
        own = [row for row in rows if row.experiment == experiment.name]
        header, lines = table(own)
        parts += [f"## {experiment.name}", experiment.note]
        parts.append("\n".join([_line(header), _line(["---"] * len(header)), *map(_line, lines)]))
        parts += [f"* {note}" for note in notes.get(experiment.name, [])]
        parts += [f"* {row.method}: not possible here: {row.problem}" for row in own if row.problem]
    return "\n\n".join(part for part in parts if part) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_summary(benchmark: Benchmark, output: Path) -> list[Row]:
    """Writes ``summary.json``, ``summary.csv``, ``summary.md`` and ``report.html``.

    Returns:
        The rows.
    """
    from zinit.bench.page import page

    rows = summarise(benchmark, output)
    notes = {experiment.name: aggregates(experiment, rows) for experiment in benchmark.experiments}
    write_json(output / "summary.json", {"rows": [row.to_dict() for row in rows], "aggregates": notes})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("experiment", "method", "vary", "metric", "mean", "std", "seeds", "samples", "frozen", "difference",
             "difference_std", "num_trainable", "seconds", "paper")  # fmt: skip
    writer.writerow(names)
    for row in rows:
        plain = {**row.to_dict(), "vary": json.dumps(row.vary), "seeds": " ".join(map(str, row.values))}
        writer.writerow([plain[name] for name in names])
    write_atomically(output / "summary.csv", text.getvalue().encode())
    write_atomically(output / "summary.md", markdown(benchmark, rows, notes).encode())
    write_atomically(output / "report.html", page(benchmark, rows, notes, curves(benchmark, output)).encode())
    return rows


def dataset_of(cell: Cell) -> str:
    """The data set of a cell: which one of several, else the name of its folder, file or Hub id; "" for the demo's."""
    return Path(str(cell.vary.get("task.dataset", cell.vary.get("data", cell.data or "")))).name


def aggregates(experiment: Experiment, rows: list[Row]) -> list[str]:
    """Means over data sets as the task's literature has them, per method; nothing where the task defines none."""
    task, found = TASKS.get(str(experiment.task)), []
    if set(experiment.vary) - {"task.dataset", "data"}:
        return []
    for method in experiment.methods:
        own = [row for row in rows if (row.experiment, row.method) == (experiment.name, method) and row.metrics]
        figures = task.over_datasets({row.dataset: row.metrics for row in own}) if own else {}
        shown = [
            f"{name} {show(figure) if isinstance(figure, float | None) else ', '.join(map(str, figure))}"
            for name, figure in figures.items()
        ]
        found += [f"{method}: {', '.join(shown)}"] if shown else []
    return found
