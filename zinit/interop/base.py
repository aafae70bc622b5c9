"""What a format implements: reading its files and, where possible, writing an adapter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from zinit.adapter.handle import Handle
from zinit.adapter.registries import FORMATS
from zinit.config import AdapterConfig, PrefixConfig
from zinit.errors import CheckpointError, ConfigError
from zinit.registry import did_you_mean

SHARED = ("path", "model", "length", "gate")  # what all readers take
Gate = Literal["tanh", "identity"]
Imported = tuple[PrefixConfig, dict[str, Tensor]]
"""The settings of the prefixes and {parameter name: tensor}, for `zinit.attach` and ``load_state_dict``."""
ImportedAdapter = tuple[PrefixConfig | AdapterConfig, dict[str, Tensor]]
"""The same of an adapter that may be more than a prefix."""


Reader = Callable[..., ImportedAdapter]
"""``(path, model, *, length, gate)``, and options of its own: reads a file, and does not change the model."""


class Writer(Protocol):
    """Writes an adapter in one format."""

    def __call__(self, handle: Handle, path: Path) -> None: ...


@dataclass(frozen=True)
class Format:
    """Another implementation's checkpoint format.

    Args:
        title: implementation and kind of adapter, for listings.
        read: the importer.
        write: the exporter, if there is one; it may take options of its own.
        needs_weights: whether importing needs the model's weights; otherwise its shape is enough.
        bgr: whether its images had their channels in reverse.
    """

    title: str
    read: Reader
    write: Writer | None = None
    needs_weights: bool = False
    bgr: bool = False

    def check_reading(self, options: Iterable[str], *, format: str) -> None:
        """Refuses options that the reader does not take.

        Raises:
            ConfigError: naming those that there are.
        """
        known = [name for name in inspect.signature(self.read).parameters if name not in SHARED]
        for option in options:
            if option not in known:
                raise ConfigError(f"reading {format!r} has no option {option!r}.{did_you_mean(option, known)}")

    def export(self, handle: Handle, path: str | Path, *, format: str, **options: Any) -> None:
        """Writes an adapter; see `zinit.Handle.export`.

        Args:
            handle: the adapter.
            path: the file, or the folder ("peft").
            format: this format's name.
            options: the format's own. "official-v1" takes ``reader="training"`` (the default) or ``"inference"``: the
                project's trainer squashes the stored gates, its released inference script does not.

        Raises:
            CheckpointError: if the format cannot express the adapter; the message says why.
            ConfigError: if there is no such option.
        """
        if self.write is None:
            writes = ", ".join(name for name in FORMATS if FORMATS.get(name).write)
            raise CheckpointError(f"zinit reads {format!r} but does not write it. Formats it writes: {writes}.")
        known = list(inspect.signature(self.write).parameters)[2:]
        for option in options.keys() - known:
            raise ConfigError(f"the format {format!r} has no option {option!r}.{did_you_mean(option, known)}")
        try:
            self.write(handle, Path(path), **options)
        except OSError as error:
            raise CheckpointError(f"the adapter cannot be written to {path}: {error}.") from error
