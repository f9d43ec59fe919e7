"""Puts a run's result on the hub: everything is shown first, and nothing is sent before it is confirmed.

    python -m sparktune.setup.export.push --run RUN --push-to OWNER/NAME [--parts merged,mtp,gguf] [--public] [--yes]

The token comes from a file (--token-file), from HF_TOKEN, or from an earlier `hf auth login`; never from the command
line, and it is never shown.
"""

from __future__ import annotations

import argparse
import os
import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparktune.setup.export.stage import run_command
from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.errors import PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.outfolder import gib
from sparktune.setup.plan.rundir import RunDir

__all__ = ["Upload", "main", "plan_uploads", "preview", "push"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,80}")
_PARTS = ("merged", "mtp", "gguf")
_SUFFIX = {"merged": "", "mtp": "-mtp", "gguf": "-GGUF"}


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One repository and the folder that goes into it."""

    repository: str
    folder: Path

    @property
    def files(self) -> list[Path]:
        """All files, relative to the folder; hidden ones stay here."""
        found = (p.relative_to(self.folder) for p in self.folder.rglob("*") if p.is_file())
        return sorted(p for p in found if not any(part.startswith(".") for part in p.parts))

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum((self.folder / p).stat().st_size for p in self.files)


def plan_uploads(root: Path, target: str, parts: Sequence[str]) -> list[Upload]:
    """Returns what would be sent where: the merged model to `target`, the others beside it.

    Args:
        root: results/RUN.
        target: OWNER/NAME.
        parts: of merged, mtp, gguf; one that the run does not have is left out, unless it is the only one.

    Raises:
        UsageError: not a run, not a repository's name, an unknown part, or there is nothing to send.
    """
    if not (root / "plan.yaml").is_file():
        raise UsageError(f"--run {root} should be a run's folder with its plan.yaml; there is none. Give results/RUN.")
    if not _ID.fullmatch(target):
        raise UsageError(f"--push-to takes OWNER/NAME (letters, digits, '.', '_', '-'); got {target!r}.")
    unknown = [p for p in parts if p not in _PARTS]
    if unknown:
        raise UsageError(f"--parts takes {', '.join(_PARTS)}; got {unknown[0]!r}.")
    plan = load_plan(root / "plan.yaml")
    run = RunDir.from_root(root, plan.output)
    folders = {"merged": run.merged, "gguf": run.gguf}
    served = run.served_mtp(plan.mtp)
    if served is not None:
        folders["mtp"] = served
    found = [Upload(repository=target + _SUFFIX[p], folder=folders[p]) for p in parts
             if p in folders and folders[p].is_dir()]
    if not found:
        raise UsageError(f"The run {run.name} has nothing of {', '.join(parts)} yet. Finish it first: ./run.sh resume "
                         f"{run.name}")
    return found


def preview(uploads: Sequence[Upload], public: bool) -> str:
    """Returns all that would be sent, file by file, and the cards."""
    lines = []
    for upload in uploads:
        lines += [f"{upload.repository} ({'public' if public else 'private'}), {gib(upload.bytes)}, from "
                  f"{upload.folder}:"]
        lines += [f"  {path.as_posix()}  {gib((upload.folder / path).stat().st_size)}" for path in upload.files]
        card = upload.folder / "README.md"
        if card.is_file():
            lines += ["  its README.md:", *(f"  | {line}" for line in card.read_text("utf-8").splitlines())]
    return "\n".join(lines)


def _token(file: Path | None) -> str | None:
    """Returns the token of a file; None leaves it to HF_TOKEN or an earlier login.

    Raises:
        UsageError: the file cannot be read, is empty, or others may read it.
    """
    if file is None:
        return None
    try:
        mode, text = file.stat().st_mode, file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UsageError(f"--token-file {file} cannot be read: {error.strerror}.") from error
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        raise UsageError(f"--token-file {file} may be read by others. Make it yours alone: chmod 600 {file}")
    if not text or len(text.split()) != 1:
        raise UsageError(f"--token-file {file} should hold one token and nothing else.")
    return text


def push(uploads: Sequence[Upload], token: str | None, public: bool, message: str) -> list[str]:
    """Sends every folder, each as one commit, and returns the addresses. A repository that is there gets a new commit.

    Args:
        uploads: from plan_uploads.
        token: see _token.
        public: visibility of repositories that are made; existing ones keep theirs.
        message: of the commits.

    Raises:
        PreflightError: no token, or one that may not write there.
        SparktuneError: the hub could not be reached or refused.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api: Any = HfApi(token=token)
    addresses = []
    for upload in uploads:
        try:
            api.create_repo(upload.repository, private=not public, exist_ok=True)
            done = api.upload_folder(
                repo_id=upload.repository, folder_path=upload.folder, commit_message=message,
                allow_patterns=[p.as_posix() for p in upload.files],
            )
        except LocalTokenNotFoundError as error:
            raise PreflightError("There is no token for the hub. Set HF_TOKEN, give --token-file, or run `hf auth "
                                 "login` once.") from error
        except HfHubHTTPError as error:
            code = error.response.status_code if error.response is not None else 0
            if code in (401, 403):
                raise PreflightError(f"The hub refused {upload.repository} (HTTP {code}): the token is missing, wrong, "
                                     "or may not write there. Set HF_TOKEN, or give --token-file.") from error
            raise SparktuneError(f"The hub refused {upload.repository} (HTTP {code}). Nothing here was changed; start "
                                 "again later.") from error
        except (OSError, httpx.HTTPError) as error:
            raise SparktuneError(
                f"The hub could not be reached for {upload.repository} ({type(error).__name__}). Check the network and "
                "start again; files already there are not sent twice."
            ) from error
        addresses.append(str(done.commit_url))
    return addresses


def _confirmed(yes: bool) -> bool:
    if yes:
        return True
    if not sys.stdin.isatty():
        print("Nothing was sent. Add --yes to send exactly this.", file=sys.stderr)
        return False
    print("Send this? Type yes: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() == "yes"


def _work(args: argparse.Namespace) -> None:
    uploads = plan_uploads(args.run, args.push_to, [p for p in args.parts.split(",") if p])
    token = _token(args.token_file)
    print(preview(uploads, args.public))
    if not _confirmed(args.yes):
        return
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for address in push(uploads, token, args.public, f"sparktune: {args.run.resolve().name}"):
        print(address)


def main(argv: Sequence[str] | None = None) -> int:
    """Shows what would be sent, and sends it once it is confirmed. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.setup.export.push", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder, results/RUN")
    parser.add_argument("--push-to", required=True, metavar="OWNER/NAME", help="repository of the merged model")
    parser.add_argument("--parts", default="merged,gguf", help=f"of {', '.join(_PARTS)} (default: %(default)s)")
    parser.add_argument("--public", action="store_true", help="make new repositories public (default: private)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="a file with the token, readable by you alone")
    parser.add_argument("--yes", action="store_true", help="send without asking; the preview is printed all the same")
    args = parser.parse_args(argv)
    return run_command(lambda: _work(args))


if __name__ == "__main__":
    sys.exit(main())
