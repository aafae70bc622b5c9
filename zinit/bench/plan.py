"""What a benchmark runs: experiments from a TOML file or options."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from importlib import resources
from typing import Annotated, Any

from zinit.backbones import BACKBONES
from zinit.bench.cells import ALL, START, Cell, Experiment, Options, choice_key
from zinit.config import JsonConfig
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.registry import did_you_mean
from zinit.runs.presets import read_config_file
from zinit.runs.settings import absolute_path
from zinit.tasks import TASKS
from zinit.validation import Name, Seed, Words, shown

PRESETS = resources.files("zinit.bench") / "presets"
REFERENCE = "zero-init"  # what other methods are compared with, seed by seed


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

    def cells(self, chosen: Mapping[str, Mapping[str, Options]] | None = None) -> Iterator[tuple[Experiment, Cell]]:
        """The final runs. One that goes on from another's weights names it: ``warm_start={runs}/ID``.

        Args:
            chosen: by experiment, what was chosen for it (see `Experiment.cells`); runs for which nothing was, and
                those that go on from them, are left out. None leaves out none, and chooses nothing.
        """
        made: dict[tuple[str, str, int], Cell] = {}
        for experiment in self.experiments:
            own = None if chosen is None else chosen[experiment.select.like or experiment.name]
            for cell in experiment.cells(chosen=own):
                key = choice_key(cell.name, cell.vary)
                start = None if experiment.after is None else made.get((experiment.after, key, cell.seed))
                if (own is not None and experiment.selects and key not in own) or (experiment.after and start is None):
                    continue
                if start is not None:
                    cell = replace(cell, options=(*cell.options, f"{START}{start.id}"))
                made[experiment.name, key, cell.seed] = cell
                yield experiment, cell

    def check(self) -> None:
        """Every cell's settings are complete and known, before anything runs.

        Raises:
            ConfigError: naming the experiment.
        """
        for experiment in self.experiments:
            try:
                experiment.check_rates()
                self._check_others(experiment)
                own = (cell for of, cell in self.cells() if of is experiment)
                for cell in [*experiment.selection_cells(), *own]:
                    cell.resolve()
            except ConfigError as error:
                raise ConfigError(f"experiment {experiment.name!r}: {error}") from error

    def _check_others(self, experiment: Experiment) -> None:
        """The experiments that one names are above it, with all of its methods, seeds and settings."""
        above = {e.name: e for e in self.experiments[: self.experiments.index(experiment)]}
        for role, name in (("after", experiment.after), ("select.like", experiment.select.like)):
            if name is None:
                continue
            if name not in above:
                raise ConfigError(f"{role} names an experiment above it: {', '.join(above) or 'none'}; got {name!r}.")
            other = above[name]
            lacking = {*experiment.methods} - {*other.methods} or {*experiment.seeds} - {*other.seeds}
            if lacking or experiment.vary != other.vary:
                raise ConfigError(
                    f"{role}={name!r} must have the same vary, and all methods and seeds; it lacks "
                    f"{', '.join(map(str, sorted(lacking, key=str))) or experiment.vary}."
                )


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
        options: further settings of all runs; ``METHOD:key=value`` of those by one method.

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
        made = [_experiment(entry, file, overrides, options) for entry in file.experiment]
        experiments = [experiment for experiment in made if experiment is not None]
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
) -> Experiment | None:
    """An experiment with the defaults of its file, of its task and of the demo filled in.

    None where only methods are asked for that are variants of other experiments.
    """
    elsewhere = {name for other in file.experiment for name in _variants(other)} - {*_variants(entry)}
    if methods := overrides.get("methods"):
        overrides = {**overrides, "methods": [name for name in methods if name not in elsewhere]}
        if not overrides["methods"]:
            return None
    own = {name: value for name, value in entry.items() if value or name not in ("methods", "seeds")}
    shared = {"methods": file.methods, "seeds": file.seeds}
    try:
        experiment = Experiment.from_dict({**shared, **own, **overrides})
    except ConfigError as error:
        raise ConfigError(f"experiment {shown(entry.get('name'))}: {error}") from error
    task = experiment.task or str(BACKBONES.fact(experiment.backbone, "default_task"))
    preset = experiment.preset
    if preset is None and experiment.model is None:
        preset = f"{task}/demo"
    own_options = {method: list(said) for method, said in experiment.method_options.items()}
    shared_options: list[str] = []
    for option in options:
        method, said = _of_method(option, experiment, elsewhere)
        if method in elsewhere:
            continue
        (shared_options if method is None else own_options.setdefault(method, [])).append(said)
    return replace(
        experiment,
        task=task,
        metric=experiment.metric if "metric" in entry else getattr(TASKS.get(task), "metric", "accuracy"),
        preset=preset,
        model=absolute_path(experiment.model),
        data=absolute_path(experiment.data),
        options=(*experiment.options, *shared_options),
        method_options=own_options,
    )


def _variants(entry: dict[str, Any]) -> dict[str, Any]:
    """The variants of a table that is not checked yet."""
    return found if isinstance(found := entry.get("variants", {}), dict) else {}


def _of_method(option: str, experiment: Experiment, elsewhere: Set[str]) -> tuple[str | None, str]:
    """The method that an option is for and the bare option: ``lora:train.learning_rate=1e-4``."""
    method, colon, said = option.partition(":")
    if not colon or "=" in method:
        return None, option
    if method != ALL and method not in elsewhere:
        METHODS.where(experiment.method_of(method))
    return method, said


def _check_names(experiments: list[Experiment]) -> None:
    names = [experiment.name for experiment in experiments]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two experiments are named {double[0]!r}.")
