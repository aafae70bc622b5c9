"""Figures and pages of the reports: SVG inside one HTML file, in the reader's light or dark theme; no scripts."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 1000  # of a curve, at most
# Colours as matplotlib writes them, and what the page makes of them, so that figures follow the light or dark theme.
THEME = {"#010101": "currentColor", "#010102": "var(--first)", "#010103": "var(--second)"}
INK, FIRST, SECOND = THEME


def render(template: str, **values: Any) -> str:
    """A page from one of zinit's templates, its style sheet inside.

    Args:
        template: file name.
        values: of its variables; text is escaped.
    """
    return _template(template).render(css=_template_text("page.css"), **values)


@cache
def _template(name: str) -> Template:
    """A template, compiled once: a benchmark writes its page again and again."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["show"] = show
    return environment.from_string(_template_text(name))


def _template_text(name: str) -> str:
    return (resources.files("zinit") / name).read_text("utf-8")


def show(value: Any, sign: str = "") -> str:
    """A value for a table: four digits of a number, a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return format(value, f"{sign}.4g")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def figure(width: float, height: float, *, xlabel: str = "step", integer: bool = True) -> tuple[Figure, Axes]:
    """An empty figure.

    Args:
        width: inches.
        height: inches.
        xlabel: of the x axis.
        integer: whether the x axis counts.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=integer, min_n_ticks=1))
    axes.grid(True, color=INK, alpha=0.15, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def line(
    axes: Axes, x: np.ndarray, y: np.ndarray, color: Any, label: str | None = None, *, span: int = 1, **style: Any
) -> None:
    """A curve with gaps where it is not finite; with ``span`` a faint one under its moving average."""
    y = np.where(np.abs(y) < 1e100, y, np.nan)
    if span > 1:
        line(axes, x, y, color, lw=1, alpha=0.3)
        y, label = smooth(y, span), label and f"{label}, smoothed over {span} steps"
    x, y = thin(x, y)
    alone = {"marker": "o"} if np.isfinite(y).sum() == 1 else {}
    if len(x):
        axes.plot(x, y, color=color, label=label, **{"lw": 1.5, "markersize": 3.5, **style, **alone})


def smooth(y: np.ndarray, span: int) -> np.ndarray:
    """Exponential moving average over about ``span`` values; what is not finite is passed over."""
    keep, total, weight, out = 1 - 2 / (span + 1), 0.0, 0.0, np.full(len(y), np.nan)
    for index, value in enumerate(y.tolist()):
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
            out[index] = total / weight
    return out


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS of a curve: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(x) <= POINTS:
        return x, y
    keep = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), POINTS // 2 - 1):
        finite = part[np.isfinite(y[part])]
        keep |= {finite[y[finite].argmin()], finite[y[finite].argmax()]} if len(finite) else {part[0]}
    chosen = np.array(sorted(keep))
    return x[chosen], y[chosen]


@contextmanager
def style() -> Iterator[None]:
    """The defaults of matplotlib and ours, whatever the user's matplotlibrc says, for as long as the block lasts."""
    import matplotlib

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    ours: Any = {"text.parse_math": False, "svg.fonttype": "none", "font.size": 9, **dict.fromkeys(inked, INK)}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(ours | {"axes.titlesize": "medium"})
        yield


def svg(figure: Figure, label: str) -> Any:
    """The figure as an ``<svg>`` element that follows the page's theme and font."""
    import matplotlib
    from markupsafe import Markup, escape

    out, silent = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label}):  # ids are unique on the page, and the same in every report
        figure.savefig(out, format="svg", transparent=True, metadata=silent)
    text = re.sub(r'<g id="[^"]*">', "<g>", out.getvalue().partition("<svg ")[2])
    for written, meant in THEME.items():
        text = text.replace(written, meant)
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {text}')
