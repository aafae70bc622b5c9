"""Several short examples in one row: position ids restart at each, and no token sees another example's.

Position ids that restart are all that transformers needs to make a block-diagonal mask (sdpa, eager, flex) or to split
the row (flash). A prefix is not touched by it: every query of every example sees every prompt.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LENGTHS = (5, 4, 3, 6)  # of the examples that a model is tried with


def lay_rows(lengths: Sequence[int], capacity: int | None) -> list[list[int]]:
    """Lays examples into rows so that the padded batch has the fewest tokens; among equals it has the most rows.

    For each possible number of rows the examples go, longest first, each into the row that is emptiest so far. One row
    per example is a possibility too, so the batch never has more tokens than without packing.

    Args:
        lengths: of the examples, in tokens.
        capacity: tokens that a row may hold; a longer example gets a row of its own. None lays everything in one row.

    Returns:
        The examples' indices, row by row.
    """
    count = len(lengths)
    if capacity is None:
        return [list(range(count))]
    longest_first = sorted(range(count), key=lambda index: (-lengths[index], index))
    best: list[list[int]] = [[index] for index in longest_first]
    fewest = count * max(lengths)
    for number in range(count - 1, (sum(lengths) - 1) // capacity, -1):
        rows: list[list[int]] = [[] for _ in range(number)]
        filled = [(0, row) for row in range(number)]
        for index in longest_first:
            total, row = filled[0]
            heapq.heapreplace(filled, (total + lengths[index], row))
            rows[row].append(index)
        longest = max(filled)[0]
        if longest <= max(capacity, lengths[longest_first[0]]) and number * longest < fewest:
            best, fewest = rows, number * longest
    return best


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
