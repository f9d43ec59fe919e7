"""Some tensors of a safetensors file on the hub, by HTTP range requests: its header, then the wanted bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sparktune.mtp.tensors import Place
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.outfolder import check_free_space
from sparktune.setup.plan.weights import MAX_HEADER_BYTES, TensorEntry, header_entries

__all__ = ["fetch_tensors"]

_FIRST_BYTES = 2**20
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class _NoRanges(Exception):
    """The server answers with the whole file."""


@contextmanager
def _part(url: str, begin: int, end: int) -> Iterator[tuple[Any, int]]:
    """Yields (response, size of the whole file) of bytes [begin, end); nothing of the body is read before it is known
    that the server serves ranges."""
    from huggingface_hub.utils import build_hf_headers, get_session

    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=60) as response:
        if response.status_code == 404:
            raise PreflightError(f"{url} is not there. Check the model's name.")
        response.raise_for_status()
        told = _RANGE.fullmatch(response.headers.get("content-range", ""))
        if response.status_code != 206 or told is None or int(told[1]) != begin:
            raise _NoRanges
        yield response, int(told[3])


def _copy(url: str, begin: int, end: int, out: BinaryIO) -> int:
    """Appends bytes [begin, end) to `out`, or up to the file's end where that comes first; returns the file's size."""
    with _part(url, begin, end) as (response, size):
        left = min(end, size) - begin
        for piece in response.iter_bytes(2**20):
            out.write(piece)
            left -= len(piece)
    if left:
        raise PreflightError(f"{url}: {end - begin} bytes were asked for, {end - begin - left} came. Try again.")
    return size


def _header(url: str, name: str, path: Path) -> dict[str, TensorEntry]:
    with path.open("w+b") as file:
        size = _copy(url, 0, _FIRST_BYTES, file)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise PreflightError(f"{url} should be a safetensors file; it has {size} bytes and announces a header of "
                                 f"{length}.")
        if 8 + length > _FIRST_BYTES:
            file.seek(0, 2)
            _copy(url, file.tell(), 8 + length, file)
        file.seek(8)
        return header_entries(Path(name), size, file.read(length))


def _runs(entries: list[tuple[str, TensorEntry]]) -> Iterator[list[tuple[str, TensorEntry]]]:
    """Groups tensors that lie end to end: one request each."""
    run: list[tuple[str, TensorEntry]] = []
    for name, entry in sorted(entries, key=lambda item: item[1].begin):
        if run and run[-1][1].end != entry.begin:
            yield run
            run = []
        run.append((name, entry))
    if run:
        yield run


def fetch_tensors(source: str, name: str, prefix: str, scratch: Path) -> dict[str, Place] | None:
    """Returns the tensors of hub file `name` whose names start with `prefix`, their bytes appended to `scratch`.

    Args:
        source: hub id.
        name: a safetensors file of it.
        prefix: of the tensors' names.
        scratch: file that takes the bytes; its folder is made.

    Returns:
        name -> place in `scratch`; None when the server does not serve ranges.

    Raises:
        PreflightError: the hub cannot be reached, the file is missing or damaged, or there is too little space.
    """
    import httpx
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(source, name)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    header = scratch.with_name(scratch.name + ".header")
    try:
        wanted = [(n, e) for n, e in _header(url, name, header).items() if n.startswith(prefix)]
        check_free_space(scratch, sum(e.end - e.begin for _, e in wanted), "The MTP head")
        found: dict[str, Place] = {}
        with scratch.open("ab") as out:
            for run in _runs(wanted):
                shift = out.tell() - run[0][1].begin
                _copy(url, run[0][1].begin, run[-1][1].end, out)
                for tensor, e in run:
                    found[tensor] = (scratch, TensorEntry(
                        dtype=e.dtype, shape=e.shape, begin=e.begin + shift, end=e.end + shift))
        return found
    except _NoRanges:
        return None
    except (httpx.HTTPError, OSError) as error:
        raise PreflightError(
            f"{name} of {source} could not be fetched ({type(error).__name__}: {error}). Check name and network."
        ) from error
    finally:
        header.unlink(missing_ok=True)
