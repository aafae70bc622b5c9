"""Base, novel and harmonic mean over several data sets, and what the paper reports of them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from zinit.errors import DataError


def harmonic_mean(base: float, novel: float) -> float:
    """2 b n / (b + n); 0 if both are."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Base, novel and harmonic mean of each data set and on average, as the paper's table has them.

    Accuracies of several seeds are averaged before their harmonic mean is taken; the average over data sets is the mean
    of their harmonic means, not the harmonic mean of their averages.

    Args:
        rows: one per run, with ``data``, ``base_accuracy`` and ``novel_accuracy``.

    Returns:
        {data set: {"base_accuracy", "novel_accuracy", "harmonic_mean"}}, with "average" for all of them.

    Raises:
        DataError: if there are no rows.
    """
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(str(row["data"]), []).append(row)
    if not grouped:
        raise DataError("there are no results to average.")
    names = ("base_accuracy", "novel_accuracy")
    found: dict[str, dict[str, float]] = {}
    for data, mine in grouped.items():
        base, novel = (sum(float(row[name]) for row in mine) / len(mine) for name in names)
        found[data] = {"base_accuracy": base, "novel_accuracy": novel, "harmonic_mean": harmonic_mean(base, novel)}
    average = {name: sum(row[name] for row in found.values()) / len(found) for name in (*names, "harmonic_mean")}
    return {**found, "average": average}


def paper_results() -> dict[str, Any]:
    """What the paper's Table 14 reports, in percent: {method: {data set: [base, novel, harmonic mean]}}.

    These are the paper's figures, not zinit's.
    """
    return tomllib.loads((resources.files("zinit.tasks.base_to_novel") / "paper.toml").read_text("utf-8"))["methods"]
