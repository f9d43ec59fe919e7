"""Takes the MTP head out of a published checkpoint, fetching its tensors and nothing else where the hub allows it.

    python -m sparktune.mtp.extract_upstream_mtp --model DIR-OR-HUB-ID --out FILE.safetensors
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparktune.mtp.ranges import fetch_tensors
from sparktune.mtp.tensors import PREFIX, Place, check_head, write_safetensors
from sparktune.setup.plan.errors import PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.models import resolve_model_dir
from sparktune.setup.plan.outfolder import check_free_space, gib
from sparktune.setup.plan.weights import safetensors_header, safetensors_index

__all__ = ["extract", "find_head", "text_config"]

_INDEX = "model.safetensors.index.json"


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the text tower's part of a config.json, nested or not."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def find_head(folder: Path) -> dict[str, Place]:
    """Returns the `mtp.*` tensors of a local checkpoint, none if it has none.

    Raises:
        PreflightError: a shard is missing or damaged.
    """
    index = safetensors_index(folder)
    files = {file for name, file in index.items() if name.startswith(PREFIX)}
    headers = {file: safetensors_header(file) for file in files}
    return {name: (file, headers[file][name]) for name, file in index.items() if name.startswith(PREFIX)}


def _fetch(source: str, name: str) -> Path | None:
    """Returns one file of a hub repository, None when the repository lacks it."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except errors.LocalEntryNotFoundError as error:
        raise PreflightError(
            f"{name} of {source} is neither cached nor reachable. Connect once, or give a folder."
        ) from error
    except errors.EntryNotFoundError:
        return None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise PreflightError(
            f"{name} of {source} could not be fetched ({type(error).__name__}: {error}). Check name and network."
        ) from error


def _shards_with_head(source: str) -> list[str]:
    """Returns the files of a hub model that may hold `mtp.*`: those its index names, or its only file."""
    index = _fetch(source, _INDEX)
    if index is None:
        return ["model.safetensors"]
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return sorted({file for name, file in weight_map.items() if name.startswith(PREFIX)})


def _head_of_hub(
    source: str, scratch: Path, say: Callable[[str], None]
) -> tuple[dict[str, Place], dict[str, Any]]:
    """Returns a hub model's head and config.

    The index comes first. Of a shard that holds `mtp.*` only the header and those tensors are fetched, into `scratch`;
    where the server does not serve ranges, the whole shard is.
    """
    config = _fetch(source, "config.json")
    if config is None:
        raise UsageError(f"{source} has no config.json on the hub: it is no model.")
    head: dict[str, Place] = {}
    for name in _shards_with_head(source):
        found = None if _cached(source, name) else fetch_tensors(source, name, PREFIX, scratch)
        if found is None:
            file = _fetch(source, name)
            if file is None:
                raise PreflightError(f"{source} names the shard {name} in its index but does not have it.")
            say(f"{name} of {source} was read whole ({gib(file.stat().st_size)}): it is cached, or its server does not "
                "serve parts of files.")
            found = {n: (file, e) for n, e in safetensors_header(file).items() if n.startswith(PREFIX)}
        head |= found
    return head, json.loads(config.read_text(encoding="utf-8"))


def _cached(source: str, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, name), str)


def extract(source: str, out: Path, say: Callable[[str], None] = lambda text: None) -> int:
    """Writes the MTP head of `source` to one safetensors file, which appears by rename. Returns its size in bytes.

    Args:
        source: a local folder, or a hub id (its index is read first; of shards that hold `mtp.*` only those tensors
            are fetched, where the server allows it).
        out: the file; must not exist.
        say: takes a sentence for the user.

    Raises:
        UsageError: `out` exists, or `source` has no complete MTP head.
        PreflightError: a shard is missing, damaged or not reachable, or there is too little space.
    """
    if out.exists():
        raise UsageError(f"{out} exists already and is left as it is. Remove it or name another file.")
    scratch = out.with_name(f"{out.name}.{os.getpid()}.ranges")
    try:
        return _extract(source, out, scratch, say)
    finally:
        scratch.unlink(missing_ok=True)


def _extract(source: str, out: Path, scratch: Path, say: Callable[[str], None]) -> int:
    if Path(source).expanduser().is_dir():
        folder = resolve_model_dir(source)
        head = find_head(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    else:
        head, config = _head_of_hub(source, scratch, say)
    if not head:
        raise UsageError(f"{source} holds no `{PREFIX}*` tensors: it was saved without its MTP head (transformers "
                         "drops it on load). Give the published checkpoint.")
    check_head(head, text_config(config), source)
    needs = sum(entry.end - entry.begin for _, entry in head.values())
    check_free_space(out, needs + 2**20, "The MTP head")
    partial = out.with_name(out.name + f".{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        size = write_safetensors(partial, sorted(head.items()))
        os.rename(partial, out)
    except OSError as error:
        raise PreflightError(
            f"{out} cannot be written: {error.strerror or error}. Give a folder you may write to."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return size


def main(argv: list[str] | None = None) -> int:
    """Command line of `extract`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.mtp.extract_upstream_mtp", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of the published checkpoint")
    parser.add_argument("--out", required=True, type=Path, help="safetensors file to write")
    args = parser.parse_args(argv)
    try:
        size = extract(args.model, args.out, print)
    except SparktuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"Wrote the MTP head of {args.model} to {args.out} ({gib(size)}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
