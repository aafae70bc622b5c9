"""Wrong input to everything that reads input: each either works or raises a `ZinitError`, and none hangs.

    python -m tests.fuzz                                  # a minute over all targets
    python -m tests.fuzz --seconds 3600 --seed 7
    python -m tests.fuzz --targets options --only 1234    # one input again, with its traceback

Prints for each target how many inputs were tried, how many were refused, and what was found. Input number n of a target
depends on the seed and n alone. Exit status 1 if anything was found.
"""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.run import Report, fuzz, try_one
from tests.fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--only", type=int, help="the number of one input; its error is not caught")
    options = parser.parse_args()
    if options.only is not None:
        for name in options.targets:
            print(name, try_one(name, options.seed, options.only, catch=False))
        return
    reports: list[Report] = []
    for name in options.targets:
        reports.append(fuzz(name, seed=options.seed, seconds=options.seconds / len(options.targets)))
        print(reports[-1], flush=True)
    total = sum(report.tried for report in reports)
    found = sum(len(report.findings) for report in reports)
    print(f"{total} inputs, {found} findings")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
