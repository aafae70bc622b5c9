"""The learning rates that methods train at where nobody says another; nothing heavy is imported with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from zinit.config import ROLES


class LearningRate(NamedTuple):
    """A learning rate, and where the number is from."""

    value: float
    source: str

    @classmethod
    def of_roles(cls, value: float, source: str, *roles: str) -> dict[str, LearningRate]:
        """The same rate for several roles of what trains; see `zinit.config.ROLES`."""
        return dict.fromkeys(roles, cls(value, source))


Rates = Mapping[str, LearningRate]  # by the role of what trains

PAPER = "the paper's base rate 9e-3, applied as base x batch / 256 with its batch of 64"
ZERO_INIT = LearningRate.of_roles(9e-3 * 64 / 256, PAPER, *ROLES)  # its ablations change one thing, and no rate
HEAD_ONLY = LearningRate.of_roles(1e-3, "ours: the default of Adam (Kingma and Ba, 2015)", "head")
FULL = LearningRate.of_roles(2e-5, "Stanford Alpaca's full fine-tuning of LLaMA-7B", "weights", "head")
BITFIT = LearningRate.of_roles(1e-3, "the example of Ben Zaken et al.'s code, benzakenelad/BitFit", "weights", "head")
LORA = LearningRate.of_roles(3e-4, "Alpaca-LoRA's finetune.py, the paper's baseline", "weights", "head")
MATRICES = LearningRate.of_roles(
    1e-3, "ours: the default of Adam (Kingma and Ba, 2015), for linear maps that start at zero", *ROLES
)
PEFT = "PEFT's guide to prompt tuning (Lester et al.'s 0.3 is Adafactor's)"
PROMPT_TUNING = LearningRate.of_roles(3e-2, PEFT, "weights", "head")
COMPARED = "PEFT's method comparison on MetaMathQA, its experiment prefixtuning"
PEFT_PREFIX_TUNING = LearningRate.of_roles(1e-3, COMPARED, "weights", "head")
BOTTLENECK = LearningRate.of_roles(
    3e-4, "the example of Houlsby et al.'s code, google-research/adapter-bert", "weights", "head"
)
COMPARISON = "PEFT's method comparison on MetaMathQA, the better of its two rates for AdaptionPrompt"
ADAPTION_PROMPT = LearningRate.of_roles(5e-3, COMPARISON, *ROLES)
NONE: Rates = {}


def rate_settings(own: Rates) -> dict[str, Any]:
    """A method's default rates as settings of ``[train]``: the largest, and factors on it by role; or nothing.

    Args:
        own: its ``default_rates``.
    """
    rates = {role: rate.value for role, rate in own.items()}
    if not rates:
        return {}
    largest = max(rates.values())
    factors = {role: value / largest for role, value in rates.items() if value != largest}
    return {"learning_rate": largest, **({"rates": factors} if factors else {})}


def shares_rates(own: Rates, other: Rates) -> bool:
    """Whether a rate that was chosen for one method is one for the other: an ablation of it, or one without rates.

    Args:
        own: ``default_rates`` of the one.
        other: of the method that the rate was chosen for.
    """
    return not own or own == other
