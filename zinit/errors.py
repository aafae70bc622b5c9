"""Errors that users can correct. A message says what was given, what was expected and what to do next.

The command line prints these without a traceback and exits with status 2; any other exception is a fault of zinit.
"""


class ZinitError(Exception):
    """Base class of all errors that a user can cause and correct."""


class ConfigError(ZinitError):
    """A setting has an impossible value, or two settings contradict each other."""


class BackboneError(ZinitError):
    """A model cannot take the prefix that was asked for."""


class CheckpointError(ZinitError):
    """An adapter or a resume checkpoint is missing, damaged, or made for something else."""


class DataError(ZinitError):
    """A data file is missing, unreadable or lacks a field."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
