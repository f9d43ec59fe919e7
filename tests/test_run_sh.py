"""run.sh and scripts/venv.sh: clean for shellcheck, quick once made, right from any folder and in any state."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(
    script: Path, *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SPARKTUNE_")}
    return subprocess.run(
        [str(script), *arguments], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        check=False, env={**clean, **(env or {})},
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the entry scripts in a folder with a space, whose environments are stand-ins that report their call."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("run.sh", "scripts/venv.sh"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "requirements", root / "requirements")
    stub = "#!/bin/sh\n" 'printf "%s\\n" "$0" "$PWD" "PYTHONPATH=$PYTHONPATH" "$@"\n'
    for name in ("wizard", "local"):
        python = root / ".venvs" / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(stub)
        python.chmod(0o755)
        (root / ".venvs" / name / ".stamp").write_text(stamp(root, name))
    return root


def stamp(root: Path, name: str) -> str:
    """Returns what venv.sh would write for a finished environment: taken from the script's own recipe."""
    script = (root / "scripts" / "venv.sh").read_text()
    recipe = script[script.index("venv=.venvs"):script.index("ready() {")]
    done = subprocess.run(
        ["bash", "-c", f'set -euo pipefail\nname={name}\nroot="$PWD"\n{recipe}\nprintf %s "$wanted"'],
        cwd=root, capture_output=True, text=True, check=True,
    )
    return done.stdout + "\n"


def unmake(checkout: Path) -> None:
    """Lets every environment count as not made."""
    for stamp_file in (checkout / ".venvs").glob("*/.stamp"):
        stamp_file.unlink()


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [str(shellcheck), "-x", str(ROOT / "run.sh"), str(ROOT / "scripts" / "venv.sh")], capture_output=True,
        text=True, check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("arguments", "env", "chosen"), [
    ([], {}, "wizard"),
    (["doctor"], {}, "wizard"),
    (["--demo"], {}, "local"),
    (["--demo", "--backend", "docker"], {}, "wizard"),
    (["--backend=docker", "--demo"], {}, "wizard"),
    (["--demo"], {"SPARKTUNE_BACKEND": "docker"}, "wizard"),
    (["--demo", "--peers", "spark-b"], {}, "wizard"),  # containers train, here too
    (["--peers=spark-b", "--demo"], {}, "wizard"),
    (["--peers", "spark-b", "--data", "x y"], {}, "wizard"),
    (["--demo", "--peers", "spark-b", "--backend", "local"], {}, "local"),  # which says that the two contradict
    (["--demo"], {"SPARKTUNE_BACKEND": "local"}, "local"),
    (["--backend", "local"], {}, "local"),
    (["--backend=local", "--data", "x y"], {}, "local"),
    (["--backend", "docker"], {"SPARKTUNE_BACKEND": "local"}, "wizard"),
    (["--backend=auto"], {"SPARKTUNE_BACKEND": "local"}, "wizard"),
    ([], {"SPARKTUNE_BACKEND": "local"}, "local"),
    (["--config", "here.yaml"], {}, "local"),
    (["--config=here.yaml"], {}, "local"),
    (["--backend", "docker", "--config=here.yaml"], {}, "wizard"),
    (["--config", "there.yaml"], {}, "wizard"),
    (["--data", "--demo.jsonl"], {}, "wizard"),
])
def test_which_environment(
    checkout: Path, tmp_path: Path, arguments: list[str], env: dict[str, str], chosen: str
) -> None:
    (tmp_path / "here.yaml").write_text("model: x\nbackend: 'local'  # here\n")
    (tmp_path / "there.yaml").write_text("# backend: local\nbackend: auto\n")
    done = run(checkout / "run.sh", *arguments, cwd=tmp_path, env={**env, "PYTHONPATH": "/somewhere"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(checkout / ".venvs" / chosen / "bin" / "python")
    assert lines[1:3] == [str(tmp_path), "PYTHONPATH="]
    assert lines[3:] == ["-P", "-m", "sparktune.setup.cli", *arguments]


def test_a_made_environment_is_found_in_no_time(checkout: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    done = run(checkout / "scripts" / "venv.sh", "wizard", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert time.monotonic() - begin < 2, "about 10 ms where nothing else runs"


def test_the_local_environment_serves_the_wizard_too(checkout: Path, tmp_path: Path) -> None:
    local = [line.split()[0] for line in (ROOT / "requirements/local.lock").read_text().splitlines() if "==" in line]
    wizard = [line.split()[0] for line in (ROOT / "requirements/wizard.lock").read_text().splitlines() if "==" in line]
    assert wizard
    assert set(wizard) <= set(local)
    (checkout / ".venvs" / "wizard" / ".stamp").unlink()
    done = run(checkout / "run.sh", "runs", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == str(checkout / ".venvs" / "local" / "bin" / "python")
    (checkout / ".venvs" / "local" / ".stamp").unlink()
    done = run(checkout / "scripts" / "venv.sh", "local", "if-made", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_changed_lock_or_an_interrupted_install_is_redone(checkout: Path, tmp_path: Path) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    python = bin_dir / "python3.13"
    # a Python whose venv module only says that it was asked
    python.write_text('#!/bin/sh\n[ "$2" = venv ] && { echo "asked to make $3"; exit 9; }\nexit 0\n')
    python.chmod(0o755)
    env = {"PATH": f"{bin_dir}:{os.environ['PATH']}"}
    venv = checkout / ".venvs" / "wizard"
    unmake(checkout)
    (venv / ".incomplete").touch()
    (venv / "half-written").touch()
    done = run(checkout / "scripts" / "venv.sh", "wizard", cwd=tmp_path, env=env)
    assert done.returncode == 3
    assert "asked to make .venvs/wizard" in done.stderr
    assert not (venv / "half-written").exists()
    assert (venv / ".incomplete").exists(), "the next start does it again"
    lock = checkout / "requirements" / "local.lock"
    lock.write_text(lock.read_text() + "# changed\n")
    done = run(checkout / "scripts" / "venv.sh", "local", cwd=tmp_path, env=env)
    assert "Making the local environment" in done.stderr


def test_no_suitable_python(checkout: Path, tmp_path: Path) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for tool in ("bash", "dirname", "cat", "sha256sum", "uname", "flock", "mkdir", "rm", "sed", "tail", "head", "env"):
        found = shutil.which(tool)
        assert found, tool
        (bin_dir / tool).symlink_to(found)
    old = bin_dir / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo "Python 3.9.2"; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    (checkout / ".venvs" / "wizard" / ".incomplete").touch()
    unmake(checkout)
    done = run(checkout / "run.sh", "doctor", cwd=tmp_path, env={"PATH": str(bin_dir)})
    assert done.returncode == 3
    assert "3.11" in done.stderr
    assert "Python 3.9.2" in done.stderr


def test_somebody_elses_checkout(checkout: Path, tmp_path: Path) -> None:
    unmake(checkout)
    (checkout / ".venvs").chmod(0o555)
    # root may write everywhere, so there this start is nobody's, who has to get to the script
    for folder in (checkout, *checkout.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(folder.stat().st_mode | 0o055)
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"] if os.getuid() == 0 else []
    done = subprocess.run(
        [*nobody, str(checkout / "scripts" / "venv.sh"), "wizard"], cwd="/", capture_output=True, text=True,
        check=False,
    )
    (checkout / ".venvs").chmod(0o755)
    assert (done.returncode, done.stdout) == (3, "")
    assert f"{checkout}/.venvs cannot be written by" in done.stderr
    assert "Permission denied" not in done.stderr


def test_an_unknown_environment(tmp_path: Path) -> None:
    done = run(ROOT / "scripts" / "venv.sh", "gpu", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")


def test_starts_wait_for_one_another(checkout: Path, tmp_path: Path) -> None:
    unmake(checkout)
    with (checkout / ".venvs" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = subprocess.Popen(
            [str(checkout / "scripts" / "venv.sh"), "wizard"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(1)
        assert waiting.poll() is None, "it waits while another start installs"
        # the other start finishes the very same environment
        (checkout / ".venvs" / "wizard" / ".stamp").write_text(stamp(checkout, "wizard"))
        fcntl.flock(lock, fcntl.LOCK_UN)
        out, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 0, err
    assert out.strip() == str(checkout / ".venvs" / "wizard" / "bin" / "python")
    assert "waiting" in err


def test_progress_keeps_to_one_line_of_the_terminal(checkout: Path, tmp_path: Path) -> None:
    # a pip whose last line is long, in a terminal 60 columns wide
    python = checkout / ".venvs" / "wizard" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "Installing collected packages: $(seq -s , 1 90)"\nsleep 1.2\n')
    unmake(checkout)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    done = subprocess.Popen(
        [str(checkout / "scripts" / "venv.sh"), "wizard"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    assert done.wait(30) == 0
    os.close(theirs)
    screen = b""
    try:
        while block := os.read(ours, 65536):
            screen += block
    except OSError:
        pass  # Linux's word for the end of a terminal whose other side is closed
    os.close(ours)
    shown = re.findall(r"\r\x1b\[K(wizard environment: installing[^\r]*)", screen.decode())
    assert shown
    assert max(len(line) for line in shown) < 60, shown
