"""Real processes that start at once: forked from a server that has imported torch, transformers and zinit already.

An import of these takes longer than what most tests do. Tests of a fresh interpreter start one: see `environment`.
The ranks of ``torchrun`` and ``accelerate launch`` are forked by `tests.launch`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GRACE = 30.0  # seconds that the other ranks have to end after one of them has failed, as torchrun gives them

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])


def environment() -> dict[str, str]:
    """For processes: this source tree, no network, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def server() -> Any:
    """The address of the server, which starts with the first call, for a process that starts further ones."""
    before = os.environ.get("PYTHONPATH")
    os.environ.update(environment())  # the server finds the tests by it
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return forkserver._forkserver._forkserver_address


class Process:
    """A Python module running as ``python -m`` would run it.

    Args:
        module: its name.
        arguments: of its command line.
        more: variables of its environment besides `environment`.
    """

    def __init__(self, module: str, *arguments: str | Path, more: Mapping[str, str] | None = None) -> None:
        self.args = [module, *map(str, arguments)]
        self.folder = tempfile.TemporaryDirectory()
        files = [str(Path(self.folder.name) / name) for name in ("out", "err")]
        for file in files:
            Path(file).touch()
        variables = {**environment(), **(more or {})}
        self.process = CONTEXT.Process(target=_run, args=(self.args, variables, os.getcwd(), server(), *files))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 240) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.args, timeout, self.stdout, self.stderr)
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return (Path(self.folder.name) / "out").read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        return (Path(self.folder.name) / "err").read_text(encoding="utf-8", errors="replace")

    def done(self, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Waits until it ends."""
        return subprocess.CompletedProcess(self.args, self.wait(timeout), self.stdout, self.stderr)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        if self.poll() is None:
            self.wait()


def run(module: str, *arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """``python -m module arguments``, in a process of its own."""
    return Process(module, *arguments).done(timeout)


def run_ranks(
    module: str, *arguments: str | Path, processes: int = 2, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """The same as the ranks of one launch, as ``torchrun`` starts them. Its status is that of the first that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    number = str(processes)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    ranks = [
        Process(module, *arguments, more={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    failed, end = 0, time.monotonic() + timeout
    while any(rank.poll() is None for rank in ranks):
        if not failed and (failed := next((rank.poll() or 0 for rank in ranks if rank.poll()), 0)):
            end = min(end, time.monotonic() + GRACE)
            for rank in ranks:
                if rank.poll() is None:
                    rank.process.terminate()
        if time.monotonic() > end:
            for rank in ranks:
                rank.process.kill()
        time.sleep(0.01)
    status = failed or next((rank.poll() or 0 for rank in ranks if rank.poll()), 0)
    texts = ["".join(getattr(rank, name) for rank in ranks) for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(ranks[0].args, status, *texts)


def _run(args: list[str], variables: dict[str, str], folder: str, address: Any, out: str, err: str) -> None:
    """In the new process."""
    known = forkserver._forkserver  # processes of this one come from the same server, not from one of their own
    known._forkserver_address, known.ensure_running = address, lambda: None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, file in ((0, os.devnull), (1, out), (2, err)):
        opened = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv = list(args)
    status = 0
    try:
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
