"""What the four ``pretrain_*`` scripts share: the loop, byte-level tokenizers, the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

console = Console(stderr=True)


def train_bpe(
    texts: Iterator[str], *, vocabulary: int, special: list[str], space: bool, least: int = 0, **parts: Any
) -> Tokenizer:
    """A byte-level BPE, which can encode any text.

    Args:
        texts: to learn from.
        vocabulary: the most tokens; the texts may not hold enough frequent pairs.
        special: tokens with the first ids, in order.
        space: whether a text starts like a word, with a space in front.
        least: how often a pair must occur to become a token.
        parts: further parts of the tokenizer by name, set before it learns (such as a normalizer).
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if "<unk>" in special else None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=least,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def seed_everything(seed: int) -> None:
    """Makes runs repeatable. One thread: so small a model gains little from more, and sums keep their order."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def fit(
    modules: nn.Module,
    losses: Iterator[Tensor],
    steps: int,
    peak: float,
    *,
    warmup: float,
    horizon: float | None = None,
    beta2: float = 0.98,
    decay: float = 0.05,
) -> None:
    """AdamW on a stream of losses: linear warm-up, then half a cosine to zero.

    Args:
        modules: to train.
        losses: one per step.
        steps: how many.
        peak: learning rate.
        warmup: steps until the peak.
        horizon: the step at which the cosine ends; None: the last one.
        beta2: of AdamW.
        decay: AdamW's weight decay.
    """
    optimizer = torch.optim.AdamW(modules.parameters(), lr=peak, betas=(0.9, beta2), weight_decay=decay)
    end = horizon or steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / end))
    )
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    modules.train()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps, loss=math.nan)
        for step, loss in enumerate(islice(losses, steps)):
            loss.backward()
            nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update(bar, advance=1, loss=loss.item())
            if step % 100 == 0 and not console.is_terminal:
                console.print(f"step {step} loss {loss.item():.3f}")
    modules.eval()


def command(
    pretrain: Callable[[Path, int, int, float, int], Any], about: str, *, steps: int, batch_size: int, peak: float
) -> None:
    """The command line of a script: ``pretrain(output, steps, batch_size, peak, seed)``.

    Args:
        pretrain: trains and writes the model.
        about: one sentence for --help.
        steps: default; the defaults are those of the shipped weights.
        batch_size: default.
        peak: default learning rate.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model's files")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--peak", type=float, default=peak, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pretrain(args.output, args.steps, args.batch_size, args.peak, args.seed)
