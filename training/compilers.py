"""C compilers that read nothing of the caller's working directory.

gcc looks for a file `specs` wherever it looks for start files. An empty or relative entry of LIBRARY_PATH (images set
`.../stubs:`), COMPILER_PATH or GCC_EXEC_PREFIX makes the working directory one of those places, and a folder or file
`specs` there ends every compilation: "cannot read spec file './specs': Is a directory". Triton compiles its launchers
and torch.compile its C++ with $CC and $CXX, in the process's working directory. So training's process cleans those
variables and compiles through a small script that first goes to a folder of its own.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import MutableMapping
from pathlib import Path

from sparktune.setup.plan.rundir import cache_dir

__all__ = ["private_compilers"]

_SEARCH = ("LIBRARY_PATH", "COMPILER_PATH", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")
_COMPILERS = {"CC": ("gcc", "clang"), "CXX": ("g++", "clang++")}


def private_compilers(env: MutableMapping[str, str]) -> None:
    """Changes `env` so that no compiler started with it looks into the caller's working directory.

    A compiler that `env` names is kept and wrapped; without any on the path nothing is set. Where no folder of ours
    takes an executable file the variables alone are cleaned, which is what keeps gcc from `specs`.

    Args:
        env: the environment, os.environ of a training process.
    """
    for name in _SEARCH:
        if name in env:
            env[name] = os.pathsep.join(entry for entry in env[name].split(os.pathsep) if os.path.isabs(entry))
            if not env[name]:
                del env[name]  # an empty value is an empty entry again
    if not os.path.isabs(env.get("GCC_EXEC_PREFIX", "/")):
        del env["GCC_EXEC_PREFIX"]
    for variable, usual in _COMPILERS.items():
        named = env.get(variable)
        found = shutil.which(named) if named else next(filter(None, map(shutil.which, usual)), None)
        wrapper = _wrapper(Path(found).absolute()) if found else None
        if wrapper is not None:
            env[variable] = str(wrapper)


def _wrapper(compiler: Path) -> Path | None:
    """Returns a script that starts `compiler` in the script's folder; None where none can be made or started."""
    try:
        home = cache_dir("compilers") / hashlib.sha256(os.fsencode(compiler)).hexdigest()[:16]
        if compiler.parent.parent == home.parent:
            return compiler  # inherited from a training process that started this one
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        script = home / compiler.name
        text = f"#!/bin/sh\ncd {shlex.quote(str(home))} && exec {shlex.quote(str(compiler))} \"$@\"\n"
        if not script.is_file() or script.read_text(encoding="utf-8") != text:
            partial = home / f"{compiler.name}.{os.getpid()}"
            partial.write_text(text, encoding="utf-8")
            partial.chmod(0o700)
            os.replace(partial, script)
    except OSError:
        return None
    return script if os.access(script, os.X_OK) else None
