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
    page._against_size(rows, {"a": "red", "b": "blue"})
    assert [container.has_yerr for container in drawn[0].axes[0].containers] == bars


def test_a_line_with_a_gap_of_deviations_draws_the_bars_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "svg", lambda figure, label: drawn.append(figure))
    page._against_setting([row("a", 0.1, K=1), row("a", None, K=2)], "K", {"a": "red"})
    page._against_setting([row("a", None, K=1), row("a", None, K=2)], "K", {"a": "red"})
    some, none = (figure.axes[0].containers[0] for figure in drawn)
    assert some.has_yerr
    assert not none.has_yerr
