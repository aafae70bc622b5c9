"""The settings of methods; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zinit.config import ExcitorConfig as ExcitorConfig
from zinit.config import JsonConfig
from zinit.validation import PositiveFloat, Rate, Size


@dataclass(frozen=True, kw_only=True)
class NoSettings(JsonConfig):
    """For methods that have none."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings(JsonConfig):
    """Defaults are Alpaca-LoRA's, the paper's baseline (r = 8, alpha 16, dropout 0.05, on queries and values).

    Args:
        rank: r.
        alpha: the update is scaled by alpha / r.
        dropout: of the update's input.
    """

    rank: Size = 8
    alpha: PositiveFloat = 16
    dropout: Rate = 0.05


@dataclass(frozen=True, kw_only=True)
class PromptTuningSettings(JsonConfig):
    """How many prompts.

    Args:
        length: learned embeddings in front of the input; None is the run's ``prefix.length``.
    """

    length: Size | None = None


@dataclass(frozen=True, kw_only=True)
class BottleneckSettings(JsonConfig):
    """How narrow.

    Args:
        width: of the bottleneck. Houlsby et al. use 8 to 256.
    """

    width: Size = 16


@dataclass(frozen=True, kw_only=True)
class LogisticRegressionSettings(JsonConfig):
    """How strongly it is regularised.

    Args:
        C: inverse strength of the L2 penalty; scikit-learn's default is 1.
    """

    C: PositiveFloat = 1.0


@dataclass(frozen=True, kw_only=True)
class StageSettings(JsonConfig):
    """Which stage of a training in two.

    Args:
        stage: ``"bind"``, the first: what makes the context, prompts and gates; ``"tuning"``, the second, which starts
            from the first's run or adapter (``--from``): LoRA, biases and norms; or ``"both"`` at once.
    """

    stage: Literal["both", "bind", "tuning"] = "both"
