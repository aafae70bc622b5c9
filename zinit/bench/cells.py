"""Experiments, taken apart into cells. One cell is one run."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from annotated_types import MinLen

from zinit.config import HEAD, ROLES, WEIGHTS, JsonConfig, PrefixConfig
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.methods.rates import rate_settings, shares_rates
from zinit.registry import did_you_mean
from zinit.runs.config import DEFAULT_METHOD, PARTS, RunConfig, read_tables
from zinit.runs.presets import PROMPTS, read_preset
from zinit.runs.settings import resolve
from zinit.train.config import TrainConfig
from zinit.validation import Name, PositiveFloat, Seed, Words

ALL = "all"  # in the place of a method's name: of every method
MAIN = "main"  # the only group of parameters, see `zinit.tasks.base`
OWN = "own"  # in the place of a role: every one but the head
SELECTION = " (selection)"  # behind the experiment's name, in the cells that settings are chosen by
START = "warm_start={runs}/"  # the option of a run that goes on from another of the benchmark; its name follows
RATES = ("learning_rate", "train.learning_rate")  # a setting that is one method's, unless all are named


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
        variant: its name in the table, where that is not the method's; see `Experiment`.
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
    variant: str | None = None

    @property
    def name(self) -> str:
        """Of its row."""
        return self.variant or self.method

    @property
    def id(self) -> str:
        """A readable name that differs when anything differs."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:10]
        row = _as_file(self.variant) if self.variant else self.method
        return f"{_as_file(self.experiment)}.{row}.seed{self.seed}.{digest}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = {**vars(self), "options": list(self.options)}
        return values if self.variant else {name: value for name, value in values.items() if name != "variant"}

    @property
    def after(self) -> str | None:
        """The cell from whose weights it starts; None starts afresh."""
        return next((said.removeprefix(START) for said in self.options if said.startswith(START)), None)

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
        return [f"method={self.method}", *self._default_prompts(), *self.options, *varied]

    def _default_prompts(self) -> Options:
        """Without a preset what prompts are is said, or ``zinit train`` would choose it for the model."""
        said = {option.partition("=")[0] for option in self.options} | self.vary.keys()
        parts = PARTS in METHODS.fact(self.method, "defaults") or any(name.startswith(f"{PARTS}.") for name in said)
        if self.preset is not None or parts or not METHODS.fact(self.method, "takes_parts") or said & PROMPTS:
            return ()
        return (f"prefix.parametrization={PrefixConfig.parametrization}",)

    def resolve(self) -> RunConfig:
        """The settings of its run.

        Raises:
            ConfigError: if one is wrong or missing.
        """
        settings, _ = resolve(
            backbone=self.backbone,
            task=self.task,
            model=self.model,
            data=self.data,
            preset=self.preset,
            seed=self.seed,
            options=self.all_options(),
        )
        return settings

    def at(self, places: Mapping[str, str]) -> Cell:
        """The cell with the words ``{name}`` of its model, data and options replaced by places on this machine.

        The name of a cell is made without them, so that figures from elsewhere count here.

        Args:
            places: {"models": "/where/they/are"}.
        """

        def placed(text: str) -> str:
            return functools.reduce(lambda found, name: found.replace(f"{{{name}}}", places[name]), places, text)

        sources = {name: text and placed(text) for name, text in (("model", self.model), ("data", self.data))}
        return replace(self, **sources, options=tuple(map(placed, self.options)))

    def command(self) -> str:
        """What a user would type to repeat this cell."""
        return shlex.join(["zinit", "train", *self.arguments()])


def _as_file(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)[:40]


def _toml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


Options = tuple[str, ...]
Vary = Annotated[
    dict[str, Annotated[list[Any], MinLen(1)]],
    Words('a table that maps a setting to a list of values, such as {"prefix.layers" = [1, 2]}'),
]


Factors = Annotated[
    dict[str, Annotated[list[PositiveFloat], MinLen(1)]],
    Words('a table that maps "own" or a role to a list of factors, such as {own = [0.3, 1, 3], head = [1, 3]}'),
]


@dataclass(frozen=True, kw_only=True)
class Selection(JsonConfig):
    """Settings to choose among, by the metric on other data, before the final runs (first seed only).

    The last evaluation counts; ties go to the combination that comes first.

    Args:
        vary: the settings, all combinations: {"train.learning_rate": [1e-3, 1e-2]}.
        rates: factors on the rates that each method begins with, all combinations of them too: of "own", every role
            but the head, and of single roles such as "gates" or "head". What a method does not train is left out.
        options: further settings of the runs that choose: ["task.split=train800"].
        metric: what is chosen by; None is the experiment's.
        like: another experiment above, whose choice is taken; nothing is tried here then.
    """

    vary: Vary = field(default_factory=dict)
    rates: Factors = field(default_factory=dict)
    options: Options = ()
    metric: Name | None = None
    like: Name | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.like is not None and (self.vary or self.rates):
            raise ConfigError(f"select takes what {self.like!r} chose, or tries settings of its own; not both.")
        for role in self.rates:
            if role not in (OWN, *ROLES):
                raise ConfigError(f"select.rates has no role {role!r}.{did_you_mean(role, (OWN, *ROLES))}")

    def trials(self, method: str) -> list[tuple[dict[str, Any], dict[str, float]]]:
        """What is tried: values of settings, and factors on rates.

        Args:
            method: registered name.
        """
        trained = set(METHODS.fact(method, "default_rates"))
        known = trained | ({OWN} if trained - {HEAD} else set())
        rates = {role: factors for role, factors in self.rates.items() if role in known}
        return list(itertools.product(combinations(self.vary), combinations(rates)))


def rate_options(start: TrainConfig, factors: dict[str, float]) -> Options:
    """Rates of a run multiplied by role, as its options.

    Args:
        start: the rates it begins with.
        factors: see `Selection.rates`.
    """
    if not factors:
        return ()
    own = factors.get(OWN, 1.0)
    before = {role: start.rates.factor(MAIN, role) for role in ROLES}
    after = {role: value * factors.get(role, 1.0) / (own if role == HEAD else 1.0) for role, value in before.items()}
    changed = {role for role in ROLES if after[role] != before[role]}
    if start.rates.weights is None and HEAD in changed:
        changed.add(WEIGHTS)  # which would follow the head otherwise
    peak = () if own == 1.0 else (f"train.learning_rate={start.learning_rate * own:.6g}",)
    return (*peak, *(f"train.rates.{role}={after[role]:.6g}" for role in ROLES if role in changed))


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
        methods: registered names or variants; none are the benchmark's.
        variants: the same methods in further rows, with settings of their own in ``method_options`` on top of their
            method's, and rates chosen for them: {"lora-2": "lora"}.
        seeds: none are the benchmark's.
        metric: the one figure to compare, as ``metrics.json`` names it.
        options: further settings of all its runs.
        method_options: further settings by method, or of "all": {"full": ["train.learning_rate=1e-4"]}. A learning
            rate belongs here: a method that is given none trains at its own (`zinit.methods.base.Method`).
        vary: settings to go through, all combinations: {"prefix.layers": [1, 2, 4]}.
        select: settings to choose before the final runs; empty chooses none.
        after: another experiment above: each run starts from the weights of its run by the same method and seed.
        columns: further figures for the table, as ``metrics.json`` names them; of a control with its name in front,
            "shuffled.exact_match".
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
    variants: dict[Name, Name] = field(default_factory=dict)
    seeds: tuple[Seed, ...] = ()
    metric: Name = "accuracy"
    options: Options = ()
    method_options: dict[str, list[str]] = field(default_factory=dict)
    vary: Vary = field(default_factory=dict)
    select: Selection = field(default_factory=Selection)
    after: Name | None = None
    columns: tuple[Name, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, method in self.variants.items():
            METHODS.where(method)
            if name in (ALL, *METHODS):
                raise ConfigError(f"variants names {name!r}, which is taken. Take another name.")
        for name in (*self.methods, *(name for name in self.method_options if name != ALL)):
            METHODS.where(self.method_of(name))
        if self.after is not None and self.selects and self.select.like is None:
            raise ConfigError(
                f"runs that start from those of {self.after!r} choose no settings of their own: take another "
                f"experiment's, select = {{ like = NAME }}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Without variants as it was before there were any: a search that was begun then goes on."""
        return {name: value for name, value in super().to_dict().items() if name != "variants" or value}

    def method_of(self, name: str) -> str:
        """The method that a row's name stands for."""
        return self.variants.get(name, name)

    @property
    def selects(self) -> bool:
        """Whether settings are chosen before the final runs."""
        return self.select != Selection()

    def cells(self, *, chosen: Mapping[str, Options] | None = None) -> Iterator[Cell]:
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
        for trials in self.trials().values():
            yield from (cell for cell, _ in trials)

    def trials(self) -> dict[str, list[tuple[Cell, Options]]]:
        """By what is chosen for (see `choice_key`): the runs to choose by, and the settings that each stands for."""
        if not self.selects or self.select.like is not None:
            return {}
        return {
            choice_key(method, values): list(self._trials(method, values))
            for values, method in itertools.product(combinations(self.vary), self.methods)
        }

    def _trials(self, method: str, values: dict[str, Any]) -> Iterator[tuple[Cell, Options]]:
        for tried, factors in self.select.trials(self.method_of(method)):
            yield self.trial(method, values, tried, factors)

    def trial(
        self, method: str, values: dict[str, Any], tried: Mapping[str, Any], factors: dict[str, float]
    ) -> tuple[Cell, Options]:
        """A run to choose by, and the settings that it stands for.

        Args:
            method: registered name or variant.
            values: of what the experiment goes through.
            tried: settings.
            factors: on rates, see `Selection.rates`.
        """
        cell = self._cell(method, self.seeds[0], values)
        varied = tuple(f"{key}={_toml(value)}" for key, value in tried.items())
        start = replace(cell, options=(*cell.options, *varied)).resolve().train if factors else TrainConfig()
        said = (*varied, *rate_options(start, factors))
        options = (*cell.options, *self.select.options, *said)
        return replace(cell, experiment=f"{self.name}{SELECTION}", options=options), said

    def _cell(self, name: str, seed: int, values: dict[str, Any]) -> Cell:
        method = self.method_of(name)
        own = (said for of in dict.fromkeys((ALL, method, name)) for said in self.method_options.get(of, ()))
        options = (*self.options, *own)
        given = [*options, *self.vary, *self.select.vary]
        rated = any(option.partition("=")[0] in RATES for option in given)
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
            options=options if rated else (*self._default_rates(method), *options),
            variant=None if name == method else name,
        )

    def _default_rates(self, method: str) -> Options:
        """A method's own learning rates, where the preset's are another's: a cell's name and command hold them.

        Without a preset too, or ``zinit train`` would choose rates for the model, and factors would be on others.
        """
        preset: dict[str, Any] = {}
        if self.preset is not None:
            preset = read_preset(self.preset if "/" in self.preset else f"{self.task}/{self.preset}")
        own = METHODS.fact(method, "default_rates")
        of_preset = read_tables(preset)["method"].get("name", DEFAULT_METHOD)
        if self.preset is not None and shares_rates(own, METHODS.fact(of_preset, "default_rates")):
            return ()
        settings = rate_settings(own)
        factors = settings.pop("rates", {})
        return (
            *(f"train.{name}={value!r}" for name, value in settings.items()),
            *(f"train.rates.{role}={factor!r}" for role, factor in factors.items()),
        )

    def check_rates(self) -> None:
        """A learning rate is said for one method, or for all by that word.

        Raises:
            ConfigError: naming the rate and the methods.
        """
        methods = map(self.method_of, self.methods)
        groups = {tuple(METHODS.fact(method, "default_rates").items()) for method in methods} - {()}
        bare = [option for option in (*self.options, *self.select.options) if option.partition("=")[0] in RATES]
        if bare and len(groups) > 1:
            raise ConfigError(
                f"{bare[0]} is a rate for one method, and there are {', '.join(self.methods)}. Say whose it is: "
                f"-o {self.methods[0]}:{bare[0]}, or -o {ALL}:{bare[0]} for all (in a file: method_options = "
                f'{{ {self.methods[0]} = ["{bare[0]}"] }}).'
            )


def combinations(vary: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """[{"a": 1, "b": 1}, {"a": 1, "b": 2}, ...]; one empty combination of nothing."""
    return [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def choice_key(method: str, values: dict[str, Any]) -> str:
    """What a selection is made for."""
    return json.dumps([method, values], sort_keys=True)
