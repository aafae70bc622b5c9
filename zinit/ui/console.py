"""What a person sees while a run goes on: stages, a progress bar with rate and time left, results."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zinit.config import to_json
from zinit.errors import printable
from zinit.train.events import Encoded, Ended, Evaluated, Event, Notice, PlanMade, Resumed, Stage, Step, Stopped

# Counts worth a line.
ODD = (
    "skipped",
    "truncated",
    "empty",
    "unused_field",
    "ignored",
    "also_held_out",
    "comments",
    "hint_cut",
    "left_out",
    "expert",
)
QUIET_SECONDS = 20.0
PATIENCE = 5.0  # seconds


def is_main_process() -> bool:
    """Whether this process is the one that talks (launchers number theirs)."""
    return int(os.environ.get("RANK", "0")) == 0


def print_error(error: object) -> None:
    """One message however many processes fail: the main one's, or that of the one that fails alone."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if is_main_process():
        say(f"zinit: {error}", error=True)
        return
    # If the main process fails too, it says why, and the launcher ends this one while it waits.
    time.sleep(PATIENCE)
    say(f"zinit (process {rank} of {world}): {error}", error=True)


class SafeConsole(Console):
    """A console of rich's: what is printed on it is text of any origin, never markup and never a control character.

    Its own colours and bars are unaffected. Everything that zinit shows goes through one, or through `say`.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, with markup off; texts are cleaned, and so are the cells of `table`."""
        cleaned = (printable(item) if isinstance(item, str) else item for item in objects)
        super().print(*cleaned, **{"markup": False, **options})


def say(text: str, *, error: bool = False) -> None:
    """Prints a text of any origin, cleaned.

    Args:
        text: what to print.
        error: on the standard error stream instead of the standard output.
    """
    print(printable(text), file=sys.stderr if error else sys.stdout)


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> Table:
    """A plain table of texts of any origin, cleaned.

    Args:
        title: above it.
        header: names of the columns.
        rows: as many cells each.
        numbers: whether all columns but the first are numbers, which stand at the right.
    """
    made = Table(title=Text(printable(title)), title_justify="left")
    for place, name in enumerate(header):
        made.add_column(Text(printable(name)), overflow="fold", justify="right" if numbers and place else "left")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


class RunView:
    """Shows the events of a run on the standard error stream; nothing with ``--json`` or on other processes.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = SafeConsole(stderr=True, highlight=False, quiet=quiet or not is_main_process())
        self.progress: Progress | None = None
        self.last_line = 0.0

    def __call__(self, event: Event) -> None:
        """Takes one event of the loop or of the run."""
        match event:
            case Stage():
                self._stop()
                self.console.print(f"{event.text} ...", style="dim", soft_wrap=True)
            case Notice():
                self.console.print(f"note: {event.text}", style="bold", soft_wrap=True)
            case Encoded():
                self._encoded(event)
            case PlanMade():
                self._start(event)
            case Resumed():
                self.console.print(f"going on after step {event.step}")
            case Step():
                self._step(event)
            case Evaluated():
                self.console.print(f"step {event.step}: held-out loss {event.metrics['loss']:.4f}")
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

    def _encoded(self, event: Encoded) -> None:
        if self.console.is_terminal and not self.console.quiet:
            if self.progress is None:
                columns = (TextColumn("encoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                self.progress = Progress(*columns, console=self.console)
                self.bar = self.progress.add_task("", total=event.of)
                self.progress.start()
            self.progress.update(self.bar, completed=event.done)
        elif time.monotonic() - self.last_line > QUIET_SECONDS:
            self.last_line = time.monotonic()
            self.console.print(f"encoding images: {event.done} of {event.of}")
        if event.done == event.of:
            self._stop()

    def _step(self, step: Step) -> None:
        status = f"loss {step.loss:.4f}  {step.examples_per_second:.0f} examples/s"
        if self.progress is not None:
            self.progress.update(self.bar, completed=step.step, status=status)
        elif time.monotonic() - self.last_line > QUIET_SECONDS:  # a log file: a line now and then
            self.last_line = time.monotonic()
            self.console.print(f"step {step.step} of {self.total}: {status}")

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
    rows = [
        [name, *(_number(results["metrics"][column].get(name)) for column in columns)]
        for name in results["metrics"][columns[0]]
    ]
    console.print(table(title, [results.get("suite", "held-out"), *columns], rows, numbers=True))
    counts = results.get("counts", {})
    if "suite" in results:
        console.print(f"{', '.join(f'{name} {n}' for name, n in counts.items())}; seed {results['seed']}")
        return
    answered = f", {counts['answered']} of them answered in words" if "answered" in counts else ""
    console.print(f"{counts.get('held_out', '?')} held-out examples{answered}; seed {results['seed']}")
    if "note" in results:
        console.print(results["note"])
    if "baseline" in results:
        console.print(f"base: {results['baseline']}")
    odd = {name: n for name, n in counts.items() if n and any(word in name for word in ODD)}
    if odd:
        console.print("data: " + ", ".join(f"{n} {name}" for name, n in odd.items()))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A plain table on the standard output."""
    if not is_main_process():
        return
    _output().print(table(title, header, rows))


def output_width() -> int:
    """Characters of a line of the standard output."""
    return _output().width


def _output() -> SafeConsole:
    """The standard output; wide where nobody looks at it, so that nothing is cut for scripts."""
    return SafeConsole(highlight=False, width=None if sys.stdout.isatty() else 160)
