"""The questions: one for every field of the schema, with its own words, limits and default. Asking, not deciding."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sparktune.setup import strings
from sparktune.setup.ask import BACK, Asker, Option
from sparktune.setup.badges import model_options
from sparktune.setup.cards import show_value
from sparktune.setup.pipeline import check_name_free
from sparktune.setup.plan.errors import SparktuneError, UsageError
from sparktune.setup.plan.flags import flag_of
from sparktune.setup.plan.models import CATALOGUE, probe
from sparktune.setup.plan.schema import Machine, Plan, Recommendation

__all__ = ["Questions", "can_be_asked", "check_data"]

_CUSTOM = "\0custom"


def check_data(typed: str) -> str | None:
    """Returns what is wrong with a data file at first sight, or None. Every row is read later, by the analysis."""
    path = Path(os.path.expanduser(typed))
    if not typed or not path.exists():
        return strings.DATA_MISSING.format(path=typed)
    if not path.is_file():
        return strings.DATA_NOT_FILE.format(path=typed)
    try:
        with path.open("rb") as file:
            if not any(row.strip() for row in file):
                return strings.DATA_EMPTY.format(path=typed)
    except OSError:
        return strings.DATA_UNREADABLE.format(path=typed)
    return None


def _check_model(typed: str) -> str | None:
    try:
        probe(typed)
    except SparktuneError as error:
        return str(error)
    return None


def _literals(name: str) -> list[str] | None:
    """Returns the words a field takes, or None where it takes a text."""
    kind = Plan.model_fields[name].annotation
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
    if kind is bool:
        return ["true", "false"]
    return [str(a) for a in typing.get_args(kind)] if typing.get_origin(kind) is Literal else None


def can_be_asked(name: str) -> bool:
    """Returns whether a field of the plan is a question of the wizard."""
    extra = typing.cast(dict[str, Any], Plan.model_fields[name].json_schema_extra or {})
    return extra.get("flags") is not None and extra.get("surface") != "train"


def _typed(value: Any) -> str:
    """Returns a value as one would type it."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else os.fspath(value) if isinstance(value, Path) else str(value)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Asks for fields of one plan."""

    asker: Asker
    plan: Plan
    """As answered so far; its values are the defaults."""
    recommendations: Sequence[Recommendation]
    machine: Machine
    check: Callable[[str, str], str | None]
    """Takes a field and a typed value, and returns what is wrong with it, or None."""
    boxes: Sequence[str] = ()
    """Other machines that could train too."""

    def ask(self, name: str, back: bool) -> Any:
        """Asks for one field. Returns its value as the config would take it, or BACK."""
        special = {"model": self._ask_model, "data": self._ask_data, "gguf": self._ask_gguf, "name": self._ask_name,
                   "peers": self._ask_peers}
        chosen = {
            "mode": (strings.ASK_MODE, strings.MODES), "mtp": (strings.ASK_MTP, strings.MTPS),
            "dedupe": (strings.ASK_DEDUPE, strings.DEDUPES), "redact_pii": (strings.ASK_REDACT, strings.REDACTS),
        }
        if name in special:
            return special[name](back)
        if name in chosen:
            return self._choose(name, *chosen[name], back)
        return self._ask_field(name, back)

    def _reason(self, name: str) -> str:
        found = [r for r in self.recommendations if r.field == name]
        if not found:
            return ""
        return strings.RECOMMENDED.format(value=show_value(found[0].value), reason=found[0].reason)

    def _choose(self, name: str, question: str, words: Mapping[str, str], back: bool) -> str:
        if reason := self._reason(name):
            self.asker.tell(reason)
        recommended = next((str(r.value) for r in self.recommendations if r.field == name), None)
        options: list[Option] = [(v, t + (f" {strings.MARKED}" if v == recommended else "")) for v, t in words.items()]
        return self.asker.choose(question, options, str(getattr(self.plan, name)).lower(), back)

    def _ask_model(self, back: bool) -> str:
        sizes, about = model_options(self.machine)
        self.asker.tell(about)
        options = [*sizes, (_CUSTOM, strings.MODEL_CUSTOM)]
        default = self.plan.model if self.plan.model in CATALOGUE else _CUSTOM
        while True:
            answer = self.asker.choose(strings.ASK_MODEL, options, default, back)
            if answer != _CUSTOM:
                return answer
            before = "" if self.plan.model in CATALOGUE else self.plan.model
            typed = self.asker.text(strings.ASK_MODEL_CUSTOM, before, _check_model, back=True, paths="folders")
            if typed != BACK:
                return typed
            default = _CUSTOM

    def _ask_data(self, back: bool) -> str:
        default = os.fspath(self.plan.data) if self.plan.data else ""
        typed = self.asker.text(strings.ASK_DATA, default, check_data, back=back, paths="files")
        return typed if typed == BACK else os.path.abspath(Path(os.path.expanduser(typed)))

    def _ask_gguf(self, back: bool) -> Any:
        options: list[Option] = [(v, f"{v}: {t}") for v, t in strings.GGUFS.items()]
        # what a flag asked for stays on offer
        options += [(v, v) for v in self.plan.gguf if v not in strings.GGUFS]
        picked = self.asker.choose_many(strings.ASK_GGUF, options, self.plan.gguf, back)
        return BACK if picked == [BACK] else picked

    def _ask_peers(self, back: bool) -> Any:
        if not self.boxes:
            return self._ask_field("peers", back)
        together = ",".join(self.plan.peers)
        offered = dict.fromkeys([*self.boxes, *self.plan.peers, *([together] if together else [])])
        options: list[Option] = [("none", strings.PEERS_ALONE)]
        options += [(hosts, strings.PEERS_WITH.format(host=hosts.replace(",", ", "))) for hosts in offered]
        while True:
            picked = self.asker.choose(strings.ASK_PEERS, options, together or "none", back)
            if picked == BACK:
                return BACK
            hosts = [] if picked == "none" else picked.split(",")
            why = self.check("peers", picked) if hosts else None
            if why is None:
                return hosts
            self.asker.tell(why)

    def _ask_name(self, back: bool) -> Any:
        def check(typed: str) -> str | None:
            try:
                check_name_free(self.plan.model_copy(update={"name": typed or None}))
            except UsageError as error:
                return str(error)
            return None

        typed = self.asker.text(strings.ASK_NAME, self.plan.name or "", check, back)
        return typed or None

    def _ask_field(self, name: str, back: bool) -> str:
        """Asks for any field of the schema, with the field's own help and limits."""
        questions = {"num_epochs": strings.ASK_EPOCHS, "eval_split": strings.ASK_EVAL}
        about = " ".join((Plan.model_fields[name].description or "").split())
        question = questions.get(name, f"{flag_of(name)}: {about}")
        if reason := self._reason(name):
            self.asker.tell(reason)
        words = _literals(name)
        current = getattr(self.plan, name)
        if words is not None:
            return self.asker.choose(question, [(w, w) for w in words], str(current).lower(), back)

        return self.asker.text(question, _typed(current), partial(self.check, name), back)
