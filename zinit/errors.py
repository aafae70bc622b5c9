"""Errors that users can correct. A message says what was given, what was expected and what to do next.

The command line prints these without a traceback and exits with status 2; any other exception is a fault of zinit.
"""

import re

# C0 but line break and tab, DEL, and C1: a terminal takes them for commands (to move, to paint, to answer as if typed).
# And half surrogate pairs: Python holds bytes that are no text by them, and no stream takes them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """A text of unknown origin for a terminal or a log: what neither is to be sent is written out in hexadecimal."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1] if found[0] > "\xff" else f"\\x{ord(found[0]):02x}", text)


class ZinitError(Exception):
    """Base class of all errors that a user can cause and correct."""


class ConfigError(ZinitError):
    """A setting has an impossible value, or two settings contradict each other."""


class BackboneError(ZinitError):
    """A model cannot take the prefix that was asked for."""


class LoadingError(BackboneError):
    """A model's files are missing, unreadable or not what is needed."""


class CheckpointError(ZinitError):
    """An adapter or a resume checkpoint is missing, damaged, or made for something else."""


class DataError(ZinitError):
    """A data file is missing, unreadable or lacks a field."""


def is_by_settings(error: BaseException) -> bool:
    """Whether the same settings would be refused again, whatever becomes of files, folders and other machines.

    What an operating system or a network refused, and what is wrong with data, models' files or checkpoints, may be
    mended.
    """
    if not isinstance(error, ConfigError | BackboneError) or isinstance(error, LoadingError):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return False
        cause = cause.__cause__ or cause.__context__
    return True


def install_extra(extra: str) -> str:
    """The sentence that says how to install an optional part of zinit. No package index has zinit: from its sources.

    Args:
        extra: its name in ``pyproject.toml``.
    """
    return f"In zinit's source folder: pip install -e '.[{extra}]'"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
