"""The errors that end a run, each with its documented exit code."""

from __future__ import annotations

from enum import IntEnum

from sparktune.setup.plan.untrusted import printable, without_credentials

__all__ = [
    "DataError",
    "ExitCode",
    "MemoryBudgetError",
    "PreflightError",
    "SparktuneError",
    "StoppedResumable",
    "UsageError",
]


class ExitCode(IntEnum):
    """Exit codes of every command (design contract; do not renumber)."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    PREFLIGHT = 3
    DATA = 4
    MEMORY = 5
    STOPPED = 75
    INTERRUPTED = 130


class SparktuneError(Exception):
    """A failure the user can act on: what was expected, what was seen, what to do. Never shown as a traceback."""

    exit_code: ExitCode = ExitCode.FAILURE

    def __str__(self) -> str:
        """Returns the text without escape codes and passwords in URLs: it may quote what came from elsewhere."""
        return without_credentials(printable(super().__str__()))


class UsageError(SparktuneError):
    """A flag, a config key or their combination is wrong."""

    exit_code = ExitCode.USAGE


class PreflightError(SparktuneError):
    """The machine, a folder or a dependency is not in a state to start."""

    exit_code = ExitCode.PREFLIGHT


class DataError(SparktuneError):
    """The data or the tokenizer cannot be used."""

    exit_code = ExitCode.DATA


class MemoryBudgetError(SparktuneError):
    """The plan does not fit in the memory there is."""

    exit_code = ExitCode.MEMORY


class StoppedResumable(SparktuneError):
    """Training stopped on request after writing a checkpoint."""

    exit_code = ExitCode.STOPPED
