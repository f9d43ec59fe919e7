"""A GGUF file's header, read with every count and length held against the file's size before it is believed.

The `gguf` package's reader trusts them: an array said to hold 2**60 values keeps it busy, and its memory growing, for
good. So a file passes here before that reader opens it.

Source of the layout: the GGUF specification, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from sparktune.setup.plan.errors import PreflightError

__all__ = ["MAX_ARRAY_VALUES", "GgufHeader", "GgufTensor", "read_gguf_header"]

MAX_ARRAY_VALUES = 2**22
"""Values of all arrays together. A vocabulary of 248,320 tokens needs half a million."""

_VERSIONS = (2, 3)
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
# Number of a value's type -> how `struct` reads it.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32 = 4
_DEFAULT_ALIGNMENT = 32
_LEAST_FIELD, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8

# Number of a tensor's type -> its name, values of a block, bytes of a block.
_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor as the header describes it."""

    kind: str
    """Name of its type: F32, Q8_0, ..."""
    dims: tuple[int, ...]
    """Fastest first, as the file has them."""
    begin: int
    """First byte, counted from the start of the file."""
    end: int
    """One past the last byte."""


@dataclass(kw_only=True)
class GgufHeader:
    """What a GGUF says before its data begins."""

    version: int = 0
    fields: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Metadata with a single value."""
    arrays: dict[str, int] = field(default_factory=dict)
    """Metadata with many values -> how many."""
    tensors: dict[str, GgufTensor] = field(default_factory=dict)


class _Damaged(Exception):
    """What is wrong, without the file's name."""


class _Cursor:
    """Reads forward through a file that may end anywhere."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self.at

    def numbers(self, form: str) -> tuple[int | float | bool, ...]:
        size = struct.calcsize("<" + form)
        if size > self.left:
            raise _Damaged(f"it ends within its header, at byte {len(self._data)}")
        values = struct.unpack_from("<" + form, self._data, self.at)
        self.at += size
        return values

    def whole(self, form: str) -> int:
        return int(self.numbers(form)[0])

    def text(self, what: str) -> str:
        length = self.whole("Q")
        if length > self.left:
            raise _Damaged(f"{what} at byte {self.at} is said to have {length} bytes; {self.left} are left")
        raw = self._data[self.at:self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged(f"{what} that ends at byte {self.at} is not UTF-8") from None

    def skip(self, count: int, size: int) -> None:
        if count * size > self.left:
            raise _Damaged(f"an array at byte {self.at} is said to have {count} values; {self.left} bytes are left")
        self.at += count * size


def read_gguf_header(path: Path) -> GgufHeader:
    """Returns what a GGUF's header says, once all of it is consistent with the file's size.

    Args:
        path: the file.

    Raises:
        PreflightError: missing, not a GGUF, cut off, or its header contradicts itself or the file's size.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise _Damaged(f"it has {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(_Cursor(data), size)
    except _Damaged as error:
        raise PreflightError(
            f"{path} should be a complete GGUF file, but {error}. The file is damaged or was cut off: make it again, "
            "or fetch it again."
        ) from None
    except OSError as error:
        raise PreflightError(f"{path} should be a readable GGUF file: {error.strerror or error}.") from error


def _header(cursor: _Cursor, size: int) -> GgufHeader:
    if cursor.whole("I") != int.from_bytes(b"GGUF", "little"):
        raise _Damaged("it does not begin with GGUF")
    header = GgufHeader(version=cursor.whole("I"))
    if header.version not in _VERSIONS:
        raise _Damaged(f"it is of version {header.version}; versions 2 and 3, little-endian, are read")
    n_tensors, n_fields = (int(n) for n in cursor.numbers("QQ"))
    if n_tensors * _LEAST_TENSOR + n_fields * _LEAST_FIELD > cursor.left:
        raise _Damaged(f"it announces {n_fields} fields and {n_tensors} tensors, more than {size} bytes can describe")
    values = 0
    for _ in range(n_fields):
        values += _field(cursor, header, values)
    alignment = _alignment(header)
    raw = _tensor_infos(cursor, n_tensors)
    start = -(-cursor.at // alignment) * alignment
    for name, (kind, dims, offset) in raw.items():
        header.tensors[name] = _placed(name, kind, dims, offset, start, size, alignment)
    _refuse_overlap(header.tensors)
    return header


def _field(cursor: _Cursor, header: GgufHeader, values: int) -> int:
    """Reads one field into `header`; returns how many values its array has (0 without one)."""
    key = cursor.text("a key")
    if key in header.fields or key in header.arrays:
        raise _Damaged(f"the field {key[:64]!r} is there twice")
    kind = cursor.whole("I")
    if key == "general.alignment" and kind != _UINT32:
        raise _Damaged("general.alignment is not a 32-bit whole number")
    if kind == _STRING:
        header.fields[key] = cursor.text("a text")
        return 0
    if kind in _SCALARS:
        header.fields[key] = cursor.numbers(_SCALARS[kind])[0]
        return 0
    if kind != _ARRAY:
        raise _Damaged(f"the field {key[:64]!r} is of the unknown type {kind}")
    kind, count = cursor.whole("I"), cursor.whole("Q")
    if kind != _STRING and kind not in _SCALARS:
        raise _Damaged(f"the array {key[:64]!r} holds values of type {kind}; numbers and texts are read")
    if values + count > MAX_ARRAY_VALUES:
        raise _Damaged(f"its arrays are said to hold more than {MAX_ARRAY_VALUES} values, {count} of them {key[:64]!r}")
    if kind == _STRING:
        for _ in range(count):
            cursor.text(f"a text of {key[:64]!r}")
    else:
        cursor.skip(count, struct.calcsize(_SCALARS[kind]))
    header.arrays[key] = count
    return count


def _alignment(header: GgufHeader) -> int:
    alignment = int(header.fields.get("general.alignment", _DEFAULT_ALIGNMENT))
    if alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment is {alignment}, which is no power of two")
    return alignment


def _tensor_infos(cursor: _Cursor, count: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
    found: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = cursor.text("a tensor's name")
        if name in found:
            raise _Damaged(f"the tensor {name[:64]!r} is there twice")
        n_dims = cursor.whole("I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise _Damaged(f"the tensor {name[:64]!r} has {n_dims} dimensions; 1 to {_MAX_DIMS} are read")
        dims = tuple(int(n) for n in cursor.numbers(f"{n_dims}Q"))
        kind, offset = cursor.whole("I"), cursor.whole("Q")
        if kind not in _TYPES:
            raise _Damaged(f"the tensor {name[:64]!r} is of the unknown type {kind}")
        found[name] = (kind, dims, offset)
    return found


def _placed(
    name: str, kind: int, dims: tuple[int, ...], offset: int, start: int, size: int, alignment: int
) -> GgufTensor:
    """Returns the tensor with its bytes, once they are known to lie inside the file."""
    type_name, block, block_bytes = _TYPES[kind]
    if dims[0] % block:
        raise _Damaged(f"the tensor {name[:64]!r} has rows of {dims[0]}, which {type_name} cannot hold")
    count = 1
    for n in dims:
        count *= n
    begin, n_bytes = start + offset, count // block * block_bytes
    if not count or begin + n_bytes > size or offset % alignment:
        raise _Damaged(
            f"the tensor {name[:64]!r} ({type_name} {list(dims)}) should lie at bytes {begin} to {begin + n_bytes}; "
            f"the file has {size}, and tensors begin at multiples of {alignment}"
        )
    return GgufTensor(kind=type_name, dims=dims, begin=begin, end=begin + n_bytes)


def _refuse_overlap(tensors: Mapping[str, GgufTensor]) -> None:
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    for (name, one), (other, two) in pairwise(ordered):
        if two.begin < one.end:
            raise _Damaged(f"the tensors {name[:64]!r} and {other[:64]!r} share bytes")
