"""Where the runs of a benchmark are made: on this machine, each in a process of its own."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

Command = Callable[[], Sequence[str]]
"""Makes a run's folder ready and gives the command line that begins it or goes on with it, the interpreter first."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run's process ended.

    Attributes:
        status: its exit status.
        out: what it printed.
        err: its error stream.
    """

    status: int
    out: bytes = b""
    err: bytes = b""


class Place(Protocol):
    """What makes runs; called from several threads.

    Attributes:
        many_machines: whether runs are made on several, each of which may be lost with what it was making.
    """

    many_machines: bool

    @property
    def jobs(self) -> int:
        """Runs side by side."""
        ...

    def run(self, command: Command, environment: Mapping[str, str], tell: Callable[[str], None]) -> Ended | None:
        """Waits for a run.

        Args:
            command: is called anew whenever the run is begun or gone on with.
            environment: variables beside those of the place.
            tell: takes a line about what happened to it.

        Returns:
            None where it was stopped before it began.
        """
        ...

    def stop(self) -> None:
        """Asks all runs to save and stop; none begins any more."""
        ...


class Here:
    """This machine.

    Args:
        jobs: runs side by side; None is one per visible GPU, or one per CPU core (at most 8).
    """

    many_machines = False

    def __init__(self, jobs: int | None = None) -> None:
        devices = visible_gpus()
        self.jobs = jobs or len(devices) or min(8, os.cpu_count() or 1)
        self._threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        self._free: SimpleQueue[str | None] = SimpleQueue()
        for number in range(self.jobs):
            self._free.put(devices[number % len(devices)] if devices else None)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False
        self._guard = threading.Lock()

    def run(self, command: Command, environment: Mapping[str, str], tell: Callable[[str], None]) -> Ended | None:
        """See `Place.run`."""
        device = self._free.get()
        variables = {**os.environ, **environment}
        if device is not None:
            variables["CUDA_VISIBLE_DEVICES"] = device
        elif self.jobs > 1:
            variables.setdefault("OMP_NUM_THREADS", self._threads)
        try:
            with self._guard:
                if self._stopping:
                    return None
                process = started(command(), variables)
                self._running.add(process)
            out, err = process.communicate()
            with self._guard:
                self._running.discard(process)
            return Ended(status=process.returncode, out=out, err=err)
        finally:
            self._free.put(device)

    def stop(self) -> None:
        """See `Place.stop`."""
        with self._guard:
            self._stopping = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)


def started(
    command: Sequence[str], environment: Mapping[str, str], folder: str | None = None
) -> subprocess.Popen[bytes]:
    """A process that dies with the thread that started it, where the system can do that.

    Args:
        command: its command line.
        environment: all of its variables.
        folder: that it works in; None is this process's.
    """
    return subprocess.Popen(
        command,
        env=dict(environment),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=functools.partial(_die_with_parent, os.getpid()) if sys.platform == "linux" else None,
    )


def _die_with_parent(parent: int) -> None:
    """A cell whose benchmark was killed must not go on beside the one that resumes it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was killed before that
        os._exit(1)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return []
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
