"""`./install.sh`: build the image, test it from inside, say what came of it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparktune.setup.build_progress import BuildDisplay
from sparktune.setup.machine.backends import LocalBackend, StopSignals, local_python, program_root
from sparktune.setup.machine.detect import nvidia_gpus
from sparktune.setup.machine.diagnose import diagnose
from sparktune.setup.machine.docker_backend import ROLE_LABEL, RUN_LABEL
from sparktune.setup.machine.engine import connect, create_container, start_container
from sparktune.setup.machine.image import HASH_LABEL, Flavour, Image, base_digest, ensure_image, load_stack, stacks
from sparktune.setup.machine.image_build import Cancelled
from sparktune.setup.machine.image_checks import host_checks
from sparktune.setup.plan.errors import ExitCode, PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.rundir import cache_dir
from sparktune.setup.terminal import Terminal

__all__ = ["main", "smoke_test", "uninstall"]

NOT_GPU_TESTED = 75
_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    check: str
    status: Literal["pass", "fail", "skip"]
    seconds: float
    detail: str


def smoke_test(client: Any, tag: str, gpu: bool, should_stop: Callable[[], bool] = lambda: False) -> list[Row]:
    """Runs docker/smoke_test.py in a container of the image, and returns its lines.

    Raises:
        PreflightError: the engine would not start it, as one that cannot give a container GPUs. The image stays.
        Cancelled: `should_stop` said so. The image stays.
    """
    from docker.types import DeviceRequest

    devices = [DeviceRequest(count=-1, capabilities=[["gpu"]])] if gpu else None
    container = create_container(
        client, image=tag, network_mode="none", labels={ROLE_LABEL: "smoke"}, ipc_mode="host", device_requests=devices,
        name=f"sparktune-smoke-{os.getpid()}-{time.monotonic_ns()}",
    )
    try:
        start_container(container)
        while container.status != "exited":
            if should_stop():
                raise Cancelled(f"The smoke test was stopped. The image {tag} is built and not tested.")
            time.sleep(_POLL_S)
            container.reload()
        text = container.logs(stdout=True, stderr=False).decode("utf-8", "replace")
        errors = container.logs(stdout=False, stderr=True).decode("utf-8", "replace")
    finally:
        container.remove(force=True)
    rows = [Row(**json.loads(line)) for line in text.splitlines() if line.startswith("{")]
    if not rows:
        rows = [Row(check="smoke test", status="fail", seconds=0.0, detail=errors.strip()[-400:] or "it said nothing")]
    return rows


def uninstall(client: Any) -> list[str]:
    """Removes every image and container that carries our labels, and their records; returns what was removed.

    Raises:
        PreflightError: one of these containers is running; then nothing was removed.
    """
    removed = []
    ours = [c for label in (RUN_LABEL, ROLE_LABEL) for c in client.containers.list(all=True, filters={"label": label})]
    if running := sorted(c.name for c in ours if c.status == "running"):
        raise PreflightError(f"Nothing was removed: {', '.join(running)} is running, which may be a training run. "
                             f"Let it end, or stop it (docker stop {' '.join(running)}), and start again.")
    for container in ours:
        container.remove(force=True)
        removed.append(f"container {container.name}")
    for image in client.images.list(filters={"label": HASH_LABEL}):
        for tag in image.tags:
            client.images.remove(tag)
            removed.append(f"image {tag}")
    folder = cache_dir("images")
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        path.unlink()
        removed.append(str(path))
    return removed


def _left(client: Any) -> list[str]:
    """Returns what is large, is not ours to remove, and how its owner would remove it."""
    root = program_root()
    bases = sorted({load_stack(root, name).base_image for name in stacks(root)})
    return [
        *(f"{base}: other images may stand on it; docker rmi {base}" for base in bases if base_digest(client, base)[1]),
        "the engine's cache of build steps, which it shares with all builds: docker builder prune",
    ]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="install.sh", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("--stack", default="2026.05", help="pinned software stack (default: %(default)s)")
    parser.add_argument("--baseline", action="store_true", help="the stock stack: no torch.compile, no fast path")
    parser.add_argument("--rebuild", nargs="?", const="yes", default="no", choices=("yes", "clean", "no"),
                        help="build although nothing changed; =clean removes it first and reuses no layer")
    parser.add_argument("--max-jobs", type=_jobs, metavar="N", help="compilers at once (default 4, about 1.5 GiB each)")
    parser.add_argument("--gates", action="store_true",
                        help="run the six gates in the local environment, without the image")
    parser.add_argument("--uninstall", action="store_true", help="remove what this made, and nothing else")
    parser.add_argument("--json", action="store_true", help="the outcome as JSON on standard output")
    parser.add_argument("--plain", action="store_true", help="no bars, no colour")
    options = parser.parse_args(argv)
    alone = [flag for flag, given in (("--gates", options.gates), ("--uninstall", options.uninstall)) if given]
    others = [flag for flag, given in (("--rebuild", options.rebuild != "no"), ("--max-jobs", options.max_jobs),
                                       ("--baseline", options.baseline)) if given]
    if len(alone) > 1 or (alone and others):
        parser.error(f"{alone[0]} goes alone; drop {', '.join([*alone[1:], *others])}")
    try:
        load_stack(program_root(), options.stack)
    except UsageError as error:
        parser.error(str(error))
    return options


def _jobs(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    messages = Terminal(stderr=True, no_color=True if options.plain else None)
    try:
        if options.gates:
            return _gates(options)
        client = connect()
        if options.uninstall:
            for what in uninstall(client):
                messages.print(escape(f"removed {what}"), highlight=False, soft_wrap=True)
            for what in _left(client):
                messages.print(escape(f"left {what}"), highlight=False, soft_wrap=True)
            return ExitCode.OK
        return _install(options, client, messages)
    except SparktuneError as error:
        messages.print(escape(str(error)), style="bold red", highlight=False, soft_wrap=True)
        if options.json:
            print(json.dumps({"code": int(error.exit_code), "verdict": str(error), "image": None, "checks": []}))
        return int(error.exit_code)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)


def _gates(options: argparse.Namespace) -> int:
    """Runs lab/gates.py where there is torch, and returns its exit code."""
    command = [local_python(program_root()), "-P", "-m", "sparktune.lab.gates", *(["--json"] if options.json else [])]
    return subprocess.run(command, env=LocalBackend.environment(), check=False).returncode


def _install(options: argparse.Namespace, client: Any, messages: Console) -> int:
    root, rows, begun = program_root(), [], time.monotonic()
    flavour: Flavour = "baseline" if options.baseline else "opt"
    base_here = base_digest(client, load_stack(root, options.stack).base_image)[1] is not None
    for name, status, detail in host_checks(client, base_is_here=base_here):
        rows.append(Row(check=name, status=status, seconds=0.0, detail=detail))
    if any(row.status == "fail" for row in rows):
        _show(options, rows, None, ExitCode.PREFLIGHT)
        return int(ExitCode.PREFLIGHT)
    arguments = {} if options.max_jobs is None else {"MAX_JOBS": str(options.max_jobs)}
    with StopSignals() as stop:
        with BuildDisplay(messages, options.plain) as display:
            image = ensure_image(
                client, root, options.stack, flavour, on_event=display.event, rebuild=options.rebuild,
                build_args=arguments, should_stop=lambda: stop.count > 0,
            )
        seconds = round(time.monotonic() - begun, 1)
        word = "built" if image.built else "already there, nothing changed"
        rows.append(Row(check=f"image ({flavour})", status="pass", seconds=seconds, detail=word))
        rows += smoke_test(client, image.tag, bool(nvidia_gpus()), lambda: stop.count > 0)
    gpu_tested = all(row.status != "skip" or "CUDA device" not in row.detail for row in rows)
    code = 1 if any(row.status == "fail" for row in rows) else 0 if gpu_tested else NOT_GPU_TESTED
    _show(options, rows, image, code)
    for row in rows:
        for finding in diagnose(row.detail) if row.status == "fail" else []:
            messages.print(escape(finding.sentence()), highlight=False, soft_wrap=True)
    return code


def _show(options: argparse.Namespace, rows: list[Row], image: Image | None, code: int) -> None:
    verdict = {
        0: "Installed: every check passed.", 1: "Not installed: a check failed.",
        3: "Not built: this machine is not ready.",
        NOT_GPU_TESTED: "Built, but not tested on a GPU: none is visible here.",
    }[int(code)]
    if options.json:
        facts = None if image is None else {**asdict(image), "log": str(image.log)}
        print(json.dumps({"code": int(code), "verdict": verdict, "image": facts, "checks": [asdict(r) for r in rows]}))
        return
    console = Terminal(no_color=True if options.plain else None)
    table = Table(box=None, pad_edge=False)
    for name in ("check", "result", "seconds", "seen"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row.check, row.status, f"{row.seconds:.1f}", escape(row.detail))
    console.print(table)
    if image is not None:
        for name, value in (("tag", image.tag), ("also", image.alias), ("image id", image.id), ("base", image.base),
                            ("build log", image.log)):
            print(f"{name + ':':11}{value}")
    print(verdict)


if __name__ == "__main__":
    sys.exit(main())
