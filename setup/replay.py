"""The command that makes the same run again."""

from __future__ import annotations

import os
import shlex
import typing
from typing import Any, Literal

from sparktune.setup import strings
from sparktune.setup.plan.flags import flag_of
from sparktune.setup.plan.schema import Plan
from sparktune.setup.plan.untrusted import shell_word

__all__ = ["plan_arguments", "replay_arguments", "replay_command"]

_LEFT_OUT = ("name", "resume_from_checkpoint", "static_lora", "wrap_full_ft")
"""A name is taken once it was used; the two selectors are said by --engine and --mode, which are always there."""


def _arguments(field: str, value: Any) -> list[str]:
    flag = flag_of(field)
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if field == "sample_prompts":
        return [f"--sample-prompt={prompt}" for prompt in value]
    if field == "validator":
        return [flag, shlex.join(value)]
    if isinstance(value, list):
        return [flag, ",".join(value) or "none"]
    text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    # --flag=-x: a value that begins with a dash would be read as a flag
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def replay_arguments(plan: Plan) -> list[str]:
    """Returns the arguments after run.sh: every value that differs from its default, whoever chose it.

    A plan holds no tokens or passwords, so neither does the command.
    """
    return ["--non-interactive", *plan_arguments(plan, "run")]


def plan_arguments(plan: Plan, surface: Literal["run", "train"]) -> list[str]:
    """Returns the model and every value that differs from its default, as flags of run.sh or of train.py."""
    words = ["--model", plan.model]
    other = "train" if surface == "run" else "run"
    for field, info in Plan.model_fields.items():
        extra = typing.cast(dict[str, Any], info.json_schema_extra or {})
        if field in _LEFT_OUT or field == "model" or extra.get("flags") is None or extra.get("surface") == other:
            continue
        value = getattr(plan, field)
        if value is not None and value != info.get_default(call_default_factory=True):
            words += _arguments(field, value)
    return words


def replay_command(plan: Plan) -> str:
    """Returns the whole command line, to be shown and pasted: each word quoted for a shell, on one line."""
    return " ".join([strings.run_script(), *map(shell_word, replay_arguments(plan))])
