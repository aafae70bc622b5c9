"""Ready features of one sample in a file of their own, instead of an image, a sound or a video.

A file holds one vector (F,) or several (N, F): ``.npy``, or ``.safetensors`` with one tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from zinit.data.records import describe
from zinit.errors import DataError
from zinit.files import is_file, is_lfs_pointer, parsing

SUFFIXES = (".npy", ".safetensors")
FLOATS = ("float16", "float32", "float64")
TENSOR_FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them


def read_vector(source: Any) -> np.ndarray:
    """(N, F) in float32; what the file's header says is checked before anything is read.

    Raises:
        DataError: naming the file, if it is missing, damaged, holds something else, or a number that is not finite.
    """
    path = Path(source) if isinstance(source, str | Path) else None
    if path is None or path.suffix not in SUFFIXES:
        raise DataError(
            f"{describe(source) if path is None else path}: expected a file of vectors, {' or '.join(SUFFIXES)}."
        )
    if not is_file(path):
        raise DataError(f"there is no file of vectors {path}.")
    if is_lfs_pointer(path):
        raise DataError(f"{path} is a Git LFS pointer, not the data itself. Fetch the file with 'git lfs pull'.")
    found = _numpy(path) if path.suffix == ".npy" else _safetensors(path)
    if not np.isfinite(found).all():
        raise DataError(f"{path} holds numbers that are not finite in float32. Leave it out.")
    return found.reshape(-1, found.shape[-1])


def map_numpy(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file, mapped into memory.

    Raises:
        DataError: if it is none, such as an ``.npz`` by another name, or holds objects.
    """
    with parsing(f"{path} is no array of numpy that can be read", DataError):
        return np.lib.format.open_memmap(path, mode="c")


def _numpy(path: Path) -> np.ndarray:
    mapped = map_numpy(path)
    _check(path, mapped.shape, str(mapped.dtype), FLOATS)
    with np.errstate(over="ignore"):
        return np.array(mapped, dtype=np.float32)


def _safetensors(path: Path) -> np.ndarray:
    from safetensors import safe_open

    with parsing(f"{path} is damaged", DataError), safe_open(path, "pt") as file:
        names = list(file.keys())
        if len(names) != 1:
            raise DataError(f"{path} holds {len(names)} tensors, and one is expected: {', '.join(names[:8])}.")
        header = file.get_slice(names[0])
        _check(path, tuple(header.get_shape()), header.get_dtype(), TENSOR_FLOATS)
        return file.get_tensor(names[0]).to(torch.float32).numpy()


def _check(path: Path, shape: tuple[int, ...], dtype: str, floats: tuple[str, ...]) -> None:
    if len(shape) not in (1, 2) or 0 in shape or dtype not in floats:
        expected = f"a vector (width,) or several (number, width) in {', '.join(floats)}"
        raise DataError(f"{path}: expected {expected}; got {dtype} {shape}.")
