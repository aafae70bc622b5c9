"""The machines of a Ray cluster: every run of a benchmark is a task there (``zinit bench --on ray``).

All of them have zinit and see the benchmark's folder, the data and the models under the same paths. A run whose machine
is lost goes on at another one from its last checkpoint. What was measured is written here.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zinit.bench.place import Command, Ended, started
from zinit.compat import silence_ray
from zinit.errors import ConfigError, first_line, install_extra

MOST_LOSSES = 3  # of one run; then something else is wrong
LOOK = 0.2  # seconds between two looks for a request to stop


class Cluster:
    """A `zinit.bench.place.Place`: the cluster that ``RAY_ADDRESS`` names, or the one of this machine.

    A run takes a GPU where the cluster has some, or else a CPU core; Ray chooses the machine.

    Args:
        folder: of the benchmark.
        jobs: runs side by side; None is one per GPU of the cluster, or per CPU core.

    Raises:
        ConfigError: if Ray is not installed, or there is no cluster.
    """

    many_machines = True

    def __init__(self, folder: Path, jobs: int | None = None) -> None:
        self.folder, self._ray = folder.absolute(), connected()
        found = self._ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        self.jobs = jobs or gpus or max(1, int(found.get("CPU", 1)))
        self._task = self._ray.remote(run_here).options(num_cpus=1, num_gpus=min(gpus, 1), max_retries=0)
        self._running: set[Any] = set()
        self._stopping = False
        self._guard = threading.Lock()

    def run(self, command: Command, environment: Mapping[str, str], tell: Callable[[str], None]) -> Ended | None:
        """See `Place.run`."""
        errors = self._ray.exceptions
        lost = (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError)
        for _ in range(MOST_LOSSES):
            with self._guard:
                if self._stopping:
                    return None
                task = self._task.remote(list(command()), dict(environment), str(Path.cwd()), str(self.folder))
                self._running.add(task)
            try:
                return Ended(**self._ray.get(task))
            except errors.TaskCancelledError:
                return None
            except errors.RayTaskError as error:  # zinit is not there, say: the last line of Ray's text names it
                text = f"zinit: a machine of the cluster cannot run it: {_last_line(error)}"
                return Ended(status=1, err=text.encode())
            except lost as error:
                tell(f"its machine was lost, it goes on elsewhere: {first_line(error)}")
            finally:
                with self._guard:
                    self._running.discard(task)
        return Ended(status=1, err=f"zinit: its machine was lost {MOST_LOSSES} times".encode())

    def stop(self) -> None:
        """See `Place.stop`."""
        with self._guard:
            self._stopping = True
            for task in self._running:
                self._ray.cancel(task)


def _last_line(error: Exception) -> str:
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]


def connected() -> Any:
    """The package ``ray``, connected to a cluster; nothing of it is written to the terminal.

    Raises:
        ConfigError: if it is not installed, or there is no cluster.
    """
    if find_spec("ray") is None:
        raise ConfigError(f"zinit bench --on ray needs ray. {install_extra('ray')}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if (Path.home() / ".ray" / "auth_token").is_file():  # ``ray start`` wrote it, and lets nobody in without
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    ray: Any = import_module("ray")  # it may be absent where types are checked, and this file has its name

    silence_ray()
    if not ray.is_initialized():
        try:
            ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"there is no Ray cluster: {first_line(error)} Start one (ray start --head, and on each further "
                f"machine ray start --address HOST:6379), or name one: RAY_ADDRESS=HOST:6379."
            ) from error
    return ray


def run_here(command: Sequence[str], environment: Mapping[str, str], folder: str, output: str) -> dict[str, Any]:
    """A run, on the machine that Ray has chosen; asked to stop it saves first.

    Args:
        command: its command line; the interpreter is this machine's.
        environment: variables beside those of ``ray start``.
        folder: that it works in.
        output: of the benchmark.

    Returns:
        The fields of `Ended`.
    """
    for needed in (folder, output):
        if not Path(needed).is_dir():
            text = (
                f"zinit: the machine {socket.gethostname()} has no folder {needed}. Start the benchmark in a folder "
                f"that all machines share, and give it one there: --output DIR."
            )
            return {"status": 2, "err": text.encode()}
    process = started([sys.executable, *command[1:]], {**os.environ, **environment}, folder)
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):  # in slices: Ray's request to stop does not interrupt a wait
                out, err = process.communicate(timeout=LOOK)
                break
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    return {"status": process.returncode, "out": out, "err": err}
