"""Curves and heat maps of a run: what they show, and that long ones keep what matters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tests.runs.pages import log_of, page_of
from zinit.runs import plots


def test_long_curves_keep_their_spikes() -> None:
    x, y = np.arange(50_000.0), np.ones(50_000)
    y[31_415], y[27_182], y[100:300] = 9.0, -9.0, math.nan
    thin_x, thin_y = plots.thin(x, y)
    assert len(thin_x) <= plots.POINTS
    assert (thin_x[0], thin_x[-1]) == (0, 49_999)
    assert (thin_x[np.nanargmax(thin_y)], thin_x[np.nanargmin(thin_y)]) == (31_415, 27_182)
    assert np.isnan(thin_y).any()


def test_smoothing_starts_unbiased_and_passes_over_gaps() -> None:
    smooth = plots.smooth(np.array([math.nan, 4.0, 4.0, math.inf, 4.0, 1.0]), 3)
    assert np.isnan(smooth[[0, 3]]).all()
    assert smooth[[1, 2, 4]].tolist() == [4, 4, 4]
    assert smooth[5] == pytest.approx(
        (0.5 * 1 + 0.4375 * 4) / 0.9375
    )  # each value has half the weight of its successor


def figures_of(folder: Path, log: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """{label: figure} of a report, before they become SVG."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(plots, "svg", lambda figure, label: found.setdefault(label, figure) and "")
    page_of(folder, log)
    return found


def gates_now(number: int, gates: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [{"event": "gates", "step": number, "gates": gates}]


@pytest.mark.parametrize("label", ["gates at step 3", "every gate by step"])
def test_the_topmost_layer_is_on_top_and_beside_its_own_name(
    label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer n has gates of n tenths: the higher a row, the further its colour is from the page's."""
    gates = {f"layers.{layer}.attn": [layer / 10] * 2 for layer in range(1, 6)}
    figure = figures_of(tmp_path, gates_now(3, gates), monkeypatch)[label]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba()).astype(float)
    axes = figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    places = [axes.transData.transform((0, place + 0.3)) for place in axes.get_yticks()]
    heights = [y for _, y in places]
    strength = [np.abs(pixels[-1 - int(y), int(x), :3] - 255).max() for x, y in places]
    assert names == ["1", "2", "3", "4", "5"]
    assert heights == sorted(heights)
    assert strength == sorted(strength)
    assert len(set(strength)) == 5


def test_the_mean_is_of_absolute_gates_and_of_the_heads_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = [*gates_now(0, {"a.0": [0.0, 0.0], "a.1": [0.0]}), *gates_now(5, {"a.0": [0.5, -0.3], "a.1": [-0.2]})]
    figure = figures_of(tmp_path, log, monkeypatch)["mean gate of each layer by step"]
    lines = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert lines["0"] == pytest.approx([0.0, 0.4])
    assert lines["1"] == pytest.approx([0.0, 0.2])


@pytest.mark.parametrize(
    ("layers", "named", "title"), [(8, 8, "layer"), (16, 16, "layer"), (40, 14, "layer, 1 of 3 named")]
)
def test_every_curve_has_a_name_or_the_legend_says_how_many(
    layers: int, named: int, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = figures_of(tmp_path, log_of(4, every=2, layers=layers), monkeypatch)["mean gate of each layer by step"]
    legend = figure.axes[0].get_legend()
    assert len(figure.axes[0].lines) == layers
    assert len(legend.get_texts()) == named
    assert legend.get_title().get_text() == title
