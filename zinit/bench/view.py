"""A benchmark on the terminal: progress while it runs, tables when it is done."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zinit.bench.plan import Benchmark
from zinit.bench.runner import Event, Runner
from zinit.bench.summary import Row, table, write_summary
from zinit.ui.console import print_table


@dataclass(kw_only=True)
class Finished:
    """How a benchmark ended.

    Attributes:
        rows: of the summary.
        interrupted: by a signal.
        failed: cells that broke; they are tried again next time.
    """

    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False
    failed: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every cell was run, or refused for a reason that stays."""
        return not self.interrupted and not any(row.missing for row in self.rows)


def run_benchmark(
    benchmark: Benchmark, output: Path, *, jobs: int | None = None, budget: float | None = None, quiet: bool = False
) -> Finished:
    """Runs what is not finished yet, and writes the summary of what is.

    Args:
        benchmark: what to run.
        output: its folder.
        jobs: see `Runner`; budget alike.
        budget: seconds.
        quiet: print nothing to the standard output.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    finished = Finished()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet) as progress:
        bar = progress.add_task("runs", total=None)
        guard = threading.Lock()

        def show(event: Event) -> None:
            with guard:
                if event["event"] == "plan":
                    done = event["cells"] - event["todo"]
                    progress.update(bar, total=event["cells"], completed=done)
                    progress.print(f"{event['cells']} runs, {done} finished already, {event['jobs']} side by side")
                elif event["event"] == "cell":
                    progress.advance(bar)
                    progress.print(f"{event['status']:8} {event['id']} ({event['wall_seconds']:.0f} s) {_say(event)}")
                    if event["status"] == "failed":
                        finished.failed.append(event["id"])
                elif event["event"] == "budget":
                    progress.advance(bar)
                    progress.print(f"left out {event['cell']}: the budget is spent")

        runner = Runner(benchmark, output, jobs=jobs, budget=budget, on_event=show)

        def ask_to_stop(number: int, frame: Any) -> None:
            finished.interrupted = True
            threading.Thread(target=runner.stop, daemon=True).start()  # a handler must not wait for a lock

        previous = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            runner.run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    finished.rows = write_summary(benchmark, output)
    if not quiet:
        for experiment in benchmark.experiments:
            header, lines = table(row for row in finished.rows if row.experiment == experiment.name)
            print_table(experiment.name, header, lines)
    where = f"Tables and plots: {output}/report.html, {output}/summary.md, {output}/summary.csv"
    console.print(where, markup=False)
    for cell in finished.failed:
        console.print(f"failed: {cell}; the same command tries it again", markup=False)
    if finished.interrupted:
        console.print("stopped; everything is saved. The same command goes on.", markup=False)
    return finished


def _say(event: Event) -> str:
    if event["status"] != "done":
        return event["error"]
    adapted = event["metrics"]["adapted"]
    return ", ".join(f"{name} {value:.3f}" for name, value in list(adapted.items())[:4] if value is not None)
