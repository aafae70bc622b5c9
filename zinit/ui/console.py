"""What a person sees while a run goes on: stages, a progress bar with rate and time left, results."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from zinit.config import to_json
from zinit.train.events import Ended, Evaluated, Event, Notice, PlanMade, Resumed, Stage, Step, Stopped

QUIET_SECONDS = 20.0
PATIENCE = 5.0  # seconds


def is_main_process() -> bool:
    """Whether this process is the one that talks (launchers number theirs)."""
    return int(os.environ.get("RANK", "0")) == 0


def print_error(error: object) -> None:
    """One message however many processes fail: the main one's, or that of the one that fails alone."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if is_main_process():
        print(f"zinit: {error}", file=sys.stderr)
        return
    # If the main process fails too, it says why, and the launcher ends this one while it waits.
    time.sleep(PATIENCE)
    print(f"zinit (process {rank} of {world}): {error}", file=sys.stderr)


class RunView:
    """Shows the events of a run on the standard error stream; nothing with ``--json`` or on other processes.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet or not is_main_process())
        self.progress: Progress | None = None
        self.last_line = 0.0

    def __call__(self, event: Event) -> None:
        """Takes one event of the loop or of the run."""
        match event:
            case Stage():
                self._stop()
                self.console.print(f"{event.text} ...", markup=False, style="dim")
            case Notice():
                self.console.print(f"note: {event.text}", markup=False, style="bold")
            case PlanMade():
                self._start(event)
            case Resumed():
                self.console.print(f"going on after step {event.step}", markup=False)
            case Step():
                self._step(event)
            case Evaluated():
                self.console.print(f"step {event.step}: held-out loss {event.metrics['loss']:.4f}", markup=False)
            case Stopped() | Ended():
                self._stop()

    def _start(self, plan: PlanMade) -> None:
        self.total = plan.steps
        if not self.console.is_terminal or self.console.quiet:
            return
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bar = self.progress.add_task("", total=plan.steps, completed=plan.done, status="")
        self.progress.start()

    def _step(self, step: Step) -> None:
        status = f"loss {step.loss:.4f}  {step.examples_per_second:.0f} examples/s"
        if self.progress is not None:
            self.progress.update(self.bar, completed=step.step, status=status)
        elif time.monotonic() - self.last_line > QUIET_SECONDS:  # a log file: a line now and then
            self.last_line = time.monotonic()
            self.console.print(f"step {step.step} of {self.total}: {status}", markup=False)

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._stop()


def print_json(document: Any) -> None:
    """One machine-readable document on the standard output."""
    if is_main_process():
        sys.stdout.write(to_json(document, indent=2) + "\n")


def print_metrics(results: dict[str, Any], *, title: str) -> None:
    """The base beside the adapted model, with the counts and the seed that belong to the figures."""
    if not is_main_process():
        return
    console = _output()
    columns = list(results["metrics"])
    table = Table(title=title, title_justify="left")
    table.add_column("held-out")
    for column in columns:
        table.add_column(column, justify="right")
    for name in results["metrics"][columns[0]]:
        table.add_row(name, *(_number(results["metrics"][column].get(name)) for column in columns))
    console.print(table)
    counts = results.get("counts", {})
    answered = f", {counts['answered']} of them answered in words" if "answered" in counts else ""
    console.print(f"{counts.get('held_out', '?')} held-out examples{answered}; seed {results['seed']}", markup=False)
    if "baseline" in results:
        console.print(f"base: {results['baseline']}", markup=False)
    odd = {name: n for name, n in counts.items() if n and ("skipped" in name or "truncated" in name or "empty" in name)}
    if odd:
        console.print("data: " + ", ".join(f"{n} {name}" for name, n in odd.items()), markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A plain table on the standard output."""
    if not is_main_process():
        return
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    _output().print(table)


def output_width() -> int:
    """Characters of a line of the standard output."""
    return _output().width


def _output() -> Console:
    """The standard output; wide where nobody looks at it, so that nothing is cut for scripts."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
