"""Changes of an input that keep its outer shape: a JSON tree, YAML lines, a header behind its length, GGUF fields.

Bytes changed blindly seldom stay JSON; most of a reader lies behind that first door.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Mutation", "any_bytes", "gguf_fields", "json_lines", "json_tree", "safetensors_header", "yaml_lines"]

Mutation = Callable[[random.Random, bytes], bytes]

_NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, 10**18, 2**63, -(2**63), 10**40, "", " ", "\x00",
    "\x1b[2J\x1b]0;x\x07",
    "\u202e", "\ud83d", "../../x", "/etc/passwd", "a" * 300, "{{ 7*7 }}", "{% for x in y %}", "<|im_end|>", "</think>",
    "<think>", "!!python/object/apply:os.system ['x']", [], {}, [[]], [None], {"": None}, "NaN", float("nan"),
    float("inf"),
)
_SCALAR_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_COUNTS = (0, 1, 2, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)


def any_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flips, cuts, doubles or inserts bytes."""
    raw = bytearray(data or b"x")
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(raw) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 8))))
        elif kind == 2:
            del raw[at:at + rng.choice((1, 4, 64))]
        elif kind == 3:
            end = at + rng.choice((1, 8, 200))
            raw[at:at] = raw[at:end] * rng.choice((1, 2, 40))
        elif at < len(raw):
            raw[at] = rng.choice((0, 10, 34, 91, 93, 123, 125, 128, 255))
    return bytes(raw)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Returns (container, key) of every node below `value`."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        at = waiting.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        found += [(at, key) for key in keys]
        waiting += [at[key] for key in keys]
    return found


def _changed(rng: random.Random, tree: Any, words: Sequence[str]) -> Any:
    places = _places(tree)
    if not places:
        return rng.choice(_NASTY)
    box, key = rng.choice(places)
    kind = rng.randrange(9)
    if kind == 0:
        box[key] = copy.deepcopy(rng.choice(_NASTY))
    elif kind == 1:
        del box[key]
    elif kind == 2 and isinstance(box, dict):
        box[rng.choice(words)] = box.pop(key)
    elif kind == 3 and isinstance(box, dict):
        box[rng.choice(words)] = copy.deepcopy(rng.choice(_NASTY))
    elif kind == 4:
        other, name = rng.choice(places)
        box[key] = copy.deepcopy(other[name]) if name in other or (isinstance(other, list) and name < len(other)) else 0
    elif kind == 5 and isinstance(box, list):
        box.insert(key, copy.deepcopy(box[key]))
    elif kind == 6 and isinstance(box[key], str):
        text = box[key]
        at = rng.randrange(len(text) + 1)
        box[key] = text[:at] + str(rng.choice((rng.choice(_NASTY), rng.choice(words)))) + text[at:]
    elif kind == 7 and isinstance(box[key], int | float):
        box[key] = rng.choice((-1, 0, 1, 2, 7, 2**31, 2**63, 0.5)) * (rng.random() < 0.7 or box[key])
    else:
        box[key] = rng.choice(words)
    return tree


def _json(rng: random.Random, data: bytes, words: Sequence[str]) -> bytes | None:
    """Returns the changed document; None where `data` is none."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice((1, 1, 2, 4))):
        tree = _changed(rng, tree, words)
    return json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def json_tree(words: Sequence[str]) -> Mutation:
    """Changes of one JSON document. `words` are the keys and values that mean something to its reader."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        changed = _json(rng, data, words) if rng.random() < 0.85 else None
        return any_bytes(rng, data) if changed is None else changed

    return mutate


def json_lines(words: Sequence[str]) -> Mutation:
    """Changes of a JSON document a line."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        changed = _json(rng, lines[at], words) if rng.random() < 0.85 else None
        if changed is None:
            return any_bytes(rng, data)
        lines[at] = changed
        if rng.random() < 0.1:
            lines.insert(at, rng.choice(lines))
        return b"\n".join(lines[:8])

    return mutate


def yaml_lines(words: Sequence[str]) -> Mutation:
    """Changes of YAML: a key's value, a line more or less, an anchor, a tag, a block."""
    values = (
        "null", "true", "on", "1", "-1", "0x_", "1e400", ".nan", ".inf", "9" * 5000, "0x" + "f" * 3900,
        "2026-13-45", "12:99:99",
        "[]",
        "{}",
        "!!python/object/apply:os.system [x]", "!!binary x", "!!int x", "!!timestamp x", "!!set {a, b}",
        "!!omap [a: 1]",
        "&a [*a]", "*a", "&a [x, x]", "[*a, *a, *a]", "<<: *a", "'", '"\\x1b[31m"', "|", ">", "? [a]: b", "{a: {b: c}}",
        "[[[[[[[[[[[[]]]]]]]]]]]]", "!<tag:yaml.org,2002:python/name:os.system> x", "=", "~", "../x", "\x85",
        "%YAML 9.9",
    )

    def mutate(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.2:
            return any_bytes(rng, data)
        lines = data.decode("utf-8", "replace").split("\n")
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = rng.randrange(len(lines))
            kind = rng.randrange(5)
            if kind == 0:
                lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice((*values, *words))}"
            elif kind == 1:
                lines.insert(at, f"{rng.choice(words)}: {rng.choice((*values, *words))}")
            elif kind == 2:
                lines.insert(at, rng.choice((*lines, *values, "---", "...", "- x", "  y: 1")))
            elif kind == 3 and len(lines) > 1:
                del lines[at]
            else:
                lines[at] = " " * rng.choice((1, 2, 4)) + lines[at]
        return "\n".join(lines[:100]).encode("utf-8", "replace")

    return mutate


def safetensors_header(words: Sequence[str]) -> Mutation:
    """Changes of the JSON behind its length, with the length and the file's size mended or not."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        changed = _json(rng, data[8:8 + length], words) if len(data) >= 8 and rng.random() < 0.85 else None
        if changed is None:
            return any_bytes(rng, data)
        changed += b" " * (-len(changed) % 8) if rng.random() < 0.8 else b""
        announced = len(changed) if rng.random() < 0.9 else rng.choice(_COUNTS)
        body = data[8 + length:]
        return announced.to_bytes(8, "little") + changed + (body if rng.random() < 0.8 else body[:-1])

    return mutate


def gguf_fields(rng: random.Random, data: bytes) -> bytes:
    """Changes of a GGUF: a count, a length or a type becomes another; or a file made anew of random fields."""
    if rng.random() < 0.3:
        return _made_gguf(rng)
    raw = bytearray(data)
    if len(raw) < 24 or rng.random() < 0.3:
        return any_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice((8, 16, rng.randrange(4, len(raw)), rng.randrange(4, len(raw)) & ~3))
        form = rng.choice(("Q", "I"))
        value = rng.choice((*_COUNTS, rng.randrange(16)))
        packed = struct.pack("<" + form, value & (2 ** (8 * struct.calcsize(form)) - 1))
        raw[at:at + len(packed)] = packed
    return bytes(raw)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _made_gguf(rng: random.Random) -> bytes:
    fields, tensors, data = [], [], 0
    names = (b"general.architecture", b"general.alignment", b"tokenizer.ggml.tokens", b"a", b"b", b"\xff", b"")
    for _ in range(rng.randrange(5)):
        kind = rng.choice((*range(14), 8, 9, 9))
        head = _text(rng.choice(names)) + struct.pack("<I", kind)
        if kind == 8:
            fields.append(head + _text(rng.choice((b"", b"qwen35", b"\x1b[2J", b"\xfe"))))
        elif kind == 9:
            inner, count = rng.choice((*range(13), 8)), rng.choice((0, 1, 3, 3, 3, *_COUNTS))
            size = struct.calcsize(_SCALAR_FORMS.get(inner, "B"))
            body = b"".join(_text(b"t") for _ in range(min(count, 3))) if inner == 8 else bytes(size * min(count, 3))
            fields.append(head + struct.pack("<IQ", inner, count) + body)
        else:
            size = struct.calcsize(_SCALAR_FORMS.get(kind, "B"))
            fields.append(head + rng.choice((1, 2, 32, 64, 0)).to_bytes(size, "little"))
    for _ in range(rng.randrange(4)):
        dims = [rng.choice((1, 2, 32, 64, 256, *_COUNTS[:2])) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 5)))]
        kind = rng.choice((0, 1, 8, 12, 30, 99))
        offset = data if rng.random() < 0.9 else rng.choice(_COUNTS)
        tensors.append(
            _text(rng.choice((b"x", b"y", b"token_embd.weight"))) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            + struct.pack("<IQ", kind, offset)
        )
        data += 1024
    header = struct.pack("<4sIQQ", b"GGUF", rng.choice((2, 3, 3, 3, 4)), len(tensors), len(fields))
    whole = header + b"".join(fields) + b"".join(tensors)
    return whole + bytes(-len(whole) % 32 + data)
