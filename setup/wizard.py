"""The wizard: one state machine over its screens. It ends with a plan that was reviewed line by line.

    machine -> model -> data -> lengths -> plan -> review

A screen returns where to go: forward, back, again, or out. A screen whose answers were all given as flags shows what it
knows and asks nothing; going back passes it by. What the plan is follows from flags, environment, config, saved answers
and recommendations alone (setup/plan/config.py), so a run without a wizard makes the same plan from the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sparktune.setup import strings
from sparktune.setup.ask import BACK, Asker, Option
from sparktune.setup.cards import flaws, outlook_table, plan_pages, report_tables, show_value
from sparktune.setup.machine.check import Check, failures
from sparktune.setup.outlook import Outlook
from sparktune.setup.pipeline import Analysis, StageFailed, decide
from sparktune.setup.plan.config import resolve
from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.flags import flag_of
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.schema import Machine, ModelSpec, Plan, Recommendation
from sparktune.setup.preview import Preview
from sparktune.setup.questions import Questions, can_be_asked
from sparktune.setup.replay import replay_command
from sparktune.setup.runstate import DATA_FIELDS
from sparktune.setup.screens import heading, length_screen, machine_screen, model_card, preview_screen

__all__ = ["SCREENS", "LeftWizard", "Wizard"]

SCREENS = ("machine", "model", "data", "lengths", "plan", "review")
"""The screens in their order; each is a method `_NAME_screen` of the wizard and a title in strings.SCREENS."""
_RUN, _QUIT, _OTHER = "\0run", "\0quit", "\0other"
_QUESTIONS = ("mode", "num_epochs", "eval_split", "mtp", "gguf", "name")
"""Asked one by one where the recommended plan is not taken as it is."""
_ANALYSED = (*DATA_FIELDS, "results", "output")
"""Fields whose change makes the analysis out of date."""
_WHERE = ("results", "output")
_REVIEW_REST = 12
"""Rows that the review needs beside its lines."""
_PLAN_REST = 8
"""Rows that heading, question and options of the plan's screen take."""
_MARGIN = 12
_OPEN = ("default", "saved", "recommendation")
"""Origins of values that a question may still change: nobody has said them in this session."""
Step = Literal["next", "back", "again", "skip"]
"""Where a screen leads; skip: nothing was asked, go on in the direction one came from."""


class LeftWizard(Exception):
    """The user chose to leave."""


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
    machine: Callable[[Plan], Machine]
    """Looks at the machine."""
    checks: Callable[[Plan], list[Check]]
    """The doctor's checks of the machine."""
    previews: Callable[[Plan, ModelSpec], Iterator[Preview]]
    """Rows as training sees them."""
    outlook: Callable[[Plan, Analysis], Outlook]
    """What a complete plan would take, and what stands against it."""
    boxes: Callable[[], list[str]] = list
    """Looks for other machines that could train too."""
    saved: dict[str, Any] = field(default_factory=dict)
    """Answers of an earlier session that was left."""
    answers: dict[str, Any] = field(default_factory=dict)
    """Answers of this session; saved by the caller when the user leaves."""
    analysis: Analysis | None = None
    recommendations: list[Recommendation] = field(default_factory=list)
    _given: dict[str, Any] = field(default_factory=dict)
    """Those of the answers that differ from what they would be without: they count as flags."""
    _analysed: dict[str, Any] | None = None
    _seen: Machine | None = None
    _boxes: list[str] | None = None
    _confirmed: str | None = None
    """The model of unknown architecture that the user agreed to."""

    def plan(self) -> Plan:
        """Returns the plan as answered so far, open values recommended once the data is known."""
        plan = self.asked()
        if self.analysis is not None:
            plan, self.recommendations = decide(plan, self.analysis)
        return plan

    def asked(self) -> Plan:
        """Returns the plan as answered, open values still open: what a run without a wizard starts from."""
        return resolve({**self.flags, **self._given}, self.config, self.env, self.saved)

    def run(self) -> Plan:
        """Goes through the screens and returns the reviewed plan; `analysis` holds what its data is.

        Raises:
            KeyboardInterrupt: Ctrl-C, or the end of the input.
            LeftWizard: the user chose to leave.
            UsageError: flags or config contradict each other.
        """
        self.asker.tell(strings.WELCOME)
        at, direction = 0, 1
        try:
            while at < len(SCREENS):
                name = SCREENS[at]
                self.asker.show(heading(at + 1, len(SCREENS), strings.SCREENS[name]))
                step: Step = getattr(self, f"_{name}_screen")(at > 0)
                if step == "again":
                    continue
                direction = {"next": 1, "back": -1, "skip": direction}[step]
                at += direction
            return self.plan()
        except BaseException:
            if self.analysis is not None:
                self.analysis.discard()
            raise

    def _is_open(self, name: str) -> bool:
        return resolve(self.flags, self.config, self.env, self.saved).origins[name] in _OPEN

    # -- the screens

    def _machine_screen(self, back: bool) -> Step:
        plan = self.asked()
        self._seen = self.machine(plan)
        checks = self.checks(plan)
        self.asker.show(machine_screen(self._seen, checks))
        failed = failures(checks)
        options: list[Option] = [] if failed else [("next", strings.GO_ON)]
        options.append(("again", strings.CHECK_AGAIN))
        if self.saved:
            self.asker.tell(strings.SAVED_ANSWERS.format(
                answers=", ".join(f"{flag_of(n)} {show_value(v)}" for n, v in self.saved.items())
            ))
            options.append(("forget", strings.FORGET_SAVED))
        options.append((_QUIT, strings.LEAVE))
        picked = self.asker.choose(strings.MACHINE_BLOCKED if failed else strings.MACHINE_READY, options, None, back)
        if picked == _QUIT:
            raise LeftWizard
        if picked == "forget":
            self.saved = {}
        return "next" if picked == "next" else "again"

    def _model_screen(self, back: bool) -> Step:
        asked = self._is_open("model")
        if asked and not self.ask("model", back):
            return "back"
        spec = probe(self.asked().model)
        self.asker.show(model_card(spec))
        if spec.native or self._confirmed == spec.source:
            return "next" if asked else "skip"
        options: list[Option] = [("yes", strings.UNKNOWN_TAKE), ("no", strings.UNKNOWN_OTHER)]
        picked = self.asker.choose(strings.ASK_UNKNOWN.format(why=spec.native_reason), options, "no", back)
        if picked == "yes":
            self._confirmed = spec.source
            return "next"
        if asked:
            return "again"
        raise LeftWizard  # a flag named the model: there is nothing else to choose here

    def _data_screen(self, back: bool) -> Step:
        if self._is_open("data") and not self.ask("data", back):
            return "back"
        if not self._read_data():
            return "again"
        assert self.analysis is not None
        self.asker.show(report_tables(self.analysis.report, bars=False))
        if not self._clean():
            return "again" if self._is_open("data") else "back"
        rows = self.previews(self.asked(), self.analysis.spec)
        more = self._preview(rows)
        while True:
            options: list[Option] = [("next", strings.GO_ON)]
            options += [("more", strings.ANOTHER_ROW)] if more else []
            picked = self.asker.choose(strings.ASK_PREVIEW, options, "next", back)
            if picked == BACK:
                return "again" if self._is_open("data") else "back"
            if picked == "next":
                return "next"
            more = self._preview(rows)

    def _clean(self) -> bool:
        """Offers to leave out repeats and to replace personal data, where there are some. Returns False for back."""
        assert self.analysis is not None
        before, kept = self.analysis, dict(self._given)
        for name, found in flaws(before.report).items():
            if (found or name in self._given) and self._is_open(name):
                self.asker.tell(found)
                if not self.ask(name, back=True):
                    self._given = kept
                    return False
        if not self._read_data():
            self._given = kept  # the sentence that says why has been shown
            self._read_data()
        if self.analysis is not before:
            self.asker.show(report_tables(self.analysis.report, bars=False))
        return True

    def _preview(self, rows: Iterator[Preview]) -> bool:
        """Shows the next row. Returns False when there is none."""
        row = next(rows, None)
        if row is None:
            self.asker.tell(strings.NO_MORE_ROWS)
            return False
        self.asker.show(preview_screen(row, self.asker.colours))
        return True

    def _lengths_screen(self, back: bool) -> Step:
        assert self.analysis is not None
        plan = self.asked()
        self.asker.show(length_screen(self.analysis.report, plan.max_seq_length))
        options: list[Option] = [("next", strings.GO_ON)]
        options += [
            (name, f"{strings.CHANGE} {flag_of(name)} ({show_value(getattr(plan, name))})")
            for name in ("max_seq_length", "over_length")
        ]
        picked = self.asker.choose(strings.ASK_LENGTHS, options, "next", back)
        if picked == BACK:
            return "back"
        if picked == "next":
            return "next"
        self._edit(picked)
        return "again"

    def _plan_screen(self, back: bool) -> Step:
        plan, shown = self.plan(), 0
        parts = plan_pages(plan, self.recommendations, self.asker.width, self.asker.height - _PLAN_REST)
        while True:
            self.asker.show(parts[shown])
            options: list[Option] = [("next", strings.TAKE_PLAN), ("ask", strings.ASK_ONE_BY_ONE)]
            after = (shown + 1) % len(parts)
            options += [("more", strings.PLAN_MORE.format(number=after + 1, count=len(parts)))] if after else []
            options += [("more", strings.PLAN_FIRST)] if shown and not after else []
            picked = self.asker.choose(strings.ASK_PLAN, options, "next", back)
            if picked == BACK:
                return "back"
            if picked == "next":
                return "next"
            if picked == "ask":
                self._walk(self._questions())
                return "again"
            shown = after

    def _questions(self) -> tuple[str, ...]:
        """The questions of the plan; with several GPUs, or a second machine, also how many of them train."""
        if self._boxes is None:
            self._boxes = self.boxes()
        more = [("gpus", self._seen is not None and self._seen.gpus > 1),
                ("peers", bool(self._boxes) and self.plan().backend != "local")]
        return (_QUESTIONS[0], *(name for name, offered in more if offered), *_QUESTIONS[1:])

    def _walk(self, names: tuple[str, ...]) -> None:
        """Asks for `names` in order; back goes to the question before, and from the first to the plan."""
        at = 0
        while 0 <= at < len(names):
            at += 1 if self._edit(names[at]) else -1

    def _review_screen(self, back: bool) -> Step:
        """Shows every value that was chosen, by whomever, and lets any of them be changed."""
        assert self.analysis is not None
        plan = self.plan()
        found = self.outlook(plan, self.analysis)
        self.asker.tell(strings.REPLAY.format(command=replay_command(plan)), whole=True)
        self.asker.show(outlook_table(found))
        names = self._reviewed(plan)
        width = max(len(flag_of(n)) for n in names)
        options: list[Option] = [] if found.refusals else [(_RUN, strings.REVIEW_RUN)]
        options += [self._line(name, plan, width) for name in names]
        options += [(_OTHER, strings.REVIEW_OTHER), (_QUIT, strings.REVIEW_QUIT)]
        question = strings.REVIEW_BLOCKED if found.refusals else strings.ASK_REVIEW
        picked = self.asker.choose(question, options, _RUN, back)
        if picked == BACK:
            return "back"
        if picked == _QUIT:
            raise LeftWizard
        if picked == _RUN:
            return "next"
        if picked == _OTHER:
            others = [n for n in Plan.model_fields if n not in names and can_be_asked(n)]
            width = max(len(flag_of(n)) for n in others)
            picked = self.asker.choose(strings.ASK_OTHER, [self._line(n, plan, width) for n in others], None, back=True)
        if picked != BACK:
            self._edit(picked)
        return "again"

    def _reviewed(self, plan: Plan) -> list[str]:
        """Returns the fields of the review: all that somebody chose; on a low screen recommended ones stand apart."""
        reviewed = ("model", "data", *self._questions())
        chosen = [n for n in Plan.model_fields if n not in reviewed and plan.origins.get(n, "default") != "default"]
        if len(reviewed) + len(chosen) + _REVIEW_REST > self.asker.height:
            chosen = [n for n in chosen if plan.origins[n] != "recommendation" and n not in _WHERE]
        return [*reviewed, *chosen]

    def _line(self, name: str, plan: Plan, width: int) -> Option:
        value = getattr(plan, name)
        shown = strings.OPEN_NAME if name == "name" and value is None else show_value(value)
        why = strings.ANSWERED if name in self._given else strings.ORIGINS[plan.origins[name]]
        room = self.asker.width - width - len(why) - _MARGIN
        if len(shown) > room:
            shown = "…" + shown[-max(room - 1, 8):]  # of a path, the end tells most
        return name, [("", f"{flag_of(name):<{width}}  {shown}"), ("class:faint", f"  {why}")]

    # -- the data

    def _read_data(self) -> bool:
        """Analyses the data if that is not done for these answers. Returns False when the data must be asked again."""
        plan = self.asked()
        wanted = plan.model_dump(include=set(_ANALYSED))
        if self.analysis is not None and self._analysed == wanted:
            return True
        if self.analysis is not None:
            self.analysis.discard()
            self.analysis = None
        can_ask_again = self._is_open("data")
        try:
            self.analysis = self.analyse(plan)
        except StageFailed as failure:
            if failure.code == 130 or not can_ask_again:
                raise
        except SparktuneError as error:
            if not can_ask_again:
                raise
            self.asker.tell(str(error))
        else:
            self._analysed = wanted
            return True
        return False

    def _edit(self, name: str) -> bool:
        """Asks for one field; an answer that makes the data unreadable is taken back. Returns False for back."""
        kept = dict(self._given)
        if not self.ask(name, back=True):
            return False
        if name == "model":
            self.asker.show(model_card(probe(self.asked().model)))
        if name in _ANALYSED and self.analysis is not None and not self._read_data():
            self._given = kept  # the sentence that says why has been shown
            self._read_data()
        return True

    # -- questions

    def ask(self, name: str, back: bool) -> bool:
        """Asks for one field and keeps the answer. Returns False for "back"."""
        plan = self.plan()
        questions = Questions(
            asker=self.asker, plan=plan, recommendations=self.recommendations, machine=self._seen or self.machine(plan),
            check=self._objection, boxes=self._boxes or [],
        )
        answer = questions.ask(name, back)
        if answer == BACK:
            return False
        self._keep(name, answer, plan)
        return True

    def _objection(self, name: str, typed: str) -> str | None:
        """Returns what is wrong with a typed value of a field, given all that was said so far."""
        try:
            resolve({**self.flags, **self._given, name: typed or None}, self.config, self.env, self.saved)
        except SparktuneError as error:
            return str(error)
        return None

    def _keep(self, name: str, answer: Any, plan: Plan) -> None:
        """Keeps an answer; agreeing with what is there anyway leaves its origin, and so its reason, alone."""
        self.answers[name] = answer
        if getattr(resolve({name: answer}, {}, {}, {}), name) == getattr(plan, name) and plan.origins[name] in _OPEN:
            self._given.pop(name, None)
        else:
            self._given[name] = answer
