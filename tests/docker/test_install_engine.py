"""install.sh on a real engine: its verdicts, and that it removes what it made and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup import install
from sparktune.setup.machine.docker_backend import RUN_LABEL
from sparktune.setup.machine.image import HASH_LABEL, load_stack
from sparktune.setup.plan.rundir import cache_dir

pytestmark = [pytest.mark.docker, pytest.mark.timeout(2400), pytest.mark.xdist_group("docker-engine")]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sized(checkout: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the program build a checkout of one package whose smoke test prints what a test wants."""
    def smoke(status: str, detail: str) -> None:
        line = json.dumps({"check": "one", "status": status, "seconds": 0.1, "detail": detail})
        checkout.shrink(smoke=f"import sys\nif '--build' not in sys.argv:\n    print('''{line}''')\n")

    monkeypatch.setattr(install, "program_root", lambda: checkout.root)
    return smoke


@pytest.mark.parametrize(
    ("status", "detail", "code", "word"),
    [("pass", "fine", 0, "Installed"), ("fail", "CUDA error: no kernel image is available", 1, "Not installed"),
     ("skip", "needs a CUDA device; none is visible here", 75, "not tested on a GPU")],
)
def test_the_exit_code_says_what_was_tested(
    client: Any, engine: Any, sized: Any, capsys: pytest.CaptureFixture[str], status: str, detail: str, code: int,
    word: str,
) -> None:
    sized(status, detail)
    assert install.main(["--baseline", "--json", "--plain"]) == code
    shown = capsys.readouterr()
    said = json.loads(shown.out)
    assert said["code"] == code
    assert word in said["verdict"]
    assert ("Installed" in said["verdict"]) == (code == 0)
    assert said["image"]["tag"].startswith("sparktune:2026.05-baseline-")
    assert [c["check"] for c in said["checks"]] == ["memory", "disk", "driver", "image (baseline)", "one"]
    assert ("no code for sm_121" in shown.err) == (code == 1), "a failed check is diagnosed"
    assert engine.idle()


def test_the_script_itself_without_a_gpu(client: Any, engine: Any) -> None:
    """The checkout as it is, its real smoke test: everything but the GPU passes, and it never says installed."""
    done = subprocess.run([ROOT / "install.sh", "--plain"], capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Built, but not tested on a GPU" in done.stdout
    assert "Installed" not in done.stdout
    results = dict(re.findall(r"^(\w+) +(pass|fail|skip) +\d", done.stdout, flags=re.M))
    assert {name for name, result in results.items() if result == "pass"} >= {
        "memory", "disk", "torch_unchanged", "pip_check", "package", "stack", "llama_cpp"}
    assert {name for name, result in results.items() if result == "skip"} >= {"triton_kernel", "unsloth_first"}
    for line in (r"^tag: +sparktune:2026\.05-opt-[0-9a-f]{12}$", r"^image id: +sha256:", r"^base: +sha256:",
                 r"^build log: +/.*2026\.05-opt\.log$"):
        assert re.search(line, done.stdout, flags=re.M), done.stdout
    assert engine.idle()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [(["--frobnicate"], 2, "unrecognized arguments"), (["--stack", "2025.01"], 2, "2026.05, 2026.10"),
     (["--rebuild=twice"], 2, "invalid choice")],
)
def test_wrong_use(client: Any, arguments: list[str], code: int, words: str) -> None:
    command = [sys.executable, "-P", "-m", "sparktune.setup.install", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert words in done.stderr


def test_too_little_disk_is_a_missing_prerequisite(
    client: Any, engine: Any, sized: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sized("pass", "fine")
    with engine.almost_full(5 * 2**30):
        assert install.main(["--baseline", "--plain"]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "Not built" in said
    assert "GiB is free" in said


def test_an_engine_that_cannot_give_gpus_is_a_missing_prerequisite(
    client: Any, engine: Any, sized: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This engine has no toolkit of NVIDIA's; that the machine has a GPU is made up."""
    sized("pass", "fine")
    monkeypatch.setattr(install, "nvidia_gpus", lambda: ["a GPU"])
    assert install.main(["--baseline", "--plain"]) == 3
    said = capsys.readouterr().err
    assert "no way to give a container this machine's GPUs (could not select device driver" in said
    assert "sudo nvidia-ctk runtime configure" in said
    assert engine.idle()


def test_uninstall_removes_ours_and_nothing_else(
    client: Any, engine: Any, sized: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sized("pass", "fine")
    assert install.main(["--baseline", "--plain"]) == 0
    # the image may be an earlier test's, built with another cache: its files are laid here as a build leaves them
    cache_dir("images").mkdir(parents=True, exist_ok=True)
    (cache_dir("images") / "2026.05-baseline.freeze.txt").touch()
    client.containers.create("sparktune-stub-base:test", "true", labels={RUN_LABEL: "/x"}, network_mode="none")
    theirs = client.containers.create("sparktune-stub-base:test", "true", network_mode="none")
    training = client.containers.run("sparktune-stub-base:test", "sleep 600", labels={RUN_LABEL: "/y"}, detach=True,
                                     network_mode="none", name="somebody-trains")
    assert install.main(["--uninstall", "--plain"]) == 3
    assert "somebody-trains is running" in capsys.readouterr().err
    assert client.images.list(filters={"label": HASH_LABEL})
    training.kill()
    engine.docker("tag", "sparktune-stub-base:test", "sparktune:not-ours")
    assert install.main(["--uninstall", "--plain"]) == 0
    base = load_stack(ROOT, "2026.05").base_image
    assert f"left {base}: other images may stand on it; docker rmi {base}\n" in capsys.readouterr().err
    assert client.images.get(base)
    assert client.images.list(filters={"label": HASH_LABEL}) == []
    assert [c.id for c in client.containers.list(all=True)] == [theirs.id]
    assert "sparktune:not-ours" in client.images.get("sparktune-stub-base:test").tags
    assert list(cache_dir("images").glob("*")) == []
    theirs.remove()
    client.images.remove("sparktune:not-ours")


def test_the_locks_resolve_for_aarch64_as_they_stand() -> None:
    """uv resolves both stacks for aarch64 and Python 3.12 from wheels alone, as the index stood on their day."""
    script, uv = ROOT / "docker" / "stacks" / "lock.sh", Path(sys.executable).parent / "uv"
    done = subprocess.run(
        [script, "--check"], capture_output=True, text=True, check=False, env={**os.environ, "UV": str(uv)}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
