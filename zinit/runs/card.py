"""The model card of a run, which lies in its folder, and its way to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zinit.adapter.file import DESCRIPTION, AdapterFile
from zinit.adapter.hub import CARD, card_of, is_hub_id, upload
from zinit.data.records import hub_parts
from zinit.errors import CheckpointError, ConfigError
from zinit.files import parsing, write_atomically
from zinit.runs.command import command_of
from zinit.runs.config import RunConfig
from zinit.runs.directory import TRAINED, read_finished_run
from zinit.runs.record import Record, Results
from zinit.tasks import TASKS

EVAL_RESULTS = ".eval_results/zinit.yaml"  # where the Hub looks for figures on its benchmarks


def model_card(directory: str | Path) -> str:
    """What a finished run is, for the Hub: base, method, counts of the data, figures with the seed, the command again.

    Folders of this machine are named by their last part alone; where it is loaded from, `push` fills in.

    Args:
        directory: of the run.

    Raises:
        CheckpointError: if there is no finished run.
    """
    config, record = read_finished_run(directory)
    results = Results.read(Path(directory))
    base = record.model or "unknown"
    data = ", ".join(map(_name, [config.data] if isinstance(config.data, str) else config.data or ["embedded demo"]))
    rows = [
        ("base", _name(base)),
        ("method", record.method),
        ("task", record.task),
        ("data", data),
        ("examples", ", ".join(f"{count} {name}" for name, count in record.counts.items() if count)),
        ("trained numbers", f"{record.num_trainable or 0:,}"),
        ("seed", record.seed),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
    ]
    about = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    parts = [about, _figures(results), _again(config, record)]
    title = f"{record.method} on {_name(base)}: {record.task}"
    model_index = _model_index(record, results, data)
    return card_of(base, title, "\n\n".join(filter(None, parts)), model_name=title, eval_results=model_index or None)


def write_card(directory: Path) -> None:
    """Writes the card of a finished run into its folder, where its licence can be named before it is pushed."""
    write_atomically(directory / CARD, model_card(directory).encode())


def push(directory: str, repository: str, *, private: bool | None = None) -> str:
    """Uploads a finished run's adapter with its card; the address of the commit.

    Raises:
        ConfigError: if its method has no adapter.
        CheckpointError: if there is no finished run, its card is no text, or the Hub refuses.
    """
    read_finished_run(directory)
    if not (Path(directory) / DESCRIPTION).is_file():
        raise ConfigError(f"the run in {directory} has no adapter to push: its method keeps none.")
    file = AdapterFile.read(directory)
    own = Path(directory) / CARD
    with parsing(f"{own} is not UTF-8 text", CheckpointError, "Save it as UTF-8, or remove it."):
        card = own.read_text(encoding="utf-8") if own.is_file() else model_card(directory)
    figure = leaderboard_entry(directory)
    texts = {} if figure is None else {EVAL_RESULTS: figure}
    return upload(file, repository, card=card, more=[Path(directory) / TRAINED], texts=texts, private=private)


def leaderboard_entry(directory: str | Path) -> str | None:
    """The task's own figure as the Hub's page of a benchmark takes it, in YAML.

    None where the held-out part is no data set of the Hub by itself: a part cut off the training data is no benchmark.

    Args:
        directory: of a finished run.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    config, record = read_finished_run(directory)
    results, source = Results.read(Path(directory)), getattr(config.options, "held_out_data", None)
    metric = getattr(TASKS.get(config.task), "metric", "")
    value = results.metrics.get("adapted", {}).get(metric)
    name, configuration, split = hub_parts(source or "")
    if not is_hub_id(name) or "/" not in name or not isinstance(value, int | float):
        return None
    counts = ", ".join(f"{count} {of}" for of, count in (results.counts or {}).items() if count)
    notes = f"{metric}; split {split or 'named by none'}; {counts}; seed {record.seed}; {record.method} by zinit"
    entry = EvalResultEntry(dataset_id=name, task_id=configuration or "default", value=round(value, 6), notes=notes)
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), allow_unicode=True, sort_keys=False)


def _name(where: str) -> str:
    """A Hub id or a name as it is; of a path the last part."""
    return Path(where).name if where.startswith(("/", "~", "./", "../")) or where.count("/") > 1 else where


def _names(value: Any) -> Any:
    """The same for what settings hold, however deep."""
    if isinstance(value, dict):
        return {key: _names(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_names(each) for each in value]
    return _name(value) if isinstance(value, str) else value


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
    command = command_of(RunConfig.from_dict(_names(config.to_dict())), record.preset)
    return "" if command is None else f"To make it again:\n\n```bash\n{command}\n```"


def _model_index(record: Record, results: Results, data: str) -> list[Any]:
    """The adapted model's figures as the Hub reads them from a card."""
    from huggingface_hub import EvalResult

    task_type = TASKS.get(record.task).hub_task if record.task is not None and record.task in TASKS else "other"
    return [
        EvalResult(
            task_type=task_type,
            task_name=record.task,
            dataset_type=data,
            dataset_name=data,
            dataset_split="held-out",
            metric_type=name,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for name, value in results.metrics.get("adapted", {}).items()
        if isinstance(value, int | float)
    ]
