"""Confidence intervals of differences between methods: a bootstrap over seeds and held-out examples, both paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Examples = Sequence[Sequence[float]]  # (x, y) of each: a figure is the sum of x over the sum of y
FEWEST = 5  # seeds: fewer give no interval
DRAWS = 4000


def interval(
    these: Mapping[int, Examples], those: Mapping[int, Examples], *, draws: int = DRAWS
) -> tuple[float, float] | None:
    """The 95 % interval of the mean over seeds of (this - that), by percentiles.

    Each draw takes as many seeds as there are and as many examples, with replacement; an example counts as often in
    both methods and in every seed (Efron and Tibshirani, 1993, chapters 8 and 13).

    Args:
        these: of one method, the examples by seed.
        those: of the other.
        draws: how many.

    Returns:
        Lowest and highest; None with fewer than `FEWEST` seeds in common, or examples that are not the same in all.
    """
    seeds = sorted(these.keys() & those.keys())
    sizes = {len(own[seed]) for own in (these, those) for seed in seeds}
    if len(seeds) < FEWEST or len(sizes) != 1 or sizes == {0}:
        return None
    generator = np.random.default_rng(0)
    count = sizes.pop()
    weights = generator.multinomial(count, np.full(count, 1 / count), size=draws)
    figures = [np.stack([_figures(own[seed], weights) for seed in seeds], axis=1) for own in (these, those)]
    drawn = generator.integers(len(seeds), size=(draws, len(seeds)))
    means = np.take_along_axis(figures[0] - figures[1], drawn, axis=1).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _figures(examples: Examples, weights: np.ndarray) -> np.ndarray:
    """The figure in every draw; 0 where nothing that counts was drawn."""
    x, y = np.asarray(examples, dtype=float).T
    below = weights @ y
    return np.divide(weights @ x, below, out=np.zeros(len(weights)), where=below > 0)
