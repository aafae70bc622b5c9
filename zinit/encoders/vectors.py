"""Ready features from files: what encoders made that zinit does not know, or does not ship.

A file holds one row for each sample, (N, D): ``.npy``, ``.safetensors`` (one tensor, or ``FILE.safetensors:NAME``), or
an index of faiss (``.index``) whose vectors can be read back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from zinit.data.vectors import FLOATS, map_numpy
from zinit.errors import ConfigError, DataError, first_line, install_extra
from zinit.files import is_file, is_lfs_pointer, local_path, parsing

SUFFIXES = (".npy", ".safetensors", ".index")


def is_vectors(source: str) -> bool:
    """Whether a source is named like a file of features."""
    return Path(_parted(source)[0]).suffix in SUFFIXES


def read_vectors(source: str) -> np.ndarray:
    """(N, D) of float16 or more; of a ``.npy`` file mapped into memory, not read.

    Raises:
        DataError: naming the file, if it is missing, damaged, or holds something else.
        ConfigError: if it takes faiss, which is not installed.
    """
    name, tensor = _parted(source)
    path = local_path(name)
    if not is_file(path):
        raise DataError(f"there is no file {path}. Expected features, (samples, width), in {', '.join(SUFFIXES)}.")
    if is_lfs_pointer(path):
        raise DataError(f"{path} is a Git LFS pointer, not the data itself. Fetch the file with 'git lfs pull'.")
    reader = {".npy": _numpy, ".safetensors": _safetensors, ".index": _faiss}.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: expected features in {', '.join(SUFFIXES)}; got a {path.suffix or 'bare'} file.")
    found = reader(path, tensor)
    if found.ndim != 2 or str(found.dtype) not in FLOATS or not found.size:
        raise DataError(
            f"{path}: expected numbers (samples, width) in {', '.join(FLOATS)}; got {found.dtype} {found.shape}."
        )
    return found


def _parted(source: str) -> tuple[str, str]:
    name, colon, tensor = source.rpartition(":")
    return (name, tensor) if colon and name.endswith(".safetensors") else (source, "")


def _numpy(path: Path, tensor: str) -> np.ndarray:
    return map_numpy(path)


def _safetensors(path: Path, tensor: str) -> np.ndarray:
    from safetensors import safe_open

    with parsing(f"{path} is damaged", DataError), safe_open(path, "np") as file:
        names = list(file.keys())
        if not tensor and len(names) != 1:
            raise DataError(f"{path} holds {len(names)} tensors: {', '.join(names[:8])}. Name one: {path.name}:NAME")
        if tensor and tensor not in names:
            raise DataError(f"{path} holds no tensor {tensor!r}: {', '.join(names[:8])}.")
        return file.get_tensor(tensor or names[0])


def _faiss(path: Path, tensor: str) -> np.ndarray:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(f"{path} is read by the package faiss. {install_extra('retrieval')}") from error
    library: Any = faiss
    try:
        index = library.read_index(str(path))
        if hasattr(index, "make_direct_map"):
            index.make_direct_map()
        return index.reconstruct_n(0, index.ntotal)
    except Exception as error:  # faiss raises its own and RuntimeError
        raise DataError(f"{path}: faiss cannot give the vectors back: {first_line(error)}") from error
