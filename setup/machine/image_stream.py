"""One build through the SDK, as a process of its own: its stream as JSON lines on standard output.

Ending the process closes the connection, which is what makes the engine's own builder stop.
"""

from __future__ import annotations

import json
import sys

from sparktune.setup.machine.engine import connect
from sparktune.setup.plan.errors import SparktuneError

__all__ = ["main"]


def main(payload: str) -> int:
    """Builds as `payload` says (JSON: arguments of the SDK's `api.build`) and returns the exit code."""
    request = json.loads(payload)
    try:
        # rm and forcerm: no container of a step outlives it, whether it failed or was stopped
        stream = connect().api.build(**request, decode=True, rm=True, forcerm=True, timeout=None)
        failed = False
        for entry in stream:
            print(json.dumps(entry), flush=True)
            failed = failed or "error" in entry
    except SparktuneError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    except Exception as error:  # the engine's end shows as any of several transport errors
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
