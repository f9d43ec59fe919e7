"""Takes the MTP head out of a published checkpoint, fetching only the shards that hold it.

    python -m sparktune.mtp.extract_upstream_mtp --model DIR-OR-HUB-ID --out FILE.safetensors
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

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


def _head_of_hub(source: str) -> tuple[dict[str, Place], dict[str, Any]]:
    """Returns a hub model's head and config: the index first, then the shards that hold `mtp.*` and no others."""
    config = _fetch(source, "config.json")
    if config is None:
        raise UsageError(f"{source} has no config.json on the hub: it is no model.")
    index = _fetch(source, _INDEX)
    if index is None:
        names = ["model.safetensors"]
    else:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({file for name, file in weight_map.items() if name.startswith(PREFIX)})
    head: dict[str, Place] = {}
    for name in names:
        file = _fetch(source, name)
        if file is None:
            raise PreflightError(f"{source} names the shard {name} in its index but does not have it.")
        head |= {n: (file, e) for n, e in safetensors_header(file).items() if n.startswith(PREFIX)}
    return head, json.loads(config.read_text(encoding="utf-8"))


def extract(source: str, out: Path) -> int:
    """Writes the MTP head of `source` to one safetensors file, which appears by rename. Returns its size in bytes.

    Args:
        source: a local folder, or a hub id (its index is read first; only shards that hold `mtp.*` are fetched).
        out: the file; must not exist.

    Raises:
        UsageError: `out` exists, or `source` has no complete MTP head.
        PreflightError: a shard is missing, damaged or not reachable, or there is too little space.
    """
    if out.exists():
        raise UsageError(f"{out} exists already and is left as it is. Remove it or name another file.")
    if Path(source).expanduser().is_dir():
        folder = resolve_model_dir(source)
        head = find_head(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    else:
        head, config = _head_of_hub(source)
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
        size = extract(args.model, args.out)
    except SparktuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"Wrote the MTP head of {args.model} to {args.out} ({gib(size)}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
