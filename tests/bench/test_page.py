"""Figures of a benchmark's page."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from zinit.bench import page
from zinit.runs import plots


def row(method: str, std: float | None, **settings: Any) -> Any:
    return SimpleNamespace(experiment="one", method=method, metric="f1", mean=0.5, std=std, base=None,
                           num_trainable=10, vary=settings)  # fmt: skip


@pytest.mark.parametrize(
    ("deviations", "bars"), [((None, None), [False, False]), ((0.1, None), [True, False]), ((0.0, 0.1), [True, True])]
)
def test_a_single_seed_has_no_error_bar(
    deviations: tuple[Any, Any], bars: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "svg", lambda figure, label: drawn.append(figure))
    rows = [row(method, std) for method, std in zip("ab", deviations, strict=True)]
    page._against_size(rows, {"a": page.Look(0), "b": page.Look(1)})
    assert [container.has_yerr for container in drawn[0].axes[0].containers] == bars


def test_a_line_with_a_gap_of_deviations_draws_the_bars_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "svg", lambda figure, label: drawn.append(figure))
    page._against_setting([row("a", 0.1, K=1), row("a", None, K=2)], "K", {"a": page.Look(0)})
    page._against_setting([row("a", None, K=1), row("a", None, K=2)], "K", {"a": page.Look(0)})
    some, none = (figure.axes[0].containers[0] for figure in drawn)
    assert some.has_yerr
    assert not none.has_yerr


def test_fifteen_methods_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "svg", lambda figure, label: drawn.append(figure) or "")
    monkeypatch.setattr(page, "render", lambda *_, **__: "")
    names = [f"m{number}" for number in range(15)]
    rows = [row(name, None) for name in names]
    varied = [row(name, None, K=size) for name in names for size in (1, 2)]
    curves = {("one", "loss", name): [[[step, 1.0] for step in range(4)]] for name in names}
    experiment: Any = SimpleNamespace(name="one", methods=names, vary=["K"], backbone="llama", task="alpaca", note="")
    for each in rows + varied:
        each.problem, each.missing = "", []
    monkeypatch.setattr(page, "table", lambda own: ([], []))
    benchmark: Any = SimpleNamespace(experiments=[experiment])
    page.page(benchmark, rows + varied, {}, curves)
    size, learning, setting = (figure.axes[0] for figure in drawn)
    for axes in (size, setting):
        points = [container.lines[0] for container in axes.containers]
        assert len({(line.get_color(), line.get_marker()) for line in points}) == len(points) == 15
    assert len({(line.get_color(), line.get_linestyle()) for line in learning.lines}) == len(learning.lines) == 15
