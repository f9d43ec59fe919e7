"""Guards what the base image brought: a pip step that replaces its CUDA torch makes everything slow or broken.

usage: verify_base.py record|refuse LOCK...|check|pip-check ALLOW    (inside an image build; the record is in base.json)

Standard library only: it runs before anything is installed. Every refusal begins with `sparktune-check:`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

RECORD = Path(__file__).resolve().parent / "base.json"
CONSTRAINTS = Path("/etc/pip/constraint.txt")
PROTECTED = re.compile(
    r"(torch|torchvision|torchaudio|torchao|triton|pytorch-triton|numpy|setuptools|(nvidia|cuda)-.*)$"
)
CHECK_FAILED = 41


def fail(text: str) -> int:
    """Prints one refusal, in the form that image.py looks for, and returns the exit code."""
    print(f"sparktune-check: {text}", flush=True)
    return CHECK_FAILED


def normal(name: str) -> str:
    """Returns a distribution's name as indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def protected() -> dict[str, str]:
    """Returns the versions of the base's own packages, as this interpreter would import them."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = normal(distribution.metadata["Name"] or "")
        if PROTECTED.match(name):
            found.setdefault(name, distribution.version)  # the first on sys.path is what gets imported
    return found


def locked(path: Path) -> dict[str, str]:
    """Returns name -> version of a lock file."""
    rows = re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s\\;]+)", path.read_text(encoding="utf-8"), flags=re.M)
    return {normal(name): version for name, version in rows}


def record() -> int:
    """Writes down what the base brought, before anything is installed."""
    versions = protected()
    if "torch" not in versions:
        return fail("the base image has no torch. Expected NVIDIA's PyTorch image, as docker/stacks/*/stack.yaml names "
                    "it; give that one, or another with torch built for this chip.")
    RECORD.write_text(json.dumps(versions, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"base: Python {sys.version.split()[0]}, " + ", ".join(f"{n} {v}" for n, v in sorted(versions.items())))
    if CONSTRAINTS.is_file():
        print(f"--- {CONSTRAINTS} of the base\n{CONSTRAINTS.read_text(encoding='utf-8').rstrip()}\n---")
    return 0


def refuse(paths: list[str]) -> int:
    """Fails if a lock file would install anything that is the base's own; tells what else it shadows."""
    base = json.loads(RECORD.read_text(encoding="utf-8"))
    wanted: dict[str, str] = {}
    for path in paths:
        wanted |= locked(Path(path))
    for name, version in wanted.items():
        if PROTECTED.match(name):
            seen = f"has {name} {base[name]}" if name in base else f"brings its own {name.split('-')[0]} packages"
            return fail(f"the lock file would install {name} {version}, but the base {seen}, built for this chip. "
                        f"Take {name} out of the lock file (docker/stacks/overrides.txt).")
    constraints = locked(CONSTRAINTS) if CONSTRAINTS.is_file() else {}
    shadowed = sorted(n for n, v in wanted.items() if constraints.get(n, v) != v)
    for name in shadowed:
        print(f"shadowed in our environment: {name} {constraints[name]} of the base by {wanted[name]}")
    return 0


def check() -> int:
    """Fails if any of the base's packages is another than at the start."""
    before, now = json.loads(RECORD.read_text(encoding="utf-8")), protected()
    changed = [f"{n}: {before.get(n, 'nothing')} -> {now.get(n, 'nothing')}" for n in sorted({*before, *now})
               if before.get(n) != now.get(n)]
    if changed:
        return fail(f"a pip step replaced the base's own packages ({'; '.join(changed)}). Nothing may touch them: "
                    "every install here is --no-deps from a lock file.")
    print(f"torch unchanged: {now['torch']}")
    return 0


def pip_check(allow: str) -> int:
    """Fails on any line of `pip check` that the stack is not known for."""
    torch = json.loads(RECORD.read_text(encoding="utf-8"))["torch"]
    lines = [line.strip() for line in Path(allow).read_text(encoding="utf-8").splitlines()]
    allowed = {line.replace("{torch}", torch) for line in lines if line and not line.startswith("#")}
    env = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"}
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, env=env, check=False)
    printed = [line for line in done.stdout.splitlines() if line.strip() and line != "No broken requirements found."]
    other = [line for line in printed if line not in allowed]
    for line in printed:
        print(f"pip check: {line}")
    if done.returncode not in (0, 1) or (done.returncode and not printed):
        return fail(f"pip check itself failed: {done.stderr.strip()[-500:]}")
    if other:
        return fail(f"pip check says what {allow} does not allow: {' | '.join(other)}")
    print(f"pip check: {len(printed)} lines, all known for this stack")
    return 0


def main(arguments: list[str]) -> int:
    """Runs one of the commands above."""
    command, rest = (arguments[0] if arguments else ""), arguments[1:]
    if command == "record" and not rest:
        return record()
    if command == "refuse" and rest:
        return refuse(rest)
    if command == "check" and not rest:
        return check()
    if command == "pip-check" and len(rest) == 1:
        return pip_check(rest[0])
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
