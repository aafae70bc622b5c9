"""VTAB-1k's protocol: what is trained on and what is evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zinit.data.labelled.parts import Labelled, Parts, class_names, skipped_files
from zinit.data.labelled.splits import hold_out
from zinit.tasks.vtab.config import Split
from zinit.tasks.vtab.facts import VTAB_TASKS

NAMED = 5  # skipped images that a report names; all are counted


def vtab_split(
    data: str | None,
    held_out_data: str | None,
    read: Callable[[str | None], Parts],
    *,
    train: bool,
    split: Split,
    seed: int,
) -> tuple[list[str], list[Labelled], list[Labelled], dict[str, Any]]:
    """Training and held-out images of a run, in VTAB-1k's protocol.

    Args:
        data: see `zinit.data.labelled.sources.read_images`.
        held_out_data: a source of its own for what is evaluated: its part for that, or all of it if it has no parts.
        read: reads a source.
        train: False leaves the training images out.
        split: "train800val200": everything but the test part is trained on. "train800": a validation part is
            evaluated, and no test image is touched.
        seed: of the parts that the source lacks: a tenth of everything for the test, a fifth of training for
            validation (as 200 of VTAB's 1,000), class by class.

    Returns:
        Class names, training and held-out images, and how many were read, skipped and not used, and why.

    Raises:
        DataError: if a source cannot be read.
    """
    training, held_out, sources = [], [], []
    if train or held_out_data is None:
        sources.append(read(data))
        training, held_out = _choose(sources[0], split, seed)
    if held_out_data is not None:
        sources.append(read(held_out_data))
        held_out = sources[-1].train if sources[-1].whole else _choose(sources[-1], split, 0)[1]
        if train and sources[0].whole and split == "train800val200":
            training = sources[0].train
    training = training if train else []
    files = {example.image for example in held_out if isinstance(example.image, Path)}
    clean = [example for example in training if example.image not in files] if files else training
    skipped = [reason for source in sources for reason in source.skipped]
    read_in = sum(map(len, sources))
    left_out = sum((source.left_out for source in sources), Counter[str]())
    counts: dict[str, Any] = {
        "read": read_in + len(skipped) + skipped_files(left_out),
        "train": 0,
        "held_out": 0,
        "not_used": read_in - len(training) - len(held_out),
        "lines_skipped": len(skipped),
        "train_skipped_also_held_out": len(training) - len(clean),
        "reasons": skipped[:NAMED],
        **left_out,
    }
    if (known := sources[-1].dataset) and split == "train800val200":
        counts["test_images_of_vtab"] = VTAB_TASKS[known].test_images
    return sources[0].labels or class_names(sources[0]), clean, held_out, counts


def _choose(parts: Parts, split: Split, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """What is trained on and what is evaluated."""
    train, val, test = parts.train, parts.val, parts.test
    if parts.whole:
        train, test = hold_out(train, 10, seed)
    if split == "train800":
        return (train, val) if val is not None else hold_out(train, 5, seed)
    if test is None:
        return train, val or []
    return train + (val or []), test
