"""One line of the preflight, and how a check that cannot be made is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparktune.setup.plan.errors import ExitCode, SparktuneError

__all__ = ["Check", "failures", "guarded"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the preflight."""

    name: str
    status: Literal["ok", "warning", "failed"]
    seen: str
    """What was found."""
    fix: str = ""
    """What to do; empty when nothing is to be done."""
    exit_code: int = ExitCode.PREFLIGHT
    """What a run that this check stops exits with: a wrong --model is a usage error, missing data a data error."""

    def as_json(self) -> dict[str, Any]:
        """Returns the check as JSON values."""
        return asdict(self)


def failures(checks: list[Check]) -> list[Check]:
    """Returns the checks that must be repaired before a run can start."""
    return [c for c in checks if c.status == "failed"]


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """Returns the check's result; one that cannot be made counts as failed, with its sentence."""
    try:
        return check()
    except SparktuneError as error:
        return Check(name=name, status="failed", seen=str(error), exit_code=error.exit_code)
    except OSError as error:
        return Check(name=name, status="failed", seen=str(error))
