"""The benchmark's page: every table, and what the tables look like as plots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from zinit.bench.plan import REFERENCE, Benchmark
from zinit.bench.summary import Row, table
from zinit.runs import plots

COLOURS = ("#3987e5", "#e8743b", "#2e9c6a", "#b07cc6", "#c4a000", "#d05a8c", "#6b8e9e", "#8a6d3b", "#5b5bd6", "#999999")
MARKERS, LINES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")  # with each colour in turn
ABOUT = (
    'Mean and standard deviation (n - 1) are over the seeds named. "minus zero-init" is the mean and standard '
    'deviation of the differences to zero-init, seed by seed (number of pairs). "base" is the task\'s baseline '
    "without any training of the model."
)
Curves = dict[tuple[str, str, str], list[list[list[float]]]]


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in all figures.

    Args:
        number: of the method.
    """

    number: int

    @property
    def colour(self) -> str:
        """Another for each of the first methods; then they come again."""
        return COLOURS[self.number % len(COLOURS)]

    @property
    def marker(self) -> str:
        """Another for each round of the colours."""
        return MARKERS[self.number // len(COLOURS) % len(MARKERS)]

    @property
    def line(self) -> str:
        """Likewise."""
        return LINES[self.number // len(COLOURS) % len(LINES)]


def page(benchmark: Benchmark, rows: list[Row], notes: dict[str, list[str]], curves: Curves) -> str:
    """One HTML file without scripts and without the network.

    Args:
        benchmark: what was to be run.
        rows: see `zinit.bench.summary.summarise`.
        notes: sentences by experiment.
        curves: {(experiment, curve, method): [points of a seed, ...]}.
    """
    methods = list(dict.fromkeys(method for e in benchmark.experiments for method in e.methods))
    looks = {method: Look(index) for index, method in enumerate(methods)}
    sections = []
    with plots.style():
        for experiment in benchmark.experiments:
            own = [row for row in rows if row.experiment == experiment.name]
            header, lines = table(own)
            figures = [_against_size(own, looks), *_learning_curves(experiment.name, curves, looks)]
            figures += [_against_setting(own, name, looks) for name in experiment.vary]
            problems = [f"{row.method} was not possible here: {row.problem}" for row in own if row.problem]
            sections.append(
                {
                    "name": experiment.name,
                    "what": f"{experiment.backbone} / {experiment.task}",
                    "note": experiment.note,
                    "header": header,
                    "lines": lines,
                    "figures": [figure for figure in figures if figure is not None],
                    "notes": [*notes.get(experiment.name, []), *problems],
                }
            )
    missing = sum(len(row.missing) for row in rows)
    return render(benchmark, sections, missing, title="zinit bench", about=ABOUT)


def render(benchmark: Benchmark, sections: list[dict[str, Any]], missing: int, *, title: str, about: str) -> str:
    """The page with its sections in place.

    Args:
        benchmark: what was to be run.
        sections: name, what, note, header, lines, figures (title and SVG) and notes of each.
        missing: runs that are not finished.
        title: of the page.
        about: how the tables are to be read.
    """
    return plots.render(
        "bench/page.html.jinja", benchmark=benchmark, sections=sections, missing=missing, title=title, about=about
    )


def _against_size(rows: list[Row], looks: dict[str, Look]) -> tuple[str, Any] | None:
    """The metric against what was trained; for experiments that vary nothing else."""
    rows = [row for row in rows if row.mean is not None and row.num_trainable and not row.vary]
    if len(rows) < 2:
        return None
    figure, axes = plots.figure(4.8, 3.2, xlabel="trainable parameters", integer=False)
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(rows[0].metric)
    for row in rows:
        x, y = [row.num_trainable or 0], [row.mean or 0.0]
        look = looks[row.method]
        axes.errorbar(x, y, yerr=_deviations([row]), fmt=look.marker, capsize=3, color=look.colour, label=row.method)
    if rows[0].base is not None:
        axes.axhline(rows[0].base, color=plots.INK, lw=0.8, ls=":", label="base")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    title = f"{rows[0].metric} against trainable parameters"
    return title, plots.svg(figure, f"{rows[0].experiment}: {title}")


def _learning_curves(experiment: str, curves: Curves, looks: dict[str, Look]) -> list[tuple[str, Any]]:
    """Mean over the seeds of every curve that has more than one point."""
    found = []
    for name in dict.fromkeys(curve for e, curve, _ in curves if e == experiment):
        own = {method: seeds for (e, curve, method), seeds in curves.items() if (e, curve) == (experiment, name)}
        own = {method: seeds for method, seeds in own.items() if max(map(len, seeds)) > 2}
        if not own:
            continue
        figure, axes = plots.figure(4.8, 3.2)
        for method in sorted(own, key=lambda method: (method != REFERENCE, method)):
            steps, mean, low, high = _over_seeds(own[method])
            span = max(1, len(steps) // 30) if name == "train loss" else 1
            smooth = [plots.smooth(values, span) for values in (mean, low, high)]
            look, label = looks[method], f"{method} ({len(own[method])})"
            axes.plot(steps, smooth[0], color=look.colour, ls=look.line, lw=1.5, label=label)
            axes.fill_between(steps, smooth[1], smooth[2], color=look.colour, alpha=0.15, lw=0)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        title = f"{name} by step: mean over (n) seeds, band from lowest to highest"
        found.append((title, plots.svg(figure, f"{experiment}: {title}")))
    return found


def _deviations(rows: list[Row]) -> Any:
    """Lengths of the error bars; None, and no sign of a bar, where no row has a deviation: one seed has none."""
    if all(row.std is None for row in rows):
        return None
    return [math.nan if row.std is None else row.std for row in rows]


def _over_seeds(seeds: list[list[list[float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all seeds have, and there the mean, the lowest and the highest."""
    common = sorted(set.intersection(*({point[0] for point in points} for points in seeds)))
    by_step = [{point[0]: point[1] for point in points} for points in seeds]
    values = np.array([[points[step] for step in common] for points in by_step], dtype=float)
    return np.array(common), values.mean(0), values.min(0), values.max(0)


def _against_setting(rows: list[Row], setting: str, looks: dict[str, Look]) -> tuple[str, Any] | None:
    """The metric against one varied setting, a line per method (and per combination of the other settings)."""
    rows = [row for row in rows if row.mean is not None and setting in row.vary]
    values = [row.vary[setting] for row in rows]
    if len(set(map(str, values))) < 2:
        return None
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    places = {str(value): (value if numeric else index) for index, value in enumerate(dict.fromkeys(values))}
    figure, axes = plots.figure(4.8, 3.2, xlabel=setting, integer=all(isinstance(value, int) for value in values))
    axes.set_ylabel(rows[0].metric)
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        others = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in row.vary.items() if k != setting)
        lines.setdefault((row.method, others), []).append(row)
    for (method, others), own in lines.items():
        own.sort(key=lambda row: places[str(row.vary[setting])])
        x, y = [places[str(row.vary[setting])] for row in own], [row.mean or 0.0 for row in own]
        label = f"{method}, {others}" if others else method
        look = looks[method]
        style = f"{look.marker}{look.line}" if numeric else look.marker
        axes.errorbar(x, y, yerr=_deviations(own), fmt=style, capsize=3, lw=1.5, color=look.colour, label=label)
    if not numeric:
        axes.set_xticks(list(places.values()), list(places), rotation=60, ha="right")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    title = f"{rows[0].metric} against {setting}"
    return title, plots.svg(figure, f"{rows[0].experiment}: {title}")
