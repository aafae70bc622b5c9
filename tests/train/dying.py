"""The command line, but process 1 kills itself at step 5 of its first life; see `test_faults`."""

from __future__ import annotations

import os
import signal

from zinit.cli import main
from zinit.train.plan import Plan

count = Plan.count


def dying(self: Plan, step: int) -> int:
    if step == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return count(self, step)


Plan.count = dying

if __name__ == "__main__":
    main()
