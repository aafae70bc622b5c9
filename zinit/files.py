"""Files that appear whole or not at all, folders that one process holds alone, and checks before files are read."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from zinit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

LFS_POINTER = b"version https://git-lfs.github.com/spec"
PARTIAL = ".partial"  # how the names of files end that are being written
# What a kill leaves of an atomic write; zinit 0.1 wrote without the ending, and these kinds of files.
LEFTOVER = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(PARTIAL)}|\..+\.(json|safetensors|html)\.[a-z0-9_]{{8}}")
LOCK, OWNER = ".claim.lock", ".claim.json"  # in a claimed folder: what the system locks, and who holds it


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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
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


def is_ours(name: str) -> bool:
    """Whether a file is of a claim, or what a kill left of an atomic write."""
    return name in (LOCK, OWNER) or LEFTOVER.fullmatch(name) is not None


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and those above it; afterwards those that it made are removed as far as they are empty.

    Raises:
        ConfigError: if it cannot be made.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_claimed(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            for path in new:
                path.rmdir()


@contextmanager
def claim(folder: Path, *, tell: Callable[[str], None]) -> Iterator[None]:
    """Holds a folder for this process alone; it is made if need be, and gone again if nothing was put into it.

    The system ends the claim of a process that dies. The next one is told so, and removes what was half written.

    Args:
        folder: what is held.
        tell: takes a line about a claim that is taken over.

    Raises:
        ConfigError: if a living process holds the folder, one of another machine may, or it cannot be written.
    """
    lock = FileLock(folder / LOCK)
    with made_folder(folder):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"{folder} is in use by {_describe(_owner(folder))}. Wait until it ends or stop it, or name another "
                f"folder with --output."
            ) from None
        except (OSError, NotImplementedError) as error:
            raise _cannot_be_claimed(folder, error) from error
        try:
            _take_over(folder, tell)
            try:
                yield
            finally:
                with suppress(OSError):
                    (folder / OWNER).unlink()
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()  # while it is held: who has it open sees that it is gone, and makes another
            lock.release()


def _take_over(folder: Path, tell: Callable[[str], None]) -> None:
    """Notes this process as the owner of a folder whose lock it holds, and clears up after one that was killed."""
    before = _owner(folder)
    if before and before.get("host") != socket.gethostname():
        raise ConfigError(  # locks of a network file system may end at the machine
            f"{folder} was claimed by {_describe(before)}, and from here it cannot be seen whether that is alive. "
            f"If it is not, remove {folder / OWNER} and run the same command again."
        )
    if before:
        tell(f"{_describe(before)} held {folder} and was killed; this process goes on with it")
    now = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name):
                path.unlink()
        write_atomically(folder / OWNER, json.dumps(now).encode())
    except OSError as error:
        raise _cannot_be_claimed(folder, error) from error


def _cannot_be_claimed(folder: Path, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or error
    return ConfigError(f"{folder} cannot be written: {reason}. Make room for it, or name another folder with --output.")


def _owner(folder: Path) -> dict[str, Any]:
    """Who claimed a folder last and has not given it back; empty where nobody has, or nobody knows."""
    try:
        found = json.loads((folder / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe(owner: Mapping[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('process')} on {owner.get('host')} (since {owner.get('since')})"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
