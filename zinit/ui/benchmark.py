"""A benchmark on the terminal: progress while it runs, tables when it is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zinit.bench.place import Here, Place
from zinit.bench.plan import Benchmark
from zinit.bench.runner import Event, Runner
from zinit.bench.summary import FORGETS, PAPER, TRIALS, Row, table
from zinit.bench.write import write_summary
from zinit.errors import ConfigError
from zinit.ui.console import SafeConsole, output_width, print_table

SHARED = ("metric", "setting", "seeds", "samples", "base", "base loss")  # said once where all lines have the same
LEFT_OUT = (  # on a narrow terminal, in this order
    *("seconds", "trainable", "samples", "base loss", "base", "std", "metric", "seeds", "loss minus zero-init", "loss"),
    *(TRIALS, FORGETS, PAPER, "rate", "minus zero-init"),
)
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


@dataclass(kw_only=True)
class Finished:
    """How a benchmark ended.

    Attributes:
        rows: of the summary.
        interrupted: by a signal.
        failed: cells that broke; they are tried again next time.
        left_out: how many runs the budget left out.
    """

    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False
    failed: list[str] = field(default_factory=list)
    left_out: int = 0

    @property
    def measured(self) -> bool:
        """Whether there is any figure."""
        return any(row.values for row in self.rows)

    @property
    def status(self) -> int:
        """The exit status: 130 stopped, 1 failed or nothing measured, 2 if all that was asked for was refused."""
        if self.interrupted:
            return 130
        if self.failed or (not self.measured and any(row.missing for row in self.rows)):
            return 1
        return 0 if self.measured else 2

    @property
    def complete(self) -> bool:
        """Whether every cell was run, or refused for a reason that stays."""
        return not self.interrupted and not any(row.missing for row in self.rows)


def run_benchmark(
    benchmark: Benchmark,
    output: Path,
    *,
    on: str = "local",
    jobs: int | None = None,
    budget: float | None = None,
    quiet: bool = False,
) -> Finished:
    """Runs what is not finished yet, and writes the summary of what is.

    Args:
        benchmark: what to run.
        output: its folder.
        on: "local", or "ray", see `zinit.bench.ray`.
        jobs: runs side by side.
        budget: seconds, see `Runner`.
        quiet: print nothing to the standard output.

    Raises:
        ConfigError: if there is no such place, or it cannot be reached.
    """
    place = _place(on, output, jobs)
    console = SafeConsole(stderr=True)
    finished = Finished()
    with Progress(*COLUMNS, console=console, disable=quiet) as progress:
        view = View(progress, finished)
        runner = Runner(benchmark, output, place=place, budget=budget, on_event=view)
        with stopping_on_signals(runner, finished):
            runner.run()
    finished.rows = write_summary(benchmark, output)
    if not quiet:
        for experiment in benchmark.experiments:
            header, lines = table(row for row in finished.rows if row.experiment == experiment.name)
            shared, header, lines = fit(header, lines, output_width())
            print_table("\n".join([experiment.name, *shared]), header, lines)
    console.print(f"Tables and plots: {output}/report.html, {output}/summary.md, {output}/summary.csv")
    for cell in finished.failed:
        console.print(f"failed: {cell}; the same command tries it again")
    if finished.left_out:
        console.print(f"{finished.left_out} runs are left: the budget is spent. The same command goes on.")
    if not finished.measured:
        console.print("nothing was measured")
    if finished.interrupted:
        console.print("stopped; everything is saved. The same command goes on.")
    return finished


def _place(on: str, output: Path, jobs: int | None) -> Place:
    if on == "ray":
        from zinit.bench.ray import Cluster

        return Cluster(output, jobs)
    if on != "local":
        raise ConfigError(f"a benchmark runs --on local or --on ray; got {on!r}.")
    return Here(jobs)


def fit(header: list[str], lines: list[list[str]], width: int) -> tuple[list[str], list[str], list[list[str]]]:
    """A table that fits a terminal without breaking words; ``summary.md`` has it whole.

    Args:
        header: names of the columns.
        lines: cells.
        width: of the terminal, in characters.

    Returns:
        Sentences for the title (what all lines share, and what is left out), names (in lines of their own words) and
        cells of the columns that are shown.
    """
    columns = {name: [line[place] for line in lines] for place, name in enumerate(header)}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"} or name == "mean"}
    shared = {name: columns.pop(name)[0] for name in SHARED if len(set(columns.get(name, []))) == 1}
    left_out: list[str] = []
    for name in LEFT_OUT:
        if _width(columns) > width and name in columns:
            left_out.append(name)
            del columns[name]
    said = [", ".join(f"{name} {value}" for name, value in shared.items())] if shared else []
    said += [f"too narrow for: {', '.join(left_out)} (see summary.md)"] if left_out else []
    shown = [list(cells) for cells in zip(*columns.values(), strict=True)]
    return said, [name.replace(" ", "\n") for name in columns], shown


def _width(columns: dict[str, list[str]]) -> int:
    """Characters of a table's line: cells whole, names broken at spaces only, and the rules between."""
    return 1 + sum(3 + max(map(len, [*name.split(" "), *cells])) for name, cells in columns.items())


@contextmanager
def stopping_on_signals(runner: Runner, finished: Finished) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask every running cell to save and stop."""

    def ask_to_stop(number: int, frame: Any) -> None:
        finished.interrupted = True
        threading.Thread(target=runner.stop, daemon=True).start()  # a handler must not wait for a lock

    previous = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class View:
    """Shows the events of a benchmark; they come from several threads.

    Args:
        progress: where they are shown.
        finished: notes the cells that broke.
    """

    def __init__(self, progress: Progress, finished: Finished) -> None:
        self.progress, self.finished = progress, finished
        self.bar = progress.add_task("runs", total=None)
        self.guard = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self.guard:
            if event["event"] == "plan":
                self._plan(event)
            elif event["event"] == "cell":
                self._cell(event)
            elif event["event"] == "budget":
                self.finished.left_out += 1
            elif event["event"] == "notice":
                self.progress.print(event["text"])

    def _plan(self, event: Event) -> None:
        done = event["cells"] - event["todo"]
        self.progress.update(self.bar, total=event["cells"], completed=done)
        self.progress.print(f"{event['cells']} runs, {done} finished already, {event['jobs']} side by side")

    def _cell(self, event: Event) -> None:
        self.progress.advance(self.bar)
        self.progress.print(f"{event['status']:8} {event['id']} ({event['wall_seconds']:.0f} s) {_outcome(event)}")
        if event["status"] == "failed":
            self.finished.failed.append(event["id"])


def _outcome(event: Event) -> str:
    """A cell's first figures, or why there are none."""
    if event["status"] != "done":
        return event["error"]
    adapted = event["metrics"]["adapted"]
    return ", ".join(f"{name} {value:.3f}" for name, value in list(adapted.items())[:4] if value is not None)
