"""The files of a benchmark's summary: JSON, CSV, Markdown and the page."""

from __future__ import annotations

import csv
import html
import io
import json
from pathlib import Path

from zinit.bench.page import page
from zinit.bench.plan import Benchmark
from zinit.bench.summary import Row, aggregates, curves, summarise, table
from zinit.errors import printable
from zinit.files import write_atomically
from zinit.runs.directory import write_json

CSV_COLUMNS = (
    *("experiment", "method", "vary", "metric", "mean", "std", "seeds", "samples", "base"),
    *("difference", "difference_std", "losses", "base_loss", "loss_difference", "loss_difference_std", "rates"),
    *("num_trainable", "seconds", "paper", "interval", "loss_interval", "trials", "forgetting", "columns"),
)


def write_summary(benchmark: Benchmark, output: Path) -> list[Row]:
    """Writes ``summary.json``, ``summary.csv``, ``summary.md`` and ``report.html``.

    Returns:
        The rows.
    """
    rows = summarise(benchmark, output)
    notes = {experiment.name: aggregates(experiment, rows) for experiment in benchmark.experiments}
    write_json(output / "summary.json", {"rows": [row.to_dict() for row in rows], "aggregates": notes})
    write_atomically(output / "summary.csv", as_csv(rows).encode())
    write_atomically(output / "summary.md", as_markdown(benchmark, rows, notes).encode())
    write_atomically(output / "report.html", page(benchmark, rows, notes, curves(benchmark, output)).encode())
    return rows


def as_csv(rows: list[Row]) -> str:
    """All rows as CSV; settings as JSON, seeds separated by spaces."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        plain = {**row.to_dict(), "vary": json.dumps(row.vary), "seeds": " ".join(map(str, row.values))}
        plain |= {name: json.dumps(plain[name]) for name in ("losses", "rates", "interval", "loss_interval", "columns")}
        cells = (plain[name] for name in CSV_COLUMNS)
        writer.writerow([printable(cell) if isinstance(cell, str) else cell for cell in cells])
    return text.getvalue()


def as_markdown(benchmark: Benchmark, rows: list[Row], notes: dict[str, list[str]]) -> str:
    """All tables and notes as Markdown."""
    parts = ["# zinit bench", _markdown(benchmark.description)]
    if benchmark.demo:
        parts.append(
            "**Demo figures**: tiny models and data that are embedded in zinit. They say nothing about the paper's "
            "results."
        )
    for experiment in benchmark.experiments:
        own = [row for row in rows if row.experiment == experiment.name]
        header, lines = table(own)
        parts += [f"## {_in_line(experiment.name)}", _markdown(experiment.note)]
        parts.append("\n".join([_line(header), _line(["---"] * len(header)), *map(_line, lines)]))
        parts += [f"* {_in_line(note)}" for note in notes.get(experiment.name, [])]
        parts += [f"* {_in_line(f'{row.method}: not possible here: {row.problem}')}" for row in own if row.problem]
    return "\n\n".join(part for part in parts if part) + "\n"


def _line(cells: list[str]) -> str:
    escaped = (_in_line(cell).replace("\\", "\\\\").replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(escaped) + " |"


def _markdown(text: str) -> str:
    """Markdown that holds no HTML and no control character."""
    return html.escape(printable(text), quote=False)


def _in_line(text: str) -> str:
    """The same on one line."""
    return " ".join(_markdown(text).split())
