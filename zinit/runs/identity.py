"""Which settings make a run the one it is: what a resumed run, and every process of it, must have in common."""

from __future__ import annotations

from typing import Any

from zinit.runs.config import SECTIONS, RunConfig
from zinit.tasks import TASKS

# Settings that a resumed run may change. (Other micro-batches sum in another order: the same result but for rounding.)
# The places of model and data may change too: what is in them is compared.
MAY_CHANGE_ON_RESUME = (
    *(f"train.{name}" for name in ("micro_batch_size", "micro_batch_tokens", "evaluate_every", "save_every")),
    *("train.workers", "train.tracker", "train.activation_cache", "task.packing"),
    *("model", "data", "task.held_out_data", "task.image_folder", "task.evaluation_limit", "offload"),
    *("task.known_texts", "task.drift", "warm_start"),
    *("encoder.source", "encoder.revision", "encoder.cache", "encoder.cache_limit"),
)
# Processes may have them elsewhere: what is in them is compared.
PLACES = (
    "model",
    "data",
    "task.held_out_data",
    "task.image_folder",
    "task.known_texts",
    "encoder.source",
    "encoder.cache",
    "warm_start",
)
# What else decides which weights are best: not to be changed where they are chosen.
CHOOSES_THE_BEST = ("train.evaluate_every", "task.evaluation_limit", "task.known_texts", "task.drift")


def identity_of(config: RunConfig, examples: str) -> dict[str, Any]:
    """What decides the result bit for bit: a resumed run must have all of it in common with the one that saved.

    Args:
        config: the settings.
        examples: a hash of the examples; see `Task.fingerprint`.
    """
    everything = {**flat_settings(config), "examples": examples}
    fixed = () if config.train.keep_best is None else CHOOSES_THE_BEST
    return {name: value for name, value in everything.items() if name in fixed or name not in MAY_CHANGE_ON_RESUME}


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """All settings by their full names, but for the places of further models, which are compared themselves."""
    settings = config.to_dict()
    tables = {section: settings.pop(section, None) or {} for section in SECTIONS}
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    sources = [spec.source for spec in TASKS.get(config.task).further_models(config.options).values()]
    return {**settings, **{n: value for n, value in flat.items() if not (n.startswith("task.") and value in sources)}}
