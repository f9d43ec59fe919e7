"""The wizard, by real key presses: arrows and Enter on a piped terminal, and numbered lines with --plain."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.data_structures import Size
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from rich.text import Text

from sparktune.setup import strings
from sparktune.setup.ask import PlainAsker, TerminalAsker
from sparktune.setup.cards import plan_pages, plan_table
from sparktune.setup.demo import make_model, write_smoke
from sparktune.setup.machine.doctor import Check
from sparktune.setup.outlook import outlook
from sparktune.setup.pipeline import Analysis, StageFailed
from sparktune.setup.plan.errors import DataError
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import DatasetReport, Machine, Plan
from sparktune.setup.preview import Preview, previews, shorten
from sparktune.setup.questions import check_data
from sparktune.setup.runstate import RunLock
from sparktune.setup.wizard import SCREENS, LeftWizard, Wizard

ENTER, DOWN, UP, LEFT, CTRL_C, CTRL_D, CTRL_U, SPACE = (
    "\r", "\x1b[B", "\x1b[A", "\x1b[D", "\x03", "\x04", "\x15", " "
)
MACHINE = Machine(device="cpu", memory_gib=8, cpu_cores=2, disk_free_gib=9)
WELL = [Check(name="python", status="ok", seen="3.11")]


FLAWED: dict[str, Any] = {
    "duplicates": 3, "near_duplicates": 1,
    "findings": {"pii_email": {"rows": 2, "count": 2, "lines": [4, 9]}},
}


def report(path: str, **more: Any) -> DatasetReport:
    lengths = {
        "count": 49, "total": 1778, "mean": 36.0, "p50": 37, "p90": 37, "p99": 38, "max": 38,
        "histogram_edges": [0, 64], "histogram_counts": [49],
    }
    return DatasetReport.model_validate({
        "path": path, "sha256": "0", "bytes": 1, "rows": 50, "kept": 50, "train_examples": 49, "eval_examples": 1,
        "formats": {"messages": 50}, "dropped": {}, "problems": [], "lengths": lengths, "supervised_tokens": 569,
        "supervised_share": 0.3, "multi_turn": 0, "with_system": 0, "with_thinking": 0, "duplicates": 0,
        "eval_leaks": 0, "packing": {128: 0.87, 256: 0.99}, "cache_key": "k", **more,
    })


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("m") / "tiny"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    write_smoke(tmp_path / "d.jsonl")
    return str(tmp_path / "d.jsonl")


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as made:
        yield made


class Analyst:
    """Counts analyses; describes the data without reading it, or fails as told."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        self.plans: list[Plan] = []
        self.fail: list[Exception] = []
        self.flaws: dict[str, Any] = {}

    def __call__(self, plan: Plan) -> Analysis:
        self.plans.append(plan)
        if self.fail:
            raise self.fail.pop(0)
        root = self.folder / f".pending-{len(self.plans)}"
        root.mkdir()
        run = RunDir.from_root(root, self.folder)
        return Analysis(
            run=run, spec=probe(self.model), report=report(str(plan.data), **self.flaws), machine=MACHINE,
            lock=RunLock(run), input_hash="", seconds=0.0,
        )


@pytest.fixture
def analyst(tmp_path: Path, model: str) -> Analyst:
    return Analyst(tmp_path, model)


@pytest.fixture
def make(keys: PipeInput, analyst: Analyst, tmp_path: Path) -> Callable[..., Wizard]:
    def build(flags: dict[str, Any] | None = None, **more: Any) -> Wizard:
        where = {"results": tmp_path / "results", "output": tmp_path / "output"}
        asker = TerminalAsker(keys, DummyOutput(), Console(file=io.StringIO(), width=100))
        more = {"config": {}, "env": {}, "asker": asker, "machine": lambda plan: MACHINE,
                "checks": lambda plan: WELL, "previews": lambda plan, spec: iter(ROWS), "outlook": outlook, **more}
        return Wizard(flags={**where, **(flags or {})}, analyse=analyst, **more)

    return build


ROWS = [
    Preview(line=1, format="messages", parts=[("Q: 1 + 1?", False), ("2", True)], tokens=4, learned=1),
    Preview(line=2, format="messages", parts=[("Q: 2 + 2?", False), ("4", True)], tokens=4, learned=1),
]


def go(*steps: str) -> str:
    """Returns the keys of the screens after the machine's and the model's: data, preview, lengths, plan, review."""
    return "".join(steps)


PREVIEW = LENGTHS = TAKE = RUN = ENTER
ONE_BY_ONE = DOWN + ENTER


def test_enter_all_the_way_takes_the_recommendations(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    wizard = make({"model": model})
    keys.send_text(go(ENTER, data + ENTER, PREVIEW, LENGTHS, TAKE, RUN))
    plan = wizard.run()
    assert (str(plan.data), plan.mode, plan.num_epochs, plan.mtp, plan.gguf) == (data, "lora", 3.0, "default", ["q8_0"])
    assert plan.name is None
    assert plan.origins["mode"] == "recommendation", "agreeing with a recommendation leaves its reason in place"
    assert plan.lora_r == next(r.value for r in wizard.recommendations if r.field == "lora_r")
    assert wizard.analysis is not None


def test_every_question_can_be_answered_otherwise(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    wizard = make()
    keys.send_text(ENTER + DOWN * 4 + ENTER + CTRL_U + model + ENTER)  # the second size is marked: custom
    keys.send_text(data + ENTER + PREVIEW + LENGTHS + ONE_BY_ONE)
    keys.send_text(DOWN * 2 + ENTER)                # LoRA is marked: full
    keys.send_text(CTRL_U + "2.5" + ENTER)
    keys.send_text(CTRL_U + "0.1" + ENTER)
    keys.send_text(DOWN + ENTER)                    # default is marked: none
    keys.send_text(DOWN * list(strings.GGUFS).index("bf16") + SPACE + ENTER)
    keys.send_text("mine" + ENTER)
    keys.send_text(TAKE + RUN)
    plan = wizard.run()
    assert (plan.model, plan.mode, plan.num_epochs, plan.eval_split) == (model, "full", 2.5, 0.1)
    assert (plan.mtp, plan.gguf, plan.name) == ("skip", ["q8_0", "bf16"], "mine")
    assert plan.learning_rate == 2e-5, "recommendations follow the answers"


def test_a_second_machine_is_offered_where_there_is_one(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    wizard = make({"model": model}, boxes=lambda: ["192.168.100.2"])
    keys.send_text(ENTER + data + ENTER + PREVIEW + LENGTHS + ONE_BY_ONE)
    keys.send_text(ENTER)                           # the method as it is
    keys.send_text(DOWN + ENTER)                    # this machine is marked: both
    keys.send_text(ENTER * 5 + TAKE + RUN)
    plan = wizard.run()
    assert plan.peers == ["192.168.100.2"]
    assert plan.processes == 2
    assert "peers" not in make({"model": model})._questions(), "nobody is asked about a machine that is not there"
    assert "peers" not in make({"model": model, "backend": "local"}, boxes=lambda: ["192.168.100.2"])._questions()


def test_a_second_machine_that_contradicts_what_was_said_is_asked_again(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    wizard = make({"model": model, "gradient_accumulation": 1}, boxes=lambda: ["192.168.100.2"])
    keys.send_text(ENTER + data + ENTER + PREVIEW + LENGTHS + ONE_BY_ONE)
    keys.send_text(ENTER)                           # the method as it is
    keys.send_text(DOWN + ENTER)                    # a step of one pack cannot be shared
    keys.send_text(ENTER * 6 + TAKE + RUN)          # this machine alone, then the rest as it is
    plan = wizard.run()
    assert plan.peers == []
    assert "cannot be shared by 2" in wizard.asker._console.file.getvalue()


def test_back_from_every_screen(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, analyst: Analyst
) -> None:
    asker = TerminalAsker(keys, DummyOutput(), Console(file=(seen := io.StringIO()), width=100))
    wizard = make(asker=asker)
    custom = DOWN * 4 + ENTER + model + ENTER
    keys.send_text(ENTER + LEFT)                            # model -> machine
    keys.send_text(ENTER + custom + "<" + ENTER)            # data -> model, where custom is marked now
    keys.send_text(ENTER + ENTER + data + ENTER + LEFT)     # preview -> data
    keys.send_text(ENTER + PREVIEW + LEFT)                  # lengths -> data
    keys.send_text(ENTER + PREVIEW + LENGTHS + LEFT)        # plan -> lengths
    keys.send_text(LENGTHS + TAKE + LEFT)                   # review -> plan
    keys.send_text(ONE_BY_ONE + LEFT)                       # the first question -> plan
    keys.send_text(TAKE + RUN)
    plan = wizard.run()
    assert (plan.model, str(plan.data)) == (model, data)
    assert len(analyst.plans) == 1, "nothing that the data depends on changed"
    lines = [line for line in seen.getvalue().splitlines() if "/6" in line]
    titles = [t for line in lines for t in SCREENS if strings.SCREENS[t] in line]
    assert titles == [
        "machine", "model", "machine", "model", "data", "model", "data", "data", "lengths", "data", "lengths", "plan",
        "lengths", "plan", "review", "plan", "plan", "review",
    ]


def test_back_passes_by_what_a_flag_decided(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    wizard = make({"model": model, "data": data})
    keys.send_text(ENTER + LEFT + ENTER + PREVIEW + LENGTHS + TAKE + RUN)
    assert str(wizard.run().data) == data


def test_questions_go_back_one_by_one(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, analyst: Analyst
) -> None:
    wizard = make({"model": model})
    keys.send_text(ENTER + data + ENTER + PREVIEW + LENGTHS + ONE_BY_ONE)
    keys.send_text(DOWN * 2 + ENTER)                # full
    keys.send_text(CTRL_U + "<" + ENTER)            # back from the epochs
    keys.send_text(UP * 2 + ENTER)                  # LoRA after all
    keys.send_text(CTRL_U + "1" + ENTER)
    keys.send_text(ENTER * 4 + TAKE + RUN)
    plan = wizard.run()
    assert (plan.mode, plan.num_epochs) == ("lora", 1.0)
    assert len(analyst.plans) == 1


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (100, 40), (200, 60)])
def test_a_plan_fits_the_screen_or_is_shown_in_parts(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, columns: int, rows: int
) -> None:
    wizard = make({"model": model, "data": data})
    wizard.analysis = wizard.analyse(wizard.asked())
    plan = wizard.plan()
    room = rows - 8
    parts = plan_pages(plan, wizard.recommendations, columns, room)
    drawn = ["\n".join(text.plain for text in _lines(part, columns)) for part in parts]
    assert all(len(text.splitlines()) <= room for text in drawn)
    assert (len(parts) == 1) == (rows == 60)
    whole = "\n".join(text.plain for text in _lines(plan_table(plan, wizard.recommendations, columns), columns))
    flags = [word for word in whole.split() if word.startswith("--")]
    assert sorted(word for text in drawn for word in text.split() if word.startswith("--")) == sorted(flags)
    wizard.analysis.discard()


def _lines(part: Any, columns: int) -> list[Text]:
    console = Console(file=io.StringIO(), width=columns)
    return [Text("".join(segment.text for segment in line)) for line in console.render_lines(part)]


def test_all_parts_of_a_plan_can_be_seen_on_a_low_screen(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    class Low(DummyOutput):
        def get_size(self) -> Size:
            return Size(rows=24, columns=80)

    asker = TerminalAsker(keys, Low(), Console(file=(seen := io.StringIO()), width=80))
    wizard = make({"model": model, "data": data}, asker=asker)
    more = DOWN * 2 + ENTER
    keys.send_text(ENTER + PREVIEW + LENGTHS + more + TAKE + RUN)
    wizard.run()
    told = seen.getvalue()
    assert "The plan (1 of " in told
    assert "The plan (2 of " in told
    assert "--lora-r" in told


def test_given_flags_are_not_asked(make: Callable[..., Wizard], keys: PipeInput, model: str, data: str) -> None:
    wizard = make({"model": model, "data": data, "mtp": "skip", "gguf": [], "name": "n"})
    keys.send_text(ENTER + PREVIEW + LENGTHS + TAKE + RUN)
    plan = wizard.run()
    assert (plan.name, plan.gguf, plan.origins["name"]) == ("n", [], "flag")


def test_any_line_can_be_edited_in_the_review(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, analyst: Analyst
) -> None:
    wizard = make({
        "model": model, "data": data, "mode": "lora", "num_epochs": 1.0, "mtp": "skip", "gguf": [], "name": "n",
        "lora_r": 8, "eval_split": 0.5,
    })
    keys.send_text(ENTER + PREVIEW + LENGTHS + TAKE)
    # Run, then the eight asked fields in order: eval_split is the fifth
    keys.send_text(DOWN * 5 + ENTER + CTRL_U + "0.25" + ENTER)
    keys.send_text(DOWN * 3 + ENTER + DOWN * 2 + ENTER)     # mode: full
    keys.send_text(UP * 3 + ENTER + ENTER)                  # back, leave, another setting: the first of them
    keys.send_text(CTRL_U + "11" + ENTER + ENTER)
    plan = wizard.run()
    assert (plan.eval_split, plan.mode, plan.lora_r) == (0.25, "full", 8)
    assert plan.learning_rate == 2e-5
    assert [p.eval_split for p in analyst.plans] == [0.5, 0.25], "a changed split means another analysis"
    assert plan.seed == 11


def test_a_plan_that_cannot_run_names_why_and_offers_no_start(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, tmp_path: Path
) -> None:
    (tmp_path / "output" / "taken").mkdir(parents=True)
    asker = TerminalAsker(keys, DummyOutput(), Console(file=(seen := io.StringIO()), width=100))
    wizard = make({"model": model, "data": data, "name": "taken"}, asker=asker)
    keys.send_text(ENTER + PREVIEW + LENGTHS + TAKE)
    keys.send_text(LEFT + TAKE)   # no "run it": nothing but the lines, and back
    keys.send_text(DOWN * 7 + ENTER + CTRL_U + "free" + ENTER + RUN)
    assert wizard.run().name == "free"
    assert "cannot run" in seen.getvalue()
    assert "A run named taken exists" in " ".join(seen.getvalue().split())


def test_wrong_answers_are_refused_until_they_are_right(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    wizard = make({"model": model})
    keys.send_text(ENTER + "/nope" + ENTER + CTRL_U + data + ENTER + PREVIEW + LENGTHS + ONE_BY_ONE)
    keys.send_text(ENTER)
    keys.send_text(CTRL_U + "-1" + ENTER + CTRL_U + "2" + ENTER)
    keys.send_text(CTRL_U + "1.5" + ENTER + CTRL_U + "0" + ENTER)
    keys.send_text(ENTER * 2)
    keys.send_text("bad/name" + ENTER + CTRL_U + "good" + ENTER)
    keys.send_text(TAKE + RUN)
    plan = wizard.run()
    assert (plan.num_epochs, plan.eval_split, plan.name) == (2.0, 0.0, "good")


def test_a_custom_model_is_described_and_an_unknown_one_confirmed(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, tmp_path: Path
) -> None:
    alien = tmp_path / "alien"
    alien.mkdir()
    config = json.loads((Path(model) / "config.json").read_text())["text_config"]
    (alien / "config.json").write_text(json.dumps({**config, "model_type": "alien"}))
    asker = TerminalAsker(keys, DummyOutput(), Console(file=(seen := io.StringIO()), width=200))
    wizard = make({"data": data}, asker=asker)
    keys.send_text(ENTER + DOWN * 4 + ENTER + str(tmp_path / "no") + ENTER)         # refused
    keys.send_text(CTRL_U + str(alien) + ENTER + ENTER)                             # described; No is marked
    keys.send_text(ENTER + CTRL_U + model + ENTER + PREVIEW + LENGTHS + TAKE + RUN)  # custom is marked now
    assert wizard.run().model == model
    told = seen.getvalue()
    assert "alien" in told
    assert "Unsloth only" in told
    assert "million" in told, "the parameter count, from the config alone"


def test_data_that_the_analysis_refuses_is_asked_again(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, analyst: Analyst
) -> None:
    analyst.fail = [StageFailed("prepare", 4), DataError("no row is usable")]
    wizard = make({"model": model})
    again = CTRL_U + data + ENTER
    keys.send_text(ENTER + data + ENTER + again + again + PREVIEW + LENGTHS + TAKE + RUN)
    assert wizard.run().mode == "lora"
    assert len(analyst.plans) == 3


def test_repeats_and_personal_data_can_be_cleaned_away(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, analyst: Analyst
) -> None:
    asker = TerminalAsker(keys, DummyOutput(), Console(file=(seen := io.StringIO()), width=200))
    analyst.flaws = FLAWED
    wizard = make({"model": model}, asker=asker)
    keys.send_text(ENTER + data + ENTER + ENTER + LEFT)             # dedupe: off; back from redact to the data
    keys.send_text(ENTER + DOWN + ENTER + DOWN + ENTER + PREVIEW)   # exact, yes
    keys.send_text(LENGTHS + TAKE + RUN)
    plan = wizard.run()
    assert (plan.dedupe, plan.redact_pii, plan.origins["dedupe"]) == ("exact", True, "flag")
    assert [(p.dedupe, p.redact_pii) for p in analyst.plans] == [("off", False), ("exact", True)], "read once for both"
    assert "3 rows are an earlier one again" in seen.getvalue()
    assert "email in 2 rows" in seen.getvalue()


def test_data_with_flaws_is_left_alone_by_enter_and_by_flags(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, analyst: Analyst
) -> None:
    analyst.flaws = FLAWED
    wizard = make({"model": model})
    keys.send_text(ENTER + data + ENTER + ENTER * 2 + PREVIEW + LENGTHS + TAKE + RUN)
    plan = wizard.run()
    assert (plan.dedupe, plan.redact_pii, plan.origins["dedupe"]) == ("off", False, "default")
    wizard = make({"model": model, "data": data, "dedupe": "near", "redact_pii": False})
    keys.send_text(ENTER + PREVIEW + LENGTHS + TAKE + RUN)  # nothing is asked
    assert wizard.run().dedupe == "near"
    assert len(analyst.plans) == 2


def test_a_cleaning_that_leaves_nothing_is_taken_back(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, analyst: Analyst, monkeypatch: Any
) -> None:
    analyst.flaws = {"duplicates": 49}
    wizard = make({"model": model})
    real = Analyst.__call__

    def refuse(self: Analyst, plan: Plan) -> Analysis:
        self.fail = [DataError("no row is left")] if plan.dedupe == "exact" else []
        return real(self, plan)

    monkeypatch.setattr(Analyst, "__call__", refuse)
    keys.send_text(ENTER + data + ENTER + DOWN + ENTER + PREVIEW + LENGTHS + TAKE + RUN)
    assert wizard.run().dedupe == "off"
    assert wizard.analysis is not None


def test_refused_data_from_a_flag_ends_the_wizard(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, analyst: Analyst
) -> None:
    analyst.fail = [StageFailed("prepare", 4)]
    keys.send_text(ENTER)
    with pytest.raises(StageFailed):
        make({"model": model, "data": data}).run()


def test_a_machine_that_must_be_repaired_goes_no_further(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    found = [[Check(name="disk", status="failed", seen="full", fix="Free some.")], WELL]
    wizard = make({"model": model, "data": data}, checks=lambda plan: found.pop(0))
    keys.send_text(ENTER + ENTER + PREVIEW + LENGTHS + TAKE + RUN)  # the first Enter checks again
    assert wizard.run().mode == "lora"
    assert found == []


BEFORE = {
    "machine": "", "model": ENTER, "custom model": ENTER + DOWN * 4 + ENTER, "data": "{model}", "preview": "{data}",
    "dedupe": "{data}", "redact": "{data}" + ENTER,
    "lengths": "{data}" + PREVIEW, "plan": "{data}" + PREVIEW + LENGTHS,
    "mode": "{data}" + PREVIEW + LENGTHS + ONE_BY_ONE, "epochs": "{data}" + PREVIEW + LENGTHS + ONE_BY_ONE + ENTER,
    "split": "{data}" + PREVIEW + LENGTHS + ONE_BY_ONE + ENTER * 2,
    "mtp": "{data}" + PREVIEW + LENGTHS + ONE_BY_ONE + ENTER * 3,
    "gguf": "{data}" + PREVIEW + LENGTHS + ONE_BY_ONE + ENTER * 4,
    "name": "{data}" + PREVIEW + LENGTHS + ONE_BY_ONE + ENTER * 5,
    "review": "{data}" + PREVIEW + LENGTHS + TAKE,
    "other": "{data}" + PREVIEW + LENGTHS + TAKE + UP * 3 + ENTER,
}
"""Keys that lead to each prompt there is."""


@pytest.mark.parametrize("leave", [CTRL_C, "closed"])
@pytest.mark.parametrize("prompt", BEFORE)
def test_leaving_at_every_prompt_keeps_the_answers(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, tmp_path: Path, prompt: str, leave: str,
    analyst: Analyst,
) -> None:
    analyst.flaws = FLAWED if prompt in ("dedupe", "redact") else {}
    wizard = make()
    to_data = ENTER + DOWN * 4 + ENTER + model + ENTER
    keys.send_text(BEFORE[prompt].format(model=to_data, data=to_data + data + ENTER))
    if leave == CTRL_C:
        keys.send_text(CTRL_C)
    else:
        keys.close()
    with pytest.raises(KeyboardInterrupt):
        wizard.run()
    known = {"model": model, "data": data} if "{data}" in BEFORE[prompt] else (
        {"model": model} if "{model}" in BEFORE[prompt] else {}
    )
    assert {k: v for k, v in wizard.answers.items() if k in ("model", "data")} == known
    assert not list(tmp_path.glob(".pending-*")), "the analysis is discarded"


def test_saved_answers_are_offered_again_and_can_be_forgotten(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    saved = {"data": data, "num_epochs": "7", "gguf": ["bf16"]}
    wizard = make({"model": model}, saved=dict(saved))
    keys.send_text(ENTER * 2 + PREVIEW + LENGTHS + TAKE + RUN)
    plan = wizard.run()
    assert (str(plan.data), plan.num_epochs, plan.gguf) == (data, 7.0, ["bf16"])
    assert plan.origins["num_epochs"] == "saved"
    wizard = make({"model": model}, saved=dict(saved))
    keys.send_text(DOWN * 2 + ENTER + ENTER + data + ENTER + PREVIEW + LENGTHS + TAKE + RUN)
    plan = wizard.run()
    assert (plan.num_epochs, plan.gguf) == (3.0, ["q8_0"])


def test_leaving_from_the_review(make: Callable[..., Wizard], keys: PipeInput, model: str, data: str) -> None:
    wizard = make({"model": model, "data": data})
    keys.send_text(ENTER + PREVIEW + LENGTHS + TAKE + UP * 2 + ENTER)
    with pytest.raises(LeftWizard):
        wizard.run()


def test_plain_questions_are_numbered(make: Callable[..., Wizard], model: str, data: str) -> None:
    screen = io.StringIO()
    skip = list(strings.MTPS).index("skip") + 1
    q8_0, bf16 = (list(strings.GGUFS).index(kind) + 1 for kind in ("q8_0", "bf16"))
    answers = io.StringIO(f"1\n6\n{model}\n{data}\n9\n2\n1\n1\n2\n3\n2\n\n{skip}\n{q8_0},{bf16}\n\n1\n1\n")
    wizard = make(asker=PlainAsker(answers, screen))
    plan = wizard.run()
    assert (plan.model, plan.mode, plan.num_epochs, plan.mtp) == (model, "full", 2.0, "skip")
    assert plan.gguf == ["q8_0", "bf16"]
    assert "  1. Qwen3.5-0.8B" in screen.getvalue()
    assert "\x1b" not in screen.getvalue()
    assert "»2«" in screen.getvalue(), "what is learned stands between marks where there is no colour"


def test_the_preview_marks_what_training_learns(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    asker = TerminalAsker(keys, DummyOutput(), Console(file=(seen := io.StringIO()), width=100, force_terminal=True))
    wizard = make({"model": model, "data": data}, asker=asker, previews=previews)
    keys.send_text(ENTER + DOWN + ENTER + PREVIEW + LENGTHS + TAKE + RUN)
    wizard.run()
    told = seen.getvalue()
    green = "".join(part.split("\x1b[0m")[0] for part in told.split("\x1b[1;32m")[1:])
    assert "2 + 2 = 4" in " ".join(green.split()) or "=" in green
    assert "<|im_start|>user" not in green
    assert "<|im_end|>" in green, "the end-of-turn token is learned"
    rows = list(itertools.islice(previews(wizard.plan(), probe(model)), 3))
    assert [r.line for r in rows] == [1, 2, 3]
    for row in rows:
        text = "".join(part for part, _ in row.parts)
        learned = "".join(part for part, is_learned in row.parts if is_learned)
        assert text.count("<|im_end|>") > learned.count("<|im_end|>") == 1
        assert 0 < row.learned < row.tokens


def test_control_characters_of_the_data_do_not_reach_the_terminal() -> None:
    assert shorten("a\x1b[31mb\x07c\nd") == "a�[31mb�c\nd"
    assert len(shorten("x" * 10_000)) < 400


def test_plain_back(make: Callable[..., Wizard], model: str, data: str) -> None:
    answers = io.StringIO(f"\n6\n{model}\n<\n\n\n{data}\n<\n\n\n<\n\n<\n\n\n")
    # data -> model; preview -> data; plan -> lengths; review -> plan
    wizard = make(asker=PlainAsker(answers, io.StringIO()))
    with pytest.raises(KeyboardInterrupt):
        wizard.run()  # the input ends on the review screen
    assert wizard.answers == {"model": model, "data": data}


def test_plain_end_of_input_leaves(make: Callable[..., Wizard]) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(asker=PlainAsker(io.StringIO(""), io.StringIO())).run()


def test_what_is_seen_at_first_sight(tmp_path: Path) -> None:
    good, empty = tmp_path / "g", tmp_path / "e"
    good.write_text("\n" + json.dumps({"text": "x"}) + "\n")
    empty.write_text("\n\n")
    assert check_data(str(good)) is None
    for path, words in ((empty, "empty"), (tmp_path, "folder"), (tmp_path / "no", "no file")):
        assert words in str(check_data(str(path)))
    assert check_data("")
