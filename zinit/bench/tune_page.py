"""The page of a search: its trials as a table, and their figures as they came."""

from __future__ import annotations

import itertools
from typing import Any

from zinit.bench.page import render
from zinit.bench.plan import Benchmark
from zinit.bench.summary import show
from zinit.runs import plots

ABOUT = (
    "Each trial is one run, measured on a validation part, of which no figure may be reported: train with the best "
    "settings, and report what that run measures on its held-out part."
)


def page(benchmark: Benchmark, document: dict[str, Any]) -> str:
    """One HTML file without scripts and without the network.

    Args:
        benchmark: of the one experiment.
        document: what ``tune.json`` holds.
    """
    experiment, best = benchmark.experiments[0], document["best"]
    header, lines = table(document)
    with plots.style():
        figures = [figure for figure in [_by_trial(document)] if figure is not None]
    notes = [f"trials alone: {' '.join(experiment.select.options)}"]
    notes += [f"the best, trial {best['number']}: {best['command']}"] if best else []
    notes += [f"trial {trial['number']}: {trial['error']}" for trial in document["trials"] if trial["error"]]
    section = {
        "name": experiment.name,
        "what": f"{experiment.backbone} / {experiment.task} / {experiment.methods[0]}, seed {experiment.seeds[0]}",
        "note": f"{document['metric']}, {'lower' if document['lower_is_better'] else 'higher'} is better",
        **{"header": header, "lines": lines, "figures": figures, "notes": notes},
    }
    missing = sum(trial["status"] in ("open", "failed") for trial in document["trials"])
    return render(benchmark, [section], missing, title="zinit tune", about=ABOUT)


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines, the best first; those without a figure last."""
    sign = 1 if document["lower_is_better"] else -1
    trials = sorted(document["trials"], key=lambda trial: (trial["value"] is None, sign * (trial["value"] or 0.0)))
    names = list(document["search"]["space"])
    header = ["trial", document["metric"], *names, "trainable", "seconds", "status"]
    return header, [
        [
            str(trial["number"]),
            show(trial["value"], 4),
            *(f"{trial['settings'][name]:.3g}" for name in names),
            "-" if trial["num_trainable"] is None else f"{trial['num_trainable']:,}",
            show(trial["seconds"], 1),
            trial["status"],
        ]
        for trial in trials
    ]


def _by_trial(document: dict[str, Any]) -> tuple[str, Any] | None:
    """The figure of each trial, and the best so far."""
    done = [trial for trial in document["trials"] if trial["value"] is not None]
    if len(done) < 2:
        return None
    x, y = [trial["number"] for trial in done], [trial["value"] for trial in done]
    figure, axes = plots.figure(4.8, 3.2, xlabel="trial")
    axes.set_ylabel(document["metric"])
    axes.plot(x, y, "o", color=plots.FIRST, label="trial")
    better = min if document["lower_is_better"] else max
    axes.step(x, list(itertools.accumulate(y, better)), where="post", color=plots.SECOND, lw=1.5, label="best so far")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    title = f"{document['metric']} on the validation part by trial"
    return title, plots.svg(figure, title)
