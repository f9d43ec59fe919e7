"""A second machine: what of its name is refused, what ssh is given, what is sent, who waits for whom."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from sparktune.setup.machine import boxes, peers
from sparktune.setup.machine.backends import StopSignals
from sparktune.setup.machine.boxes import inputs_of, link_of
from sparktune.setup.machine.docker_backend import environment_of, mounts_of
from sparktune.setup.machine.inventory import MARK, PARTIAL, inventory, known_files, main
from sparktune.setup.machine.peers import Peer, reach, reachable_boxes, send_image, tar_stream
from sparktune.setup.plan.config import resolve
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.links import interface_of, interface_to
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.training.launch import Node

ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
enP7s7\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
enP7s7\t0000A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
enp1s0f0np0\t0064A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
down0\t0065A8C0\t00000000\t0000\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""
"""/proc/net/route of a machine with the office on 192.168.0.0/24 and the cable on 192.168.100.0/24."""


@pytest.mark.parametrize(
    "host", ["-oProxyCommand=touch x", "a b", "$(reboot)", "a;b", "a/b", "u@-x", "@a", "a:b", ""]
)
def test_what_could_be_an_option_or_a_line_of_a_shell_is_no_machine(host: str) -> None:
    with pytest.raises(UsageError, match=r"--peers takes machines as \[USER@\]HOST\[:PORT\]"):
        resolve({"peers": [host]}, {}, {}, {})


def test_machines_as_ssh_takes_them() -> None:
    plan = resolve({"peers": ["spark-b", "me@192.168.100.2:2222"], "gpus": 2}, {}, {}, {})
    assert plan.processes == 6
    assert resolve({}, {"peers": ["b"]}, {}, {}).peers == ["b"], "a key of the config"
    assert plan.backend == "docker"
    with pytest.raises(UsageError, match="--backend is local"):
        resolve({"peers": ["b"], "backend": "local"}, {}, {}, {})


@pytest.mark.parametrize("text", ["2/2@a:1", "0/2@a", "0/2@-a:1", "x/2@a:1", "0/2@a:0", "0/2@a:70000"])
def test_a_place_among_machines_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="--node should say"):
        Node.of(text)


# -- links


@pytest.mark.parametrize(("address", "interface"), [
    ("192.168.100.2", "enp1s0f0np0"), ("192.168.0.9", "enP7s7"), ("8.8.8.8", "enP7s7"), ("127.0.0.1", "lo"),
    ("192.168.101.2", "enP7s7"),  # its own route is down
])
def test_the_interface_that_leads_somewhere(address: str, interface: str) -> None:
    assert interface_to(address, ROUTES) == interface


def test_nothing_leads_anywhere_without_routes() -> None:
    assert interface_to("10.0.0.1", ROUTES.splitlines()[0]) is None


@pytest.fixture
def sys_net(tmp_path: Path) -> Path:
    for name, state, speed in (("cable", "up", "200000"), ("office", "up", "1000"), ("veth", "up", "-1"),
                               ("dead", "down", "")):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "operstate").write_text(state + "\n")
        (tmp_path / "net" / name / "speed").write_text(speed + "\n")
    return tmp_path / "net"


def test_how_fast_an_interface_says_it_is(sys_net: Path) -> None:
    assert (interface_of("cable", sys_net).megabits, interface_of("cable", sys_net).up) == (200_000, True)
    assert interface_of("veth", sys_net).megabits is None
    assert not interface_of("dead", sys_net).up


def test_boxes_that_are_offered_are_on_the_fast_link_and_let_us_in(tmp_path: Path, sys_net: Path) -> None:
    table = tmp_path / "arp"
    table.write_text(
        "IP address       HW type     Flags       HW address            Mask     Device\n"
        "192.168.100.2    0x1         0x2         a0:b1:c2:d3:e4:f5     *        cable\n"
        "192.168.100.3    0x1         0x2         a0:b1:c2:d3:e4:f6     *        cable\n"
        "192.168.100.4    0x1         0x0         00:00:00:00:00:00     *        cable\n"
        "192.168.0.1      0x1         0x2         a0:b1:c2:d3:e4:f7     *        office\n"
    )
    asked: list[str] = []

    def lets_in(address: str) -> bool:
        asked.append(address)
        return address.endswith(".2")

    assert reachable_boxes(lets_in, table, sys_net) == ["192.168.100.2"]
    assert asked == ["192.168.100.2", "192.168.100.3"], "nobody in the office is asked"
    assert reachable_boxes(lets_in, tmp_path / "none", sys_net) == []


# -- ssh


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that poses as ssh, notes its arguments and says what `answer` holds."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ssh"
    program.write_text(
        "#!/bin/sh\nfor word; do printf '%s\\n' \"$word\" >> \"$0.asked\"; done\n"
        'case " $* " in *" -G "*) echo "hostname 127.0.0.1"; exit 0;; *xargs*) cat > "$0.stdin";; esac\n'
        'env > "$0.env"\n'
        'cat "$0.answer"; cat "$0.error" >&2; exit "$(cat "$0.code")"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for name, text in (("answer", ""), ("error", ""), ("code", "0")):
        (program.parent / f"ssh.{name}").write_text(text)
    return program.parent


def test_a_machine_that_answers(ssh: Path) -> None:
    (ssh / "ssh.answer").write_text("Welcome to spark-b\nsparktune asks\n1000\n1001\n100\naarch64\nrdma\n28.2.2\n")
    peer = reach("me@spark-b:2222")
    assert (peer.uid, peer.gid, peer.arch, peer.engine, peer.address) == (1000, 1001, "aarch64", "28.2.2", "127.0.0.1")
    assert peer.infiniband
    assert peer.clock_off_s < -1e9, "its clock stands in 1970"
    asked = (ssh / "ssh.asked").read_text().splitlines()
    assert asked[-2:] == ["me@spark-b", peers._LOOK], "a constant, and a host behind --"
    assert asked[asked.index("-p") + 1] == "2222"
    assert asked[asked.index("--") - 1] == "2222"
    assert "BatchMode=yes" in asked


def test_a_machine_that_falls_silent_is_given_up(ssh: Path) -> None:
    """The SDK's own ssh has no such options, and a read from a silent machine never ends."""
    peer = Peer(host="me@spark-b:2222", address="192.168.100.2", uid=1, gid=1, clock_off_s=0, clock_known_s=0, arch="x",
                engine="1")
    with pytest.raises(PreflightError, match="me@spark-b:2222 or its Docker engine went away"):
        peer.client()
    asked = (ssh / "ssh.asked").read_text().splitlines()
    assert {"ServerAliveInterval=5", "ServerAliveCountMax=3", "BatchMode=yes", "ConnectTimeout=10"} <= set(asked)
    at = asked.index("--")
    assert asked[at - 2 : at + 3] == ["-p", "2222", "--", "me@spark-b", "docker system dial-stdio"]


def test_the_sdks_ssh_is_replaced_once_and_gets_the_systems_libraries(
    ssh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from docker.transport import sshconn

    for name in ("LD_LIBRARY_PATH", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, "/opt/packed")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    peers._give_ssh_a_deadline()
    once = sshconn.SSHSocket
    peers._give_ssh_a_deadline()
    assert sshconn.SSHSocket is once
    line = sshconn.SSHSocket("spark-b")
    line.connect()
    assert line.proc.wait(timeout=10) == 0
    line.close()
    seen = (ssh / "ssh.env").read_text()
    assert "/opt/packed" not in seen
    assert "SSH_AUTH_SOCK=/run/agent" in seen


@pytest.mark.parametrize("code", ["0", "1"])
def test_folders_are_made_by_the_user_whom_ssh_logs_in_as(ssh: Path, code: str) -> None:
    """Their names go through standard input: no shell reads them. One that cannot be made is the inventory's to say."""
    (ssh / "ssh.code").write_text(code)
    peers.make_folders(replace(FAR, host="me@spark-b:2222"), ["/data/my rows", "/x; touch $(y)\n", "-p"])
    asked = (ssh / "ssh.asked").read_text().splitlines()
    assert asked[-5:] == ["-p", "2222", "--", "me@spark-b", "xargs -0 mkdir -p --"]
    assert (ssh / "ssh.stdin").read_text() == "/data/my rows\0/x; touch $(y)\n\0-p"


@pytest.mark.usefixtures("ssh")
def test_a_connection_to_a_machine_that_went_away_closes_without_a_word() -> None:
    """Else the SDK's farewell ends run.sh with a traceback, behind the sentence that said what happened."""
    from docker.transport import sshconn

    peers._give_ssh_a_deadline()
    line = sshconn.SSHSocket("spark-b")
    line.connect()
    assert line.proc.wait(timeout=10) == 0
    line.close()


def test_a_container_asks_the_hub_that_the_user_names_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = environment_of(network=True)
    assert (asked["HF_ENDPOINT"], asked["HF_HUB_OFFLINE"]) == ("http://127.0.0.1:1", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "HF_HUB_OFFLINE" not in environment_of(network=True)
    alone = environment_of(network=False)
    assert alone["HF_HUB_OFFLINE"] == "1"
    assert "HF_ENDPOINT" not in alone


@pytest.mark.parametrize(("answer", "error", "code", "words"), [
    ("", "Permission denied (publickey).", "255", "without a password; it did not (Permission denied (publickey).)"),
    ("", "Host key verification failed.", "255", "ssh-copy-id spark-b"),
    ("sparktune asks\n1000\n1000\n%s\nx86_64\nnone\n28\n", "", "0", "without a password"),
    ("sparktune asks\n1000\n1000\n5\naarch64\nnone\n", "sh: 1: docker: not found", "127", "have a Docker engine"),
])
def test_a_machine_that_does_not(ssh: Path, answer: str, error: str, code: str, words: str) -> None:
    for name, text in (("answer", answer), ("error", error), ("code", code)):
        (ssh / f"ssh.{name}").write_text(text)
    with pytest.raises(PreflightError) as refused:
        reach("spark-b")
    assert words in str(refused.value)


def test_all_machines_are_on_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def peer(address: str) -> Peer:
        return Peer(host=address, address=address, uid=1, gid=1, clock_off_s=0, clock_known_s=0, arch="x", engine="1")

    monkeypatch.setattr(boxes, "own_address", lambda other: other.rpartition(".")[0] + ".1")
    monkeypatch.setattr(boxes, "interface_to", lambda address: interface_to(address, ROUTES))
    assert link_of([peer("192.168.100.2"), peer("192.168.100.3")]) == ("192.168.100.1", "enp1s0f0np0")
    with pytest.raises(PreflightError, match="through one interface"):
        link_of([peer("192.168.100.2"), peer("192.168.0.3")])


# -- what is sent


def test_a_tar_holds_files_links_and_their_folders_for_the_other_user(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "one").write_bytes(b"x" * 1000)
    (tmp_path / "snap" / "a").mkdir(parents=True)
    (tmp_path / "snap" / "a" / "model").symlink_to("../../blobs/one")
    made = b"".join(tar_stream(tmp_path, {"blobs/one": False, "snap/a/model": True}, 23456, 23457))
    with tarfile.open(fileobj=io.BytesIO(made)) as archive:
        members = {m.name: m for m in archive.getmembers()}
        assert list(members) == ["blobs", "snap", "snap/a", "blobs/one" + PARTIAL, "snap/a/model"]
        assert {(m.uid, m.gid) for m in members.values()} == {(23456, 23457)}
        blob = archive.extractfile("blobs/one" + PARTIAL)
        assert blob is not None
        assert blob.read() == b"x" * 1000
        assert members["snap/a/model"].linkname == "../../blobs/one"
    made = b"".join(tar_stream(tmp_path / "snap" / "a", {"model": False}, 1, 1))
    with tarfile.open(fileobj=io.BytesIO(made)) as archive:
        assert archive.getmember("model" + PARTIAL).size == 1000, "data given as a link is sent as what it leads to"


def test_a_snapshot_of_the_hubs_cache_is_what_its_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "one").write_bytes(b"x" * 1000)
    snapshot = tmp_path / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/one")
    (snapshot / "gone").symlink_to("../../blobs/none")
    (snapshot / "again").symlink_to("model.safetensors")
    whole, alone = known_files([str(tmp_path)]), known_files([str(snapshot)])
    assert whole[str(snapshot / "model.safetensors")] == ["link", "../../blobs/one"]
    assert alone[str(snapshot / "model.safetensors")][0] == 1000
    assert set(alone) == {str(snapshot / "model.safetensors"), str(snapshot / "again")}


def test_a_folder_that_an_engine_made_is_given_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`work` is root's and holds nothing but the way to other mounts; `theirs` holds somebody's file."""
    for name in ("work/results/one", "theirs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "theirs" / "letter").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    work, one, theirs = (str(tmp_path / name) for name in ("work", "work/results/one", "theirs"))
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: SimpleNamespace(st_uid=0) if path in (work, one, theirs)
                        else real(path, **more))
    found = inventory([], [one], "127.0.0.1", [work, theirs])
    assert set(found["new"]) == {work, one}
    assert found["closed"] == [theirs], "nothing can be sent there"


def test_a_folder_that_is_a_link_is_sent_as_what_it_leads_to(tmp_path: Path) -> None:
    """Inside the base a link stays one; out of it leads to what the other machine need not have."""
    base, other = tmp_path / "base", tmp_path / "other"
    for folder in (base / "own", other / "deep"):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    (base / "inside").symlink_to("own")
    (base / "there").symlink_to(other)
    (other / "here").symlink_to("deep")
    (other / "absolute").symlink_to(other / "deep")
    (other / "back").symlink_to(base)
    (base / "up").symlink_to("..")
    (base / "loop").symlink_to("loop")
    assert {path.removeprefix(f"{base}/"): value[0] for path, value in known_files([str(base)]).items()} == {
        "own/file": 3, "inside": "link", "there/deep/file": 4, "there/here": "link", "there/absolute/file": 4,
        "loop": "link",
    }


def test_what_an_earlier_start_began_to_send_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base" / "deep").mkdir(parents=True)
    for name in ("base/deep/model", "base/deep/model" + PARTIAL, "rows" + PARTIAL, "other" + PARTIAL):
        (tmp_path / name).write_text("half")
    paths = [str(tmp_path / "base"), str(tmp_path / "rows")]
    assert list(known_files(paths)) == [str(tmp_path / "base/deep/model")], "a half is no input"
    asked = {"files": paths, "written": [], "towards": "127.0.0.1", "clear": paths}
    monkeypatch.setattr("sys.argv", ["inventory", json.dumps(asked)])
    assert main() == 0
    assert capsys.readouterr().out.startswith(MARK)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"model", "other" + PARTIAL}


def test_files_are_told_apart_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparktune.setup.machine import inventory as module

    monkeypatch.setattr(module, "_WHOLE", 1000)
    monkeypatch.setattr(module, "_SAMPLE", 10)
    (tmp_path / "m").mkdir()
    for name, size in (("small", 100), ("large", 5000)):
        (tmp_path / "m" / name).write_bytes(b"a" * size)
    before = known_files([str(tmp_path / "m"), str(tmp_path / "none")])
    assert sorted(before) == [str(tmp_path / "m" / "large"), str(tmp_path / "m" / "small")]
    (tmp_path / "m" / "large").write_bytes(b"b" * 5000)
    after = known_files([str(tmp_path / "m")])
    assert {path for path in before if before[path] != after[path]} == {str(tmp_path / "m" / "large")}


def test_the_inventory_is_one_line_of_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"files": [str(tmp_path)], "written": [str(tmp_path)], "towards": "127.0.0.1"}
    monkeypatch.setattr("sys.argv", ["inventory", json.dumps(asked)])
    assert main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line.removeprefix(MARK))
    assert found["refused"] == found["new"] == []
    assert found["interface"]["name"] == "lo"
    assert found["memory_gib"] > 0
    assert inventory([], [], "127.0.0.1")["disk_gib"] == 0


def test_every_machine_reads_plan_data_and_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    run = RunDir(name="r", results_root=tmp_path / "results", output_root=tmp_path / "output")
    (tmp_path / "base").mkdir()
    data = tmp_path / "d.jsonl"
    data.touch()
    plan = Plan(model=str(tmp_path / "base"), data=data)
    assert inputs_of(run, plan) == [str(run.plan), str(data), str(tmp_path / "base")]
    hub = inputs_of(run, plan.model_copy(update={"model": "Qwen/Qwen3.5-2B"}))
    assert hub[-1] == str(tmp_path / "hf" / "hub" / "models--Qwen--Qwen3.5-2B")


class Images:
    """An engine's images: tag -> id. What is loaded becomes `becomes`."""

    def __init__(self, have: dict[str, str], becomes: str = "sha256:1") -> None:
        self.have, self.becomes, self.loaded = have, becomes, 0
        self.images = self.api = self

    def get(self, tag: str) -> Any:
        from docker.errors import ImageNotFound

        if tag not in self.have:
            raise ImageNotFound(tag)
        return SimpleNamespace(
            id=self.have[tag], attrs={"Size": 30}, save=lambda chunk_size, named: iter([b"0123456789"] * 3)
        )

    def load_image(self, chunks: Iterator[bytes]) -> list[Any]:
        self.loaded = sum(map(len, chunks))
        self.have["t"] = self.becomes
        return []


def test_an_image_is_sent_where_it_is_another_and_checked() -> None:
    ours, seen = Images({"t": "sha256:1"}), []
    assert not send_image(ours, Images({"t": "sha256:1"}), "t", "b", seen.append)
    for have in ({}, {"t": "sha256:0"}):
        theirs = Images(dict(have))
        assert send_image(ours, theirs, "t", "b", seen.append)
        assert theirs.loaded == 30
    assert seen[-1]["done"] == seen[-1]["total"] == 30
    with pytest.raises(PreflightError, match="there it became sha256:2"):
        send_image(ours, Images({}, "sha256:2"), "t", "b", seen.append)


# -- whose fault it is


class Uploads:
    """An engine over there, as the SDK talks to it: an OSError of what it reads becomes its own ConnectionError."""

    def __init__(self) -> None:
        self.images = self.api = self

    def get(self, tag: str) -> Any:
        from docker.errors import ImageNotFound

        raise ImageNotFound(tag)

    def load_image(self, chunks: Iterator[bytes]) -> None:
        self.put_archive("/", chunks)

    def put_archive(self, folder: str, chunks: Iterator[bytes]) -> None:
        try:
            for _ in chunks:
                pass
        except OSError as error:
            raise requests.exceptions.ConnectionError(error) from error
        raise requests.exceptions.ConnectionError("cable")


FAR = Peer(host="b", address="192.168.100.2", uid=1, gid=1, clock_off_s=0, clock_known_s=0, arch="x", engine="1")


def full_disk(event: dict[str, Any]) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("name", "on_event", "words"), [
    ("there", lambda event: None, "^b or its Docker engine went away, or refused: cable"),
    ("there", full_disk, "^This machine could not write its records: .*No space left"),
    ("gone", lambda event: None, "^This machine could not read the files of .*gone"),
])
def test_what_fails_while_files_are_sent(
    name: str, on_event: Callable[[dict[str, Any]], None], words: str, tmp_path: Path
) -> None:
    (tmp_path / "there").write_text("rows")
    with pytest.raises(PreflightError, match=words):
        peers.send_files(Uploads(), tmp_path, {name: False}, FAR, on_event)


def test_a_file_that_goes_away_while_others_are_sent_is_this_machines(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text("rows")
    with pytest.raises(PreflightError, match=r"^This machine could not read .*/two: .*No such file"):
        peers.send_files(Uploads(), tmp_path, {"one": False, "two": False}, FAR,
                         lambda event: (tmp_path / "two").unlink(missing_ok=True))


def test_an_image_that_cannot_be_read_here_is_this_machines() -> None:
    def cut(**_: Any) -> Iterator[bytes]:
        yield b"x"
        raise requests.exceptions.ConnectionError("its own engine")

    image = SimpleNamespace(id="sha256:1", attrs={"Size": 30}, save=cut)
    ours = SimpleNamespace(images=SimpleNamespace(get=lambda tag: image))
    with pytest.raises(PreflightError, match=r"^This machine could not read the image t from its Docker engine"):
        send_image(ours, Uploads(), "t", "b", lambda event: None)
    image.save = lambda **_: iter([b"x"])
    with pytest.raises(PreflightError, match=r"^b or its Docker engine went away, or refused: cable"):
        send_image(ours, Uploads(), "t", "b", lambda event: None)


@pytest.mark.parametrize(("far", "said", "words"), [
    (True, "", "^b or its Docker engine went away"),
    (False, "", "^The Docker engine went away before it could start a container"),
    (True, "unresolvable CDI devices", "^The Docker engine of b has no way to give a container its machine's GPUs"),
    (True, "no such mount", "^The Docker engine of b would not start a container: no such mount"),
    (False, "no such mount", "^The Docker engine would not start a container: no such mount"),
])
def test_a_machine_whose_container_does_not_start(far: bool, said: str, words: str) -> None:
    from docker.errors import APIError

    def start() -> None:
        raise APIError("500", explanation=said) if said else requests.exceptions.ConnectionError("aborted")

    with pytest.raises(PreflightError, match=words):
        boxes._Part(name="b", container=SimpleNamespace(start=start), far=far).start()


# -- waiting


class Container:
    """Ends as told: by itself after some looks, or by a signal."""

    def __init__(self, looks: int | None, code: int = 0, on_int: int = 75) -> None:
        self.looks, self.code, self.on_int, self.signals = looks, code, on_int, []
        self.status, self.attrs = "running", {"State": {"ExitCode": 0}}

    def _end(self, code: int) -> None:
        self.status, self.attrs = "exited", {"State": {"ExitCode": code}}

    def reload(self) -> None:
        if self.looks is not None:
            self.looks -= 1
            if self.looks <= 0:
                self._end(self.code)

    def kill(self, signal: str) -> None:
        self.signals.append(signal)
        self._end(self.on_int if signal == "SIGINT" else 137)


class Stop:
    """Signals so far."""

    count = 0


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Waits for two machines' containers; returns the exit code and the log."""
    for name, value in (("_POLL_S", 0.001), ("_STATUS_S", 0.0), ("_FAR_STATUS_S", 0.0), ("_LEFT_ALONE_S", 0.05)):
        monkeypatch.setattr(boxes, name, value)

    def run(here: Container, there: Container, stop: Any = None, on_poll: Any = lambda: None) -> tuple[int, str]:
        with (tmp_path / "log").open("wb") as file:
            backend = boxes.BoxesBackend.__new__(boxes.BoxesBackend)
            parts = [boxes._Part(name="this machine", container=here, far=False),
                     boxes._Part(name="b", container=there, far=True)]
            code = backend._wait_for_all(parts, boxes._SharedLog(file), on_poll, stop or Stop())
        return code, (tmp_path / "log").read_text()

    return run


def test_both_end_well(wait: Any) -> None:
    code, log = wait(Container(3), Container(2))
    assert code == 0
    assert log.splitlines() == [f"The ranks on {name} ended with exit code 0." for name in ("b", "this machine")]


@pytest.mark.parametrize(("here", "there", "code"), [
    (Container(9, 1), Container(2, 5), 1),  # both say why; this machine's code counts
    (Container(None), Container(2, 5), 5),  # here nothing ended by itself: it is killed, the first bad code counts
    (Container(2, 3), Container(None), 3),
])
def test_one_that_fails_takes_the_other_with_it(wait: Any, here: Container, there: Container, code: int) -> None:
    found, log = wait(here, there)
    assert found == code
    for container, name in ((here, "this machine"), (there, "b")):
        if container.looks is None:
            assert container.signals == ["SIGKILL"]
            assert f"The ranks on {name} did not end by themselves; they are killed." in log


def test_one_ctrl_c_reaches_both_and_a_second_kills(wait: Any) -> None:
    class Once(Stop):
        count = 1

    here, there = Container(None), Container(None)
    assert wait(here, there, Once())[0] == 75
    assert here.signals == there.signals == ["SIGINT"]

    class Twice(Stop):
        count = 2

    here, there = Container(None), Container(None)
    assert wait(here, there, Twice())[0] == 130
    assert here.signals[-1] == there.signals[-1] == "SIGKILL"


def test_a_machine_that_does_not_answer_is_left_to_the_ranks(wait: Any) -> None:
    class Silent(Container):
        def reload(self) -> None:
            raise ConnectionError("no way there")

    assert wait(Container(3, 1), Silent(None))[0] == 1


def test_lines_of_the_other_machine_say_where_they_are_from(tmp_path: Path) -> None:
    class Speaker:
        def logs(self, **_: Any) -> Iterator[bytes]:
            return iter([b"step 1\nste", b"p 2\nend"])

    with (tmp_path / "log").open("wb") as file:
        log = boxes._SharedLog(file)
        log.copy(Speaker(), "spark-b", True)
        log.copy(Speaker(), "this machine", False)
    assert (tmp_path / "log").read_text().splitlines() == [
        "[spark-b] step 1", "[spark-b] step 2", "[spark-b] end", "step 1", "step 2", "end"]


def test_files_go_to_the_innermost_mount_that_holds_them() -> None:
    mounts = ["/home/a/results/one", "/home/a/.cache/huggingface", "/home/a/data", "/home/a/model"]
    sent = {root: str(boxes.mounted_above(root, mounts)) for root in (
        "/home/a/.cache/huggingface/hub/models--Qwen--Qwen3.5-2B", "/home/a/data/rows.jsonl", "/home/a/model",
        "/home/a/results/one/plan.yaml",
    )}
    assert list(sent.values()) == [mounts[1], mounts[2], mounts[3], mounts[0]]


class FarEngine:
    """An engine over there that makes, as root, every folder to mount that is missing. Notes what it is asked to do."""

    def __init__(self, roots: set[str]) -> None:
        self.roots, self.holds, self.done = roots, set(), []
        self.closed, self.late, self.cut = "", "", ""
        self.containers = self

    def create(self, **options: Any) -> FarEngine.Box:
        return self.Box(self, options)

    class Box:
        """A container of it: the inventory, or what gives folders away."""

        def __init__(self, engine: FarEngine, options: dict[str, Any]) -> None:
            self.engine, self.options, self.answer = engine, options, {}

        def start(self) -> None:
            command = self.options["command"]
            if command[0] == "chown":
                assert (self.options["user"], self.options["cap_add"]) == ("0:0", ["CHOWN"])
                self.engine.done.append(("given", command[2], sorted(command[3:])))
                self.engine.roots -= set(command[3:])
                return
            asked = json.loads(command[-1])
            assert self.options["user"] == "23456:23457"
            seen = [*asked["written"], *asked.get("given", ())]
            if seen:
                self.engine.done.append(("looked",))
            if "clear" in asked:
                self.engine.done.append(("cleared", self.options["name"], asked["clear"]))
            unfinished = [path for path in asked.get("finish", ()) if path.startswith(self.engine.late or "none")]
            self.answer = {
                "files": known_files(self.engine.holds), "refused": [f for f in asked["written"] if f in
                self.engine.roots], "new": sorted(set(seen) & self.engine.roots), "unfinished": unfinished,
                "closed": [self.engine.closed],
                "interface": {"name": "far0", "up": True, "megabits": None},
            }

        def wait(self) -> dict[str, int]:
            return {"StatusCode": 0}

        def logs(self) -> bytes:
            return (MARK + json.dumps(self.answer)).encode()

        def put_archive(self, folder: str, chunks: Iterator[bytes]) -> None:
            assert folder not in self.engine.roots, "a file sent there would be root's, and keep its partial name"
            with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
                sent = [m for m in archive.getmembers() if m.isfile()]
            assert {(m.uid, m.gid) for m in sent} == {(23456, 23457)}
            if folder == self.engine.cut:
                raise requests.exceptions.ConnectionError("cable")
            self.engine.done.append(("sent", folder))
            self.engine.holds |= {f"{folder}/{m.name.removesuffix(PARTIAL)}" for m in sent}

        def remove(self, force: bool) -> None: ...


@pytest.fixture
def equip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[FarEngine], str]:
    """Gives a machine what a run needs whose results, data and base lie in folders beside each other."""
    for name, folder in (("HF_HOME", "hf"), ("XDG_CACHE_HOME", "cache"), ("XDG_STATE_HOME", "state")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    for file in ("results/r/plan.yaml", "data/rows.jsonl", "base/config.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("{}")
    run = RunDir(name="r", results_root=tmp_path / "results", output_root=tmp_path / "output")
    plan = Plan(model=str(tmp_path / "base"), data=tmp_path / "data" / "rows.jsonl", output=run.output_root)
    peer = Peer(host="b", address="192.168.100.2", uid=23456, gid=23457, clock_off_s=0, clock_known_s=0, arch="x",
                engine="1")
    monkeypatch.setattr(boxes, "make_folders", lambda *_: None)  # its user may not: they lie in a folder of root's
    volumes = {folder: {"bind": folder, "mode": mode} for folder, mode in mounts_of(run, plan).items()}
    options = {"name": "train", "user": "23456:23457", "volumes": volumes}

    def equip(engine: FarEngine) -> str:
        backend = boxes.BoxesBackend.__new__(boxes.BoxesBackend)
        backend._clients = {"b": engine}
        with (tmp_path / "log").open("wb") as file:
            return backend._equip(peer, options, run, plan, "192.168.100.1", boxes._SharedLog(file), lambda: None,
                                  StopSignals())

    return equip


def test_folders_that_the_far_engine_made_belong_to_its_user_before_files_are_sent(
    equip: Callable[[FarEngine], str], tmp_path: Path
) -> None:
    """Those that are written to and those that are only read: data and base are sent into them as that user."""
    made = {str(tmp_path / name) for name in ("results/r", "output", "data", "base")}
    engine = FarEngine(set(made))
    assert equip(engine) == "far0"
    assert [step[0] for step in engine.done[:3]] == ["looked", "cleared", "given"], "what an earlier start left is gone"
    assert engine.done[2] == ("given", "23456:23457", sorted(made))
    assert sorted(engine.done[3:-1]) == [("sent", str(tmp_path / name)) for name in ("base", "data", "results/r")]
    assert engine.done[-1] == ("looked",), "and what was sent is what is here"


def test_a_folder_over_there_that_is_somebody_elses_is_said_with_its_cure(
    equip: Callable[[FarEngine], str], tmp_path: Path
) -> None:
    engine = FarEngine(set())
    engine.closed = str(tmp_path / "data")
    with pytest.raises(PreflightError, match=f"sudo chown 23456:23457 {engine.closed}$"):
        equip(engine)
    assert "sent" not in [step[0] for step in engine.done], "before gigabytes are"
    engine.holds = {f"{engine.closed}/rows.jsonl"}
    assert equip(engine) == "far0", "where nothing has to go there it may stay closed"


@pytest.mark.parametrize(("field", "words"), [("late", "sudo chown 23456:23457"), ("cut", "^b or its Docker engine")])
def test_halves_of_files_do_not_stay_over_there(
    equip: Callable[[FarEngine], str], tmp_path: Path, field: str, words: str
) -> None:
    engine = FarEngine(set())
    setattr(engine, field, str(tmp_path / "data"))
    with pytest.raises(PreflightError, match=words):
        equip(engine)
    read = [str(tmp_path / name) for name in ("results/r/plan.yaml", "data/rows.jsonl", "base")]
    assert [step for step in engine.done if step[0] == "cleared"] == [
        ("cleared", "train-inputs", read), ("cleared", "train-inputs-clear", read)]
    assert engine.done[-1][0] == "cleared"


@pytest.mark.parametrize("answer", ["here", "refused", "stopped"])
def test_a_base_of_the_hub_is_fetched_before_others_are_given_it(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, stop = threading.Event(), StopSignals()

    def fetch(model: str) -> Path:
        if answer == "refused":
            raise PreflightError("no network")
        if answer == "stopped":
            stop.count = 1
            fetched.wait(10)
        fetched.set()
        return tmp_path

    monkeypatch.setattr(boxes, "resolve_model_dir", fetch)
    plan = Plan(model="Qwen/Qwen3.5-2B")
    with (tmp_path / "log").open("wb") as file:
        log = boxes._SharedLog(file)
        if answer == "refused":
            with pytest.raises(PreflightError, match="no network"):
                boxes._weights_are_here(plan, log, lambda: None, stop)
        else:
            assert boxes._weights_are_here(plan, log, lambda: None, stop) == (answer == "here")
    fetched.set()
    assert b"Qwen/Qwen3.5-2B from the hub" in (tmp_path / "log").read_bytes()
