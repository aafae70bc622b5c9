"""A training step and ``model.generate`` with two checkouts of zinit: the ratio of new to old, with its interval.

    python -m benchmarks.old_new --old ../before --new .
    python -m benchmarks.old_new --old ../before --new . --works step generate train --pairs 60
    python -m benchmarks.old_new --old ../before --new . --together --lives 4 --pairs 200
    python -m benchmarks.old_new --old ../before --new . --works step-counts generate-counts --lives 1 --pairs 2

Each checkout has one living process, with one thread and pinned to the same core; the processes take rounds in turn,
and the order within a pair alternates. They are forks of one that has built the model, so its weights lie at the same
place for all. Where the rest of a process's memory lies is luck that lasts as long as it does, so pairs are spread over
several lives; how fast the machine is changes from second to second, so many short rounds (``--tokens 8 --length 16``)
tell more than a few long ones. Reported are the median over pairs of new / old and its bootstrap 95 % interval: lives
are drawn first, then pairs within them.
Beside it, measured alike and at the same time: two processes of the new checkout, which shows what the method itself
can tell apart. ``--together`` leaves less to luck: the checkouts take turns in one process, so that not only the frozen
weights but all else in memory is shared; what a process pays for having more imported is not seen there.
``train`` is a step of `zinit train` on the embedded demo, as the run logs it. Where a machine cannot
tell small differences apart, ``step-counts`` and ``generate-counts`` say what is done instead of how long it takes:
torch's operators, the numbers in their inputs and outputs, and calls of Python functions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import save
from benchmarks.old_new_worker import WORKS

WORKER = Path(__file__).with_name("old_new_worker.py")
SHAPE = {"width": 256, "layers": 8, "heads": 4, "vocabulary": 2000, "prefix_length": 10, "batch": 4, "length": 64,
         "tokens": 48, "steps": 12}  # fmt: skip
PAIRS = {"new_over_old": ("old", "new"), "new_over_new": ("new", "new again")}
RESAMPLES = 10_000


class Life:
    """Living processes that time the works of several checkouts, see `benchmarks.old_new_worker`.

    Args:
        checkouts: roots of the repositories, by name.
        cpu: the core that the processes may run on; -1 leaves that to the system.
        shape: of the model and its inputs.
        together: one process for all of them.
    """

    def __init__(self, checkouts: dict[str, Path], cpu: int, shape: dict[str, int], together: bool) -> None:
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)  # zinit comes from the checkouts
        self.names, self.log = list(checkouts), tempfile.TemporaryFile()  # noqa: SIM115
        folders = json.dumps([str(folder) for folder in checkouts.values()])
        how = "together" if together else "apart"
        # -P: the folder of the script is not searched either.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), folders, str(cpu), json.dumps(shape), how],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1, env=environment,
        )  # fmt: skip

    def time(self, name: str, work: str) -> dict[str, float]:
        """Seconds, or counts, of one round of a checkout."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{self.names.index(name)} {work}\n")
        answer = self.process.stdout.readline()
        if not answer.strip():
            self.log.seek(0)
            said = self.log.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"the process of {name!r} failed in {work!r}:\n{said}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the processes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def rounds(life: Life, work: str, pairs: int, warm_up: int) -> dict[str, list[dict[str, Any]]]:
    """Seconds of both sides of every pair in one life, ``{comparison: [{"under": ..., "over": ...}]}``."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in PAIRS}
    for number in range(warm_up + pairs):
        for name, (under, over) in PAIRS.items():
            order = ("under", "over") if number % 2 else ("over", "under")
            sides = {"under": under, "over": over}
            pair = {side: life.time(sides[side], work) for side in order}
            if number >= warm_up:
                measured[name].append(pair)
    return measured


def interval(lives: Sequence[Sequence[float]], seed: int = 0) -> list[float]:
    """The bootstrap 95 % interval of the median: lives are drawn, and pairs within each."""
    rng = random.Random(seed)

    def resampled() -> list[float]:
        return [ratio for life in rng.choices(lives, k=len(lives)) for ratio in rng.choices(life, k=len(life))]

    medians = sorted(statistics.median(resampled()) for _ in range(RESAMPLES))
    return [medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]]


def summarize(lives: Sequence[dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Median ratio, its interval, the median of each life and the median of each side, by comparison and clock."""
    figures: dict[str, Any] = {}
    for name in lives[0]:
        pairs = [pair for life in lives for pair in life[name]]
        for clock in pairs[0]["under"]:
            by_life = [[pair["over"][clock] / pair["under"][clock] for pair in life[name]] for life in lives]
            ratios = [ratio for life in by_life for ratio in life]
            figures.setdefault(name, {})[clock] = {
                "median_ratio": round(statistics.median(ratios), 4),
                "interval_95": [round(bound, 4) for bound in interval(by_life)],
                "median_by_life": [round(statistics.median(life), 4) for life in by_life],
                "median": {
                    side: round(statistics.median(pair[side][clock] for pair in pairs), 5) for side in ("under", "over")
                },
                "pairs": len(ratios),
            }
    return figures


def show(work: str, figures: dict[str, Any]) -> None:
    """One line for each comparison and clock."""
    for name, clocks in figures.items():
        for clock, found in clocks.items():
            low, high = found["interval_95"]
            title = name.replace("_", " ")
            print(f"{work:9} {title:13} {clock:9} {found['median_ratio']:.4f}  [{low:.4f}, {high:.4f}]", flush=True)


def revision(checkout: Path) -> str:
    """The commit that is checked out; with a plus if files differ from it."""
    git = ["git", "-C", str(checkout)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return f"{commit}{'+' if changed else ''}" or "no repository"


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--old", type=Path, required=True, help="checkout to compare with")
    options.add_argument("--new", type=Path, required=True, help="checkout to judge")
    options.add_argument("--works", nargs="+", choices=list(WORKS), default=["step", "generate"])
    options.add_argument("--pairs", type=int, default=40, help="of each comparison; 30 at least for a figure to report")
    options.add_argument("--lives", type=int, default=5, help="of the processes; the pairs are spread over them")
    options.add_argument("--warm-up", type=int, default=3, help="pairs of a life that are not counted")
    options.add_argument("--cpu", type=int, default=0, help="core of all processes; -1: not pinned")
    options.add_argument("--together", action="store_true", help="all checkouts in one process")
    options.add_argument("--output", type=Path, default=None, help="default: benchmarks/results/old_new-cpu.json")
    for name, value in SHAPE.items():
        options.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return options.parse_args()


def main() -> None:
    options = parse()
    shape = {name: getattr(options, name) for name in SHAPE}
    checkouts = {"old": options.old.resolve(), "new": options.new.resolve(), "new again": options.new.resolve()}
    measured: dict[str, list[dict[str, Any]]] = {work: [] for work in options.works}
    for _ in range(options.lives):
        life = Life(checkouts, options.cpu, shape, options.together)
        try:
            for work in options.works:
                measured[work].append(rounds(life, work, -(-options.pairs // options.lives), options.warm_up))
        finally:
            life.close()
    figures = {work: summarize(lives) for work, lives in measured.items()}
    for work, found in figures.items():
        show(work, found)
    options.old, options.new = revision(options.old), revision(options.new)  # commits say more than folders
    options.device = "cpu"
    save("old_new", options, figures)


if __name__ == "__main__":
    main()
