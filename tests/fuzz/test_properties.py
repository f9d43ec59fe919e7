"""Properties of the readers, over what hypothesis can think of."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sparktune.lab.fuzz_targets import refused
from sparktune.setup.data.read import Row, parse_row
from sparktune.setup.plan.config import load_plan, resolve, save_plan
from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.schema import Plan
from sparktune.setup.plan.untrusted import excerpt, json_object, json_rows, printable, without_credentials
from sparktune.setup.plan.weights import safetensors_header
from sparktune.setup.terminal import Terminal, json_text

fast = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
texts = st.text(st.characters(codec="utf-8"), max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "system", "tool", "assistant", "\x1b")) | texts, "content": texts | values},
)
rows = st.fixed_dictionaries({"messages": st.lists(messages, max_size=5)}) | values


@fast
@given(rows)
def test_a_row_is_usable_or_named_with_a_reason_fit_for_a_screen(row: object) -> None:
    parsed = parse_row(7, json.dumps(row).encode())
    if isinstance(parsed, Row):
        assert parsed.messages or (parsed.text or "").strip()
        assert parsed == parse_row(7, json.dumps(row, ensure_ascii=False).encode())
    else:
        assert parsed.line == 7
        assert parsed.text.isprintable()
        assert "\x1b" not in parsed.text


@fast
@given(st.text(max_size=80))
def test_what_is_shown_holds_no_control_character(text: str) -> None:
    shown = printable(text)
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    assert printable(shown) == shown
    assert excerpt(text).isprintable()
    assert str(SparktuneError(text)) == without_credentials(shown)
    assert json.loads(json_text({"a": text})) == {"a": text}
    assert all(c.isprintable() or c == "\n" for c in json_text({"a": text}))


@fast
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_a_console_prints_no_control_character_of_ours(text: str) -> None:
    from io import StringIO

    out = StringIO()
    Terminal(file=out, width=40, force_terminal=True, color_system=None).print(text, markup=False, highlight=False)
    assert all(c.isprintable() or c in "\n\t" for c in out.getvalue())


@fast
@given(st.dictionaries(st.sampled_from(sorted(Plan.model_fields)) | texts, values, max_size=4))
def test_a_plan_file_is_a_plan_or_a_sentence(tmp_path: Path, content: dict[str, object]) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    plan = refused(lambda: load_plan(path))
    if plan is None:
        return
    save_plan(plan, tmp_path / "again.yaml")
    assert load_plan(tmp_path / "again.yaml") == plan


@fast
@given(
    st.floats(0, 1, allow_nan=False), st.integers(1, 10**6), st.lists(texts.map(str.strip).filter(bool), max_size=3),
)
def test_a_plan_comes_back_as_it_was_saved(tmp_path: Path, share: float, length: int, prompts: list[str]) -> None:
    try:
        plan = resolve({"lora_dropout": share, "max_seq_length": length, "sample_prompts": prompts}, {}, {}, {})
    except SparktuneError:
        return
    save_plan(plan, tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml") == plan


shapes = st.lists(st.integers(0, 5), max_size=3)


@fast
@given(st.dictionaries(texts.filter(lambda n: n != "__metadata__"), shapes, max_size=4), st.integers(-9, 9))
def test_a_safetensors_header_is_what_the_library_reads(
    tmp_path: Path, tensors: dict[str, list[int]], off: int
) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(max(end + off, 0)))
    if end and off and end + off >= 0:
        with pytest.raises(SparktuneError):
            safetensors_header(path)
    elif off == 0:
        entries = safetensors_header(path)
        with safe_open(path, framework="numpy") as file:
            assert set(file.keys()) == set(entries)
            assert {n: tuple(file.get_slice(n).get_shape()) for n in entries} == {
                n: e.shape for n, e in entries.items()}


@fast
@given(st.lists(values, max_size=4), st.binary(max_size=20))
def test_damaged_lines_are_counted_and_the_others_read(tmp_path: Path, lines: list[object], noise: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(json.dumps(line).encode() for line in lines) + b"\n{" + noise.replace(b"\n", b""))
    found, damaged = json_rows(path)
    assert damaged >= 1
    assert len(found) + damaged <= len(lines) + 1


@fast
@given(st.binary(max_size=60))
def test_json_from_elsewhere_is_an_object_or_a_reason(raw: bytes) -> None:
    try:
        value = json_object(raw)
    except ValueError:
        return
    assert isinstance(value, dict)
