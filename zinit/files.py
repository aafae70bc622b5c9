"""Files that appear whole or not at all, folders that one process holds alone, and checks of files of others."""

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

from zinit.errors import BackboneError, CheckpointError, ConfigError, ZinitError, first_line

if TYPE_CHECKING:
    from torch import Tensor

LFS_POINTER = b"version https://git-lfs.github.com/spec"
PARTIAL = ".partial"  # how the names of files end that are being written
# What a kill leaves of an atomic write; zinit 0.1 wrote without the ending, and these kinds of files.
LEFTOVER = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(PARTIAL)}|\..+\.(json|safetensors|html)\.[a-z0-9_]{{8}}")
LOCK, OWNER = ".claim.lock", ".claim.json"  # in a claimed folder: what the system locks, and who holds it
NUMBERS = ("float16", "bfloat16", "float32", "float64")  # dtypes that an adapter may have


def local_path(source: str | Path) -> Path:
    """A path as a user writes it, "~" resolved. Names that no file can have come back as they are."""
    return Path(os.path.expanduser(source))


def is_file(path: str | Path) -> bool:
    """Whether there is a regular file: no folder, pipe or device. Also for paths that are too long or hold a NUL."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder; see `is_file`."""
    return os.path.isdir(path)


def model_source(source: str | Path) -> str:
    """Checks that a path or Hub id can be a model, and returns it as text.

    Raises:
        BackboneError: if it is a path that holds no model.
    """
    path = local_path(source)
    if is_folder(path):
        if not is_file(path / "config.json"):
            raise BackboneError(f"the folder {source} holds no model: it has no config.json.")
        return str(path)
    text = str(source)
    if is_file(path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise BackboneError(f"there is no model folder {source}. Expected a folder with a config.json, or a Hub id.")
    return text


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of the data: it belongs to an editor, a system or a tool."""
    return name.startswith(".") or name == "__MACOSX"


@contextmanager
def parsing(
    what: str, kind: type[ZinitError], advice: str = "", *, also: tuple[type[ZinitError], ...] = ()
) -> Iterator[None]:
    """Every parser of files that others wrote runs in here: whatever it raises becomes one message.

    Which exceptions a parser knows is not documented for what its authors did not think of: nesting beyond the
    recursion limit, numbers of thousands of digits, types of a newer version.

    Args:
        what: file and complaint, such as "a.json is not valid JSON".
        kind: of the error.
        advice: what to do, a sentence.
        also: kinds of `ZinitError` that do not name the file, and are told like a parser's own.

    Raises:
        ZinitError: of that kind, with the parser's own words; any other `ZinitError` passes as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ZinitError) and not isinstance(error, also):
            raise
        reason = first_line(error).rstrip(".")
        raise kind(f"{what}: {reason[:300]}. {advice}".rstrip()) from error


def read_json(path: Path, kind: type[ZinitError], advice: str = "") -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        kind: of the error.
        advice: what to do about it, a sentence.

    Raises:
        ZinitError: of that kind, if it cannot be read or is no JSON.
    """
    with parsing(f"{path} is damaged or unreadable JSON", kind, advice):
        return json.loads(path.read_text(encoding="utf-8-sig"))


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


def check_plain(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Checks tensors of a file that others wrote before anything is computed with them.

    Layout, device, storage and dtype first, as a few bytes can claim to be 2**40 numbers (a stride of 0) or none (a
    sparse tensor); then the numbers.

    Args:
        tensors: of the adapter, by name.
        path: of the file, for messages.

    Raises:
        CheckpointError: naming the tensor, and what it is.
    """
    import torch

    dtypes = {getattr(torch, name) for name in NUMBERS}
    for name, tensor in tensors.items():
        if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else str(tensor.layout)
            problem = f"is {kind} on {tensor.device.type!r}, where a plain tensor with numbers of its own is expected"
        elif tensor.dtype not in dtypes:
            problem = f"holds {tensor.dtype}, where one of {', '.join(NUMBERS)} is expected"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            stored = tensor.untyped_storage().nbytes() // tensor.element_size()
            problem = f"claims the shape {tuple(tensor.shape)}, but stores {stored:,} numbers"
        elif not tensor.isfinite().all():
            problem = "holds numbers that are not finite: the run that made it diverged, or the file is damaged"
        else:
            continue
        raise CheckpointError(f"{path} was not loaded: its tensor {name!r} {problem}. Get the file anew.")


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
    except (OSError, ValueError, RecursionError):
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
