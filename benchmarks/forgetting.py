"""What methods forget at equal training loss, against LoRA: both are followed while they train.

    python -m benchmarks.forgetting --models DIR --data DIR [--only "MiniLM: named entities"] [--method zero-init]

The models, data, seeds and chosen rates of ``benchmarks.real``, whose trials must be finished. Every few steps the loss
on `EXAMPLES` training examples is measured, and how far features have moved (of a language model: how much the loss on
known texts has risen). A method and LoRA are compared, seed by seed, at the lowest loss that both reached, each where
it came there first; by the seeds with which both came below the loss they started at.

Writes ``benchmarks/results/forgetting.json`` after every run, and the tables of docs/real-weights.md; the same command
goes on from there. ``--page`` writes the tables alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS
from benchmarks.dynamics import forgetting, of_trials
from benchmarks.real import OUTPUT as CELLS
from benchmarks.real import PAGE, PLAN, places_of
from zinit.bench.cells import Cell
from zinit.bench.intervals import DRAWS, FEWEST
from zinit.bench.plan import Benchmark, make_benchmark
from zinit.bench.runner import final_cells
from zinit.runs.train import Run, build
from zinit.train.batches import load_batches
from zinit.train.callbacks import Callback, Progress
from zinit.train.events import Step
from zinit.train.held_out import held_out_loss
from zinit.train.loop import Stepper, ignore, run_steps
from zinit.train.plan import Plan
from zinit.train.strategy import place

OUTPUT = RESULTS / "forgetting.json"
TABLE, END = "<!-- forgetting: python -m benchmarks.forgetting -->", "<!-- end of forgetting -->"
LORA = "lora"
METHODS = (
    *("zero-init", "query-gate", "zero-init-tuned", "query-gate-tuned", "bias-tuning", "random-gate"),
    *(LORA, "lora-all", "full"),
)
EXAMPLES, MEASURED = 96, 8  # of the training part; times a run
Curve = list[tuple[float, float]]  # (training loss, forgetting), before the first step first
Found = dict[str, dict[str, dict[str, Curve]]]  # by experiment, method, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", action="append", default=[], help="name of an experiment; repeatable")
    parser.add_argument("--method", action="append", default=[], help="repeatable")
    parser.add_argument("--page", action="store_true", help="write the table into the page and stop")
    options = parser.parse_args()
    found: Found = json.loads(OUTPUT.read_text()) if OUTPUT.is_file() else {}
    if not options.page:
        if options.models is None or options.data is None:
            parser.error("name the folders: --models DIR --data DIR")
        benchmark = make_benchmark(config_file=str(PLAN))
        kept = [e for e in benchmark.experiments if e.name in (options.only or [e.name])]
        places = places_of(options.models, options.data, kept)
        follow_all(found, places, replace(benchmark, experiments=tuple(kept)), options.method or list(METHODS))
    write_page(found)


def follow_all(found: Found, places: dict[str, str], benchmark: Benchmark, methods: list[str]) -> None:
    """Follows every run that ``found`` does not hold yet, seeds outermost.

    Args:
        found: completed here, and written.
        places: see `zinit.bench.cells.Cell.at`.
        benchmark: the experiments to look at.
        methods: to follow.
    """
    trials = {experiment.name: of_trials(experiment) for experiment in benchmark.experiments}
    for cell in final_cells(benchmark, CELLS):
        if cell.name not in methods or str(cell.seed) in found.get(cell.experiment, {}).get(cell.name, {}):
            continue
        own = found.setdefault(cell.experiment, {}).setdefault(cell.name, {})
        own[str(cell.seed)] = follow(replace(cell, options=(*cell.options, *trials[cell.experiment])), places)
        print(cell.experiment, cell.name, cell.seed, own[str(cell.seed)][-1], flush=True)
        OUTPUT.write_text(json.dumps(found, indent=1))


def follow(cell: Cell, places: dict[str, str]) -> Curve:
    """A run of a cell, measured while it trains."""
    run = build(cell.at(places).resolve(), Path(), preset=None, resume=False, on_event=ignore)
    place(run.task, run.accelerator)
    with run.built.adapted.disabled():
        run.task.prepare()
    stepper = Stepper(run.task, Plan.of(run.task, run.config.train, cell.seed), run.accelerator)
    measure = Measure(run, max(1, stepper.plan.steps // MEASURED))
    run_steps(stepper, load_batches(stepper.plan, run.task.collate, run.accelerator, start=0), [measure], start=0)
    return measure.curve


class Measure(Callback):
    """Notes the loss on training examples and what is forgotten: before the first step, every few, after the last.

    Args:
        run: nothing is trained in yet, but the methods that change the model at once (random gates) have done so.
        every: steps.
    """

    def __init__(self, run: Run, every: int) -> None:
        self.run, self.every, self.curve = run, every, Curve()
        with run.built.adapted.disabled():
            self.before = forgetting(run)
        self.note()

    def note(self) -> None:
        """One point more."""
        task, held_out = self.run.task, self.run.task.held_out_stream
        lost = forgetting(self.run) - self.before
        task.held_out_stream = task.train_stream
        chosen = range(min(EXAMPLES, len(task.train_stream)))
        loss, _ = held_out_loss(task, self.run.config.train, self.run.accelerator, chosen=chosen)
        task.held_out_stream = held_out
        task.train()
        self.curve.append((loss, lost))

    def on_step(self, progress: Progress, step: Step) -> None:
        if step.step % self.every == 0 or step.step == progress.plan.steps:
            self.note()


# --- equal loss ---


def forgotten_at(curve: Curve, loss: float) -> float:
    """What is forgotten where a run first comes down to a loss, on the line between the two points around it.

    Raises:
        ValueError: if it never does.
    """
    if curve[0][0] <= loss:
        return curve[0][1]
    for (high, before), (low, after) in itertools.pairwise(curve):
        if low <= loss < high:
            return before + (after - before) * (high - loss) / (high - low)
    raise ValueError(f"the loss {loss} is not reached: {curve}")


def learned(curve: Curve) -> bool:
    """Whether the training loss was ever below its start: where a head starts as regression it need not be."""
    return min(loss for loss, _ in curve) < curve[0][0]


def at_equal_loss(these: Curve, those: Curve) -> tuple[float, float, float]:
    """The lowest loss that both runs reached, and what each has forgotten there."""
    loss = max(min(loss for loss, _ in curve) for curve in (these, those))
    return loss, forgotten_at(these, loss), forgotten_at(those, loss)


def share(pairs: list[tuple[float, float]]) -> tuple[float, tuple[float, float] | None]:
    """The mean of the first over the mean of the second, and its 95 % interval: a bootstrap over seeds.

    Args:
        pairs: one a seed; fewer than `zinit.bench.intervals.FEWEST` give no interval.
    """
    these, those = np.asarray(pairs).T
    if len(pairs) < FEWEST:
        return float(these.mean() / those.mean()), None
    drawn = np.random.default_rng(0).integers(len(pairs), size=(DRAWS, len(pairs)))
    low, high = np.percentile(these[drawn].mean(axis=1) / those[drawn].mean(axis=1), [2.5, 97.5])
    return float(these.mean() / those.mean()), (float(low), float(high))


# --- the page ---

HEADER = ("method", "training loss, last", "forgetting, last", "equal loss", "forgetting there", "LoRA's there")


def write_page(found: Found) -> None:
    """Puts the tables into the page, between the lines `TABLE` and `END`."""
    parts = []
    for experiment, runs in found.items():
        lora = runs.get(LORA, {})
        lines = [row(name, own, lora) for name, own in runs.items() if own.keys() & lora.keys()]
        header = [*HEADER, "of LoRA's", "seeds"]
        cells = [header, ["---"] * len(header), *lines]
        parts += [f"### {experiment}", "\n".join(f"| {' | '.join(line)} |" for line in cells)]
    text = PAGE.read_text("utf-8")
    before, after = text[: text.index(TABLE) + len(TABLE)], text[text.index(END) :]
    PAGE.write_text("\n\n".join([before, *parts, after]), "utf-8")


def row(method: str, these: dict[str, Curve], lora: dict[str, Curve]) -> list[str]:
    """A line of the table."""
    seeds = sorted(these.keys() & lora.keys())
    last = [statistics.mean(these[seed][-1][place] for seed in seeds) for place in (0, 1)]
    figures = [f"{last[0]:.3f}", f"{last[1]:.4f}"]
    seeds = [seed for seed in seeds if all(learned(runs[seed]) for runs in (these, lora))]
    if not seeds:
        return [method, *figures, "-", "-", "-", "-", "-"]
    equal = [at_equal_loss(these[seed], lora[seed]) for seed in seeds]
    means: list[Any] = [statistics.mean(own) for own in zip(*equal, strict=True)]
    ratio, bounds = share([(own, other) for _, own, other in equal])
    shown = f"{ratio:.2f}" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")
    figures += [f"{means[0]:.3f}", f"{means[1]:.4f}", f"{means[2]:.4f}"]
    return [method, *figures, "-" if method == LORA else shown, ", ".join(seeds)]


if __name__ == "__main__":
    main()
