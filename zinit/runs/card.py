"""The model card of a run, and its way to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zinit.adapter.file import DESCRIPTION, FILES, AdapterFile
from zinit.adapter.hub import card_of, upload
from zinit.errors import ConfigError
from zinit.runs.command import command_of
from zinit.runs.config import RunConfig
from zinit.runs.directory import TRAINED, read_finished_run
from zinit.runs.record import Record, Results


def model_card(directory: str | Path) -> str:
    """What a finished run is, for the Hub: base, method, counts of the data, figures with the seed, the command again.

    Folders of this machine are named by their last part alone.

    Args:
        directory: of the run.

    Raises:
        CheckpointError: if there is no finished run.
    """
    config, record = read_finished_run(directory)
    results = Results.read(Path(directory))
    base = record.model or "unknown"
    rows = [
        ("base", _name(base)),
        ("method", record.method),
        ("task", record.task),
        ("data", _name(record.data or "unknown")),
        ("examples", ", ".join(f"{count} {name}" for name, count in record.counts.items() if count)),
        ("trained numbers", f"{record.num_trainable or 0:,}"),
        ("seed", record.seed),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
    ]
    about = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    parts = [about, _figures(results), _again(config, record)]
    title = f"{record.method} on {_name(base)}: {record.task}"
    model_index = _model_index(record, results)
    return card_of(base, title, "\n\n".join(filter(None, parts)), model_name=title, eval_results=model_index or None)


def push(directory: str, repository: str, *, private: bool | None = None) -> str:
    """Uploads a finished run's adapter with its card; the address of the commit.

    Raises:
        ConfigError: if its method has no adapter.
        CheckpointError: if there is no finished run, or the Hub refuses.
    """
    card = model_card(directory)
    if not (Path(directory) / DESCRIPTION).is_file():
        raise ConfigError(f"the run in {directory} has no adapter to push: its method keeps none.")
    AdapterFile.read(directory)  # whole, or it is said here
    return upload(directory, repository, (*FILES, DESCRIPTION, TRAINED), card=card, private=private)


def _name(where: str) -> str:
    """A Hub id or a name as it is; of a path the last part."""
    return where if where.count("/") <= 1 and not where.startswith((".", "/", "~")) else Path(where).name


def _figures(results: Results) -> str:
    if not results.metrics:
        return ""
    columns = list(results.metrics)
    names = dict.fromkeys(name for column in columns for name in results.metrics[column])
    lines = [f"| held-out (seed {results.seed}) | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        values = (results.metrics[column].get(name) for column in columns)
        lines.append(f"| {name} | {' | '.join(f'{v:.4f}' if isinstance(v, int | float) else '-' for v in values)} |")
    return "\n".join(lines)


def _again(config: RunConfig, record: Record) -> str:
    command = command_of(config, record.preset)
    if command is None:
        return ""
    for where in (record.model, record.data):
        command = command.replace(str(where), _name(str(where))) if where else command
    return f"To make it again:\n\n```bash\n{command}\n```"


def _model_index(record: Record, results: Results) -> list[Any]:
    """The adapted model's figures as the Hub reads them from a card."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            task_name=record.task,
            dataset_type=_name(record.data or "unknown"),
            dataset_name=_name(record.data or "unknown"),
            dataset_split="held-out",
            metric_type=name,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for name, value in results.metrics.get("adapted", {}).items()
        if isinstance(value, int | float)
    ]
