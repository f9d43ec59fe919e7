"""The command line of `./run.sh`: one parser generated from the schema, and the checks between commands and flags."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sparktune.setup import strings
from sparktune.setup.cluster import KINDS
from sparktune.setup.machine.docker_backend import ImageOptions
from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.flags import add_plan_flags, flag_of, given_flags
from sparktune.setup.runstate import EVALUATION_FIELDS, RESUME_FIELDS

__all__ = ["COMMANDS", "WITH_RUN", "Arguments", "parse"]

COMMANDS = ("doctor", "analyze", "plan", "resume", "runs", "evaluate", "chat", "push", "diagnose")
WITH_RUN = ("resume", "evaluate", "chat", "push")
_PUSH = ("push_to", "token_file", "public")
_NAMED = {**dict.fromkeys(WITH_RUN, 1), "diagnose": 1, "runs": 8}
"""Command -> how many names it takes at most."""
_WHERE = ("results", "output", "backend")
"""Fields that say where runs are and where they run, which commands on an existing run may be given."""
_ANEW = {"evaluate": EVALUATION_FIELDS, "resume": RESUME_FIELDS}
"""Command -> fields of an existing run's plan that it may be given anew."""
_REBUILD = ("yes", "clean", "no")


class _Parser(argparse.ArgumentParser):
    """argparse, with errors as exceptions and the nearest flag named."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message[0].upper() + message[1:].rstrip(".") + ". See ./run.sh --help.")

    def flag_names(self) -> list[str]:
        """Returns every long flag."""
        return [s for a in self._actions for s in a.option_strings if s.startswith("--")]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What was asked for."""

    command: str
    """A name of COMMANDS, or "run"."""
    run: str | None
    """The run that resume, evaluate and chat work on; what diagnose reads."""
    names: list[str]
    """The runs that `runs` compares."""
    flags: dict[str, Any]
    """Plan fields given on the command line."""
    config: Path | None
    demo: bool
    non_interactive: bool
    dry_run: bool
    json_out: bool
    plain: bool
    yes: bool
    push: tuple[str, ...]
    """What the command push hands on: --push-to and its companions."""
    image: ImageOptions
    """What is wanted of the Docker image."""
    script: str | None
    """What the command plan writes a script for, instead of showing the plan."""
    nodes: int
    """Machines of that script."""


def _make_parser() -> _Parser:
    parser = _Parser(
        prog="./run.sh", usage=strings.USAGE, description=strings.ABOUT, epilog=strings.COMMANDS_HELP,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", help=strings.HELP_COMMAND)
    parser.add_argument("names", nargs="*", metavar="RUN", help=strings.HELP_RUN)
    parser.add_argument("--demo", action="store_true", help=strings.HELP_DEMO)
    parser.add_argument("--config", dest="config_file", type=Path, metavar="FILE", help=strings.HELP_CONFIG)
    parser.add_argument("--non-interactive", action="store_true", help=strings.HELP_NON_INTERACTIVE)
    parser.add_argument("--dry-run", action="store_true", help=strings.HELP_DRY_RUN)
    parser.add_argument("--json", dest="json_out", action="store_true", help=strings.HELP_JSON)
    parser.add_argument("--plain", action="store_true", help=strings.HELP_PLAIN)
    parser.add_argument("--yes", "-y", action="store_true", help=strings.HELP_YES)
    parser.add_argument("--rebuild", nargs="?", const="yes", default="no", choices=_REBUILD,
                        help=strings.HELP_REBUILD)
    parser.add_argument("--dev-mount", action="store_true", help=strings.HELP_DEV_MOUNT)
    parser.add_argument("--as", dest="script", choices=KINDS, help=strings.HELP_AS)
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help=strings.HELP_NODES)
    parser.add_argument("--push-to", metavar="OWNER/NAME", help=strings.HELP_PUSH_TO)
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=strings.HELP_KEY_FILE)
    parser.add_argument("--public", action="store_true", help=strings.HELP_PUBLIC)
    add_plan_flags(parser, "run")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text} should be 1 to 4096")
    return int(text)


def _nearest(word: str, pool: Sequence[str]) -> str:
    return (difflib.get_close_matches(word, pool, n=1, cutoff=0.0) or [pool[0]])[0]


def _push_words(known: argparse.Namespace) -> tuple[str, ...]:
    words = ["--push-to", str(known.push_to)] if known.push_to else []
    words += ["--token-file", str(known.token_file)] if known.token_file else []
    return (*words, *(["--public"] if known.public else []), *(["--yes"] if known.yes else []))


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the command line.

    Raises:
        UsageError: an unknown command or flag (the nearest one is named), a missing run name, flags that the command
            does not take.
    """
    parser = _make_parser()
    # `--rebuild resume RUN`: the command is not the flag's value
    words = [f"{word}=yes" if word == "--rebuild" and after not in _REBUILD else word
             for word, after in zip(argv, [*argv[1:], ""], strict=False)]
    known, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        flag = next((u for u in unknown if u.startswith("-")), unknown[0])
        name = flag.split("=")[0]
        raise UsageError(strings.UNKNOWN_FLAG.format(given=name, nearest=_nearest(name, parser.flag_names())))
    command, names, flags = known.command or "run", known.names, given_flags(known)
    if command not in (*COMMANDS, "run") or (command == "run" and known.command):
        raise UsageError(strings.UNKNOWN_COMMAND.format(given=command, nearest=_nearest(command, COMMANDS)))
    if len(names) > _NAMED.get(command, 0):
        raise UsageError(strings.RUN_UNEXPECTED.format(command=known.command, run=names[_NAMED.get(command, 0)]))
    given = [f for f in _PUSH if getattr(known, f)]
    if given and command != "push":
        raise UsageError(strings.PUSH_ALONE.format(flags=", ".join("--" + f.replace("_", "-") for f in given)))
    if command == "push" and known.push_to is None:
        raise UsageError(strings.PUSH_WHERE)
    if (known.script or known.nodes != 1) and (command != "plan" or not known.script):
        raise UsageError(strings.AS_ALONE)
    if command in (*WITH_RUN, "runs", "diagnose"):
        allowed = (*_WHERE, *_ANEW.get(command, ()))
        refused = [flag_of(f) for f in flags if f not in allowed] + (["--config"] if known.config_file else [])
        if refused:
            anew = ", ".join(map(flag_of, RESUME_FIELDS)) if command == "resume" else ""
            but = strings.FLAGS_OF_RESUME.format(flags=anew) if anew else ""
            raise UsageError(strings.FLAGS_WITH_RUN.format(command=command, flags=", ".join(refused), but=but))
    if known.demo:
        refused = [flag_of(f) for f in flags if f not in (*_WHERE, "peers")]
        refused += (["--config"] if known.config_file else []) + ([command] if command != "run" else [])
        if refused:
            raise UsageError(strings.DEMO_ALONE.format(flags=", ".join(refused)))
    return Arguments(
        command=command, run=names[0] if names else None, names=names, flags=flags,
        config=known.config_file, demo=known.demo, non_interactive=known.non_interactive,
        dry_run=known.dry_run, json_out=known.json_out, plain=known.plain,
        yes=known.yes, push=_push_words(known),
        image=ImageOptions(rebuild=known.rebuild, dev_mount=known.dev_mount), script=known.script, nodes=known.nodes,
    )
