"""Tensors of one shape, one for each of many examples, in files that are mapped into memory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zinit.errors import ConfigError
from zinit.files import write_atomically

PART_BYTES = 64 * 2**20
STALE_SECONDS = 24 * 3600  # a half-written file that is older belongs to no living process


def bytes_of(tensor: Tensor) -> memoryview:
    """What a tensor holds, in any dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class TensorStore:
    """One tensor for each of many examples, in files that are mapped into memory.

    Args:
        folder: of the files.
        like: shape and dtype of one example's tensor.
        count: number of examples.
    """

    def __init__(self, folder: Path, like: Tensor, count: int) -> None:
        self.folder, self.shape, self.dtype, self.count = folder, tuple(like.shape), like.dtype, count
        self.bytes_each = like.numel() * like.element_size()
        self.per_part = max(1, PART_BYTES // self.bytes_each)
        self.parts = range(-(-count // self.per_part))
        self._mapped: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_mapped": {}}  # processes that prepare batches map the files themselves

    def __getitem__(self, indices: Iterable[int]) -> Tensor:
        """(B, ...) of these examples."""
        places = [divmod(index, self.per_part) for index in indices]
        return torch.stack([self._part(part)[place] for part, place in places])

    def examples(self, part: int) -> range:
        """The examples whose tensors a file holds."""
        return range(part * self.per_part, min(self.count, (part + 1) * self.per_part))

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.safetensors"

    def _part(self, part: int) -> Tensor:
        if part not in self._mapped:
            self._mapped[part], _ = _read(self._path(part))
        return self._mapped[part]

    def is_whole(self, part: int) -> bool:
        """Whether a file exists and holds what was written."""
        from safetensors import SafetensorError

        try:
            states, sha256 = _read(self._path(part))
        except (OSError, SafetensorError):
            return False
        return (
            states.dtype == self.dtype
            and states.shape == (len(self.examples(part)), *self.shape)
            and hashlib.sha256(bytes_of(states)).hexdigest() == sha256
        )

    def write(self, part: int, states: Tensor) -> None:
        """Makes a file."""
        from safetensors.torch import save

        sha256 = hashlib.sha256(bytes_of(states)).hexdigest()
        write_atomically(self._path(part), save({"states": states}, metadata={"sha256": sha256}))

    def check(self) -> None:
        """Checks that every file can be seen from here, and removes what a killed run left half written.

        Raises:
            ConfigError: naming the first that cannot.
        """
        for left in self.folder.glob(".part-*"):
            with suppress(FileNotFoundError):  # another run has just finished it
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()
        for part in self.parts:
            if not self._path(part).is_file():
                raise ConfigError(
                    f"{self._path(part)} was written, but cannot be seen by this process: "
                    f"train.activation_cache must be a folder that all machines share."
                )


def _read(path: Path) -> tuple[Tensor, str]:
    """The tensors of a file, read from the disk when they are used, and the hash that they were written with."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor("states"), (file.metadata() or {}).get("sha256", "")
