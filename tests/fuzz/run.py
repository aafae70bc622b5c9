"""Runs a target on one input after the other, and tells refusals from faults."""

from __future__ import annotations

import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import zinit
from tests.fuzz.targets import TARGETS, clear
from zinit.errors import ZinitError

PACKAGE = Path(zinit.__file__).parent
LIMIT = 10  # seconds for one input; more is a hang


class HangError(BaseException):
    """An input took too long. Not an Exception, so that nothing on the way catches it."""


@dataclass
class Report:
    """What came of a target.

    Args:
        target: its name.
        tried: inputs.
        refused: of these, how many raised a ZinitError.
        findings: by place in the code, the number of the first input that led there, and the error.
    """

    target: str
    tried: int = 0
    refused: int = 0
    findings: dict[str, tuple[int, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"{self.target:12} {self.tried:6} inputs, {self.refused:6} refused, {len(self.findings)} findings"
        return "\n".join([head, *(f"    --only {n}: {error}  at {at}" for at, (n, error) in self.findings.items())])


def fuzz(target: str, *, seed: int, seconds: float = float("inf"), inputs: int | None = None) -> Report:
    """Tries inputs until the time or their number is reached."""
    report, end = Report(target), time.monotonic() + seconds
    while time.monotonic() < end and (inputs is None or report.tried < inputs):
        try:
            report.refused += try_one(target, seed, report.tried) == "refused"
        except (Exception, HangError) as error:
            at = place(error)
            report.findings.setdefault(at, (report.tried, f"{type(error).__name__}: {str(error)[:100]}"))
        report.tried += 1
    return report


def try_one(target: str, seed: int, number: int, *, catch: bool = True) -> str:
    """Makes one input and hands it over: "worked" or "refused"; any error but a ZinitError is raised."""
    rng = Random(f"{target} {seed} {number}")
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call = TARGETS[target](rng, Path(name))
        try:
            with limited(LIMIT):
                call()
        except ZinitError:
            if not catch:
                raise
            return "refused"
        finally:
            clear(Path(name))
    return "worked"


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises a `HangError` inside if it takes longer."""

    def ring(number: int, frame: object) -> None:
        raise HangError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def place(error: BaseException) -> str:
    """The last line of zinit on the way to the error: one fault is reported once."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(PACKAGE))]
    return f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno}" if frames else "outside zinit"
