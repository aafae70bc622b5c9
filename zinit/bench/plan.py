"""What a benchmark runs: experiments from a TOML file or options, taken apart into cells. One cell is one run."""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from zinit.config import JsonConfig
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.registry import did_you_mean
from zinit.runs.presets import read_config_file
from zinit.runs.settings import absolute_path, resolve

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
        options = [
            f"method={self.method}",
            *self.options,
            *(f"{key}={_toml(value)}" for key, value in self.vary.items()),
        ]
        return [
            *("--backbone", self.backbone),
            *(part for name, value in named.items() if value is not None for part in (f"--{name}", str(value))),
            *(part for option in options for part in ("-o", option)),
        ]

    def command(self) -> str:
        """What a user would type to repeat this cell."""
        return shlex.join(["zinit", "train", *self.arguments()])


def _toml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


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
        select: settings to choose among by the metric on other data before the final runs (first seed only):
            {"vary": {"train.learning_rate": [...]}, "options": ["task.split=train800"]}. The last evaluation counts;
            ties go to the combination that comes first.
        note: a sentence for the report.
    """

    name: str
    backbone: str
    task: str | None = None
    preset: str | None = None
    model: str | None = None
    data: str | None = None
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    metric: str = "accuracy"
    options: tuple[str, ...] = ()
    method_options: dict[str, list[str]] = field(default_factory=dict)
    vary: dict[str, list[Any]] = field(default_factory=dict)
    select: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"an experiment needs a name; got {self.name!r}.")
        for method in (*self.methods, *self.method_options):
            METHODS.where(method)
        for where, vary in (("vary", self.vary), ("select.vary", self.select.get("vary", {}))):
            if not isinstance(vary, dict) or not all(isinstance(values, list) and values for values in vary.values()):
                raise ConfigError(
                    f"experiment {self.name!r}: {where} maps a setting to a list of values, such as "
                    f'{{"prefix.layers" = [1, 2]}}; got {vary!r}.'
                )
        if unknown := sorted(set(self.select) - {"vary", "options"}):
            raise ConfigError(f"experiment {self.name!r}: select takes vary and options; got {', '.join(unknown)}.")

    def cells(self, *, chosen: dict[str, tuple[str, ...]] | None = None) -> Iterator[Cell]:
        """The final runs, seed by seed.

        Args:
            chosen: by method and data combination (see `choice_key`), what `select` came to.
        """
        for seed, values, method in itertools.product(self.seeds, combinations(self.vary), self.methods):
            cell = self._cell(method, seed, values)
            if self.select:
                cell = replace(cell, options=(*cell.options, *(chosen or {}).get(choice_key(method, values), ())))
            yield cell

    def selection_cells(self) -> Iterator[Cell]:
        """The runs that settings are chosen by."""
        if not self.select:
            return
        for values, method, tried in itertools.product(
            combinations(self.vary), self.methods, combinations(self.select.get("vary", {}))
        ):
            cell = self._cell(method, self.seeds[0], values)
            trial = (f"{key}={_toml(value)}" for key, value in tried.items())
            options = (*cell.options, *self.select.get("options", ()), *trial)
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
                        options=cell.arguments()[cell.arguments().index("-o") + 1 :: 2],
                    )
                except ConfigError as error:
                    raise ConfigError(f"experiment {experiment.name!r}: {error}") from error


def list_bench_presets() -> dict[str, str]:
    """{"demo": its description, ...}."""
    files = sorted(file.name for file in PRESETS.iterdir() if file.name.endswith(".toml"))
    return {name.removesuffix(".toml"): read_config_file(str(PRESETS / name)).get("description", "") for name in files}


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
    """A benchmark from a preset or a file, narrowed or widened by what was said on the command line.

    Without preset and file, the product of what was named: the demo of every backbone named.

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
    backbones, tasks, methods, seeds = list(backbones), list(tasks), list(methods), list(seeds)
    if preset and config_file:
        raise ConfigError("name a preset or a config file, not both.")
    if preset is not None and preset not in list_bench_presets():
        raise ConfigError(f"no benchmark preset named {preset!r}.{did_you_mean(preset, list_bench_presets())}")
    if preset:
        config_file = str(PRESETS / f"{preset}.toml")
    if config_file:
        document = read_config_file(config_file)
    elif backbones:
        names = [f"{backbone} {task}" if task else backbone for backbone in backbones for task in tasks or [None]]
        pairs = itertools.product(backbones, tasks or [None])
        document = {
            "experiment": [
                {"name": name, "backbone": backbone, **({"task": task} if task else {})}
                for name, (backbone, task) in zip(names, pairs, strict=True)
            ]
        }
        backbones, tasks = [], []
    else:
        raise ConfigError("say what to run: --preset demo, --config FILE, or --backbone NAME (repeatable).")
    where = config_file or "the command line"
    known = {"description", "methods", "seeds", "experiment"}
    for name in document:
        if name not in known:
            raise ConfigError(f"{where}: there is no setting {name!r} in a benchmark.{did_you_mean(name, known)}")
    entries = document.get("experiment", [])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{where}: a benchmark holds one or more [[experiment]] tables.")
    shared = {"methods": document.get("methods", [REFERENCE]), "seeds": document.get("seeds", [0])}
    said = {"methods": methods, "seeds": seeds, "model": model, "data": data}
    experiments = []
    for entry in entries:
        try:
            experiment = _experiment(entry, shared, {name: value for name, value in said.items() if value}, options)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        if (not backbones or experiment.backbone in backbones) and (not tasks or experiment.task in tasks):
            experiments.append(experiment)
    if not experiments:
        raise ConfigError(f"{where} has no experiment for {', '.join([*backbones, *tasks])}.")
    names = [experiment.name for experiment in experiments]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{where}: two experiments are named {double[0]!r}.")
    return Benchmark(experiments=tuple(experiments), description=str(document.get("description", "")))


def _experiment(
    entry: dict[str, Any], shared: dict[str, Any], said: dict[str, Any], options: Iterable[str]
) -> Experiment:
    from zinit.backbones import BACKBONES
    from zinit.tasks import TASKS

    experiment = Experiment.from_dict({**shared, **entry, **said})
    backbone = BACKBONES.get(experiment.backbone)
    task = experiment.task or str(backbone.default_task)
    metric = experiment.metric if "metric" in entry else getattr(TASKS.get(task), "metric", "accuracy")
    preset = experiment.preset
    if preset is None and experiment.model is None:
        preset = f"{task}/demo"
    if not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in experiment.seeds):
        raise ConfigError(f"experiment {experiment.name!r}: seeds are whole numbers; got {list(experiment.seeds)!r}.")
    return replace(
        experiment,
        task=task,
        metric=metric,
        preset=preset,
        model=absolute_path(experiment.model),
        data=absolute_path(experiment.data),
        options=(*experiment.options, *options),
    )
