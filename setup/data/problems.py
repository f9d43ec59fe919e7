"""What was wrong with the rows of one file: counted by code, the first ten kept, judged by the documented limits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparktune.setup.plan.errors import DataError
from sparktune.setup.plan.schema import RowProblem

__all__ = ["LOST_LABELS_LIMIT", "SHOWN", "FileTally", "judge"]

SHOWN = 10
"""Problems of each code that are kept and shown."""
LOST_LABELS_LIMIT = 0.30
"""Share of rows without any label above which a run stops."""

# Not defects of a row: a policy of the plan, and what that policy or the template leaves.
_NOT_BAD = ("over_length", "all_masked")


@dataclass(kw_only=True)
class FileTally:
    """The fate of every row of one file."""

    rows: int = 0
    """Non-blank lines."""
    kept: int = 0
    truncated: int = 0
    """Kept rows that were cut at max_seq_length."""
    open_turns: int = 0
    """Assistant turns of kept rows that no special token closes."""
    dropped: Counter[str] = field(default_factory=Counter)
    problems: list[RowProblem] = field(default_factory=list)
    """The first ten of each code, in the file's order."""

    def drop(self, problem: RowProblem) -> None:
        """Counts a row that is not used."""
        self.dropped[problem.code] += 1
        if self.dropped[problem.code] <= SHOWN:
            self.problems.append(problem)

    @property
    def bad(self) -> int:
        """Rows that cannot be used, whatever the plan."""
        return sum(count for code, count in self.dropped.items() if code not in _NOT_BAD)

    def listing(self) -> str:
        """Returns one line a code: how many rows, the first ten line numbers, and what the first one is."""
        lines = []
        for code, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])):
            shown = [p for p in self.problems if p.code == code]
            where = ", ".join(str(p.line) for p in shown) + (f" and {count - SHOWN:,} more" if count > SHOWN else "")
            s = "s" if count > 1 else ""
            lines.append(f"  {code}: {count:,} row{s}, line{s} {where}. Line {shown[0].line}: {shown[0].text}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values that `from_json` takes."""
        return {
            "rows": self.rows, "kept": self.kept, "truncated": self.truncated, "open_turns": self.open_turns,
            "dropped": dict(self.dropped), "problems": [p.model_dump() for p in self.problems],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FileTally:
        """Returns the tally that `to_json` described."""
        return cls(**{
            **values, "dropped": Counter(values["dropped"]), "problems": [RowProblem(**p) for p in values["problems"]],
        })


def judge(path: Path, tally: FileTally, bad_row_limit: float, over_length: str, max_seq_length: int) -> None:
    """Stops a run whose data is too broken to go on with.

    Raises:
        DataError: too many bad rows, too many rows without labels, an over-length row under policy error, or nothing
            usable; names the file, the first ten lines of each kind and a count.
    """
    if over_length == "error" and tally.dropped["over_length"]:
        raise DataError(
            f"{path} should hold no example longer than max_seq_length ({max_seq_length:,} tokens), as --over-length "
            f"error asks; {tally.dropped['over_length']:,} of {tally.rows:,} rows are longer:\n{tally.listing()}\n"
            "Shorten them, raise --max-seq-length, or pass --over-length drop or truncate."
        )
    if tally.bad > bad_row_limit * tally.rows:
        raise DataError(
            f"{path}: {tally.bad:,} of {tally.rows:,} rows ({100 * tally.bad / tally.rows:.1f} %) cannot be used; at "
            f"most {100 * bad_row_limit:g} % may be.\n{tally.listing()}\n"
            "Mend or remove these rows, or raise --bad-row-limit."
        )
    lost = tally.dropped["all_masked"]
    if lost > LOST_LABELS_LIMIT * tally.rows:
        raise DataError(
            f"{path}: {lost:,} of {tally.rows:,} rows ({100 * lost / tally.rows:.1f} %) have no token left to learn "
            f"from; at most {100 * LOST_LABELS_LIMIT:g} % may.\n{tally.listing()}\n"
            "Raise --max-seq-length, or pass --over-length drop."
        )
    if not tally.kept:
        too_long = tally.dropped["over_length"]
        advice = "Raise --max-seq-length, or pass --over-length truncate." if too_long else "Mend these rows."
        raise DataError(
            f"{path} should hold at least one usable example; none of its {tally.rows:,} rows is.\n{tally.listing()}\n"
            f"{advice}"
        )
