"""A launcher (``torchrun``, ``accelerate launch``) as its command line runs it, but with ranks that start at once.

Run as ``tests.launch MODULE ARGUMENTS`` by `tests.processes`: ranks are forked where torch would start interpreters.
"""

from __future__ import annotations

import runpy
import signal
import sys
from typing import Any

from torch.distributed.elastic.multiprocessing import api

from tests.processes import Process


class Rank:
    """What torch keeps of a rank, in place of its handler of a ``subprocess.Popen``."""

    def __init__(self, *, entrypoint: str, args: tuple[str, ...], env: dict[str, str], **others: Any) -> None:
        assert entrypoint == sys.executable
        module = args.index("-m") + 1
        self.proc = Process(args[module], *args[module + 1 :], more=env)
        RANKS.append(self)

    def close(self, death_sig: signal.Signals | None = None) -> None:
        self.proc.send_signal(death_sig or signal.SIGTERM)


RANKS: list[Rank] = []


def main() -> None:
    del sys.argv[0]
    api.get_subprocess_handler = Rank
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        assert RANKS, "the launcher starts its ranks in another way than this module expects"
        for rank in RANKS:
            sys.stdout.write(rank.proc.stdout)
            sys.stderr.write(rank.proc.stderr)


if __name__ == "__main__":
    main()
