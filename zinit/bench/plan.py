"""What a benchmark runs: experiments from a TOML file or options, taken apart into cells. One cell is one run."""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Annotated, Any

from annotated_types import MinLen

from zinit.backbones import BACKBONES
from zinit.config import JsonConfig
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.registry import did_you_mean
from zinit.runs.presets import read_config_file
from zinit.runs.settings import absolute_path, resolve
from zinit.tasks import TASKS
from zinit.validation import Name, Seed, Words, shown

PRESETS = resources.files("zinit.bench") / "presets"
REFERENCE = "zero-init"  # what other methods are compared with, seed by seed


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the benchmark: what is passed to ``zinit train``.

    Attributes:
        experiment: name of the experiment it belongs to.
        backbone: registered name.
        task: registered name.
        method: registered name.
        seed: of everything random.
        preset: of the run.
        model: folder or Hub id; None is the embedded demo.
        data: file, folder or Hub id; None is the embedded demo's.
        vary: the settings that the experiment goes through, at this cell's values.
        options: further settings, ``key=value``.
    """

    experiment: str
    backbone: str
    task: str
    method: str
    seed: int
    preset: str | None = None
    model: str | None = None
    data: str | None = None
    vary: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """A readable name that differs when anything differs."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:10]
        name = "".join(letter if letter.isalnum() else "-" for letter in self.experiment)[:40]
        return f"{name}.{self.method}.seed{self.seed}.{digest}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "options": list(self.options)}

    def arguments(self) -> list[str]:
        """The arguments of ``zinit train``, but for where the run goes."""
        named = {"task": self.task, "preset": self.preset, "model": self.model, "data": self.data, "seed": self.seed}
        return [
            *("--backbone", self.backbone),
            *(part for name, value in named.items() if value is not None for part in (f"--{name}", str(value))),
            *(part for option in self.all_options() for part in ("-o", option)),
        ]

    def all_options(self) -> list[str]:
        """The method, the options and the values of what varies, as options of ``zinit train``."""
        varied = (f"{key}={_toml(value)}" for key, value in self.vary.items())
        return [f"method={self.method}", *self.options, *varied]

    def command(self) -> str:
        """What a user would type to repeat this cell."""
        return shlex.join(["zinit", "train", *self.arguments()])


def _toml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


Options = tuple[str, ...]
Vary = Annotated[
    dict[str, Annotated[list[Any], MinLen(1)]],
    Words('a table that maps a setting to a list of values, such as {"prefix.layers" = [1, 2]}'),
]


@dataclass(frozen=True, kw_only=True)
class Selection(JsonConfig):
    """Settings to choose among, by the metric on other data, before the final runs (first seed only).

    The last evaluation counts; ties go to the combination that comes first.

    Args:
        vary: the settings, all combinations: {"train.learning_rate": [1e-3, 1e-2]}.
        options: further settings of the runs that choose: ["task.split=train800"].
    """

    vary: Vary = field(default_factory=dict)
    options: Options = ()


@dataclass(frozen=True, kw_only=True)
class Experiment(JsonConfig):
    """A table of the benchmark: one backbone and task, several methods.

    Args:
        name: unique in the benchmark.
        backbone: registered name.
        task: registered name; None is the backbone's own.
        preset: of its runs; None is the task's demo, where there is no model.
        model: folder or Hub id.
        data: file, folder or Hub id.
        methods: registered names; none are the benchmark's.
        seeds: none are the benchmark's.
        metric: the one figure to compare, as ``metrics.json`` names it.
        options: further settings of all its runs.
        method_options: further settings by method: {"full": ["train.learning_rate=1e-4"]}.
        vary: settings to go through, all combinations: {"prefix.layers": [1, 2, 4]}.
        select: settings to choose before the final runs; empty chooses none.
        note: a sentence for the report.
    """

    called = "an experiment"

    name: Name
    backbone: Name
    task: str | None = None
    preset: str | None = None
    model: str | None = None
    data: str | None = None
    methods: tuple[Name, ...] = ()
    seeds: tuple[Seed, ...] = ()
    metric: Name = "accuracy"
    options: Options = ()
    method_options: dict[str, list[str]] = field(default_factory=dict)
    vary: Vary = field(default_factory=dict)
    select: Selection = field(default_factory=Selection)
    note: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in (*self.methods, *self.method_options):
            METHODS.where(method)

    @property
    def selects(self) -> bool:
        """Whether settings are chosen before the final runs."""
        return self.select != Selection()

    def cells(self, *, chosen: dict[str, tuple[str, ...]] | None = None) -> Iterator[Cell]:
        """The final runs, seed by seed.

        Args:
            chosen: by method and data combination (see `choice_key`), what `select` chose.
        """
        for seed, values, method in itertools.product(self.seeds, combinations(self.vary), self.methods):
            cell = self._cell(method, seed, values)
            if self.selects:
                cell = replace(cell, options=(*cell.options, *(chosen or {}).get(choice_key(method, values), ())))
            yield cell

    def selection_cells(self) -> Iterator[Cell]:
        """The runs that settings are chosen by."""
        if not self.selects:
            return
        for values, method, tried in itertools.product(
            combinations(self.vary), self.methods, combinations(self.select.vary)
        ):
            cell = self._cell(method, self.seeds[0], values)
            trial = (f"{key}={_toml(value)}" for key, value in tried.items())
            options = (*cell.options, *self.select.options, *trial)
            yield replace(cell, experiment=f"{self.name} (selection)", options=options)

    def _cell(self, method: str, seed: int, values: dict[str, Any]) -> Cell:
        return Cell(
            experiment=self.name,
            backbone=self.backbone,
            task=str(self.task),
            method=method,
            seed=seed,
            preset=self.preset,
            model=self.model,
            data=self.data,
            vary=values,
            options=(*self.options, *self.method_options.get(method, ())),
        )


def combinations(vary: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """[{"a": 1, "b": 1}, {"a": 1, "b": 2}, ...]; one empty combination of nothing."""
    return [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def choice_key(method: str, values: dict[str, Any]) -> str:
    """What a selection is made for."""
    return json.dumps([method, values], sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All experiments.

    Attributes:
        experiments: in the order of the report.
        description: a sentence.
        demo: whether any of it runs on embedded demo models.
    """

    experiments: tuple[Experiment, ...]
    description: str = ""

    @property
    def demo(self) -> bool:
        return any(experiment.model is None for experiment in self.experiments)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the record."""
        return {"description": self.description, "experiments": [e.to_dict() for e in self.experiments]}

    def check(self) -> None:
        """Every cell's settings are complete and known, before anything runs.

        Raises:
            ConfigError: naming the experiment.
        """
        for experiment in self.experiments:
            for cell in [*experiment.selection_cells(), *experiment.cells()]:
                try:
                    resolve(
                        backbone=cell.backbone,
                        task=cell.task,
                        model=cell.model,
                        data=cell.data,
                        preset=cell.preset,
                        seed=cell.seed,
                        options=cell.all_options(),
                    )
                except ConfigError as error:
                    raise ConfigError(f"experiment {experiment.name!r}: {error}") from error


def list_bench_presets() -> dict[str, str]:
    """{"demo": its description, ...}."""
    files = sorted(file.name for file in PRESETS.iterdir() if file.name.endswith(".toml"))
    return {name.removesuffix(".toml"): read_config_file(str(PRESETS / name)).get("description", "") for name in files}


@dataclass(frozen=True, kw_only=True)
class BenchmarkFile(JsonConfig):
    """A benchmark's TOML file.

    Args:
        description: a sentence.
        methods: of the experiments that name none.
        seeds: likewise.
        experiment: the tables, see `Experiment`.
    """

    called = "a benchmark"

    description: str = ""
    methods: tuple[Name, ...] = (REFERENCE,)
    seeds: tuple[Seed, ...] = (0,)
    experiment: Annotated[tuple[dict[str, Any], ...], Words("one or more [[experiment]] tables")] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.experiment:
            raise ConfigError("a benchmark holds one or more [[experiment]] tables; got none.")


def make_benchmark(
    *,
    preset: str | None = None,
    config_file: str | None = None,
    backbones: Iterable[str] = (),
    tasks: Iterable[str] = (),
    methods: Iterable[str] = (),
    seeds: Iterable[int] = (),
    model: str | None = None,
    data: str | None = None,
    options: Iterable[str] = (),
) -> Benchmark:
    """A benchmark from a preset or a file, narrowed or widened by the command line.

    Without preset and file: the product of the backbones and tasks named, each the backbone's demo.

    Args:
        preset: ``zinit ls benchmarks``.
        config_file: TOML.
        backbones: keep only these (or run these).
        tasks: keep only these (or run these).
        methods: instead of those of the file.
        seeds: instead of those of the file.
        model: for all experiments.
        data: for all experiments.
        options: further settings of all runs.

    Raises:
        ConfigError: naming what is unknown or missing.
    """
    backbones, tasks, options = list(backbones), list(tasks), list(options)
    path = _path(preset, config_file)
    where = path or "the command line"
    overrides = {"methods": list(methods), "seeds": list(seeds), "model": model, "data": data}
    overrides = {name: value for name, value in overrides.items() if value}
    document = read_config_file(path) if path else _product(backbones, tasks)
    try:
        file = BenchmarkFile.from_dict(document)
        experiments = [_experiment(entry, file, overrides, options) for entry in file.experiment]
        _check_names(experiments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    kept = [e for e in experiments if e.backbone in (backbones or [e.backbone]) and e.task in (tasks or [e.task])]
    if not kept:
        raise ConfigError(f"{where} has no experiment for {', '.join([*backbones, *tasks])}.")
    return Benchmark(experiments=tuple(kept), description=file.description)


def _path(preset: str | None, config_file: str | None) -> str | None:
    """The file to read; None where neither is named."""
    if preset and config_file:
        raise ConfigError("name a preset or a config file, not both.")
    if preset is None:
        return config_file
    if preset not in list_bench_presets():
        raise ConfigError(f"no benchmark preset named {preset!r}.{did_you_mean(preset, list_bench_presets())}")
    return str(PRESETS / f"{preset}.toml")


def _product(backbones: list[str], tasks: list[str]) -> dict[str, Any]:
    """A file's content with an experiment for each backbone and task."""
    if not backbones:
        raise ConfigError("say what to run: --preset demo, --config FILE, or --backbone NAME (repeatable).")
    return {
        "experiment": [
            {"name": f"{backbone} {task}", "backbone": backbone, "task": task}
            if task
            else {"name": backbone, "backbone": backbone}
            for backbone, task in itertools.product(backbones, tasks or [None])
        ]
    }


def _experiment(
    entry: dict[str, Any], file: BenchmarkFile, overrides: dict[str, Any], options: list[str]
) -> Experiment:
    """An experiment with the defaults of its file, of its task and of the demo filled in."""
    own = {name: value for name, value in entry.items() if value or name not in ("methods", "seeds")}
    shared = {"methods": file.methods, "seeds": file.seeds}
    try:
        experiment = Experiment.from_dict({**shared, **own, **overrides})
    except ConfigError as error:
        raise ConfigError(f"experiment {shown(entry.get('name'))}: {error}") from error
    task = experiment.task or str(BACKBONES.get(experiment.backbone).default_task)
    preset = experiment.preset
    if preset is None and experiment.model is None:
        preset = f"{task}/demo"
    return replace(
        experiment,
        task=task,
        metric=experiment.metric if "metric" in entry else getattr(TASKS.get(task), "metric", "accuracy"),
        preset=preset,
        model=absolute_path(experiment.model),
        data=absolute_path(experiment.data),
        options=(*experiment.options, *options),
    )


def _check_names(experiments: list[Experiment]) -> None:
    names = [experiment.name for experiment in experiments]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two experiments are named {double[0]!r}.")
