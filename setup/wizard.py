"""The wizard: questions only. It ends with a plan that was reviewed line by line; the pipeline does the rest."""

from __future__ import annotations

import json
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparktune.setup import strings
from sparktune.setup.ask import BACK, Asker, Option
from sparktune.setup.cards import show_value
from sparktune.setup.pipeline import Analysis, StageFailed, check_name_free, decide
from sparktune.setup.plan.config import resolve
from sparktune.setup.plan.errors import SparktuneError, UsageError
from sparktune.setup.plan.flags import flag_of
from sparktune.setup.plan.models import CATALOGUE, probe
from sparktune.setup.plan.schema import Plan, Recommendation

__all__ = ["LeftWizard", "Wizard"]

_CUSTOM = "\0custom"
_RUN, _QUIT = "\0run", "\0quit"
_BEFORE_DATA = ("model", "data")
_AFTER_DATA = ("mode", "num_epochs", "eval_split", "mtp", "gguf", "name")
_ANALYSED = (
    "model", "data", "eval_data", "eval_split", "text_field", "thinking", "max_seq_length", "over_length",
    "bad_row_limit", "results", "output",
)
"""Fields whose change makes the analysis out of date."""


class LeftWizard(Exception):
    """The user left on the review screen."""


def check_data(typed: str) -> str | None:
    """Returns what is wrong with a data file at first sight, or None. Every row is read later, by the analysis."""
    path = Path(typed).expanduser()
    if not typed or not path.exists():
        return strings.DATA_MISSING.format(path=typed)
    if not path.is_file():
        return strings.DATA_NOT_FILE.format(path=typed)
    try:
        with path.open("rb") as file:
            number, line = next(((n, row) for n, row in enumerate(file, 1) if row.strip()), (0, b""))
    except OSError:
        return strings.DATA_UNREADABLE.format(path=typed)
    if not number:
        return strings.DATA_EMPTY.format(path=typed)
    try:
        json.loads(line.decode("utf-8-sig"))
    except ValueError:
        return strings.DATA_NOT_JSON.format(path=typed, line=number)
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


@dataclass(kw_only=True)
class Wizard:
    """Asks what is open, shows everything for review, and returns the plan."""

    asker: Asker
    flags: dict[str, Any]
    """Plan fields given on the command line: not asked, but open to change in the review."""
    config: dict[str, Any]
    env: Mapping[str, str]
    analyse: Callable[[Plan], Analysis]
    """Reads the data. May raise StageFailed or SparktuneError, which leads back to the data question."""
    answers: dict[str, Any] = field(default_factory=dict)
    """Answers so far; filled with saved ones by the caller, saved again by it when the user leaves."""
    analysis: Analysis | None = None
    recommendations: list[Recommendation] = field(default_factory=list)
    _given: dict[str, Any] = field(default_factory=dict)
    """Answers of this session: they count as flags. Those of an earlier session are only defaults."""
    _analysed: dict[str, Any] | None = None

    def plan(self) -> Plan:
        """Returns the plan as answered so far, open values recommended once the data is known."""
        plan = resolve({**self.flags, **self._given}, self.config, self.env, {})
        if self.analysis is not None:
            plan, self.recommendations = decide(plan, self.analysis)
        return plan

    def run(self) -> Plan:
        """Asks everything and returns the reviewed plan; `analysis` holds what its data is.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            LeftWizard: the user chose to leave.
            UsageError: flags or config contradict each other.
        """
        self.asker.tell(strings.WELCOME)
        try:
            while True:
                self._walk(_BEFORE_DATA, first=True)
                if self._read_data() and self._walk(_AFTER_DATA, first=False):
                    return self._review()
        except BaseException:
            if self.analysis is not None:
                self.analysis.discard()
            raise

    def _open(self, name: str) -> bool:
        origin = resolve(self.flags, self.config, self.env, {}).origins[name]
        return origin == "default"

    def _walk(self, names: tuple[str, ...], first: bool) -> bool:
        """Asks the open ones of `names` in order. Returns False when the user goes back past the first of them."""
        steps = [n for n in names if self._open(n)]
        at = 0
        while at < len(steps):
            can_go_back = at > 0 or (not first and any(self._open(n) for n in _BEFORE_DATA))
            if self.ask(steps[at], back=can_go_back):
                at += 1
            elif at == 0:
                return False
            else:
                at -= 1
        return True

    def _read_data(self) -> bool:
        """Analyses the data if that is not done for these answers. Returns False when the data must be asked again."""
        plan = resolve({**self.flags, **self._given}, self.config, self.env, {})
        wanted = plan.model_dump(include=set(_ANALYSED))
        if self.analysis is not None and self._analysed == wanted:
            return True
        if self.analysis is not None:
            self.analysis.discard()
            self.analysis = None
        try:
            self.analysis = self.analyse(plan)
        except StageFailed as failure:
            if failure.code == 130 or not any(self._open(n) for n in _BEFORE_DATA):
                raise
        except SparktuneError as error:
            if not any(self._open(n) for n in _BEFORE_DATA):
                raise
            self.asker.tell(str(error))
        else:
            self._analysed = wanted
            return True
        return False

    # -- questions

    def ask(self, name: str, back: bool) -> bool:
        """Asks for one field and keeps the answer. Returns False for "back"."""
        plan = self.plan()
        special = {"model": self._ask_model, "data": self._ask_data, "gguf": self._ask_gguf, "name": self._ask_name}
        chosen = {
            "mode": (strings.ASK_MODE, strings.MODES), "mtp": (strings.ASK_MTP, strings.MTPS),
        }
        if name in special:
            answer: Any = special[name](plan, back)
        elif name in chosen:
            answer = self._choose(name, *chosen[name], plan, back)
        else:
            answer = self._ask_field(name, plan, back)
        if answer == BACK:
            return False
        self._keep(name, answer, plan)
        return True

    def _keep(self, name: str, answer: Any, plan: Plan) -> None:
        """Keeps an answer; agreeing with a recommendation or default leaves its origin, and so its reason, alone."""
        self.answers[name] = answer
        meant = getattr(resolve({name: answer}, {}, {}, {}), name)
        if meant == getattr(plan, name) and plan.origins[name] in ("recommendation", "default"):
            self._given.pop(name, None)
        else:
            self._given[name] = answer

    def _default(self, name: str, plan: Plan) -> Any:
        if name not in self._given and name in self.answers and plan.origins[name] == "default":
            return self.answers[name]
        return getattr(plan, name)

    def _reason(self, name: str) -> str:
        found = [r for r in self.recommendations if r.field == name]
        if not found:
            return ""
        return strings.RECOMMENDED.format(value=show_value(found[0].value), reason=found[0].reason)

    def _choose(self, name: str, question: str, words: Mapping[str, str], plan: Plan, back: bool) -> str:
        if reason := self._reason(name):
            self.asker.tell(reason)
        recommended = next((str(r.value) for r in self.recommendations if r.field == name), None)
        options: list[Option] = [(v, t + (f" {strings.MARKED}" if v == recommended else "")) for v, t in words.items()]
        return self.asker.choose(question, options, str(self._default(name, plan)), back)

    def _ask_model(self, plan: Plan, back: bool) -> str:
        default = str(self._default("model", plan))
        options: list[Option] = [
            (m, f"{m}: {strings.MODEL_NOTES[m]}" if m in strings.MODEL_NOTES else m) for m in CATALOGUE
        ]
        options.append((_CUSTOM, strings.MODEL_CUSTOM))
        answer = self.asker.choose(strings.ASK_MODEL, options, default if default in CATALOGUE else _CUSTOM, back)
        if answer != _CUSTOM:
            return answer
        typed = self.asker.text(
            strings.ASK_MODEL_CUSTOM, "" if default in CATALOGUE else default, _check_model, back=True, path=True
        )
        return self._ask_model(plan, back) if typed == BACK else typed

    def _ask_data(self, plan: Plan, back: bool) -> str:
        default = self._default("data", plan)
        typed = self.asker.text(
            strings.ASK_DATA, os.fspath(default) if default else "", check_data, back=back, path=True
        )
        return typed if typed == BACK else os.path.abspath(Path(typed).expanduser())

    def _ask_gguf(self, plan: Plan, back: bool) -> Any:
        default = self._default("gguf", plan)
        options: list[Option] = [(v, f"{v}: {t}") for v, t in strings.GGUFS.items()]
        # what a flag asked for stays on offer
        options += [(v, v) for v in default if v not in strings.GGUFS]
        picked = self.asker.choose_many(strings.ASK_GGUF, options, default, back)
        return BACK if picked == [BACK] else picked

    def _ask_name(self, plan: Plan, back: bool) -> Any:
        def check(typed: str) -> str | None:
            try:
                check_name_free(plan.model_copy(update={"name": typed or None}))
            except UsageError as error:
                return str(error)
            return None

        typed = self.asker.text(strings.ASK_NAME, str(self._default("name", plan) or ""), check, back)
        return typed or None

    def _ask_field(self, name: str, plan: Plan, back: bool) -> str:
        """Asks for any field of the schema, with the field's own help and limits."""
        questions = {"num_epochs": strings.ASK_EPOCHS, "eval_split": strings.ASK_EVAL}
        about = " ".join((Plan.model_fields[name].description or "").split())
        question = questions.get(name, f"{flag_of(name)}: {about}")
        if reason := self._reason(name):
            self.asker.tell(reason)
        words = _literals(name)
        current = self._default(name, plan)
        if words is not None:
            return self.asker.choose(question, [(w, w) for w in words], str(current).lower(), back)

        def check(typed: str) -> str | None:
            try:
                resolve({**self.flags, **self._given, name: typed or None}, self.config, self.env, {})
            except UsageError as error:
                return str(error)
            return None

        default = "" if current is None else ",".join(map(str, current)) if isinstance(current, list) else (
            f"{current:g}" if isinstance(current, float) else str(current)
        )
        return self.asker.text(question, default, check, back)

    # -- review

    def _review(self) -> Plan:
        """Shows every value that was chosen, by whomever, and lets any of them be changed."""
        asked = (*_BEFORE_DATA, *_AFTER_DATA)
        while True:
            plan = self.plan()
            names = [*asked, *(n for n in Plan.model_fields
                               if n not in asked and plan.origins.get(n, "default") != "default")]
            width = max(len(flag_of(n)) for n in names)
            options: list[Option] = [(_RUN, strings.REVIEW_RUN), (_QUIT, strings.REVIEW_QUIT)]
            for name in names:
                value = getattr(plan, name)
                shown = strings.OPEN_NAME if name == "name" and value is None else show_value(value)
                why: str = plan.origins[name]
                if why == "recommendation":
                    why = next(r.reason for r in self.recommendations if r.field == name)
                why = strings.ANSWERED if name in self._given else why
                options.append((name, f"{flag_of(name):<{width}}  {shown}  ({why})"))
            picked = self.asker.choose(strings.ASK_REVIEW, options, _RUN, back=False)
            if picked == _QUIT:
                raise LeftWizard
            if picked == _RUN:
                return plan
            kept = dict(self._given)
            if self.ask(picked, back=True) and picked in _ANALYSED and not self._read_data():
                self._given = kept  # the sentence that says why has been shown
                self._read_data()
