"""One parsed row into one list of messages or plain text: messages, prompt/completion, alpaca, sharegpt, text.

Roles come out as system, user, assistant and tool. Everything a chat template may read (tool calls, names, reasoning)
travels along; content comes out as a string.
"""

from __future__ import annotations

import json
from typing import Any, Literal

__all__ = ["Format", "RowRefused", "normalise"]

Format = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text"]
Normalised = tuple[Format, list[dict[str, Any]] | None, str | None, list[dict[str, Any]] | None]

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "tool": "tool",
    "function": "tool", "ipython": "tool", "observation": "tool", "tool_response": "tool",
    "function_response": "tool", "function_call": "assistant", "tool_call": "assistant",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CARRIED = ("name", "tool_call_id", *_REASONING)
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_KNOWN = (
    "messages; conversations (from, value); prompt and completion; instruction and output; or a text field "
    "(--text-field)"
)


class RowRefused(Exception):
    """A row cannot be used.

    Args:
        code: a problem code of RowProblem.
        text: what was expected and seen; never the row's content.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def normalise(row: dict[str, Any], text_field: str = "text") -> Normalised:
    """Returns (format, messages or None, text or None, tools or None) of one parsed row.

    Raises:
        RowRefused: the row is in no known format, or in one but unusable.
    """
    if not row:
        raise RowRefused("empty_row", "the row is an empty object.")
    for key in _MEDIA:
        if row.get(key):
            raise RowRefused("image", f"the row has `{_shown(key)}`; images, video and audio are not supported.")
    if text_field != "text" and text_field in row:
        return "text", None, _text(row[text_field], text_field), None
    found = _chat_format(row)
    if found is None:
        if text_field in row:
            return "text", None, _text(row[text_field], text_field), None
        keys = ", ".join(_shown(key) for key in list(row)[:8]) + (", ..." if len(row) > 8 else "")
        raise RowRefused("unknown_format", f"found the keys {keys}; expected {_KNOWN}.")
    kind, raw = found
    messages = _join_leading_system([_message(raw_message, i + 1) for i, raw_message in enumerate(raw)])
    _check_turns(messages)
    return kind, messages, None, _tools(row.get("tools"))


def _chat_format(row: dict[str, Any]) -> tuple[Format, list[Any]] | None:
    """Returns the row's chat format and its raw messages, None if it is not a chat."""
    if "messages" in row:
        return "messages", _list(row["messages"], "messages")
    for key in ("conversations", "conversation"):
        if key in row:
            raw = _list(row[key], key)
            kind: Format = "sharegpt" if any(isinstance(m, dict) and "from" in m for m in raw) else "messages"
            return kind, _system(row) + raw
    if "prompt" in row and "completion" in row:
        return "prompt_completion", (
            _system(row) + _side(row["prompt"], "prompt", "user") + _side(row["completion"], "completion", "assistant")
        )
    if "instruction" in row and "output" in row:
        return "alpaca", _alpaca(row)
    return None


def _alpaca(row: dict[str, Any]) -> list[Any]:
    question = _string(row["instruction"], "instruction")
    extra = _string(row.get("input") or "", "input")
    if extra.strip():
        question = f"{question}\n\n{extra}" if question.strip() else extra
    turns: list[Any] = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowRefused("unknown_format", "`history` should hold [question, answer] pairs.")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [
        *_system(row), *turns, {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]},
    ]


def _system(row: dict[str, Any]) -> list[Any]:
    """A system prompt that stands beside the conversation (sharegpt, alpaca, prompt/completion)."""
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _side(value: Any, key: str, role: str) -> list[Any]:
    """One side of prompt/completion: a string, or messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _list(value, key)


def _list(value: Any, key: str) -> list[Any]:
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, list):
        raise RowRefused("unknown_format", f"`{key}` should be a list of messages; it is {_kind(value)}.")
    if not value:
        raise RowRefused("empty_row", f"`{key}` is an empty list.")
    return value


def _message(raw: Any, number: int) -> dict[str, Any]:
    """Returns one message with role, content (a string) and what the template may read."""
    if not isinstance(raw, dict):
        raise RowRefused("unknown_format", f"message {number} should be an object; it is {_kind(raw)}.")
    given = raw.get("role", raw.get("from"))
    if not isinstance(given, str):
        raise RowRefused("unknown_role", f"message {number} has no role; expected system, user, assistant or tool.")
    role = _ROLES.get(given.strip().lower())
    if role is None:
        raise RowRefused(
            "unknown_role",
            f"message {number} has the role `{_shown(given)}`; expected system, user, assistant or tool.",
        )
    calls = _tool_calls(raw.get("tool_calls") or raw.get("function_call"), number)
    content = _content(raw.get("content", raw.get("value")), number, empty=bool(calls) or role in ("assistant", "tool"))
    if given in ("function_call", "tool_call"):
        calls, content = _tool_calls(_parsed(content), number), ""
    message: dict[str, Any] = {"role": role, "content": content}
    for key in _CARRIED:
        if isinstance(raw.get(key), str):
            message[key] = raw[key]
    reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
    if reasoning is not None:
        message.setdefault("reasoning_content", reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _content(value: Any, number: int, empty: bool) -> str:
    """Returns a message's content as one string; text parts are joined as they stand."""
    if isinstance(value, str):
        return value
    if value is None and empty:
        return ""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowRefused(
            "unknown_format", f"the content of message {number} should be a string or text parts; it is {_kind(value)}."
        )
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and any(word in kind for word in ("image", "video", "audio", "file")):
            raise RowRefused(
                "image", f"message {number} has a part of type `{_shown(kind)}`; only text is supported."
            )
        else:
            raise RowRefused(
                "unknown_format", f"a content part of message {number} should be {{type: text, text: ...}}."
            )
    return "".join(texts)


def _tool_calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Returns tool calls as [{type, function: {name, arguments}, ...}]; arguments given as JSON text are parsed.

    Chat templates expect an object there (transformers' convention); OpenAI's logs hold JSON text.
    """
    if not value:
        return []
    calls = []
    for raw in value if isinstance(value, list) else [value]:
        function = raw.get("function", raw) if isinstance(raw, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowRefused("unknown_format", f"a tool call of message {number} should have a function with a name.")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            parsed = _parsed(arguments) if arguments.strip() else {}
            arguments = parsed if isinstance(parsed, dict) else arguments
        call: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if isinstance(raw.get("id"), str):
            call["id"] = raw["id"]
        calls.append(call)
    return calls


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Returns the row's function schemas; JSON text is parsed."""
    if isinstance(value, str):
        value = _parsed(value) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowRefused("unknown_format", f"`tools` should be a list of JSON schemas; it is {_kind(value)}.")
    return value


def _join_leading_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins the system and developer messages that open a conversation: templates take one system message."""
    count = 0
    while count < len(messages) and messages[count]["role"] == "system":
        count += 1
    if count < 2:
        return messages
    content = "\n\n".join(m["content"] for m in messages[:count] if m["content"].strip())
    return [{"role": "system", "content": content}, *messages[count:]]


def _check_turns(messages: list[dict[str, Any]]) -> None:
    turns = [(i + 1, m) for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise RowRefused("no_assistant", "the conversation has no assistant message, so there is nothing to learn.")
    for number, message in turns:
        if not message["content"].strip() and not message.get("tool_calls"):
            raise RowRefused("empty_assistant", f"message {number}, an assistant's, is empty.")


def _text(value: Any, key: str) -> str:
    text = _string(value, key)
    if not text.strip():
        raise RowRefused("empty_row", f"`{_shown(key)}` is empty.")
    return text


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RowRefused("unknown_format", f"`{_shown(key)}` should be a string; it is {_kind(value)}.")
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def _shown(name: str) -> str:
    """A key or role as messages show it: short, printable."""
    return "".join(c if c.isprintable() else "?" for c in name[:40]) + ("..." if len(name) > 40 else "")
