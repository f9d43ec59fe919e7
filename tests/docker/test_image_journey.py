"""Runs in containers of a real engine, started by `./run.sh` as somebody who is not root, on the CPU.

torch in the stub base is a real CPU build; the image is the one that test_image_builds.py makes first.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.demo_corpus import write_smoke
from sparktune.setup.demo_model import make_model
from sparktune.setup.machine import docker_backend
from sparktune.setup.machine.backends import StopSignals
from sparktune.setup.machine.docker_backend import RUN_LABEL, DockerBackend, ImageOptions
from sparktune.setup.machine.image import ensure_image
from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.rundir import RunDir, cache_dir
from sparktune.setup.plan.schema import Plan

pytestmark = [pytest.mark.docker, pytest.mark.timeout(2400), pytest.mark.xdist_group("docker-engine")]
ROOT = Path(__file__).resolve().parents[2]
UID, GID = 12345, 12346
TOKEN = "hf_MarkerThatMustNeverShow0123456789"
# read before a test moves the cache
CONVERTERS = [p for p in cache_dir("llama.cpp").glob("*") if p.is_dir() and not p.name.startswith((".", "tools-"))]


class Person:
    """Somebody with a home and a folder of their own, who may use the engine. Starts this checkout's scripts there."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self.engine, self.home, self.work = engine, folder / "home", folder / "work"
        self.cache = self.home / ".cache"
        for path in (self.work, self.cache / "huggingface", self.cache / "sparktune" / "llama.cpp"):
            path.mkdir(parents=True)
        (self.cache / "huggingface" / "token").write_text(TOKEN, encoding="utf-8")
        for converter in CONVERTERS:  # fetched once a machine; without it the stage fetches it
            shutil.copytree(converter, self.cache / "sparktune" / "llama.cpp" / converter.name)
        make_model(self.work / "model")
        write_smoke(self.work / "smoke.jsonl")
        subprocess.run(["chown", "-R", f"{UID}:{GID}", folder], check=True)
        self.said: list[str] = []

    def start(self, *arguments: str, script: str = "run.sh") -> subprocess.Popen[str]:
        """Starts a script of the checkout with these arguments."""
        env = {"PATH": os.environ["PATH"], "HOME": str(self.home), "DOCKER_HOST": self.engine.host, "CI": "true",
               "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}  # two threads wait for each other wherever anything else runs
        # the checkout and its Python may be root's alone: this process may read them, and owns what it writes
        rights = "+dac_read_search"
        return subprocess.Popen(
            ["setpriv", f"--reuid={UID}", f"--regid={GID}", "--clear-groups", f"--inh-caps={rights}",
             f"--ambient-caps={rights}", str(ROOT / script), *arguments],
            cwd=self.work, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[str], timeout_s: float = 900) -> tuple[int, str]:
        """Waits for the end; returns exit code and output."""
        said, _ = process.communicate(timeout=timeout_s)
        self.said.append(said)
        return process.returncode, said

    def strangers(self) -> list[Path]:
        """Returns what belongs to somebody else."""
        return [p for p in self.home.parent.rglob("*") if (p.lstat().st_uid, p.lstat().st_gid) != (UID, GID)]


@pytest.fixture
def person(engine: Any) -> Iterator[Person]:
    # as root, once a machine; where a run was made on this machine there is nothing to do
    subprocess.run([ROOT / "scripts" / "venv.sh", "wizard"], check=True, stdout=subprocess.DEVNULL)
    # not pytest's folder, whose parents nobody but root may pass
    with tempfile.TemporaryDirectory(prefix="sparktune-person-", ignore_cleanup_errors=True) as folder:
        yield Person(engine, Path(folder))


def training(
    client: Any, run: Path, until: Callable[[], bool], process: subprocess.Popen[str], another_than: str = ""
) -> Any:
    """Waits until the stage train runs in a container (of another id) and `until` holds; returns the container."""
    deadline = time.monotonic() + 1500
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        labels = [f"{RUN_LABEL}={run}", "org.sparktune.stage=train"]
        found = [c for c in client.containers.list(filters={"label": labels}) if c.id != another_than]
        if found and until():
            return found[0]
        assert not ended, process.communicate()[0][-3000:]
        time.sleep(0.2)
    raise AssertionError("training did not come that far in 1500 s")


def words_in(engine: Any, image: str, words: tuple[str, ...]) -> list[str]:
    """Returns which of these words a saved image (every layer and its configuration) holds anywhere in its bytes."""
    left, rest, longest = set(words), b"", max(map(len, words))
    with subprocess.Popen(["/usr/bin/docker", "-H", engine.host, "save", image], stdout=subprocess.PIPE) as save:
        assert save.stdout is not None
        while chunk := save.stdout.read(4 * 2**20):
            seen = rest + chunk
            left -= {word for word in left if word.encode() in seen}
            rest = seen[-longest:]
    assert save.returncode == 0
    return [word for word in words if word not in left]


def arguments_of_all_processes() -> str:
    """Returns every command line on this machine."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue  # it ended meanwhile
    return "\n".join(lines)


def test_a_run_survives_a_killed_container_a_killed_start_and_ctrl_c(person: Person, client: Any, engine: Any) -> None:
    run, begun = person.work / "results" / "journey", int(time.time())

    def newest() -> int:
        made = [p.name.removeprefix("checkpoint-") for p in run.glob("checkpoint-*")]
        return max((int(number) for number in made if number.isdigit()), default=0)

    seen = []
    process = person.start(
        "--backend", "docker", "--non-interactive", "--plain", "--rebuild", "--device", "cpu", "--mode", "lora",
        "--name", "journey", "--model", "model", "--data", "smoke.jsonl", "--learning-rate", "3e-3",
        "--eval-split", "0", "--epochs", "14", "--pack-length", "640", "--save-steps", "3", "--gguf", "q8_0",
        "--calibrate", "yes",
    )
    container = training(client, run, lambda: newest() >= 3, process)
    seen += [json.dumps(container.attrs), arguments_of_all_processes()]
    assert container.attrs["HostConfig"]["NetworkMode"] == "none"
    assert container.attrs["Config"]["User"] == f"{UID}:{GID}"
    container.kill(signal="SIGKILL")
    code, said = person.finish(process)
    assert code == 137, said[-3000:]
    assert "was ended by SIGKILL" in said
    assert "resume journey" in said
    assert engine.idle()
    assert json.loads((run / "calibration.json").read_text(encoding="utf-8"))["steps"] > 0
    assert "container sparktune-journey-calibrate-" in (run / "log.txt").read_text(encoding="utf-8")

    before = newest()
    process = person.start("--backend", "docker", "--non-interactive", "--plain", "resume", "journey")
    orphan = training(client, run, lambda: newest() > before, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    orphan.reload()
    assert orphan.status == "running", "a container outlives a start that is killed -9"

    process = person.start("--backend", "docker", "--non-interactive", "--plain", "resume", "journey")
    training(client, run, lambda: True, process, orphan.id)
    before = newest()
    training(client, run, lambda: newest() > before, process, orphan.id)
    assert orphan.name in (run / "log.txt").read_text(encoding="utf-8")
    os.killpg(process.pid, signal.SIGINT)
    code, said = person.finish(process)
    assert code == 75, said[-3000:]
    assert engine.idle()

    code, said = person.finish(person.start("--backend", "docker", "--plain", "--json", "resume", "journey"))
    assert code == 0, said[-3000:]
    for path in ("summary.json", "report.html", "adapter/adapter_model.safetensors"):
        assert (run / path).is_file()
    assert list((person.work / "output" / "journey-gguf").glob("*.gguf"))
    assert (person.work / "output" / "journey" / "config.json").is_file()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)), "resumed steps must follow, not repeat"
    assert engine.idle()
    assert person.strangers() == []

    # the token was in the caller's environment and in their home all the time
    token_file = person.cache / "huggingface" / "token"
    for path in person.home.parent.rglob("*"):
        if path.is_file() and path != token_file:
            assert TOKEN.encode() not in path.read_bytes(), path
    images = client.images.list(name="sparktune")
    assert images
    events = engine.docker("events", "--since", str(begun), "--until", str(int(time.time()) + 1)).stdout
    assert "sparktune-journey-train-" in events
    everything = [*person.said, *seen, events, *(json.dumps(image.attrs) for image in images),
                  *(engine.docker("history", "--no-trunc", image.id).stdout for image in images)]
    assert [text for text in everything if TOKEN in text] == []
    assert words_in(engine, container.attrs["Config"]["Image"], ("org.sparktune.input-hash", TOKEN)) == [
        "org.sparktune.input-hash"]


def test_any_command_runs_in_the_image_as_the_caller(person: Person, client: Any, engine: Any) -> None:
    ensure_image(client, ROOT, "2026.05", "opt", on_event=lambda event: None)
    code, said = person.finish(person.start(
        "--data", str(person.work), "--offline", "--", "sh", "-c",
        'id -u; pwd; cat "$HF_TOKEN_PATH" | wc -c; echo hello > made; python -c "import sparktune, transformers"; '
        'ls /sys/class/net',
        script="scripts/run.sh",
    ))
    assert code == 0, said
    assert said.splitlines()[-4:] == [str(UID), "/data", str(len(TOKEN)), "lo"]
    assert (person.work / "made").read_text() == "hello\n"
    assert engine.idle()
    assert person.strangers() == []
    assert TOKEN not in said


def test_the_demo_in_containers(person: Person, engine: Any) -> None:
    code, said = person.finish(person.start("--demo", "--backend", "docker", "--plain", "--json"), 2000)
    assert code == 0, said[-3000:]
    outcome = json.loads(said[said.rindex('{"ok"'):])
    assert outcome["ok"]
    assert len(outcome["runs"]) == 2
    for row in outcome["runs"]:
        log = (person.work / "results" / row["run"] / "log.txt").read_text(encoding="utf-8", errors="replace")
        assert log.count(f"container sparktune-{row['run']}-") >= 6
    assert engine.idle()
    assert person.strangers() == []


class OneStage:
    """A run whose stages are started one by one, without a command line around them."""

    def __init__(self, folder: Path) -> None:
        make_model(folder / "model")
        write_smoke(folder / "smoke.jsonl")
        self.plan = Plan(model=str(folder / "model"), data=folder / "smoke.jsonl", backend="docker", device="cpu",
                         results=folder / "results", output=folder / "output", mode="lora", eval_split=0.0)
        self.run = RunDir(name="one", results_root=self.plan.results, output_root=self.plan.output)
        self.run.root.mkdir(parents=True)
        save_plan(self.plan, self.run.plan)

    def __call__(self, backend: DockerBackend, on_poll: Callable[[], None] = lambda: None) -> int:
        """Runs the stage prepare."""
        with StopSignals() as stop:
            return backend.run_stage("prepare", self.run, self.plan, on_poll=on_poll, stop=stop, lock_fd=None)


@pytest.fixture
def one_stage(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OneStage:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return OneStage(tmp_path)


def test_development_mounts_the_package_over_an_older_image(
    one_stage: OneStage, client: Any, checkout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    baked = ensure_image(client, ROOT, "2026.05", "opt", on_event=lambda event: None)
    tokenise = checkout.root / "setup" / "data" / "tokenise.py"
    tokenise.write_text(tokenise.read_text(encoding="utf-8").replace(
        "from __future__ import annotations\n", "from __future__ import annotations\nprint('changed a minute ago')\n", 1
    ), encoding="utf-8")
    monkeypatch.setattr(docker_backend, "program_root", lambda: checkout.root)
    events: list[dict[str, Any]] = []
    backend = DockerBackend(one_stage.plan, ImageOptions(dev_mount=True))
    with StopSignals() as stop:
        backend.prepare(events.append, stop)
    chosen = {e["what"]: e["chosen"] for e in events if e["kind"] == "choice"}
    assert chosen == {"image": baked.tag, "package": str(checkout.root)}, "nothing is built, and the mount is said"
    assert one_stage(backend) == 0, one_stage.run.log.read_text()[-2000:]
    assert "changed a minute ago" in one_stage.run.log.read_text()
    assert list(checkout.root.rglob("*.pyc")) == [], "the checkout is mounted read-only"


def test_a_stage_that_asks_the_hub_gets_the_token_as_a_file(
    one_stage: OneStage, client: Any, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is in HF_TOKEN here; the stage's place is taken by a command that reads the file inside."""
    made = docker_backend.container_options
    seen: list[str] = []

    def options(*arguments: Any, **more: Any) -> dict[str, Any]:
        asked = made(*arguments, **more)
        files = [host for host, there in asked["volumes"].items() if there["bind"] == docker_backend.HUB_FILE]
        seen.extend(files)
        assert Path(files[0]).stat().st_mode & 0o777 == 0o600
        return {**asked, "command": ["sh", "-c", 'wc -c < "$HF_TOKEN_PATH"; cat "$HF_TOKEN_PATH" | md5sum; env; id -u']}

    monkeypatch.setattr(docker_backend, "container_options", options)
    one_stage.plan = one_stage.plan.model_copy(update={"model": "owner/gated"})
    assert one_stage(DockerBackend(one_stage.plan)) == 0
    log = one_stage.run.log.read_text()
    assert f"\n{len(TOKEN)}\n" in log
    assert "HF_TOKEN_PATH=/run/secrets/hub" in log
    assert TOKEN not in log
    assert len(seen) == 1
    assert not Path(seen[0]).exists(), "the file goes with the stage"
    assert engine.idle()


def test_an_engine_that_dies_while_a_stage_runs_is_named(
    one_stage: OneStage, client: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = docker_backend.container_options
    monkeypatch.setattr(docker_backend, "container_options", lambda *a, **more: {
        **made(*a, **more), "command": ["sleep", "600"]})
    backend = DockerBackend(one_stage.plan)
    polls = 0

    def poll() -> None:
        nonlocal polls
        polls += 1
        if polls == 20:
            engine.stop(signal.SIGKILL)

    try:
        with pytest.raises(PreflightError, match="engine went away"):
            one_stage(backend, poll)
    finally:
        engine.start()
    backend = DockerBackend(one_stage.plan)
    monkeypatch.setattr(docker_backend, "container_options", made)
    monkeypatch.setattr(docker_backend, "_STOP_S", 1)
    assert one_stage(backend) == 0, one_stage.run.log.read_text()[-2000:]
    assert engine.idle(), "what the dead engine left is ended by the next start"
