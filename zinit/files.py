"""Writing files so that they appear whole or not at all, and checks before files are read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from zinit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

LFS_POINTER = b"version https://git-lfs.github.com/spec"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the pointer that Git LFS leaves in place of a file that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that names and shapes agree exactly.

    Args:
        tensors: as a file holds them.
        expected: {name: shape}.

    Raises:
        CheckpointError: naming what is missing, unexpected or of another shape.
    """
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"the adapter's tensors do not fit: missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'} "
            f"({len(missing)} and {len(extra)} in all)."
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{name} has shape {tuple(tensors[name].shape)}, but {shape} is expected.")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file; at every instant the old content or the new one is there, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
