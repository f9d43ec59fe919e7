"""Rows from files: formats, encodings, and every kind of row that cannot be used."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from sparktune.setup.data import read
from sparktune.setup.data.formats import RowRefused, normalise
from sparktune.setup.data.read import Row, file_facts, read_rows
from sparktune.setup.plan.errors import DataError
from sparktune.setup.plan.schema import RowProblem

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def rows_of(tmp_path, data, text_field="text"):
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    return list(read_rows(path, text_field))


def one(tmp_path, value, **kwargs):
    (row,) = rows_of(tmp_path, json.dumps(value).encode(), **kwargs)
    return row


def pairs(row):
    return [(m["role"], m["content"]) for m in row.messages]


@pytest.mark.parametrize(("value", "kind", "expected"), [
    ({"messages": CHAT}, "messages", [("user", "q"), ("assistant", "a")]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"text": "2"}]}, CHAT[1]]}, "messages",
     [("user", "q2"), ("assistant", "a")]),
    ({"prompt": "q", "completion": " a"}, "prompt_completion", [("user", "q"), ("assistant", " a")]),
    ({"prompt": [CHAT[0]], "completion": [CHAT[1]]}, "prompt_completion", [("user", "q"), ("assistant", "a")]),
    ({"prompt": [CHAT[0]], "completion": "a", "system": "s"}, "prompt_completion",
     [("system", "s"), ("user", "q"), ("assistant", "a")]),
    ({"instruction": "do", "input": "", "output": "done"}, "alpaca", [("user", "do"), ("assistant", "done")]),
    ({"instruction": "do", "input": "it", "output": "done"}, "alpaca", [("user", "do\n\nit"), ("assistant", "done")]),
    ({"instruction": "do", "output": "done", "input": None, "system": "s", "history": [["x", "y"]]}, "alpaca",
     [("system", "s"), ("user", "x"), ("assistant", "y"), ("user", "do"), ("assistant", "done")]),
    ({"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt",
     [("system", "s"), ("user", "q"), ("assistant", "a")]),
    ({"conversations": CHAT}, "messages", [("user", "q"), ("assistant", "a")]),
    ({"messages": [{"role": "developer", "content": "d"}, *CHAT]}, "messages",
     [("system", "d"), ("user", "q"), ("assistant", "a")]),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "developer", "content": "d"}, *CHAT]}, "messages",
     [("system", "s\n\nd"), ("user", "q"), ("assistant", "a")]),
])
def test_formats_become_messages(tmp_path, value, kind, expected):
    row = one(tmp_path, value)
    assert isinstance(row, Row), row
    assert row.format == kind
    assert pairs(row) == expected
    assert row.text is None


def test_text_rows_and_the_text_field(tmp_path):
    row = one(tmp_path, {"text": " plain "})
    assert (row.format, row.text, row.messages) == ("text", " plain ", None)
    assert one(tmp_path, {"body": "b"}, text_field="body").text == "b"
    # A field that the user named wins; the default name does not beat a conversation.
    assert one(tmp_path, {"body": "b", "messages": CHAT}, text_field="body").format == "text"
    assert one(tmp_path, {"text": "b", "messages": CHAT}).format == "messages"


def test_a_file_may_mix_formats_line_ends_blank_lines_and_a_mark(tmp_path):
    chat, text, pair = ({"messages": CHAT}, {"text": "t"}, {"prompt": "q", "completion": "a"})
    lines = [json.dumps(chat), "", "  ", json.dumps(text), "\t", json.dumps(pair)]
    rows = rows_of(tmp_path, b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [(row.line, row.format) for row in rows] == [(1, "messages"), (4, "text"), (6, "prompt_completion")]


def test_what_templates_read_travels_along(tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = one(tmp_path, {"tools": tools, "messages": [
        CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "because"},
        {"role": "tool", "tool_call_id": "1", "name": "f", "content": "2"}, CHAT[1],
    ]})
    assert row.tools == tools
    assert row.messages[1] == {
        "role": "assistant", "content": "", "reasoning_content": "because",
        "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": 1}}}],
    }
    assert row.messages[2] == {"role": "tool", "tool_call_id": "1", "name": "f", "content": "2"}
    row = one(tmp_path, {"tools": json.dumps(tools), "conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "a"},
    ]})
    assert row.tools == tools
    assert [m["role"] for m in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    thinking = one(tmp_path, {"messages": [CHAT[0], {**CHAT[1], "thinking": "hm"}]}).messages[1]
    assert thinking["reasoning_content"] == thinking["thinking"] == "hm"


IMAGE = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(("line", "code", "says"), [
    (b'{"messages": [', "not_json", "column"),
    (b"hello", "not_json", "JSON object"),
    (b"[1, 2]", "not_json", "an array"),
    (b'"text"', "not_json", "a string"),
    (b"17", "not_json", "a number"),
    (b"null", "not_json", "null"),
    (b"[" * 200_000, "not_json", "nested"),
    (b'{"text": ' + b"9" * 5000 + b"}", "not_json", "digits"),
    (b'{"text": "\xff\xfe"}', "not_utf8", "byte 11"),
    (b'{"text": "\\ud83d"}', "not_utf8", "surrogate"),
    (b'{"messages": [{"role": "user", "content": "\\udc00"}, {"role": "assistant", "content": "a"}]}', "not_utf8",
     "surrogate"),
    (b"{}", "empty_row", "empty object"),
    (b'{"text": " \\n"}', "empty_row", "`text` is empty"),
    (b'{"messages": []}', "empty_row", "empty list"),
    (b'{"question": "q", "answer": "a"}', "unknown_format", "question, answer"),
    (b'{"text": 5}', "unknown_format", "a number"),
    (b'{"messages": "hello"}', "unknown_format", "list of messages"),
    (b'{"messages": null}', "unknown_format", "null"),
    (b'{"messages": ["hello"]}', "unknown_format", "message 1"),
    (b'{"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}]}', "unknown_format",
     "message 1"),
    (b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}', "unknown_format",
     "null"),
    (b'{"messages": [{"role": "user", "content": [{"type": "poem"}]}]}', "unknown_format", "content part"),
    (b'{"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}', "unknown_format", "tool call"),
    (b'{"tools": "x", "messages": [{"role": "assistant", "content": "a"}]}', "unknown_format", "`tools`"),
    (b'{"messages": [{"role": "narrator", "content": "x"}]}', "unknown_role", "`narrator`"),
    (b'{"messages": [{"content": "x"}]}', "unknown_role", "no role"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', "no_assistant", "nothing to learn"),
    (b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " \\n "}]}', "empty_assistant",
     "message 2"),
    (b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}', "empty_assistant", "message 2"),
    (b'{"prompt": "x", "completion": ""}', "empty_assistant", "message 2"),
    (json.dumps({"messages": [{"role": "user", "content": IMAGE}, CHAT[1]]}).encode(), "image", "image_url"),
    (b'{"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}', "image", "input_audio"),
    (json.dumps({"messages": CHAT, "images": ["a.png"]}).encode(), "image", "`images`"),
])
def test_rows_that_cannot_be_used_are_named_by_line_and_code(tmp_path, line, code, says):
    good = json.dumps({"messages": CHAT}).encode()
    rows = rows_of(tmp_path, good + b"\n" + line + b"\n" + good)
    assert [type(row) for row in rows] == [Row, RowProblem, Row]
    assert (rows[1].line, rows[1].code) == (2, code)
    assert says in rows[1].text


def test_problems_never_quote_content():
    secret = "the secret"
    for row in ({"messages": [{"role": "user", "content": secret}]}, {"prompt": secret}, {"text": [secret]},
                {"messages": [{"role": "user", "content": {"type": secret}}]} | {"messages": [secret]}):
        with pytest.raises(RowRefused) as refused:
            normalise(row)
        assert secret not in refused.value.text
    with pytest.raises(RowRefused) as refused:
        normalise({"messages": [{"role": "x" * 500 + "\n", "content": "c"}]})
    assert len(refused.value.text) < 200
    assert "\n" not in refused.value.text


def test_a_huge_line_is_refused_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_LINE_BYTES", 100)
    good = json.dumps({"text": "t"}).encode()
    rows = rows_of(tmp_path, b'{"text": "' + b"x" * 1000 + b'"}\n' + good + b"\n" + b"y" * 101)
    assert [(row.line, getattr(row, "code", "ok")) for row in rows] == [(1, "not_json"), (2, "ok"), (3, "not_json")]


@pytest.mark.parametrize(("data", "says"), [
    (b"", "empty"), (b"\n \n\n", "empty"), (b"\xef\xbb\xbf", "empty"),
    ('{"text": "t"}'.encode("utf-16"), "UTF-16"), (b"\x1f\x8b\x08\x00", "gzip"), (b"PAR1xxxx", "Parquet"),
    (b"PK\x03\x04xx", "zip"),
])
def test_files_that_are_no_jsonl_are_named(tmp_path, data, says):
    with pytest.raises(DataError, match=says) as refused:
        rows_of(tmp_path, data)
    assert "data.jsonl" in str(refused.value)
    assert refused.value.exit_code == 4


def test_missing_folders_and_unreadable_files_are_named(tmp_path, monkeypatch):
    for act in (lambda p: list(read_rows(p)), file_facts):
        with pytest.raises(DataError, match=r"nowhere\.jsonl.*no such file"):
            act(tmp_path / "nowhere.jsonl")
        with pytest.raises(DataError, match="folder"):
            act(tmp_path)
    path = tmp_path / "locked.jsonl"
    path.write_text("{}")
    path.chmod(0)
    if os.geteuid() == 0:  # root reads everything: let the open itself refuse
        real = type(path).open

        def refuse(self, *args, **kwargs):
            if self == path:
                raise PermissionError(13, "Permission denied")
            return real(self, *args, **kwargs)

        monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(DataError, match=r"locked\.jsonl.*Permission denied"):
        list(read_rows(path))


def test_digest_knows_equal_conversations(tmp_path):
    a = one(tmp_path, {"messages": CHAT})
    assert a.digest == one(tmp_path, {"prompt": "q", "completion": "a"}).digest
    assert a.digest == one(tmp_path, {"id": 7, "messages": [dict(reversed(m.items())) for m in CHAT]}).digest
    assert a.digest != one(tmp_path, {"prompt": "q ", "completion": "a"}).digest


def test_file_facts(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"a\nb\nc")
    facts = file_facts(path)
    assert (facts.bytes, facts.lines) == (5, 2)
    assert facts.sha256 == hashlib.sha256(b"a\nb\nc").hexdigest()
