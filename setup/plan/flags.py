"""Command-line parsers generated from the schema, so that a flag, its help and its config key cannot drift apart."""

from __future__ import annotations

import argparse
import shlex
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from sparktune.setup.plan.schema import Plan

__all__ = ["add_plan_flags", "flag_of", "given_flags"]

_UNSET = object()


class _Gather(argparse.Action):
    """Collects the values of a flag given several times; argparse's own `append` would append to the default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Adds one value."""
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if given is _UNSET else given), values])


def _inner(annotation: Any) -> Any:
    """Strips `| None` from an annotation."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        rest = [a for a in typing.get_args(annotation) if a is not type(None)]
        return rest[0]
    return annotation


def _flags(name: str, field: FieldInfo, surface: str) -> list[str]:
    extra = typing.cast(dict[str, Any], field.json_schema_extra or {})
    if extra.get("flags") is None or extra.get("surface", "both") not in ("both", surface):
        return []
    return list(extra["flags"]) or ["--" + name.replace("_", "-")]


def flag_of(name: str) -> str:
    """Returns the spelling of field `name` that messages use."""
    extra = typing.cast(dict[str, Any], Plan.model_fields[name].json_schema_extra or {})
    return (extra.get("flags") or ["--" + name.replace("_", "-")])[0]


class _Aliased:
    """Turns a short answer into the value it stands for."""

    def __init__(self, aliases: dict[str, str]) -> None:
        self._aliases = aliases

    def __call__(self, given: str) -> str:
        """Returns the value; what is no alias stays as it is."""
        return self._aliases.get(given, given)


def _list_of_words(text: str) -> list[str]:
    return [] if text == "none" else [w for w in text.split(",") if w]


def add_plan_flags(parser: argparse.ArgumentParser, surface: Literal["run", "train"]) -> None:
    """Adds every flag that `surface` takes. Flags not given leave no trace (see `given_flags`)."""
    for name, field in Plan.model_fields.items():
        names = _flags(name, field, surface)
        if not names:
            continue
        kind = _inner(field.annotation)
        help_text = (field.description or "").replace("%", "%%")
        common: dict[str, Any] = {"dest": name, "default": _UNSET, "help": help_text}
        if kind is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(kind) is Literal:
            aliases: dict[str, str] = typing.cast(dict[str, Any], field.json_schema_extra or {}).get("aliases", {})
            parser.add_argument(*names, choices=typing.get_args(kind), type=_Aliased(aliases), **common)
        elif name == "validator":
            # split as a shell would, and never given to one
            parser.add_argument(*names, type=shlex.split, metavar="COMMAND", **common)
        elif name == "sample_prompts":
            parser.add_argument("--sample-prompt", action=_Gather, metavar="TEXT", **common)
        elif typing.get_origin(kind) is list:
            parser.add_argument(*names, type=_list_of_words, metavar="A,B", **common)
        elif kind is Path:
            parser.add_argument(*names, type=Path, metavar="PATH", **common)
        else:
            parser.add_argument(*names, type=kind, metavar=kind.__name__.upper(), **common)


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Returns only the plan fields that were given on the command line."""
    return {k: v for k, v in vars(args).items() if k in Plan.model_fields and v is not _UNSET}
