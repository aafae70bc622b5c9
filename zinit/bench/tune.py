"""A search for settings: every trial is a cell of a benchmark, measured on a part that no figure is reported of.

Optuna proposes, and its journal lies in the folder. What it proposes depends on the seed, the number of jobs and the
trials of the rounds before, and on nothing else: a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.backbones import BACKBONES
from zinit.bench.cells import OWN, RATES, Cell, Experiment, Options, Selection, choice_key
from zinit.bench.plan import REFERENCE, Benchmark, make_benchmark
from zinit.bench.runner import Event, Runner, read_cells
from zinit.bench.tune_page import page
from zinit.config import HEAD, ROLES
from zinit.errors import ConfigError, DataError
from zinit.files import parsing, read_json, write_atomically
from zinit.methods import METHODS
from zinit.models.loading import load_on_meta
from zinit.runs.build import demo_model
from zinit.runs.config import RunConfig, read_tables
from zinit.runs.directory import write_json
from zinit.runs.presets import read_preset
from zinit.runs.preview import starting_options
from zinit.runs.settings import resolve
from zinit.tasks import TASKS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

JOURNAL, RECORD = "optuna.journal", "tune.json"
LENGTH, LAYERS = "prefix.length", "prefix.layers"
FACTORS = (OWN, *ROLES)
HOW_MUCH = ("evaluation_limit", "max_new_tokens")  # settings of tasks that do not say what is measured on
ADVICE = "Name data that no figure is reported of: --validation task.held_out_data=FILE."
AT_RANDOM = 6  # trials before Optuna's sampler goes by what was measured


@dataclass(frozen=True)
class Range:
    """What a setting, or a factor on rates, is chosen from; two whole numbers are a range of whole numbers.

    Attributes:
        low: the least.
        high: the greatest, included.
    """

    low: float
    high: float

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def distribution(self) -> BaseDistribution:
        """As Optuna has it: positive numbers that are not whole by their logarithm."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high)
        return FloatDistribution(self.low, self.high, log=self.low > 0)


def parse_range(text: str) -> tuple[str, Range]:
    """``prefix.length=4:64`` or ``gates=0.3:10``.

    Raises:
        ConfigError: if it is no range.
    """
    name, _, bounds = text.partition("=")
    try:
        low, high = (float(bound) for bound in bounds.split(":"))
    except ValueError:
        low, high = math.nan, math.nan
    is_factor = name in FACTORS
    if not name or not -math.inf < low <= high < math.inf or (is_factor and low <= 0):
        raise ConfigError(
            f"--range expects NAME=LOW:HIGH, the lower number first, such as {LENGTH}=4:64, or {OWN}=0.1:10 for a "
            f"factor above 0 on the rates; got {text!r}."
        )
    whole = not is_factor and all(bound.strip().lstrip("-").isdigit() for bound in bounds.split(":"))
    return name, Range(int(low), int(high)) if whole else Range(low, high)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is searched.

    Attributes:
        experiment: of one method and one seed; its selection holds the options of the trials alone, and the metric.
        space: ranges by name: settings, and factors on the rates of roles (see `Selection.rates`).
        start: the values of the first trial, as far as they are known: those that the method begins with.
    """

    experiment: Experiment
    space: dict[str, Range]
    start: dict[str, Any]

    @property
    def metric(self) -> str:
        """What is compared."""
        return str(self.experiment.select.metric)

    @property
    def lower(self) -> bool:
        """Whether less of it is better."""
        return TASKS.get(str(self.experiment.task)).direction(self.metric) == "lower"

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what makes it another search."""
        space = {name: [found.low, found.high] for name, found in self.space.items()}
        return json.loads(json.dumps({"experiment": self.experiment.to_dict(), "space": space}))

    def trial(self, values: Mapping[str, Any]) -> tuple[Cell, Options]:
        """The run of a trial, and the settings that it stands for."""
        factors = {name: value for name, value in values.items() if name in FACTORS}
        settings = {name: value for name, value in values.items() if name not in FACTORS}
        return self.experiment.trial(self.experiment.methods[0], {}, settings, factors)

    def final(self, said: Options) -> Cell:
        """The run that a user goes on with: measured on the part that figures are reported of."""
        return next(self.experiment.cells(chosen={choice_key(self.experiment.methods[0], {}): said}))

    def check(self) -> None:
        """Everything that can be wrong is said before anything runs.

        Raises:
            ConfigError: naming it.
        """
        task, method = str(self.experiment.task), self.experiment.methods[0]
        if TASKS.get(task).direction(self.metric) is None:
            raise ConfigError(f"{self.metric} is no better the higher or the lower it is. Name another --metric.")
        trained = set(METHODS.fact(method, "default_rates"))
        known = trained | ({OWN} if trained - {HEAD} else set())
        for name in self.space:
            if name in FACTORS and name not in known:
                raise ConfigError(f"the method {method!r} has no rate of {name!r}. It has {', '.join(sorted(known))}.")
        if not self.space:
            raise ConfigError(f"the method {method!r} has nothing to search. Name something: --range NAME=LOW:HIGH.")
        for end in ("low", "high"):
            self.trial({name: getattr(found, end) for name, found in self.space.items()})[0].resolve()
        trials, final = (cell.resolve().options.to_dict() for cell in (self.trial({})[0], self.final(())))
        if all(trials[name] == final[name] for name in trials if name not in HOW_MUCH):
            raise ConfigError(
                f"--validation {' '.join(self.experiment.select.options)} leaves the task's data as they are: the "
                f"trials would be measured on what figures are reported of. {ADVICE}"
            )


def make_plan(
    *,
    backbone: str,
    task: str | None = None,
    method: str | None = None,
    preset: str | None = None,
    model: str | None = None,
    data: str | None = None,
    seed: int = 0,
    options: Iterable[str] = (),
    validation: Iterable[str] = (),
    metric: str = "loss",
    ranges: Iterable[str] = (),
) -> Plan:
    """What ``zinit tune`` searches.

    Args:
        backbone: registered name.
        task: registered name; None is the preset's, or the backbone's own.
        method: registered name; None is the preset's, or zero-init.
        preset: of the runs.
        model: folder or Hub id; None is the embedded demo.
        data: file, folder or Hub id; None is the demo's.
        seed: of the trials, and of the search.
        options: further settings of all runs.
        validation: further settings of the trials alone; they hold a part out to measure them on where the task does
            not (`zinit.tasks.base.Task.validation_options`).
        metric: what is compared.
        ranges: see `parse_range`; they come to what is searched anyway, or in its place.

    Raises:
        ConfigError: naming what is unknown, wrong or missing.
    """
    said: dict[str, Range] = {}
    for name, found in map(parse_range, ranges):
        if name in said:
            raise ConfigError(f"--range {name} was given twice. Name it once.")
        said[name] = found
    if preset and "/" in preset:
        task = task or read_tables(read_preset(preset))["task"].get("name")
    [experiment] = make_benchmark(
        backbones=[backbone], tasks=[task] if task else [], seeds=[seed], model=model, data=data, options=options
    ).experiments
    preset = preset or experiment.preset
    if preset and "/" not in preset:
        preset = f"{experiment.task}/{preset}"
    if method is None:
        method = read_tables(read_preset(preset))["method"].get("name") if preset else None
    if preset is None:
        experiment = replace(experiment, options=(*_starting_options(experiment, method), *experiment.options))
    own = TASKS.get(str(experiment.task)).validation_options(demo=data is None)
    select = Selection(options=(*own, *validation), metric=metric)
    if not select.options:
        raise ConfigError(f"the task {experiment.task!r} keeps no part of these data to measure trials on. {ADVICE}")
    experiment = replace(experiment, preset=preset, methods=(method or REFERENCE,), metric=metric, select=select)
    space, start = _default_space(experiment, said)
    return Plan(experiment=experiment, space=space, start=start)


def _starting_options(experiment: Experiment, method: str | None) -> Options:
    """What ``zinit train`` would choose for the model: the search begins where training does."""
    names = {"backbone": experiment.backbone, "task": experiment.task, "model": experiment.model}
    return starting_options(*resolve(**names, method=method, data=experiment.data, options=_options(experiment)))


def _default_space(experiment: Experiment, said: dict[str, Range]) -> tuple[dict[str, Range], dict[str, Any]]:
    """Rates by a factor of ten, K by one of four, every L; and where they begin. What an option fixes is left out."""
    method = experiment.methods[0]
    trained = set(METHODS.fact(method, "default_rates"))
    space = {OWN if trained - {HEAD} else HEAD: Range(0.1, 10.0)} if trained and not said.keys() & {*RATES} else {}
    run = Plan(experiment=experiment, space={}, start={}).final(()).resolve()
    fixed = {option.partition("=")[0].removeprefix("prefix.") for option in _options(experiment)}
    start: dict[str, Any] = {**dict.fromkeys(FACTORS, 1.0), LENGTH: run.prefix.length}
    if "prompts" in trained and not run.parts:
        counts = _that_count(run)
        if LENGTH in counts and "length" not in fixed:
            space[LENGTH] = Range(max(1, run.prefix.length // 4), 4 * run.prefix.length)
        if LAYERS in counts and "layers" not in fixed and LAYERS not in said:
            space[LAYERS] = Range(1, _depth(experiment))
            start[LAYERS] = space[LAYERS].high if run.prefix.layers is None else run.prefix.layers
    space |= said
    return space, {name: start[name] for name in space if start.get(name) in space[name]}


def _that_count(run: RunConfig) -> set[str]:
    """Which of K and L change anything: a method may attach no prefix, or matrices in the place of prompts."""
    attached = METHODS.get(run.method)(run.method_options).attached(run.adapter())
    if attached is None:  # it makes prompts of its own
        return {LENGTH, LAYERS}
    parts = attached.parts.values()
    by_prompts = {LENGTH} if any(part.parametrization != "matrix" for part in parts) else set()
    return by_prompts | ({LAYERS} if parts else set())


def _options(experiment: Experiment) -> Iterable[str]:
    return (*experiment.options, *(said for own in experiment.method_options.values() for said in own))


def _depth(experiment: Experiment) -> int:
    """How many layers can take a prefix: of the shallowest tower."""
    source = experiment.model or str(demo_model(experiment.backbone))
    towers = Counter(site.tower for site in BACKBONES.get(experiment.backbone).sites(load_on_meta(source)))
    return min(towers.values())


class Search:
    """Finishes the trials of a plan, as many at once as its runner has jobs.

    Args:
        plan: what is searched.
        output: its folder; may hold trials.
        trials: how many in all, those of before included.
        jobs: see `zinit.bench.runner.Runner`.
        on_event: likewise.

    Raises:
        ConfigError: if the folder holds something else.
    """

    def __init__(
        self,
        plan: Plan,
        output: Path,
        *,
        trials: int,
        jobs: int | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.plan, self.output, self.trials, self.on_event = plan, output, trials, on_event
        self.benchmark = Benchmark(experiments=(plan.experiment,), description=f"a search by {plan.metric}")
        self.runner = Runner(self.benchmark, output, jobs=jobs, on_event=self._hear)
        self._errors: dict[str, str] = {}  # of cells that broke this time
        self._begun: set[int] = set()  # this time
        self._finished: set[str] = set()  # cells
        self._cells: dict[int, tuple[Cell, Options]] = {}
        self._check_same()

    def _check_same(self) -> None:
        """The folder holds this search, or nothing yet: a kill may have left no more than the runner's record."""
        before, now, advice = {}, self.plan.to_dict(), "Name another --output."
        if (self.output / RECORD).exists():
            before = read_json(self.output / RECORD, DataError, advice).get("search", {})
        elif (self.output / "bench.json").exists():
            others = read_json(self.output / "bench.json", DataError, advice)["benchmark"]["experiments"]
            if others != [now["experiment"]]:
                raise ConfigError(f"{self.output} holds a benchmark. {advice}")
        if not before:
            return
        flat = [{**search.get("experiment", {}), "ranges": search.get("space")} for search in (before, now)]
        if changed := sorted(name for name in {*flat[0], *flat[1]} if flat[0].get(name) != flat[1].get(name)):
            raise ConfigError(
                f"{self.output} holds a search with other settings: {', '.join(changed)}. Give the command that it was "
                f"begun with (--trials and --jobs may change), or another --output."
            )

    def _hear(self, event: Event) -> None:
        """A runner's event goes on, but for its plans, which are of single rounds."""
        if event["event"] == "cell" and event["status"] == "failed":
            self._errors[event["id"]] = event["error"]
        if event["event"] != "plan":
            self.on_event(event)

    def run(self) -> dict[str, Any]:
        """Runs the trials that are missing. ``tune.json`` is written after each round, ``report.html`` at the end.

        It ends early where nothing but failures came of a round, and nothing before it.

        Returns:
            The document: the search, its trials, and the best of them.
        """
        with self.runner.claimed():
            study = self._study()
            document = self._record(study)
            done = sum(trial["status"] in ("done", "refused") for trial in document["trials"])
            left = max(self.trials - done, 0)
            self.on_event({"event": "plan", "cells": done + left, "todo": left, "jobs": self.runner.jobs})
            while not self.runner.stopping.is_set() and (cells := self._round(study)):
                self.runner.finish(cells)
                document = self._record(study)
                if self._errors and not self._finished:
                    break  # of data that cannot be read, say: further trials would fail alike
            write_atomically(self.output / "report.html", page(self.benchmark, document).encode())
        return document

    def _study(self) -> Study:
        """Optuna's study; what a kill left in its journal is taken away, as the folder is held by nobody else."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = self.output / JOURNAL
        (self.output / f"{JOURNAL}.lock").unlink(missing_ok=True)
        if journal.exists() and not (text := journal.read_bytes()).endswith(b"\n"):
            os.truncate(journal, text.rfind(b"\n") + 1)
        with parsing(f"{journal} is damaged", DataError, "Name another --output."):
            storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal))))
            study = optuna.create_study(
                storage=storage,
                study_name=hashlib.sha256(json.dumps(self.plan.to_dict(), sort_keys=True).encode()).hexdigest()[:16],
                direction="minimize" if self.plan.lower else "maximize",
                load_if_exists=True,
            )
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(self.plan.start)
        return study

    def _trials(self, study: Study) -> list[FrozenTrial]:
        """All that were proposed; a kill may have left one without all its values."""
        return [t for t in study.get_trials(deepcopy=False) if t.params.keys() == self.plan.space.keys()]

    def _round(self, study: Study) -> list[Cell]:
        """What to run next: trials that are not finished, and new ones beside them."""
        from optuna.samplers import TPESampler

        known = self._trials(study)
        wanted = [t.number for t in known if self._cell(t)[0].id not in self._finished and t.number not in self._begun]
        space = {name: found.distribution() for name, found in self.plan.space.items()}
        for count in range(len(known), self.trials):
            if wanted and count % self.runner.jobs == 0:
                break  # rounds begin at the same trials, whatever stopped one
            seed = (self.plan.experiment.seeds[0] * 1_000_003 + count) % 2**32
            study.sampler = TPESampler(seed=seed, n_startup_trials=AT_RANDOM)
            wanted.append(study.ask(space).number)
        self._begun.update(wanted)
        cells = [self._cell(trial)[0] for trial in self._trials(study) if trial.number in wanted]
        return list({cell.id: cell for cell in cells}.values())  # the same values may be proposed twice

    def _cell(self, trial: FrozenTrial) -> tuple[Cell, Options]:
        if trial.number not in self._cells:
            self._cells[trial.number] = self.plan.trial(trial.params)
        return self._cells[trial.number]

    def _record(self, study: Study) -> dict[str, Any]:
        """Tells Optuna what was measured, and writes ``tune.json``."""
        from optuna.trial import TrialState

        finished, trials = {cell["id"]: cell for cell in read_cells(self.output)}, []
        self._finished = set(finished)
        for trial in self._trials(study):
            cell, said = self._cell(trial)
            found = finished.get(cell.id)
            status, value, error = self._outcome(cell, found)
            if found is not None and trial.state == TrialState.RUNNING:
                study.tell(trial.number, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)
            trials.append(
                {
                    **{"number": trial.number, "status": status, "value": value, "settings": trial.params},
                    **{"options": list(said), "error": error, "cell": cell.id},
                    "num_trainable": (found or {}).get("num_trainable"),
                    "seconds": (found or {}).get("seconds"),
                }
            )
        document = {"search": self.plan.to_dict(), "metric": self.plan.metric, "lower_is_better": self.plan.lower}
        document |= {"trials": trials, "best": self._best(trials)}
        write_json(self.output / RECORD, document)
        return document

    def _outcome(self, cell: Cell, found: dict[str, Any] | None) -> tuple[str, float | None, str | None]:
        """Status, figure, and why there is none."""
        if found is None:
            error = self._errors.get(cell.id)
            return ("failed" if error else "open"), None, error
        if found["status"] != "done":
            return "refused", None, found["error"]
        measured = found["metrics"]["adapted"]
        if self.plan.metric not in measured:
            return "refused", None, f"the task reports no {self.plan.metric}, but {', '.join(measured)}."
        value = measured[self.plan.metric]
        if value is None or not math.isfinite(value):
            return "refused", None, f"{self.plan.metric} is no finite number: training diverged."
        return "done", value, None

    def _best(self, trials: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The first of those with the best figure, with what a user types to go on with it."""
        done = [trial for trial in trials if trial["status"] == "done"]
        if not done:
            return None
        best = (min if self.plan.lower else max)(done, key=lambda trial: trial["value"])
        final = self.plan.final(tuple(best["options"]))
        return {**{name: best[name] for name in ("number", "value", "settings", "options")}, "command": final.command()}
