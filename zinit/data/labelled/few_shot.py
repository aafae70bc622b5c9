"""Few-shot splits: classes left out, half of each tested on where the data has no test part, shots drawn by chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Literal

import torch

from zinit.data.images import ImageSource, image_digest, read_image
from zinit.data.labelled.parts import Labelled, Parts, skipped_files
from zinit.data.labelled.splits import hold_out, tested
from zinit.errors import ConfigError, DataError
from zinit.registry import did_you_mean
from zinit.validation import OnBad

UNREADABLE, ALSO_HELD_OUT = ("train_skipped_unreadable", "train_skipped_also_held_out")


def few_shot_split(
    data: str | None,
    held_out_data: str | None,
    read: Callable[[str | None], Parts],
    *,
    train: bool,
    labels: list[str] | None,
    dropped: Sequence[str],
    seed: int,
) -> tuple[list[str], list[Labelled], list[Labelled], dict[str, int]]:
    """Training and test images of a run.

    Where the source has no split of its own, half of each class (rounded down, but at least one) is tested on.

    Args:
        data: see `zinit.data.labelled.sources.read_images`.
        held_out_data: a source of its own for the test images; None takes them from ``data``.
        read: reads a source.
        train: False leaves the training images out.
        labels: the only class names allowed, in label order; None takes those of the data.
        dropped: names of classes to leave out.
        seed: of the half that is tested on.

    Returns:
        Class names, training and test images, and how many were read, dropped with their class, skipped and unused.

    Raises:
        DataError: if a source cannot be read or has other classes.
        ConfigError: if ``data`` has no class that is to be left out.
    """
    first = train or held_out_data is None  # whether ``data`` is read at all
    sources = [*([data] if first else []), *([] if held_out_data is None else [held_out_data])]
    found = [read(source) for source in sources]
    names = _names(list(zip(sources, found, strict=True)), dropped, labels, check_dropped=first)
    kept = [_only(parts, set(names) - set(dropped)) for parts in found]
    if held_out_data is not None:
        training, evaluated = kept[0].train, tested(kept[-1])
    elif kept[0].whole:
        training, evaluated = hold_out(kept[0].train, 2, seed, classes=names, singles=True)
    else:
        training, evaluated = kept[0].train, tested(kept[0])
    training = training if train else []
    skipped = sum(len(parts.skipped) for parts in found)
    read_in, remain = sum(map(len, found)), sum(map(len, kept))
    left_out = sum((parts.left_out for parts in found), Counter[str]())
    counts = {
        "read": read_in + skipped + skipped_files(left_out),
        "dropped": read_in - remain,
        "lines_skipped": skipped,
        "unused": remain - len(training) - len(evaluated),
        **left_out,
    }
    return names, training, evaluated, counts


def _names(
    sources: Sequence[tuple[str | None, Parts]],
    dropped: Sequence[str],
    labels: list[str] | None,
    *,
    check_dropped: bool,
) -> list[str]:
    """The run's classes: those of an earlier run, or else the first source's without the dropped ones."""
    there = [_class_names(parts) for _, parts in sources]
    for name in dropped:
        if check_dropped and name not in there[0]:
            where = sources[0][0] or "the demo data"
            raise ConfigError(f"task.drop_classes: {where} has no class {name!r}.{did_you_mean(name, there[0])}")
    names = [name for name in there[0] if name not in dropped] if labels is None else labels
    for (source, _), own in zip(sources, there, strict=True):
        unknown = [name for name in own if name not in names and name not in dropped]
        if unknown:
            raise DataError(
                f"{source or 'the demo data'} has the classes {', '.join(unknown[:5])}"
                f"{', ...' if len(unknown) > 5 else ''}, which are not among the {len(names)} of the run. "
                f"Use data with the run's classes."
            )
    return names


def _class_names(parts: Parts) -> list[str]:
    """The source's own order, if it knows all classes that occur; else the alphabet's."""
    known, found = parts.labels or [], {example.label for example in parts}
    return known if found <= set(known) else sorted(found | set(known))


def _only(parts: Parts, names: set[str]) -> Parts:
    def some(examples: list[Labelled]) -> list[Labelled]:
        return [example for example in examples if example.label in names]

    val, test = (None if part is None else some(part) for part in (parts.val, parts.test))
    return replace(parts, train=some(parts.train), val=val, test=test)


def draw_shots(
    examples: Sequence[Labelled],
    shots: int,
    classes: Sequence[str],
    *,
    seed: int,
    few: Literal["error", "use_all"],
    on_bad: OnBad,
    held_out: Collection[bytes] = (),
) -> tuple[list[Labelled], dict[str, int]]:
    """Up to ``shots`` images of each class, by chance, class after class.

    Args:
        examples: of these classes.
        shots: per class.
        classes: in the order in which chance goes through them.
        seed: of the draw.
        few: whether a class with fewer images is an error, or all it has are used.
        on_bad: "skip" draws another image in place of one that cannot be read.
        held_out: digests of the images that are tested on (`zinit.data.images.image_digest`): another is drawn in place
            of the same picture, whatever its file is called.

    Returns:
        What was drawn, and how many images were not drawn, not readable, held out, and how many classes have too few.

    Raises:
        DataError: naming a class that has none, or too few.
    """
    pools: dict[str, list[Labelled]] = {name: [] for name in classes}
    for example in examples:
        pools[example.label].append(example)
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Labelled] = []
    counts = {"train_not_drawn": 0, "classes_with_fewer_shots": 0}
    counts[UNREADABLE] = 0
    for name, pool in pools.items():
        mine: list[Labelled] = []
        refused = 0
        for position in torch.randperm(len(pool), generator=generator).tolist():
            if len(mine) == shots:
                break
            if reason := _why_refused(pool[position].image, on_bad, held_out):
                counts[reason] = counts.get(reason, 0) + 1
                refused += 1
            else:
                mine.append(pool[position])
        if not mine or (len(mine) < shots and few == "error"):
            have = f"{len(mine)} image{'' if len(mine) == 1 else 's'}"
            hint = f"Lower task.shots, or take what there is: -o task.few=use_all{'' if mine else ' (from 1 on)'}."
            raise DataError(f"class {name!r} has {have} for {shots} shots. {hint}")
        drawn += mine
        counts["train_not_drawn"] += len(pool) - len(mine) - refused
        counts["classes_with_fewer_shots"] += len(mine) < shots
    return drawn, counts


def _why_refused(source: ImageSource, on_bad: OnBad, held_out: Collection[bytes]) -> str:
    """Under which name an image that was drawn is counted as skipped; empty if it is used."""
    if on_bad == "error" and not held_out:  # nothing to look for; it is read soon
        return ""
    try:
        image = read_image(source)
    except DataError:
        if on_bad == "error":
            raise
        return UNREADABLE
    return ALSO_HELD_OUT if image_digest(image) in held_out else ""
