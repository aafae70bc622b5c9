"""``report.html``: one page about one run, without scripts and without the network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zinit.errors import ConfigError, DataError
from zinit.files import write_atomically
from zinit.runs import plots
from zinit.runs.command import command_of
from zinit.runs.config import RunConfig
from zinit.runs.record import RECORD, RESULTS, Record, Results
from zinit.tasks import TASKS
from zinit.tasks.base import Task
from zinit.train.events import Ended, Evaluated, Event, Gates, PlanMade, Resumed, Step, Stopped, number, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS, SAMPLES, LABELS = 120, 50, 16  # at most: of a heat map over time, side by side, curves with a name
CURVES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "examples_per_second": "examples per second",
    "tokens_per_second": "tokens per second",
}
RECORDED = ("loss", "examples", "seconds", *CURVES)  # of a step
NO_CURVE = ("epoch", "loss", "count", "seconds")
PICTURE = "data:image/jpeg;base64,"  # how what `zinit.data.images.thumbnail` makes begins: nothing else is shown
NEGATIVE, POSITIVE = (0.16, 0.47, 0.84), (0.90, 0.38, 0.08)  # gates
DEPTH = ["#3987e5", "#b07cc6", "#e8743b"]  # layers, lowest to topmost; readable on white and on black


@dataclass
class _Log:
    """The numbers of ``log.jsonl`` by step. A resumed run repeats steps: the last event of a step counts."""

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    evals: dict[int, dict[str, float]] = field(default_factory=dict)
    gates: dict[int, Mapping[str, list[float]]] = field(default_factory=dict)
    planned: int | None = None
    state: type[Event] | None = None
    resumed: int = 0
    unreadable: int = 0

    @classmethod
    def read(cls, path: Path) -> _Log:
        """Every line that can be read."""
        found = read_log(path)
        log = cls(unreadable=found.unreadable)
        for event in found.events:
            log.add(event)
        return log

    def add(self, event: Event) -> None:
        """Takes one event."""
        match event:
            case Step():
                self.steps[event.step] = {name: getattr(event, name) for name in RECORDED}
            case Evaluated():
                numbers = {name: value for name, value in event.metrics.items() if name not in NO_CURVE}
                self.evals[event.step] = numbers | {"loss": event.metrics.get("loss", math.nan)}
            case Gates():
                self.gates[event.step] = event.gates
            case PlanMade():
                self.planned = event.steps
            case Resumed() | Stopped() | Ended():
                self.state = type(event)
                self.resumed += isinstance(event, Resumed)

    def curve(self, name: str, *, evals: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The steps in order, and the values there."""
        records = self.evals if evals else self.steps
        steps = sorted(step for step, record in records.items() if name in record)
        return np.array(steps, dtype=float), np.array([records[step][name] for step in steps], dtype=float)

    def status(self) -> str:
        """How far the run came, in a sentence."""
        texts: dict[Any, str] = {Ended: "Finished", Stopped: "Stopped, can be resumed"}
        text = texts.get(self.state, "Killed or still running")
        again = f" Resumed {self.resumed} time{'s' * (self.resumed > 1)}." if self.resumed else ""
        return f"{text}: {max(self.steps, default=0)}{f' of {self.planned}' if self.planned else ''} steps.{again}"


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into a run's directory, from what is there: a run that was killed has one too.

    Args:
        run_dir: holds ``run.json``, ``log.jsonl`` and, once evaluated, ``metrics.json``.

    Returns:
        The report's path.

    Raises:
        DataError: if the directory holds none of the three.
    """
    run_dir, notes = Path(run_dir), []
    if not any((run_dir / name).is_file() for name in (RECORD, RESULTS, "log.jsonl")):
        raise DataError(f"{run_dir} holds no run: neither run.json nor log.jsonl nor metrics.json is there.")
    record = _record(run_dir / RECORD, notes)
    results = Results.from_dict(_read(run_dir / RESULTS, notes))
    log = _Log.read(run_dir / "log.jsonl")
    notes += _notes_on(log)
    page = render_page(record, results, log, notes)
    write_atomically(run_dir / "report.html", page.encode("utf-8", "replace"))
    return run_dir / "report.html"


def render_page(record: Record, results: Results, log: _Log, notes: list[str]) -> str:
    """The page as HTML."""
    with plots.style():
        curves, gates = _curves(log), _gates(log)
    task: type[Task] = TASKS.get(str(record.task)) if record.task in TASKS else Task
    models, rows = _table(results, task)
    unset = vars(Record())
    settings = {name: value for name, value in record.to_dict().items() if value != unset[name]}
    return plots.render(
        "report.html.jinja",
        run=settings,
        nested={name: dict(_flat(value)) for name, value in settings.items() if isinstance(value, dict)},
        seed=record.seed if results.seed is None else results.seed,
        status=log.status(),
        totals={name: np.nansum(log.curve(name)[1]) for name in ("examples", "seconds")},
        notes=notes,
        best=results.best,
        models=models,
        rows=rows,
        better={name: way for name, *_ in rows if (way := task.direction(name))},
        counts=_dictionary(results.counts),
        curves=curves,
        gates=gates,
        samples=[_sample(sample) for sample in results.samples or [] if isinstance(sample, dict)],
        command=_command(record),
        most_samples=SAMPLES,
    )


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample as people read it: an instruction in place of the template around it; no picture that is not ours."""
    shown = {**sample, "prompt": sample.get("instruction", sample.get("prompt"))}
    if not str(shown.get("image", "")).startswith(PICTURE):
        shown.pop("image", None)
    return shown


def _command(record: Record) -> str | None:
    """What makes the run again; None where its settings cannot be read."""
    try:
        return command_of(RunConfig.from_dict(record.config), record.preset)
    except (ConfigError, TypeError, ValueError, KeyError, AttributeError):  # the file may hold anything
        return None


def _notes_on(log: _Log) -> list[str]:
    """What a reader must know about a log."""
    notes = []
    if log.unreadable:
        notes.append(f"Lines of log.jsonl that could not be read and were left out: {log.unreadable}.")
    steps, losses = log.curve("loss")
    bad = steps[~np.isfinite(losses)]
    if len(bad):
        notes.append(f"The training loss was not finite at {len(bad)} of {len(steps)} steps, first at {bad[0]:.0f}.")
    return notes


def _record(path: Path, notes: list[str]) -> Record:
    try:
        return Record.from_dict(_read(path, notes))
    except ConfigError as error:
        notes.append(f"{path.name} could not be read: {error}")
        return Record()


def _read(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return _dictionary(json.loads(path.read_text("utf-8", "replace")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} could not be read: {error}.")
        return {}


def _table(results: Results, task: type[Task]) -> tuple[list[str], list[tuple[str, list[Any], float | None, Any]]]:
    """The evaluated models, the base first; per metric its name, values, adapted minus base, and sample count.

    The loss is over all that was held out; answers may have been generated for a part of it.
    """
    counts = _dictionary(results.counts)
    metrics = {name: dict(_flat(value)) for name, value in _dictionary(results.metrics).items() if value}
    models, rows = sorted(metrics, key=lambda name: (name != "base", name)), []
    for name in dict.fromkeys(name for model in models for name in metrics[model]):
        change = number(metrics.get("adapted", {}).get(name)) - number(metrics.get("base", {}).get(name))
        part = ("held_out", "evaluated") if task.direction(name) == "lower" else ("evaluated", "answered", "held_out")
        examples = next((counts[key] for key in part if key in counts), None)
        values = [metrics[model].get(name) for model in models]
        rows.append((name, values, None if math.isnan(change) else change, examples))
    return models, rows


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("train.learning_rate", 0.009) and so on."""
    for name, inner in _dictionary(value).items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _curves(log: _Log) -> list[tuple[str, Any]]:
    """(title, figure) for every quantity that the log has numbers for; the loss first."""
    train, held_out = log.curve("loss"), log.curve("loss", evals=True)
    span, figures = max(1, len(train[0]) // 50), []
    if np.isfinite(train[1]).any() or np.isfinite(held_out[1]).any():
        figure, axes = plots.figure(9.6, 3.4)
        plots.line(axes, *train, plots.FIRST, "training", span=span)
        plots.line(axes, *held_out, plots.SECOND, "held out", marker="o")
        axes.legend(frameon=False)
        figures.append(("loss", plots.svg(figure, "loss by step")))
    more = sorted({name for record in log.evals.values() for name in record} - {"loss"})
    first: dict[str, Any] = {"color": plots.FIRST}
    second: dict[str, Any] = {"color": plots.SECOND, "marker": "o"}
    panels: list[tuple[str, Any, dict[str, Any]]]
    panels = [(CURVES[name], log.curve(name), first | {"span": 1 if name == "lr" else span}) for name in CURVES]
    panels += [(f"held out: {n}", log.curve(n, evals=True), second) for n in more]
    for title, (x, y), style in panels:
        if np.isfinite(y).sum() > (2 if "marker" in style else 0):  # before and after alone are in the table
            figure, axes = plots.figure(4.8, 2.4)
            plots.line(axes, x, y, **style)
            figures.append((title, plots.svg(figure, f"{title} by step")))
    return figures


def _gates(log: _Log) -> list[tuple[str, Any]]:
    """(title, figure): every gate now, the mean per layer over time, and every gate over time."""
    if not any(log.gates.values()):
        return []
    from matplotlib.colors import LinearSegmentedColormap

    times = sorted(log.gates)
    times = [times[i] for i in np.unique(np.linspace(0, len(times) - 1, COLUMNS).astype(int))]
    now = times[-1]
    sites = list(dict.fromkeys(site for time in reversed(times) for site in log.gates[time]))
    names, layers = _short(sites), len(sites)
    heads = max(1, *(len(gates) for time in times for gates in log.gates[time].values()))
    cube = np.full((len(times), layers, heads), np.nan)
    for t, time in enumerate(times):
        for layer, site in enumerate(sites):
            gates = log.gates[time].get(site, [])
            cube[t, layer, : len(gates)] = gates
    cube[~np.isfinite(cube)] = np.nan
    limit = float(np.nanmax(np.abs(cube), initial=0.0))
    title = f"Gates at step {now}, per layer and head" + ("" if limit else ": all are closed")

    figure, axes = _gate_figure(4.8, min(9.0, max(3.2, 0.16 * layers + 1.1)), limit)
    _heat(axes, cube[-1], limit)
    axes.set(xlabel="head", ylabel="layer")
    _ticks(axes.xaxis, range(heads), range(heads), 12)
    _ticks(axes.yaxis, range(layers), names, 30)
    figures = [(title, plots.svg(figure, f"gates at step {now}"))]

    figure, axes = plots.figure(4.8, 3.2)
    every = -(-layers // LABELS)
    labelled = set(range(0, layers, every))
    means = np.nansum(np.abs(cube), 2) / np.maximum(np.isfinite(cube).sum(2), 1)
    for layer, color in enumerate(LinearSegmentedColormap.from_list("depth", DEPTH)(np.linspace(0, 1, layers))):
        plots.line(axes, np.array(times), means[:, layer], color, names[layer] if layer in labelled else None, lw=1.2)
    axes.legend(
        title="layer" if every == 1 else f"layer, 1 of {every} named",
        frameon=False,
        reverse=True,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    axes.set_ylim(bottom=0)
    figures.append(("Mean |gate| of each layer over time", plots.svg(figure, "mean gate of each layer by step")))

    rows = layers * heads
    figure, axes = plots.figure(9.6, rows * min(0.22, max(0.0105, 9.0 / rows)) + 1.0)
    _heat(axes, cube.reshape(len(times), rows).T, limit)
    for layer in range(1, layers):
        axes.axhline(layer * heads - 0.5, color=plots.INK, lw=0.4, alpha=0.4)
    axes.grid(False)
    axes.set_ylabel("layer, and in each its heads" if heads > 1 else "layer")
    axes.tick_params("x", top=True, labeltop=True)
    marked = np.unique(np.linspace(0, len(times) - 1, 9).astype(int)).tolist()
    _ticks(axes.xaxis, marked, [times[column] for column in marked], 9)
    _ticks(axes.yaxis, [(layer + 0.5) * heads - 0.5 for layer in range(layers)], names, 64)
    figures.append(("Every gate over time, in the colours above", plots.svg(figure, "every gate by step")))
    return figures


def _short(sites: list[str]) -> list[str]:
    """Site names without what all of them share: "model.layers.2.self_attn" becomes "2"."""
    parts = [site.split(".") for site in sites]
    start = _shared(parts)
    end = _shared([part[start:][::-1] for part in parts])
    return [".".join(part[start : len(part) - end]) or site for part, site in zip(parts, sites, strict=True)]


def _shared(names: list[list[str]]) -> int:
    """How many first items are the same in all lists."""
    equal = [len(set(column)) == 1 for column in zip(*names, strict=False)]
    return [*equal, False].index(False)


def _gate_figure(width: float, height: float, limit: float) -> tuple[Figure, Axes]:
    """An empty figure of gates from -limit to limit, and the colours that they have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes, bar = figure.subplots(1, 2, width_ratios=[width * 8, 1])
    limit = limit or 1.0
    _heat(bar, np.linspace(-limit, limit, 128)[:, None], limit, extent=(0, 1, -limit, limit))
    bar.set(xticks=[], title="gate")
    bar.yaxis.tick_right()
    return figure, axes


def _heat(axes: Axes, gates: np.ndarray, limit: float, **options: Any) -> None:
    """Gates as colour: a closed one is the page itself, an open one the more opaque the wider; grey is no number."""
    from matplotlib.colors import ListedColormap

    colors = [(*(POSITIVE if x > 0 else NEGATIVE), abs(x) ** 0.7) for x in np.linspace(-1, 1, 257)]
    cmap = ListedColormap(colors).with_extremes(bad=(0.5, 0.5, 0.5, 0.5))
    values = np.ma.masked_invalid(gates / (limit or 1.0))
    axes.imshow(values, cmap, vmin=-1, vmax=1, aspect="auto", interpolation="none", origin="lower", **options)


def _ticks(axis: Any, places: Iterable[float], names: Iterable[Any], most: int) -> None:
    """Labels at most so many of the places, evenly."""
    pairs = list(zip(places, names, strict=True))
    pairs = pairs[:: -(-len(pairs) // most)]
    axis.set_ticks([place for place, _ in pairs], [str(name) for _, name in pairs])
