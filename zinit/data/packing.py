"""Several short examples in one sequence: position ids restart at each, and no token sees another example's.

Position ids that restart are all that transformers needs to make a block-diagonal mask (sdpa, eager, flex) or to split
the sequence (flash). A prefix is not affected: every query of every example sees every prompt.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LENGTHS = (5, 4, 3, 6)  # of the examples that a model is tried with


def pack_sequences(lengths: Sequence[int], capacity: int | None) -> list[list[int]]:
    """Packs examples into sequences so that the padded batch has the fewest tokens; among equals, the most sequences.

    For each possible number of sequences the examples go, longest first, each into the sequence that is emptiest so
    far. One example per sequence is a possibility too, so the batch never has more tokens than without packing.

    Args:
        lengths: of the examples, in tokens.
        capacity: tokens that a sequence may hold; a longer example gets one of its own. None packs all into one.

    Returns:
        The examples' indices, sequence by sequence.
    """
    count = len(lengths)
    if capacity is None:
        return [list(range(count))]
    longest_first = sorted(range(count), key=lambda index: (-lengths[index], index))
    best: list[list[int]] = [[index] for index in longest_first]
    fewest = count * max(lengths)
    for number in range(count - 1, (sum(lengths) - 1) // capacity, -1):
        sequences: list[list[int]] = [[] for _ in range(number)]
        filled = [(0, place) for place in range(number)]
        for index in longest_first:
            total, place = filled[0]
            heapq.heapreplace(filled, (total + lengths[index], place))
            sequences[place].append(index)
        longest = max(filled)[0]
        if longest <= max(capacity, lengths[longest_first[0]]) and number * longest < fewest:
            best, fewest = sequences, number * longest
    return best


def supports_packing(model: nn.Module, *, sequences: int) -> bool:
    """Whether a causal language model gives packed examples the logits that it gives each alone, tried with a few.

    Args:
        model: of transformers.
        sequences: into how many the examples are packed; flash attention takes one only.
    """
    device = next(model.parameters()).device
    examples = [torch.arange(length, device=device) * 5 % 17 + 3 for length in LENGTHS]
    each = len(examples) // sequences
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _moved(model):
            packed = _logits(model, examples, sequences)
            # What comes first in a sequence, at the same shapes, may not change a single bit of what follows.
            others = [ids if index % each == each - 1 else ids + 1 for index, ids in enumerate(examples)]
            beside_others = _logits(model, others, sequences)
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


def _logits(model: Any, examples: list[Tensor], sequences: int) -> list[Tensor]:
    """Of each example, (T, V); the same number of examples and tokens in every sequence."""
    ids = torch.cat(examples).view(sequences, -1)
    positions = torch.cat([torch.arange(len(example), device=ids.device) for example in examples]).view(sequences, -1)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return list(logits.flatten(0, 1).split([len(example) for example in examples]))


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """Inside, what trains is moved a little: a gate that is still closed would hide what happens behind it."""
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
