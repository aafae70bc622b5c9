"""Runs the cells of a benchmark: each once, several side by side, at a `zinit.bench.place.Place`.

A cell is finished when ``cells/<id>.json`` is there, one line, written last and atomically: its run is done, or its
settings were refused. A cell that was cut off goes on from its last checkpoint; one that failed is tried again.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Len
from pydantic import AllowInfNan

from zinit.bench.cells import Cell, Experiment
from zinit.bench.place import Here, Place
from zinit.bench.plan import Benchmark
from zinit.compat import modern_results
from zinit.config import ROLES
from zinit.errors import ConfigError, DataError
from zinit.files import OWNER, claim, is_ours, parsing, read_json
from zinit.runs.directory import write_json
from zinit.runs.record import EXAMPLES, Record, Results
from zinit.tasks import TASKS
from zinit.train.events import Evaluated, Step, read_log
from zinit.validation import check_fields

Event = dict[str, Any]
Figure = Annotated[float, AllowInfNan()] | None  # zinit 0.1 wrote NaN where today null is written
# What is read of the file of a finished cell, of the plan in it, and of what was measured.
OF_CELL = {"id": str, "status": str, "cell": dict[str, Any], "by_settings": bool}
OF_PLAN = {"experiment": str, "method": str, "variant": str | None}
MEASURED = {
    "metrics": dict[str, Any],
    "counts": dict[str, Any] | None,
    "num_trainable": int | None,
    "seconds": float,
    "rates": dict[str, float],
    "examples": dict[str, list[Annotated[list[Figure | bool], Len(2, 2)]]],
    "curves": dict[str, list[Annotated[list[Figure], Len(2, 2)]]],
}
CURVE = ("loss", "accuracy", "exact_match", "f1")  # of the evaluations during training


class Runner:
    """Finishes the cells of a benchmark.

    Args:
        benchmark: what to run.
        output: its folder; may hold finished cells.
        jobs: runs side by side on this machine, see `Here`.
        budget: seconds after which no further cell is started; None is no limit.
        on_event: gets {"event": "plan" | "start" | "cell" | "budget", ...}.
        launcher: the command line of zinit, the interpreter first.
        places: see `Cell.at`.
        place: that makes the runs; None is this machine.

    Raises:
        ConfigError: if the folder holds something else, or another benchmark runs in it.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        output: Path,
        *,
        jobs: int | None = None,
        budget: float | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        launcher: Sequence[str] = (sys.executable, "-m", "zinit"),
        places: Mapping[str, str] | None = None,
        place: Place | None = None,
    ) -> None:
        self.launcher, self.places = list(launcher), {**(places or {}), "runs": str((output / "runs").absolute())}
        self.benchmark, self.output, self.on_event = benchmark, output, on_event
        self.reported = {experiment.name for experiment in benchmark.experiments}
        self.place: Place = place or Here(jobs)
        self.jobs = self.place.jobs
        self.deadline = None if budget is None else time.monotonic() + budget
        self.stopping = threading.Event()
        self._guard = threading.Lock()
        foreign = output.is_dir() and not all(is_ours(path.name) for path in output.iterdir())
        if (output.exists() and not output.is_dir()) or (foreign and not (output / "bench.json").exists()):
            raise ConfigError(f"the output {output} holds something that is no benchmark. Name another folder.")

    def run(self) -> None:
        """Runs what is not finished. Returns when all is done, the budget is spent, or a signal asked to stop."""
        with self.claimed():
            selection = [cell for experiment in self.benchmark.experiments for cell in experiment.selection_cells()]
            self.finish(selection)
            if not self.stopping.is_set():
                self.finish(final_cells(self.benchmark, self.output))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the folder alone; its record and the place of its cells are there."""
        with claim(self.output, tell=lambda text: self.on_event({"event": "notice", "text": text})):
            write_json(self.output / "bench.json", {"benchmark": self.benchmark.to_dict(), "jobs": self.jobs})
            (self.output / "cells").mkdir(exist_ok=True)
            yield

    def stop(self) -> None:
        """Asks every running cell to save and stop."""
        self.stopping.set()
        self.place.stop()

    def finish(self, cells: Sequence[Cell]) -> None:
        """Runs those that are not finished, in a folder that is `claimed`.

        Args:
            cells: in the order to run them.
        """
        finished = {cell["id"]: cell["status"] for cell in read_cells(self.output)}
        todo = deque(cell for cell in cells if cell.id not in finished)
        done = {None, *(name for name, status in finished.items() if status == "done")}
        running: set[str] = set()
        self.on_event({"event": "plan", "cells": len(cells), "todo": len(todo), "jobs": self.jobs})
        threads: list[threading.Thread] = []
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while not self.stopping.is_set():
                    with self._guard:
                        cell = next((cell for cell in todo if cell.after in done), None)
                        if cell is None and not any(waiting.after in running for waiting in todo):
                            return
                        if cell is not None:
                            todo.remove(cell)
                            running.add(cell.id)
                    if cell is None:
                        time.sleep(0.1)
                        continue
                    if self.deadline is not None and time.monotonic() >= self.deadline:
                        self.on_event({"event": "budget", "cell": cell.id})
                    elif self._run_cell(cell):
                        done.add(cell.id)
                    running.remove(cell.id)
            except BaseException as error:
                failures.append(error)
                self.stopping.set()

        for _ in range(min(self.jobs, max(1, len(todo)))):
            threads.append(threading.Thread(target=work, daemon=True))
            threads[-1].start()
        for thread in threads:
            while thread.is_alive():
                thread.join(timeout=0.2)  # in slices, so that signals are seen
        if failures:
            raise failures[0]
        for cell in todo if not self.stopping.is_set() else ():
            self.on_event({"event": "notice", "text": f"{cell.id} waits for {cell.after}, from which it starts"})

    def _path(self, cell: Cell) -> Path:
        return self.output / "cells" / f"{cell.id}.json"

    def _run_cell(self, cell: Cell) -> bool:
        """Runs one, and notes what came of it; whether it is done."""
        run = self.output / "runs" / cell.id
        self.on_event({"event": "start", "cell": cell.id, "command": cell.command()})
        started = time.monotonic()
        ended = self.place.run(
            lambda: self._command(cell, run),
            {"ZINIT_BENCH_CELL": cell.id},
            lambda text: self.on_event({"event": "notice", "text": f"{cell.id}: {text}"}),
        )
        if ended is None or ended.status == 130 or self.stopping.is_set():
            return False  # stopped; it has saved, and goes on another time
        document: dict[str, Any] = {"cell": cell.to_dict(), "id": cell.id, "command": cell.command()}
        if ended.status == 0:
            document |= {"status": "done", **_result(run, json.loads(ended.out))}
            document["run"] |= {name: self._portable(document["run"][name]) for name in ("model", "data")}
            if cell.experiment not in self.reported:
                document |= {"examples": {}, "curves": {}}  # of a run to choose by the figures count
            shutil.rmtree(run / "resume", ignore_errors=True)
        else:
            document |= _failure(ended.status, ended.out, ended.err, run)
            document["error"] = self._portable(document["error"])
        document["wall_seconds"] = round(time.monotonic() - started, 2)
        if document["status"] != "failed":
            write_json(self._path(cell), document, indent=None)
        self.on_event({"event": "cell", **document})
        return document["status"] == "done"

    def _command(self, cell: Cell, run: Path) -> list[str]:
        """What begins a run or goes on with it; what was cut off before it began is gone then."""
        run.parent.mkdir(exist_ok=True)
        if run.exists() and not (run / "run.json").exists():
            shutil.rmtree(run)
        if self.place.many_machines:  # who holds the benchmark's folder holds its runs: the owner's machine was lost
            (run / OWNER).unlink(missing_ok=True)
        arguments = ["--resume"] if run.exists() else cell.at(self.places).arguments()
        return [*self.launcher, "train", *arguments, "--output", str(run), "--json"]

    def _portable(self, text: str | None) -> str | None:
        """A path as the cell has it; nothing of this machine."""
        for name, place in self.places.items():
            text = text and text.replace(place, f"{{{name}}}")
        return text


def _failure(status: int, out: bytes, err: bytes, run: Path) -> dict[str, Any]:
    """Why there is no result: only a refusal because of the settings is final ("refused"), whatever else is "failed".

    Args:
        status: of the process.
        out: what it printed; a refusal is a JSON document there.
        err: its error stream.
        run: its folder: what is wrong with that is nothing of the settings.
    """
    lines = err.decode(errors="replace").strip().splitlines() or ["it said nothing"]
    own = [line.removeprefix("zinit: ") for line in lines if line.startswith("zinit: ")]
    error = (own or lines)[-1]
    try:
        by_settings = json.loads(out)["by_settings"] is True
    except (ValueError, KeyError, TypeError):
        by_settings = False
    final = status == 2 and by_settings and str(run) not in error
    return {"status": "refused", "by_settings": True, "error": error} if final else {"status": "failed", "error": error}


def _result(run: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What a cell keeps of its run."""
    log, found = read_log(run / "log.jsonl"), Results.from_dict(results)
    curves: dict[str, list[list[float]]] = {"train loss": [[step.step, step.loss] for step in log.of(Step)]}
    for name in CURVE:
        measured = [(event.step, event.metrics.get(name, math.nan)) for event in log.of(Evaluated)]
        points = [[step, value] for step, value in measured if not math.isnan(value)]
        curves |= {f"held-out {name}": points} if points else {}
    record, examples = Record.read(run), run / EXAMPLES
    return {
        **{name: getattr(found, name) for name in ("metrics", "counts", "num_trainable", "steps", "seconds")},
        "rates": {role: own["rate"] for role, own in record.rates.items()} or _rates(record.config),
        "examples": read_json(examples, DataError, "Run the cell again.") if examples.is_file() else {},
        "curves": {name: _thinned(points) for name, points in curves.items()},
        "run": {name: getattr(record, name) for name in ("model", "data", "demo", "device", "versions", "fingerprint")},
    }


def _rates(config: dict[str, Any]) -> dict[str, float]:
    """The rates of a run whose record does not say what trains: {"": of most, role: of what has one of its own}."""
    train: dict[str, Any] = config.get("train", {})
    if "learning_rate" not in train:
        return {}
    rate = float(train["learning_rate"])
    factors: dict[str, Any] = {role: train.get("rates", {}).get(role, 1) for role in ROLES}
    return {"": rate, **{role: rate * float(factor) for role, factor in factors.items() if factor != 1}}


def _thinned(points: list[list[float]], most: int = 300) -> list[list[float]]:
    """At most so many points, the last among them."""
    stride = -(-len(points) // most) if points else 1
    return points[::-1][::stride][::-1]


def read_cells(output: Path) -> list[dict[str, Any]]:
    """All finished cells of a folder: done, or refused by their settings.

    Raises:
        DataError: if one of them cannot be read.
    """
    found = [_read_cell(path) for path in sorted((output / "cells").glob("*.json"))]
    # zinit 0.1 noted every refusal as final, one for want of disk space too.
    return [cell for cell in found if cell["status"] == "done" or cell.get("by_settings")]


def _read_cell(path: Path) -> dict[str, Any]:
    """The file of a finished cell, with all that is read of it."""
    advice = "Remove it, and its cell is run again."
    document = read_json(path, DataError, advice)
    with parsing(f"{path} is damaged", DataError, advice, also=(ConfigError,)):
        check_fields(document, OF_CELL, optional=("by_settings",))
        check_fields(document["cell"], OF_PLAN, optional=("variant",))
        cell = modern_results(document)
        if cell["status"] == "done":
            check_fields(cell, MEASURED, optional=("rates", "examples"))
            check_fields(cell["metrics"], dict.fromkeys(("base", "adapted"), dict[str, Figure]))
        elif cell.get("by_settings"):
            check_fields(cell, {"error": str})
    return cell


def final_cells(benchmark: Benchmark, output: Path) -> list[Cell]:
    """The final runs in the order to run them, seeds outermost: a benchmark that is cut short is short of seeds.

    Cells whose selection is not complete are left out.
    """
    finished = {cell["id"]: cell for cell in read_cells(output)}
    chosen = {experiment.name: choose(experiment, finished) for experiment in benchmark.experiments}
    found = [(experiment.seeds.index(cell.seed), cell) for experiment, cell in benchmark.cells(chosen)]
    return [cell for _, cell in sorted(found, key=lambda pair: pair[0])]


def choose(experiment: Experiment, finished: dict[str, dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The settings with the best metric, by method and varied values; only where every trial is finished."""
    return {
        key: max(trials, key=lambda trial: score(experiment, finished[trial[0].id]))[1]
        for key, trials in experiment.trials().items()
        if all(cell.id in finished for cell, _ in trials)
    }


def score(experiment: Experiment, trial: dict[str, Any]) -> float:
    """What a finished trial is judged by, larger being better."""
    metric = experiment.select.metric or experiment.metric
    value = ((trial.get("metrics") or {}).get("adapted") or {}).get(metric)
    if value is None or not math.isfinite(value):
        return -math.inf  # refused or diverged: last
    return -value if TASKS.get(str(experiment.task)).direction(metric) == "lower" else value
