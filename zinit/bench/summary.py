"""Finished cells to tables: mean, standard deviation, seeds and sample counts, and differences paired by seed."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zinit.bench.cells import SELECTION, Cell, Experiment, choice_key
from zinit.bench.intervals import Examples, interval
from zinit.bench.plan import REFERENCE, Benchmark
from zinit.bench.runner import final_cells, read_cells
from zinit.tasks import TASKS

LOSS = "loss"
FORGETTING = ("known_loss", "drift")
SAMPLES = ("evaluated", "answered", "questions", "sentences", "test", "held_out")  # names of the count of examples


@dataclass(kw_only=True)
class Row:
    """One method in one setting of one experiment, over its seeds.

    Attributes:
        experiment: its name.
        metric: of which the figures are.
        method: registered name or variant.
        vary: the settings that the experiment goes through, at this row's values.
        values: the metric by seed.
        columns: the further figures that the experiment shows, by name and seed.
        metrics: mean over the seeds of everything that was measured.
        base: the metric of the base, mean over the seeds; None where it has none.
        difference: mean of (this - zero-init) over the seeds that both have; None for zero-init itself.
        difference_std: its standard deviation.
        interval: its 95 % interval, see `zinit.bench.intervals`; None with fewer than 5 seeds.
        pairs: how many seeds both have.
        rates: the learning rates it trained at, by the role of what trained; "" is of all but those that are named.
        losses: the held-out loss by seed, where the metric is another.
        base_loss: that of the base.
        loss_difference: mean of (this - zero-init) over the seeds that both have.
        loss_difference_std: its standard deviation.
        loss_interval: its 95 % interval.
        trials: runs that its settings were chosen by, those of an earlier grid too; 0 where none were.
        examples: {"f1": {seed: (x, y) of each held-out example}} of the metric and the loss.
        forgetting: mean over the seeds of how much the loss on texts that the base knew has risen ("known_loss"), or
            features have moved ("drift"); None where it was not measured.
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
    columns: dict[str, dict[int, float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    base: float | None = None
    difference: float | None = None
    difference_std: float | None = None
    interval: tuple[float, float] | None = None
    pairs: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    base_loss: float | None = None
    loss_difference: float | None = None
    loss_difference_std: float | None = None
    loss_interval: tuple[float, float] | None = None
    trials: int = 0
    examples: dict[str, dict[int, Examples]] = field(default_factory=dict)
    forgetting: float | None = None
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
        own = {name: value for name, value in vars(self).items() if name != "examples"}
        return {**own, "mean": self.mean, "std": self.std}


def summarise(benchmark: Benchmark, output: Path, reference: str = REFERENCE) -> list[Row]:
    """One row per experiment, setting and method, in the benchmark's order.

    Args:
        benchmark: what was to be run.
        output: its folder.
        reference: the method that the others are compared with.
    """
    finished = {cell["id"]: cell for cell in read_cells(output)}
    rows = _empty_rows(benchmark)
    for key, count in _tried(finished.values()).items():
        if key in rows and rows[key].trials:
            rows[key].trials = max(rows[key].trials, count)
    measured: dict[str, list[dict[str, Any]]] = {}
    for cell in final_cells(benchmark, output):
        key = _key(cell.experiment, cell.name, cell.vary)
        if cell.id in finished and _enter(rows[key], cell.seed, finished[cell.id]):
            measured.setdefault(key, []).append(finished[cell.id])
    for key, cells in measured.items():
        _average(rows[key], cells)
    tasks = {experiment.name: TASKS.get(str(experiment.task)) for experiment in benchmark.experiments}
    for row in rows.values():
        row.paper = tasks[row.experiment].paper_figure(row.method, row.dataset, row.metric)
        other = rows.get(_key(row.experiment, reference, row.vary))
        if other is not None and other is not row:
            _compare(row, other)
    return list(rows.values())


def _empty_rows(benchmark: Benchmark) -> dict[str, Row]:
    """The rows by key, all seeds missing; also those whose selection is still open."""
    rows: dict[str, Row] = {}
    for experiment in benchmark.experiments:
        trials = experiment.trials()
        for cell in experiment.cells():
            key = _key(experiment.name, cell.name, cell.vary)
            row = Row(
                experiment=experiment.name,
                metric=experiment.metric,
                method=cell.name,
                vary=cell.vary,
                dataset=dataset_of(cell),
                columns={name: {} for name in experiment.columns},
                trials=len(trials.get(choice_key(cell.name, cell.vary), ())),
            )
            rows.setdefault(key, row).missing.append(cell.seed)
    return rows


def _tried(cells: Iterable[dict[str, Any]]) -> Counter[str]:
    """How many finished runs each row's settings were chosen by."""
    plans = [cell["cell"] for cell in cells if cell["cell"]["experiment"].endswith(SELECTION)]
    return Counter(
        _key(plan["experiment"].removesuffix(SELECTION), _row_of(plan), plan.get("vary", {})) for plan in plans
    )


def _row_of(plan: dict[str, Any]) -> str:
    """The name of the row of a cell that was read."""
    return plan.get("variant") or plan["method"]


def _enter(row: Row, seed: int, cell: dict[str, Any]) -> bool:
    """Enters a finished cell's figure, or the reason why there is none; whether there is one."""
    if cell["status"] != "done":
        row.problem = cell["error"]
        row.missing.remove(seed)
        return False
    value = cell["metrics"]["adapted"].get(row.metric)
    if value is None:
        row.problem = f"the task reports no {row.metric}, but {', '.join(cell['metrics']['adapted'])}."
        return False
    row.values[seed] = value
    for name, values in row.columns.items():
        model, _, metric = name.rpartition(".")
        if (further := cell["metrics"].get(model or "adapted", {}).get(metric)) is not None:
            values[seed] = further
    loss = cell["metrics"]["adapted"].get(LOSS)
    if loss is not None and row.metric != LOSS:
        row.losses[seed] = loss
    for name in dict.fromkeys((row.metric, LOSS)):
        if name in cell.get("examples", {}):
            row.examples.setdefault(name, {})[seed] = cell["examples"][name]
    row.missing.remove(seed)
    return True


def _average(row: Row, cells: list[dict[str, Any]]) -> None:
    """Enters what a row's cells have in common, and the means of what they measured."""
    row.base, row.base_loss = _base(cells, row.metric), _base(cells, LOSS)
    row.num_trainable = cells[0]["num_trainable"]
    row.rates = cells[0].get("rates", {})
    row.samples = next((cells[0]["counts"][name] for name in SAMPLES if name in (cells[0]["counts"] or {})), None)
    row.seconds = statistics.fmean(cell["seconds"] for cell in cells)
    row.forgetting = next((value for name in FORGETTING if (value := _rise(cells, name)) is not None), None)
    measured = [cell["metrics"]["adapted"] for cell in cells]
    names = [name for name in measured[0] if all(m.get(name) is not None for m in measured)]
    row.metrics = {name: statistics.fmean(m[name] for m in measured) for name in names}


def _rise(cells: list[dict[str, Any]], metric: str) -> float | None:
    """A metric of the adapted model minus that of the base, mean over the seeds."""
    pairs = [(cell["metrics"]["adapted"].get(metric), cell["metrics"]["base"].get(metric)) for cell in cells]
    known = [after - before for after, before in pairs if after is not None and before is not None]
    return statistics.fmean(known) if len(known) == len(cells) else None


def _base(cells: list[dict[str, Any]], metric: str) -> float | None:
    """A metric of the base, mean over the seeds; None where one has none."""
    found = [cell["metrics"]["base"].get(metric) for cell in cells]
    return statistics.fmean(found) if all(value is not None for value in found) else None


def _compare(row: Row, reference: Row) -> None:
    """Enters the differences from the reference, paired by seed."""
    row.difference, row.difference_std, row.pairs = paired(row.values, reference.values)
    row.loss_difference, row.loss_difference_std, _ = paired(row.losses, reference.losses)
    row.interval, row.loss_interval = (
        interval(row.examples.get(name, {}), reference.examples.get(name, {})) for name in (row.metric, LOSS)
    )


def paired(values: dict[int, float], reference: dict[int, float]) -> tuple[float | None, float | None, int]:
    """Mean and standard deviation of the differences at the seeds that both have, and how many these are."""
    pairs = [value - reference[seed] for seed, value in values.items() if seed in reference]
    mean = statistics.fmean(pairs) if pairs else None
    return mean, statistics.stdev(pairs) if len(pairs) > 1 else None, len(pairs)


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
                key = (cell["cell"]["experiment"], name, _row_of(cell["cell"]))
                found.setdefault(key, []).append(points)
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
    "base",
    "minus zero-init",
    "loss",
    "base loss",
    "loss minus zero-init",
    "rate",
    "trainable",
    "seconds",
)
FORGETS, TRIALS = "forgetting", "trials"
PAPER = "the paper's, on other models and data"


def table(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines; further columns only where there is something to show."""
    rows = list(rows)
    header: list[str] = list(COLUMNS)
    lines = [_line(row) for row in rows]
    place = COLUMNS.index("seeds")
    for name in reversed(dict.fromkeys(name for row in rows for name in row.columns)):
        header.insert(place, name)
        for row, line in zip(rows, lines, strict=True):
            line.insert(place, _spread(list(row.columns.get(name, {}).values())))
    further = {
        FORGETS: [show(row.forgetting, 4) for row in rows if any(other.forgetting is not None for other in rows)],
        TRIALS: [str(row.trials) if row.values else "-" for row in rows if any(other.trials for other in rows)],
        PAPER: [show(row.paper) for row in rows if any(other.paper is not None for other in rows)],
    }
    for name, cells in further.items():
        if cells:
            header.append(name)
            lines = [[*line, cell] for line, cell in zip(lines, cells, strict=True)]
    return header, lines


def _line(row: Row) -> list[str]:
    seeds = ", ".join(map(str, row.values)) or "-"
    if row.missing:
        seeds += f" (not run: {', '.join(map(str, row.missing))})"
    return [
        row.method,
        ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row.vary.items()) or "-",
        row.metric,
        show(row.mean),
        show(row.std),
        seeds,
        "-" if row.samples is None else str(row.samples),
        show(row.base),
        _difference(row.difference, row.difference_std, row.interval, row.pairs),
        show(statistics.fmean(row.losses.values()) if row.losses else None),
        show(row.base_loss) if row.losses else "-",
        _difference(row.loss_difference, row.loss_difference_std, row.loss_interval, row.pairs),
        show_rates(row.rates),
        "-" if row.num_trainable is None else f"{row.num_trainable:,}",
        show(row.seconds, 1),
    ]


def _difference(mean: float | None, std: float | None, within: tuple[float, float] | None, pairs: int) -> str:
    """With its 95 % interval, or else its standard deviation, and how many seeds it is over; nothing without a mean."""
    if mean is None:
        return show(None)
    if within is not None:
        return f"{show(mean, sign='+')} [{show(within[0], sign='+')}, {show(within[1], sign='+')}] ({pairs})"
    return show(mean, sign="+") + (f" ± {show(std)} ({pairs})" if std is not None else "")


def _spread(values: list[float]) -> str:
    """A mean with its standard deviation over the seeds."""
    return show(statistics.fmean(values) if values else None) + (
        f" ± {show(statistics.stdev(values))}" if len(values) > 1 else ""
    )


def show_rates(rates: dict[str, float]) -> str:
    """Learning rates for a table: ``gates 0.3, prompts 0.03``; one that all roles share stands alone."""
    if len(set(rates.values())) == 1:
        return f"{next(iter(rates.values())):.3g}"
    return ", ".join(f"{role} {rate:.3g}".strip() for role, rate in rates.items()) or "-"


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
