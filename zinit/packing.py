"""Several short examples in one row: position ids restart at each, and no token sees another example's.

Position ids that restart are all that transformers needs to make a block-diagonal mask (sdpa, eager, flex) or to split
the row (flash). A prefix is not touched by it: every query of every example sees every prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LENGTHS = (5, 4, 3, 6)  # of the examples that a model is tried with


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: each example, longest first, goes into the first row that has room for it.

    Args:
        lengths: of the examples, in tokens.
        capacity: tokens that a row holds; a longer example gets a row of its own.

    Returns:
        The examples' indices, row by row. Never more than 11/9 of the fewest rows possible, and one.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        row = next((row for row, left in enumerate(room) if lengths[index] <= left), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def keeps_examples_apart(model: nn.Module, *, rows: int) -> bool:
    """Whether a causal language model gives packed examples the logits that it gives each alone, tried with a few.

    Args:
        model: of transformers.
        rows: into how many the examples are laid; flash attention takes one only.
    """
    device = next(model.parameters()).device
    examples = [torch.arange(length, device=device) * 5 % 17 + 3 for length in LENGTHS]
    each = len(examples) // rows
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _moved(model):
            packed = _logits(model, examples, rows)
            # What stands in front, in the same row and with the same shapes, may not change a single bit behind it.
            others = [ids if index % each == each - 1 else ids + 1 for index, ids in enumerate(examples)]
            beside_others = _logits(model, others, rows)
            for index, ids in enumerate(examples):
                alone, largest = _logits(model, [ids], 1)[0], float(packed[index].abs().max())
                tolerance = 1e-4 if alone.dtype == torch.float32 else 5e-2
                if not torch.allclose(packed[index], alone, rtol=0, atol=tolerance * largest):
                    return False
                if others[index] is ids and not torch.equal(packed[index], beside_others[index]):
                    return False
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        return False  # takes no position ids, or not these
    finally:
        model.train(training)
    return True


def _logits(model: Any, examples: list[Tensor], rows: int) -> list[Tensor]:
    """Of each example, (T, V); the same number of examples and tokens in every row."""
    ids = torch.cat(examples).view(rows, -1)
    positions = torch.cat([torch.arange(len(example), device=ids.device) for example in examples]).view(rows, -1)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return list(logits.flatten(0, 1).split([len(example) for example in examples]))


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """What is trained moves a little while inside: a gate that is still closed would hide what happens behind it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    few = 10 * sum(p.numel() for p in trained) <= sum(p.numel() for p in model.parameters())
    before = [parameter.clone() for parameter in trained] if few else []  # full fine-tuning starts at no zero
    try:
        for parameter, _ in zip(trained, before, strict=False):
            parameter += 0.1
        yield
    finally:
        for parameter, value in zip(trained, before, strict=False):
            parameter.copy_(value)
