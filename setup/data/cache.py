"""The token cache: examples as flat memory-mapped arrays in a folder that appears whole, by rename, or not at all.

    KEY/meta.json                      written last: size and sha256 of every array file, plus the caller's facts
    KEY/{train,eval}/{ids,supervised,offsets,lines}.npy
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from sparktune.setup.plan.errors import PreflightError, SparktuneError

__all__ = ["CacheWriter", "TokenDataset", "cache_file_error", "open_cache", "remove_leftovers"]

_DTYPES: dict[str, np.dtype[Any]] = {
    "ids": np.dtype("<u4"), "supervised": np.dtype("u1"), "offsets": np.dtype("<i8"), "lines": np.dtype("<i8"),
}
_PARTS = ("train", "eval")
# numpy pads a version 1.0 header of a one-dimensional array to this many bytes whatever the length.
_HEADER_BYTES = 128
# A half-written folder nobody wrote to for this long is a leftover.
_QUIET_S = 600.0


class TokenDataset:
    """Tokenised examples. `dataset[i]` is (ids, supervised), views of the arrays.

    Args:
        ids: uint32 [tokens] token ids, examples end to end.
        supervised: uint8 [tokens] 1 where the token itself is learned.
        offsets: int64 [examples + 1] example boundaries, from 0.
        lines: int64 [examples] line of each example in its file, from 1.
        key: identity of the data; the order of training hangs on it.

    Raises:
        ValueError: the arrays do not fit together.
    """

    def __init__(
        self, ids: npt.NDArray[np.uint32], supervised: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64],
        lines: npt.NDArray[np.int64], key: str,
    ) -> None:
        if len(ids) != len(supervised) or len(offsets) != len(lines) + 1 or offsets[0] or offsets[-1] != len(ids):
            raise ValueError(
                f"a token dataset's arrays must fit together; got {len(ids)} ids, {len(supervised)} supervised, "
                f"{len(offsets)} offsets, {len(lines)} lines."
            )
        self.ids = ids
        self.supervised = supervised
        self.offsets = offsets
        self.lines = lines
        self.key = key
        self.file: Path | None = None
        """The file that `lines` refers to, where it is known: the data itself or its cleaned copy."""

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.lines)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
        """Returns (ids uint32 [t], supervised uint8 [t]) of one example."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        here = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.ids[here], self.supervised[here]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [examples]: tokens of each example."""
        return np.diff(self.offsets)

    @property
    def supervised_counts(self) -> npt.NDArray[np.int64]:
        """int64 [examples]: targets of each example; a document's first token has no target."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        starts = np.asarray(self.offsets[:-1])
        counts: npt.NDArray[np.int64] = np.add.reduceat(self.supervised, starts, dtype=np.int64)
        return counts - self.supervised[starts]


class _ArrayFile:
    """One growing .npy file; the header is written last, when the length is known."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._file: BinaryIO = path.open("wb")
        self._dtype = dtype
        self._count = 0
        self._file.write(bytes(_HEADER_BYTES))

    def append(self, values: npt.ArrayLike) -> None:
        array = np.ascontiguousarray(values, dtype=self._dtype)
        self._file.write(array.data)
        self._count += array.size

    def finish(self) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False,
                     "shape": (self._count,)},
        )
        assert len(header.getvalue()) == _HEADER_BYTES, "numpy changed its header padding"
        self._file.seek(0)
        self._file.write(header.getvalue())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        self._file.close()


class CacheWriter:
    """Writes one cache folder beside its final name; `commit` makes it appear, leaving the block without it removes it.

    Args:
        final: the folder's final name, `cache_dir("tokens") / KEY`.

    Raises:
        SparktuneError: the folder cannot be written or the disk is full, with the path and what to do.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.folder = final.with_name(f"{final.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        self._arrays: dict[str, dict[str, _ArrayFile]] = {}
        self._ends = dict.fromkeys(_PARTS, 0)
        try:
            for part in _PARTS:
                (self.folder / part).mkdir(parents=True)
                self._arrays[part] = {
                    name: _ArrayFile(self.folder / part / f"{name}.npy", dtype) for name, dtype in _DTYPES.items()
                }
                self._arrays[part]["offsets"].append([0])
        except OSError as error:
            self._discard()
            raise cache_file_error(error, self.folder) from error

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    def add(self, part: str, ids: npt.ArrayLike, supervised: npt.ArrayLike, line: int) -> None:
        """Appends one example to `part` ("train" or "eval")."""
        arrays = self._arrays[part]
        values = np.asarray(ids)
        self._ends[part] += values.size
        try:
            arrays["ids"].append(values)
            arrays["supervised"].append(supervised)
            arrays["offsets"].append([self._ends[part]])
            arrays["lines"].append([line])
        except OSError as error:
            raise cache_file_error(error, self.folder) from error

    @property
    def tokens(self) -> int:
        """Tokens so far, of both parts."""
        return sum(self._ends.values())

    def finish(self) -> None:
        """Completes the array files, so that `datasets` can read them before the commit."""
        try:
            for arrays in self._arrays.values():
                for array in arrays.values():
                    array.finish()
        except OSError as error:
            raise cache_file_error(error, self.folder) from error

    def datasets(self, key: str) -> tuple[TokenDataset, TokenDataset]:
        """Returns (train, eval) of a finished, uncommitted folder."""
        return _load(self.folder / "train", key), _load(self.folder / "eval", key)

    def commit(self, facts: dict[str, Any]) -> None:
        """Writes meta.json with `facts` and renames the folder to its final name.

        A damaged folder of that name is replaced, a whole one is kept.
        """
        try:
            files = {
                f"{part}/{name}.npy": _fingerprint(self.folder / part / f"{name}.npy")
                for part in _PARTS for name in _DTYPES
            }
            with (self.folder / "meta.json").open("w", encoding="utf-8") as file:
                json.dump({"files": files, "facts": facts}, file, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            for part in _PARTS:
                _sync_folder(self.folder / part)
            _sync_folder(self.folder)
            # Where another process finished the same key first, its folder stays: equal keys mean equal contents.
            if open_cache(self.final, "") is None:
                if self.final.exists():
                    shutil.rmtree(self.final)
                os.rename(self.folder, self.final)
                _sync_folder(self.final.parent)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and open_cache(self.final, "") is not None:
                return
            raise cache_file_error(error, self.folder) from error

    def _discard(self) -> None:
        for arrays in self._arrays.values():
            for array in arrays.values():
                array.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def open_cache(folder: Path, key: str) -> tuple[TokenDataset, TokenDataset, dict[str, Any]] | None:
    """Returns (train, eval, facts) of a cache folder, or None if it is absent or any byte of it was damaged.

    Raises:
        SparktuneError: the folder is there but cannot be read.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for name, fingerprint in meta["files"].items():
            if _fingerprint(folder / name) != fingerprint:
                return None
        return _load(folder / "train", key), _load(folder / "eval", key), meta["facts"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    except OSError as error:
        raise cache_file_error(error, folder) from error


def remove_leftovers(folder: Path) -> None:
    """Removes half-written cache folders whose process is gone.

    A process of another container may share the folder under an unknown id, so a folder must also be quiet.
    """
    for partial in folder.glob("*.partial"):
        pid = partial.name.split(".")[-2].split("-")[0]
        newest = max((path.stat().st_mtime for path in (partial, *partial.glob("*/*.npy"))), default=0.0)
        if pid.isdigit() and not _alive(int(pid)) and time.time() - newest > _QUIET_S:
            shutil.rmtree(partial, ignore_errors=True)


def cache_file_error(error: OSError, path: Path) -> SparktuneError:
    """Returns the error that says which folder could not be written or read, why, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PreflightError(
            f"The disk that holds the token cache is full ({path.parent}). Free some space, or point XDG_CACHE_HOME "
            "at a folder on a larger disk."
        )
    return PreflightError(
        f"The token cache needs to read and write {path.parent}, but: {error.strerror or error}. Make that folder "
        "writable, or point XDG_CACHE_HOME at one that is."
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _load(folder: Path, key: str) -> TokenDataset:
    arrays = {}
    for name, dtype in _DTYPES.items():
        array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        if array.dtype != dtype or array.ndim != 1:
            raise ValueError(f"{name}.npy holds {array.dtype} {array.shape}; expected one dimension of {dtype}")
        arrays[name] = array
    return TokenDataset(**arrays, key=key)


def _fingerprint(path: Path) -> list[Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
