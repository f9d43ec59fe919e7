"""Two boxes: a second Docker engine in a network namespace and with files of its own, behind a real sshd.

The first box is this machine. What stands for the second one has its own address, users, folders, engine and images;
only the kernel and the installed programs are shared. The link between them is a veth pair.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.demo import make_model, write_smoke

# 20 minutes in all, and each test stands on what the ones before it made and sent: the nightly tier's
pytestmark = [
    pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.xdist_group("docker-engine"),
]
ROOT = Path(__file__).resolve().parents[2]
ALICE, BOB = (12345, 12346), (23456, 23457)
HERE, THERE = "10.78.0.1", "10.78.0.2"
PEER = f"bob@{THERE}"
SSHD = Path("/usr/sbin/sshd")


class FarBox:
    """The second machine."""

    def __init__(self, folder: Path, person: Path, engine_class: Any) -> None:
        self.folder, self.person, self.name = folder, person, f"box{os.getpid()}"
        self.files = folder / "files"
        """What lies at `person` over there."""
        self.engine: Any = None
        self._engine_class = engine_class
        self._sshd: subprocess.Popen[bytes] | None = None
        self._keeper: subprocess.Popen[bytes] | None = None

    def inside(self, *argv: str) -> list[str]:
        """Returns a command line that runs over there: its network, its users, its files."""
        assert self._keeper is not None
        return ["nsenter", f"--net=/run/netns/{self.name}", f"--mount=/proc/{self._keeper.pid}/ns/mnt", "--wd=/", *argv]

    def _keep_files(self) -> None:
        """Starts the process that keeps the second machine's view of the file system; all of its programs share it."""
        script = ('mount --bind "$1" /etc/passwd && mount --bind "$2" /etc/shadow && mount --bind "$3" "$4" && '
                  # engines keep their networks there, whatever their own folder is
                  'mkdir -p /run/docker && mount -t tmpfs tmpfs /run/docker && touch "$5" && exec sleep infinity')
        self._keeper = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh", str(self.folder / "passwd"),
             str(self.folder / "shadow"), str(self.files), str(self.person), str(self.folder / "kept")],
            stdin=subprocess.DEVNULL, start_new_session=True,
        )
        while not (self.folder / "kept").exists():
            assert self._keeper.poll() is None, "the second machine's file system could not be made"
            time.sleep(0.05)

    def start(self) -> None:
        self.files.mkdir()
        lines = Path("/etc/passwd").read_text(encoding="utf-8")
        lines += f"alice:x:{ALICE[0]}:{ALICE[1]}::{self.person}/home:/bin/sh\n"
        lines += f"bob:x:{BOB[0]}:{BOB[1]}::{self.folder}/bob:/bin/sh\n"
        (self.folder / "passwd").write_text(lines, encoding="utf-8")
        (self.folder / "passwd").chmod(0o644)
        (self.folder / "shadow").write_text("root:*:19000::::::\nalice:*:19000::::::\nbob:*:19000::::::\n")
        (self.folder / "bob").mkdir()
        self._cable()
        self._keep_files()
        spawn, until = self._engine_class._spawn, self._engine_class._until
        far = type("FarEngine", (self._engine_class,), {
            "_spawn": lambda engine, *argv: spawn(engine, *self.inside(*argv)),
            "_until": lambda engine, name, answers: until(engine, "nsenter", answers),
        })
        (self.folder / "engine").mkdir()
        self.engine = far(self.folder / "engine")
        self.engine.start()
        self._serve_ssh()

    def _cable(self) -> None:
        def ip(*words: str) -> None:
            subprocess.run(["ip", *words], check=True)

        ip("netns", "add", self.name)
        ip("link", "add", f"here{os.getpid()}", "type", "veth", "peer", "name", "cable0", "netns", self.name)
        ip("addr", "add", f"{HERE}/24", "dev", f"here{os.getpid()}")
        ip("link", "set", f"here{os.getpid()}", "up")
        for words in (("addr", "add", f"{THERE}/24", "dev", "cable0"), ("link", "set", "cable0", "up"),
                      ("link", "set", "lo", "up")):
            ip("-n", self.name, *words)

    def _serve_ssh(self) -> None:
        keys = self.person / "home" / ".ssh"
        keys.mkdir(mode=0o700)
        for path in (keys / "id_ed25519", self.folder / "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
        public = (self.folder / "host_key.pub").read_text(encoding="utf-8").split()
        (keys / "known_hosts").write_text(f"{THERE} {public[0]} {public[1]}\n", encoding="utf-8")
        shutil.copy(keys / "id_ed25519.pub", self.folder / "authorized_keys")
        subprocess.run(["chown", "-R", f"{ALICE[0]}:{ALICE[1]}", keys], check=True)
        (self.folder / "sshd_config").write_text(
            f"ListenAddress {THERE}\nHostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/authorized_keys\n"
            f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\n"
            f"SetEnv DOCKER_HOST={self.engine.host}\n", encoding="utf-8",
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        with (self.folder / "sshd.log").open("wb") as log:
            self._sshd = subprocess.Popen(
                self.inside(str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")),
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )

    def remove(self) -> None:
        if self._sshd is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._sshd.pid, signal.SIGTERM)
            self._sshd.wait()
        if self.engine is not None:
            self.engine.remove()
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait()
        subprocess.run(["ip", "netns", "del", self.name], check=False)


def in_the_hubs_cache(model: Path, home: Path) -> None:
    """Lays a model into a user's hub cache as a download would: blobs, and a snapshot of links to them."""
    repository, commit = home / ".cache" / "huggingface" / "hub" / "models--acme--tiny", "0" * 40
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    for path in model.iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.name.encode()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    (repository / "refs" / "main").write_text(commit)


@pytest.fixture(scope="module")
def boxes(engine: Any) -> Iterator[FarBox]:
    """The second box, and a person's folder on the first one."""
    missing = [package for tool, package in
               {"/usr/sbin/sshd": "openssh-server", "/usr/bin/ssh": "openssh-client", "/usr/bin/nsenter": "util-linux",
                "/usr/sbin/ip": "iproute2"}.items() if not Path(tool).exists() and not shutil.which(Path(tool).name)]
    assert not missing, f"the tests of two boxes need Debian's tools: apt-get install {' '.join(missing)}"
    subprocess.run([ROOT / "scripts" / "venv.sh", "wizard"], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory(prefix="sparktune-person-", ignore_cleanup_errors=True) as person:
        folder = Path(tempfile.mkdtemp(prefix=f"sparktune-engine-{os.getpid()}-far-"))
        folder.chmod(0o755)
        Path(person).chmod(0o755)
        box = FarBox(folder, Path(person), type(engine))
        try:
            for path in ("home", "work"):
                (Path(person) / path).mkdir()
            make_model(Path(person) / "work" / "model")
            in_the_hubs_cache(Path(person) / "work" / "model", Path(person) / "home")
            write_smoke(Path(person) / "work" / "smoke.jsonl")
            subprocess.run(["chown", "-R", f"{ALICE[0]}:{ALICE[1]}", person], check=True)
            box.start()
            yield box
        finally:
            box.remove()
            shutil.rmtree(folder, ignore_errors=True)


def start(boxes: FarBox, engine: Any, *arguments: str) -> subprocess.Popen[str]:
    """Starts ./run.sh on the first box, as alice."""
    home = boxes.person / "home"
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "DOCKER_HOST": engine.host, "CI": "true",
           "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # no hub can be reached from here: its cache stands for it
    rights = "+dac_read_search"
    return subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c",
         'mount --bind "$1" /etc/passwd && shift && exec "$@"', "sh", str(boxes.folder / "passwd"),
         "setpriv", f"--reuid={ALICE[0]}", f"--regid={ALICE[1]}", "--clear-groups", f"--inh-caps={rights}",
         f"--ambient-caps={rights}", str(ROOT / "run.sh"), *arguments],
        cwd=boxes.person / "work", env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 1500) -> tuple[int, str]:
    """Returns exit code and output."""
    said, _ = process.communicate(timeout=timeout_s)
    return process.returncode, said


ONE_RUN = ("--non-interactive", "--plain", "--device", "cpu", "--mode", "lora", "--model", "model", "--data",
           "smoke.jsonl", "--learning-rate", "3e-3", "--eval-split", "0", "--pack-length", "640", "--gguf", "none",
           "--mtp", "skip", "--eval-prompts", "0", "--calibrate", "no", "--gradient-accumulation", "2")


def test_a_run_on_both_boxes_is_the_run_of_one(boxes: FarBox, engine: Any) -> None:
    def losses(name: str) -> list[float]:
        rows = (boxes.person / "work" / "results" / name / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, rows) if "loss" in row]

    code, said = finish(start(boxes, engine, *ONE_RUN, "--epochs", "3", "--name", "both", "--peers", PEER))
    assert code == 0, said[-4000:]
    assert f"image on {PEER}" in said
    run = boxes.person / "work" / "results" / "both"
    log = (run / "log.txt").read_text(encoding="utf-8", errors="replace")
    assert f"The ranks on {PEER} ended with exit code 0." in log
    assert f"{PEER} gets" in log
    assert "ranks: 2" in (run / "plan.yaml").read_text()
    # there: the inputs alone, of its own user; no weights, no checkpoint
    there = boxes.files / "work" / "results" / "both"
    assert [p.name for p in there.iterdir()] == ["plan.yaml"]
    assert there.stat().st_uid == BOB[0]
    assert engine.idle()
    assert boxes.engine.idle()

    code, said = finish(start(boxes, engine, *ONE_RUN, "--epochs", "3", "--name", "alone", "--backend", "docker"))
    assert code == 0, said[-4000:]
    assert max(abs(a - b) for a, b in zip(losses("both"), losses("alone"), strict=True)) < 1e-4

    code, said = finish(start(boxes, engine, *ONE_RUN, "--epochs", "3", "--name", "again", "--peers", PEER))
    assert code == 0, said[-4000:]
    assert "there already, the same image id" in said
    log = (boxes.person / "work" / "results" / "again" / "log.txt").read_text(encoding="utf-8", errors="replace")
    assert f"{PEER} gets 1 files" in log, "the plan is new, data and base are there"
    assert log.count(f"{PEER} gets") == 1


def test_one_ctrl_c_stops_both_and_resume_goes_on_with_both(boxes: FarBox, engine: Any) -> None:
    """With a base of the hub, which the second box gets from the first."""
    run = boxes.person / "work" / "results" / "stopped"
    of_the_hub = ("acme/tiny" if word == "model" else word for word in ONE_RUN)
    process = start(boxes, engine, *of_the_hub, "--epochs", "60", "--save-steps", "500", "--name", "stopped",
                    "--peers", PEER)
    deadline = time.monotonic() + 900
    while '"step": 5,' not in ((run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").is_file() else ""):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    code, said = finish(process)
    assert code == 75, said[-4000:]
    assert engine.idle()
    assert boxes.engine.idle()
    log = (run / "log.txt").read_text(encoding="utf-8", errors="replace")
    assert f"The ranks on {PEER} ended with exit code 75." in log
    assert "Fetching acme/tiny from the hub, for all machines." in log
    assert list(run.glob("checkpoint-*"))
    code, said = finish(start(boxes, engine, "--plain", "--non-interactive", "resume", "stopped"))
    assert code == 0, said[-4000:]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_the_doctor_looks_at_both_boxes(boxes: FarBox, engine: Any) -> None:
    code, said = finish(start(boxes, engine, "--json", "doctor", "--device", "cpu", "--model", "model", "--data",
                              "smoke.jsonl", "--peers", PEER))
    assert code == 0, said[-4000:]
    checks = {c["name"]: c for c in json.loads(said[said.index("{"):])["checks"]}
    assert checks[f"{PEER}: ssh"]["status"] == "ok"
    assert checks[f"{PEER}: clock"]["status"] == "ok"
    assert "the same image id" in checks[f"{PEER}: image"]["seen"]
    assert "cable0" in checks[f"{PEER}: link"]["seen"]
    assert "gloo" in checks["bandwidth"]["seen"]
    code, said = finish(start(boxes, engine, "--json", "doctor", "--device", "cpu", "--model", "model", "--data",
                              "smoke.jsonl", "--peers", f"nobody@{THERE}"))
    assert code == 3, said[-4000:]
    assert "without a password" in said


def test_the_demo_on_two_boxes(boxes: FarBox, engine: Any) -> None:
    code, said = finish(start(boxes, engine, "--demo", "--plain", "--json", "--peers", PEER), 3000)
    assert code == 0, said[-4000:]
    outcome = json.loads(said[said.rindex('{"ok"'):])
    assert outcome["ok"]
    for row in outcome["runs"]:
        run = boxes.person / "work" / "results" / row["run"]
        assert "on 2 machines" in (run / "log.txt").read_text(encoding="utf-8", errors="replace")
        assert "ranks: 2" in (run / "plan.yaml").read_text()
    assert engine.idle()
    assert boxes.engine.idle()


