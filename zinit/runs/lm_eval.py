"""Text benchmarks of lm-eval on a run: the base beside the adapted model."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.errors import ConfigError, first_line
from zinit.models.offload import weights_in_place
from zinit.runs.asked import ADAPTED, BASE, OpenRun, keep, open_run
from zinit.validation import split_at_commas

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

LM_EVAL = "lm-eval"  # as suites are named
BATCH = 16
YAML = (".yaml", ".yml")


def evaluate_texts(
    directory: str | Path,
    tasks: str,
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """The base and the adapted model of a finished run on tasks of lm-eval, as `zinit.runs.suites.evaluate_suite`.

    Texts are those of lm-eval, without the run's template, and tokens too: figures compare with those of other models.

    Args:
        directory: of the run.
        tasks: names of tasks or groups, or paths of ``.yaml`` files, with commas.
        limit: examples of each task.
        fewshot: examples before each question; None is the task's own number.
        output: a folder for ``samples.json``.

    Raises:
        ConfigError: if lm-eval is not installed, has no such task, or cannot read its data.
    """
    wanted = split_at_commas(tasks)
    if not wanted:
        raise ConfigError(f"name tasks of lm-eval: {LM_EVAL}:arc_easy,hellaswag or {LM_EVAL}:PATH.yaml")
    manager = _manager(wanted)
    names = _check(manager, wanted)
    run = open_run(directory)
    found = {}
    with run.built.adapted.disabled():
        found[BASE] = _measure(run, manager, wanted, limit, fewshot)
    run.adapt()
    found[ADAPTED] = _measure(run, manager, wanted, limit, fewshot)
    counts: dict[str, Any] = {}
    for task, samples in found[ADAPTED]["samples"].items():
        counts |= {f"{task}_examples": len(samples), f"{task}_fewshot": found[ADAPTED]["n-shot"].get(task, 0)}
        if run.trained_on is not None:
            counts[f"{task}_trained_on"] = run.trained_on.count_documents(sample["doc"] for sample in samples)
    metrics = {name: figures(results["results"]) for name, results in found.items()}
    samples = {"samples.json": {name: results["samples"] for name, results in found.items()}}
    return keep(run, f"{LM_EVAL}:{','.join(names)}", metrics, counts, samples, output)


def figures(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """lm-eval's results as "task/metric"; a filter that makes several metrics of one follows after a comma."""
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, found in results.items()
        for metric, value in found.items()
        if "," in metric and isinstance(value, int | float)
    }


def _manager(wanted: list[str]) -> TaskManager:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"suites of lm-eval need the package: pip install lm-eval ({first_line(error)}).") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=not all(name.endswith(YAML) for name in wanted))


def _check(manager: TaskManager, wanted: list[str]) -> list[str]:
    """All tasks can be loaded, with their data; their names, before a model is."""
    names = []
    for name in wanted:
        if name.endswith(YAML) and not Path(name).is_file():
            raise ConfigError(f"there is no task file {name}.")
        if not name.endswith(YAML) and name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(f"lm-eval has no task {name!r}.{hint} A file of your own: {LM_EVAL}:PATH.yaml")
        try:
            with _quiet():
                loaded = manager.load([name])
        except Exception as error:  # lm-eval and datasets raise many kinds; all mean that there is nothing to ask
            raise ConfigError(
                f"the task {name} of lm-eval cannot be read: {first_line(error)} Its data come from the Hub, unless "
                f"its file names local ones. Run it once with a network, or take a file: {LM_EVAL}:PATH.yaml"
            ) from error
        names += loaded["tasks"] if name.endswith(YAML) else [name]
    return names


def _measure(
    run: OpenRun, manager: TaskManager, tasks: list[str], limit: int | None, fewshot: int | None
) -> dict[str, Any]:
    """What lm-eval finds of the run's model as it stands now, samples included."""
    from lm_eval import evaluator
    from lm_eval.models import huggingface

    HFLM: Any = huggingface.HFLM  # its decorator hides its arguments
    simple_evaluate: Any = evaluator.simple_evaluate
    model: Any = run.built.adapted.model
    with _quiet(), run.accelerator.autocast(), weights_in_place(model):
        lm = HFLM(pretrained=model, tokenizer=run.built.processor, batch_size=BATCH)
        found = simple_evaluate(
            model=lm, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=fewshot, bootstrap_iters=0
        )
    assert found is not None  # None is lm-eval's answer on further processes of its own
    return dict(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of libraries where nobody looks at them."""
    if sys.stderr.isatty():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        yield
