"""What is trained and what is evaluated on: the data's own parts, VTAB-1k's protocol, or a share by chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from zinit.data.labelled.parts import Labelled, Parts, class_names
from zinit.tasks.vtab.facts import VTAB_TASKS

Split = Literal["train800val200", "train800"]
NAMED = 5  # skipped pictures that a report names; all are counted


def hold_out(
    examples: Sequence[Labelled], share: int, seed: int, *, classes: Sequence[str] | None = None, singles: bool = False
) -> tuple[list[Labelled], list[Labelled]]:
    """Sets one of ``share`` apart, class by class; at least one of every class that has two.

    Args:
        examples: to divide.
        share: one of so many, rounded down.
        seed: of the choice.
        classes: the order in which chance goes through them; None is that of the alphabet.
        singles: whether the only picture of a class is set apart too.

    Returns:
        What stays, and what was set apart, both in the order of ``examples``.
    """
    by_class: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        by_class[example.label].append(index)
    generator = torch.Generator().manual_seed(seed)
    apart: set[int] = set()
    for label in sorted(by_class) if classes is None else classes:
        members = by_class[label]
        count = max(1, len(members) // share) if len(members) > 1 or singles else 0
        apart |= {members[i] for i in torch.randperm(len(members), generator=generator)[:count].tolist()}
    stay = [example for index, example in enumerate(examples) if index not in apart]
    return stay, [examples[index] for index in sorted(apart)]


def tested(parts: Parts) -> list[Labelled]:
    """The test part, or else the validation part; all pictures where the source has neither."""
    return next(part for part in (parts.test, parts.val, parts.train) if part is not None)


def vtab_split(
    data: str | None,
    held_out_data: str | None,
    read: Callable[[str | None], Parts],
    *,
    train: bool,
    split: Split,
    seed: int,
) -> tuple[list[str], list[Labelled], list[Labelled], dict[str, Any]]:
    """Training and held-out pictures of a run, in VTAB-1k's protocol.

    Args:
        data: see `zinit.data.labelled.sources.read_pictures`.
        held_out_data: a source of its own for what is evaluated: its part for that, or all of it if it has no parts.
        read: reads a source.
        train: False leaves the training pictures out.
        split: "train800val200": everything but the test part is trained on. "train800": a validation part is
            evaluated, and no test picture is touched.
        seed: of the parts that the source lacks: a tenth of everything for the test, a fifth of training for
            validation (as 200 of VTAB's 1,000), class by class.

    Returns:
        Class names, training and held-out pictures, and how many were read, skipped and not used, and why.

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
    files = {example.picture for example in held_out if isinstance(example.picture, Path)}
    clean = [example for example in training if example.picture not in files] if files else training
    skipped = [reason for source in sources for reason in source.skipped]
    read_in = sum(map(len, sources))
    counts: dict[str, Any] = {
        "read": read_in + len(skipped),
        "train": 0,
        "held_out": 0,
        "not_used": read_in - len(training) - len(held_out),
        "lines_skipped": len(skipped),
        "train_skipped_also_held_out": len(training) - len(clean),
        "reasons": skipped[:NAMED],
    }
    if (task := sources[-1].vtab) and split == "train800val200":
        counts["test_images_of_vtab"] = VTAB_TASKS[task].test_images
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
