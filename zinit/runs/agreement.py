"""The processes of a run agree on its settings, examples and models before the first step; all of them find out.

A process that went its own way would train to the end on other data, or leave the others waiting for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zinit.errors import ConfigError
from zinit.models.identity import difference
from zinit.validation import shown

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_agreement(accelerator: Accelerator, values: Mapping[str, Any]) -> None:
    """Compares plain values, by name, across processes. All of them call this, and all raise or none.

    Raises:
        ConfigError: naming the first that differs, and which ranks have what.
    """
    found = _gathered(accelerator, dict(values))
    for name in dict.fromkeys(name for each in found for name in each):
        if text := _disagreement([each.get(name) for each in found]):
            raise ConfigError(
                f"the processes of this run disagree: {name} is {text}. Launch all of them with the same arguments, "
                f"and with the same files in their places."
            )


def check_models(accelerator: Accelerator, identities: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares models across processes. All of them call this, and all raise or none.

    Args:
        accelerator: the run's.
        identities: of models, by name; see `zinit.models.identity.identify`.

    Raises:
        ConfigError: naming the model, what differs, and the ranks.
    """
    first, *others = _gathered(accelerator, dict(identities))
    for rank, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if text := difference(first.get(name, {}), other.get(name, {})):
                raise ConfigError(
                    f"the processes of this run disagree: {name} of rank {rank} is not that of rank 0: {text}. "
                    f"Give all of them the same model."
                )


def _gathered(accelerator: Accelerator, value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks."""
    from accelerate.utils import gather_object

    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def _disagreement(values: Sequence[Any]) -> str:
    """Which ranks have which value, in words; empty if all have the same."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(repr(value), []).append(rank)
    if len(ranks) == 1:
        return ""
    parts = []
    for own in ranks.values():
        named = ", ".join(map(str, own[:8])) + (", ..." if len(own) > 8 else "")
        parts.append(f"{shown(values[own[0]])} on rank{'s' if len(own) > 1 else ''} {named}")
    return " and ".join(parts)
