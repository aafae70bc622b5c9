"""The settings of the task squad; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from zinit.config import JsonConfig
from zinit.validation import NonNegativeInt, Number, OnBad, PositiveInt, Tokens


def _as_text(version: Any) -> Any:
    """TOML and the command line take 2.0 for a number."""
    return str(version) if isinstance(version, float) else version


Version = Annotated[Literal["auto", "1.1", "2.0"], BeforeValidator(_as_text)]


@dataclass(frozen=True, kw_only=True)
class SquadConfig(JsonConfig):
    """What the task does with its data. Defaults are P-tuning v2's.

    Args:
        max_length: tokens of a window, special ones included.
        stride: tokens that neighbouring windows of one context share. (In BERT's first code this word is the step
            from window to window.)
        max_question: tokens that a question is cut to.
        n_best: how many first and last tokens of a window are tried with one another.
        max_answer: tokens of the longest answer.
        null_threshold: v2.0: no answer is given if "no answer" scores higher than the best one by more than this.
        version: "1.1" has no unanswerable questions and always answers; "2.0" has; "auto" is 2.0 if the data has any.
        on_bad: what to do with a question whose answer is not where the data says, or whose id another question
            has too: "error" or "skip" (which is counted).
        drift: held-out windows to measure by how much their features moved; 0 measures nothing.
        held_out_data: a source of the held-out questions; for an evaluation alone they may have no answers (a blind
            test set), and are answered then. Without it they are the ``dev*`` file of a data folder that has one, else
            those about a tenth of the contexts.
    """

    max_length: Tokens = 384
    stride: NonNegativeInt = 128
    max_question: PositiveInt = 64
    n_best: PositiveInt = 20
    max_answer: PositiveInt = 30
    null_threshold: Number = 0.0
    version: Version = "auto"
    on_bad: OnBad = "error"
    drift: NonNegativeInt = 0
    held_out_data: str | None = None
