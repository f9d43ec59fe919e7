"""The project's image: which one a checkout means, whether it is there, and how it is made and removed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import platform
import re
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sparktune.setup.machine.engine import alive, create_container, network_for_downloads
from sparktune.setup.machine.image_build import BuildFailed, BuildRequest, Cancelled, build
from sparktune.setup.machine.image_checks import check_build_host
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.rundir import cache_dir

__all__ = [
    "FLAVOURS", "HASH_LABEL", "PACKAGE", "STACK_LABEL", "Flavour", "Image", "Stack", "base_digest", "ensure_image",
    "image_inputs", "input_hash", "load_stack", "prepare_base", "remove_images", "save_records", "stacks",
]

HASH_LABEL = "org.sparktune.input-hash"
STACK_LABEL = "org.sparktune.stack-hash"
"""The same hash without our own package."""
PACKAGE = ("kernels", "mtp", "setup", "src", "train.py", "training")
"""What of a checkout our package is; the last layers of an image."""
NAME = "sparktune"
Flavour = Literal["opt", "baseline"]
FLAVOURS: dict[str, str] = {"opt": "docker/Dockerfile.opt", "baseline": "docker/Dockerfile"}
_COPY = re.compile(r"^COPY\s+(?!--from)(.+)$", re.M)
OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One pinned set of software: docker/stacks/NAME."""

    name: str
    base_image: str
    base_digest: str | None
    """Digest of the base's manifest; any other is refused. None: the one recorded at the first pull."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A built image."""

    tag: str
    """The content tag: it names exactly these inputs."""
    alias: str
    """The stable tag beside it: always the newest of this stack and flavour."""
    id: str
    base: str
    """Digest of the base, or its image id where it came from no registry."""
    log: Path
    built: bool
    """Whether it was built just now."""


def stacks(root: Path) -> list[str]:
    """Returns the names of the stacks in a checkout, oldest first."""
    return sorted(p.parent.name for p in (root / "docker" / "stacks").glob("*/stack.yaml"))


def load_stack(root: Path, name: str) -> Stack:
    """Reads docker/stacks/NAME/stack.yaml.

    Raises:
        UsageError: there is no such stack; the sentence names those there are.
    """
    known = stacks(root)
    if name not in known:
        raise UsageError(f"--stack should be one of {', '.join(known)}; it is {name}.")
    values = yaml.safe_load((root / "docker" / "stacks" / name / "stack.yaml").read_text(encoding="utf-8"))
    return Stack(name=name, base_image=str(values["base_image"]), base_digest=values.get("base_digest"))


# -- what the tag means


def image_inputs(root: Path, stack: str, flavour: str) -> list[Path]:
    """Returns every file that the Dockerfile copies, read from its own COPY lines; relative to `root`, sorted."""
    dockerfile = root / FLAVOURS[flavour]
    found = {dockerfile}
    for arguments in _COPY.findall(dockerfile.read_text(encoding="utf-8").replace("\\\n", " ")):
        for source in arguments.replace("${STACK}", stack).split()[:-1]:
            path = root / source
            if path.is_dir() and not path.is_symlink():
                for folder, folders, files in os.walk(path):  # links stay links, as in the build context
                    folders[:] = sorted(f for f in folders if f != "__pycache__")
                    links = [f for f in folders if (Path(folder) / f).is_symlink()]
                    found |= {Path(folder) / f for f in [*files, *links] if not f.endswith((".pyc", ".partial"))}
            elif path.exists():
                found.add(path)
            else:
                raise PreflightError(f"{FLAVOURS[flavour]} copies {source}, which is not in {root}.")
    return sorted(path.relative_to(root) for path in found)


def input_hash(
    root: Path, stack: str, flavour: str, base: str, build_args: dict[str, str], *, package: bool = True
) -> str:
    """Returns the sha256 over everything an image is made of: files, base, architecture, build arguments.

    Without `package` our own package is left out.
    """
    digest = hashlib.sha256()
    for path in image_inputs(root, stack, flavour):
        if not package and path.parts[0] in PACKAGE:
            continue
        full = root / path
        content = os.readlink(full).encode() if full.is_symlink() else full.read_bytes()
        mode = "link" if full.is_symlink() else "run" if os.access(full, os.X_OK) else "file"
        digest.update(f"{path}\0{mode}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    for name, value in [("base", base), ("arch", platform.machine()), *sorted(build_args.items())]:
        digest.update(f"{name}={value}\n".encode())
    return digest.hexdigest()


# -- the base


def _records() -> Path:
    """Returns the folder of build logs, bills of materials and digests, which it makes.

    Raises:
        PreflightError: this user cannot write there.
    """
    folder = cache_dir("images")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise PreflightError(f"Logs and records of the image go to {folder}, where nothing can be written "
                             f"({error.strerror}). Let XDG_CACHE_HOME name a folder of yours.") from error
    return folder


def _record_file() -> Path:
    return cache_dir("images") / "base-digests.json"


def _recorded() -> dict[str, str]:
    try:
        values = json.loads(_record_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise PreflightError(f"{_record_file()} should hold the bases' digests; it cannot be read: {error}") from error
    return {str(k): str(v) for k, v in values.items()}


def base_digest(client: Any, name: str) -> tuple[str | None, str | None]:
    """Returns (digest, image id) of a base that the engine has; the digest is None where it came from no registry."""
    from docker.errors import ImageNotFound

    try:
        image = client.images.get(name)
    except ImageNotFound:
        return None, None
    repository = name.partition("@")[0]
    if ":" in repository.rpartition("/")[2]:
        repository = repository.rpartition(":")[0]
    digests = [d.partition("@")[2] for d in image.attrs.get("RepoDigests") or () if d.partition("@")[0] == repository]
    return (digests[0] if digests else None), str(image.id)


def prepare_base(
    client: Any, stack: Stack, on_event: OnEvent, should_stop: Callable[[], bool] = lambda: False
) -> str:
    """Makes sure that the engine has the base, and that it is the one that is pinned.

    The pin is stack.yaml's digest, else what the first pull recorded.

    Returns:
        Its digest; its image id where it came from no registry and no digest is pinned.

    Raises:
        PreflightError: it cannot be pulled, or it is another than the pinned one.
        Cancelled: `should_stop` said so while it was pulled; what came is kept by the engine.
    """
    digest, image_id = base_digest(client, stack.base_image)
    if image_id is None:
        _pull(client, stack.base_image, on_event, should_stop)
        digest, image_id = base_digest(client, stack.base_image)
    assert image_id is not None  # it was there, or was pulled just now
    recorded = _recorded()
    pinned = stack.base_digest or recorded.get(stack.base_image)
    if pinned is not None and digest != pinned:
        where = "its stack.yaml" if stack.base_digest else str(_record_file())
        raise PreflightError(
            f"The base {stack.base_image} should have the digest {pinned} ({where}); "
            f"this engine has {digest or f'an image of no registry, {image_id}'}. The tag was moved or the image "
            f"replaced. Remove it (docker rmi {stack.base_image}) and pull again, or, if the new one is wanted, "
            "change the digest there."
        )
    if digest is None:
        text = f"{stack.base_image} came from no registry, so it has no digest to pin; its id stands for it."
        on_event({"kind": "message", "level": "warning", "text": text})
        return image_id
    if pinned is None:
        _records()
        _record_file().write_text(json.dumps({**recorded, stack.base_image: digest}, indent=1), encoding="utf-8")
        on_event({"kind": "message", "level": "info", "text": f"Recorded {stack.base_image} as {digest}."})
    return digest


def _pull(client: Any, name: str, on_event: OnEvent, should_stop: Callable[[], bool]) -> None:
    from docker.errors import APIError

    layers: dict[str, tuple[int, int]] = {}
    repository, _, tag = name.rpartition(":")
    try:
        for entry in client.api.pull(repository, tag=tag, stream=True, decode=True):
            if should_stop():
                raise Cancelled(f"Pulling {name} was stopped; the layers that came are kept.")
            if "error" in entry:
                raise PreflightError(_pull_failed(name, str(entry["error"])))
            detail = entry.get("progressDetail") or {}
            if detail.get("total"):
                layers[str(entry.get("id"))] = (int(detail.get("current", 0)), int(detail["total"]))
            on_event({"kind": "progress", "phase": f"pulling {name}", "done": sum(d for d, _ in layers.values()),
                      "total": sum(t for _, t in layers.values()) or None, "unit": "bytes",
                      "last": str(entry.get("status", ""))})
    except APIError as error:
        raise PreflightError(_pull_failed(name, str(error.explanation or error))) from error


def _pull_failed(name: str, why: str) -> str:
    return (f"The base image {name} is not here and could not be pulled: {why.strip()[:300]}. Check the network; "
            "nvcr.io may want `docker login nvcr.io` (user $oauthtoken, password an NGC key).")


# -- the image itself


def ensure_image(
    client: Any, root: Path, stack_name: str, flavour: Flavour = "opt", *, on_event: OnEvent,
    rebuild: Literal["no", "yes", "clean"] = "no", build_args: dict[str, str] | None = None,
    should_stop: Callable[[], bool] = lambda: False, any_package: bool = False,
) -> Image:
    """Returns the image of this checkout, building it only when one of its inputs changed.

    Args:
        client: the engine.
        root: the checkout.
        stack_name: folder under docker/stacks.
        flavour: opt (fast path) or baseline.
        on_event: takes progress events.
        rebuild: yes builds even when it is there (unchanged layers are reused); clean removes it first and reuses none.
        build_args: further build arguments (MAX_JOBS, WITH_XFORMERS, TRITON_FROM_SOURCE).
        should_stop: True cancels.
        any_package: an image with another version of our own package will do (it is mounted over).

    Raises:
        PreflightError: the host, the engine or the base is not in a state to build.
        BuildFailed: a step failed.
        Cancelled: `should_stop` said so.
    """
    from docker.errors import ImageNotFound

    stack, extra = load_stack(root, stack_name), dict(build_args or {})
    alias = f"{NAME}:{stack.name}-{flavour}"
    log = _records() / f"{stack.name}-{flavour}.log"
    have_base = base_digest(client, stack.base_image)[1] is not None
    if not have_base:
        check_build_host(client, base_is_here=False)  # before the first byte of twenty gigabytes
    base = prepare_base(client, stack, on_event, should_stop)
    content = input_hash(root, stack.name, flavour, base, extra)
    below = input_hash(root, stack.name, flavour, base, extra, package=False)
    tag = f"{alias}-{content[:12]}"
    if rebuild == "no":
        with suppress(ImageNotFound):
            image = client.images.get(tag)
            image.tag(NAME, alias.partition(":")[2])
            return Image(tag=tag, alias=alias, id=str(image.id), base=base, log=log, built=False)
        for image in client.images.list(filters={"label": f"{STACK_LABEL}={below}"}) if any_package else ():
            if found := sorted(t for t in image.tags if t.startswith(f"{alias}-")):
                return Image(tag=found[0], alias=alias, id=str(image.id), base=base, log=log, built=False)
    if have_base:
        check_build_host(client, base_is_here=True)
    if rebuild == "clean":
        remove_images(client, [tag, alias])
    request = BuildRequest(
        context=root, dockerfile=FLAVOURS[flavour], tag=tag, log=log, no_cache=rebuild == "clean",
        network=network_for_downloads(client),
        build_args={"BASE_IMAGE": stack.base_image, "STACK": stack.name, "BASE_DIGEST": base, "INPUT_HASH": content,
                    "STACK_HASH": below, **extra},
    )
    try:
        build(request, on_event, should_stop)
    except BuildFailed as error:
        if not alive(client):
            raise PreflightError(
                f"The Docker engine went away while it built `{error.step}`. Start it (sudo systemctl start docker) "
                f"and start again; finished steps are kept. The build's log is in {log}."
            ) from error
        raise
    image = client.images.get(tag)
    image.tag(NAME, alias.partition(":")[2])
    save_records(client, tag, log)
    return Image(tag=tag, alias=alias, id=str(image.id), base=base, log=log, built=True)


def save_records(client: Any, tag: str, log: Path) -> None:
    """Saves the bill of materials and `pip freeze` of an image beside its build log.

    They are copied out of a container that never starts: what one prints goes through the engine's log, whose reader
    can drop or repeat the last lines of a container that has just ended.
    """
    container = create_container(
        client, image=tag, command=["true"], network_mode="none", labels={"org.sparktune.role": "records"},
        name=f"sparktune-records-{os.getpid()}-{time.monotonic_ns()}",
    )
    try:
        for source, suffix in (("sbom.json", ".sbom.json"), ("freeze.txt", ".freeze.txt")):
            log.with_suffix(suffix).write_bytes(_file_of(container, f"/opt/sparktune-build/{source}"))
    finally:
        container.remove(force=True)


def _file_of(container: Any, path: str) -> bytes:
    """Returns the content of a file in a container."""
    chunks, _ = container.get_archive(path)
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
        file = archive.extractfile(archive.next() or path)
        assert file is not None, f"{path} is a file"
        return file.read()


def remove_images(client: Any, tags: list[str]) -> list[str]:
    """Removes these tags where they exist, and returns those that did."""
    from docker.errors import ImageNotFound

    removed = []
    for tag in tags:
        with suppress(ImageNotFound):
            client.images.remove(tag)
            removed.append(tag)
    return removed
