"""The wizard, by real key presses: arrows and Enter on a piped terminal, and numbered lines with --plain."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from sparktune.setup.ask import PlainAsker, TerminalAsker
from sparktune.setup.demo import make_model, write_smoke
from sparktune.setup.pipeline import Analysis, StageFailed
from sparktune.setup.plan.errors import DataError
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import DatasetReport, Machine, Plan
from sparktune.setup.runstate import RunLock
from sparktune.setup.wizard import LeftWizard, Wizard, check_data

ENTER, DOWN, UP, CTRL_C, CTRL_U, SPACE = "\r", "\x1b[B", "\x1b[A", "\x03", "\x15", " "


def report(path: str) -> DatasetReport:
    lengths = {
        "count": 49, "total": 1778, "mean": 36.0, "p50": 37, "p90": 37, "p99": 38, "max": 38,
        "histogram_edges": [0, 64], "histogram_counts": [49],
    }
    return DatasetReport.model_validate({
        "path": path, "sha256": "0", "bytes": 1, "rows": 50, "kept": 50, "train_examples": 49, "eval_examples": 1,
        "formats": {"messages": 50}, "dropped": {}, "problems": [], "lengths": lengths, "supervised_tokens": 569,
        "supervised_share": 0.3, "multi_turn": 0, "with_system": 0, "with_thinking": 0, "duplicates": 0,
        "eval_leaks": 0, "packing": {128: 0.87, 256: 0.99}, "cache_key": "k",
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

    def __call__(self, plan: Plan) -> Analysis:
        self.plans.append(plan)
        if self.fail:
            raise self.fail.pop(0)
        root = self.folder / f".pending-{len(self.plans)}"
        root.mkdir()
        run = RunDir.from_root(root, self.folder)
        machine = Machine(device="cpu", memory_gib=8, cpu_cores=2, disk_free_gib=9)
        return Analysis(
            run=run, spec=probe(self.model), report=report(str(plan.data)), machine=machine, lock=RunLock(run),
            input_hash="", seconds=0.0,
        )


@pytest.fixture
def analyst(tmp_path: Path, model: str) -> Analyst:
    return Analyst(tmp_path, model)


@pytest.fixture
def make(keys: PipeInput, analyst: Analyst, tmp_path: Path) -> Callable[..., Wizard]:
    def build(flags: dict[str, Any] | None = None, **more: Any) -> Wizard:
        where = {"results": tmp_path / "results", "output": tmp_path / "output"}
        more = {"config": {}, "env": {}, "asker": TerminalAsker(keys, DummyOutput()), **more}
        return Wizard(flags={**where, **(flags or {})}, analyse=analyst, **more)

    return build


def test_enter_all_the_way_takes_the_recommendations(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    wizard = make({"model": model})
    keys.send_text(CTRL_U + data + ENTER)       # data
    keys.send_text(ENTER * 4)                   # mode, epochs, share, MTP head
    keys.send_text(ENTER)                       # GGUF
    keys.send_text(ENTER)                       # name
    keys.send_text(ENTER)                       # review: run it
    plan = wizard.run()
    assert (str(plan.data), plan.mode, plan.num_epochs, plan.mtp, plan.gguf) == (data, "lora", 3.0, "default", ["q8_0"])
    assert plan.name is None
    assert plan.origins["mode"] == "recommendation", "agreeing with a recommendation leaves its reason in place"
    assert plan.lora_r == 16
    assert wizard.analysis is not None


def test_every_question_can_be_answered_otherwise(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    wizard = make()
    keys.send_text(DOWN * 4 + ENTER + CTRL_U + model + ENTER)  # the second catalogue entry is marked: custom
    keys.send_text(data + ENTER)
    keys.send_text(DOWN * 2 + ENTER)                # LoRA is marked: full
    keys.send_text(CTRL_U + "2.5" + ENTER)
    keys.send_text(CTRL_U + "0.1" + ENTER)
    keys.send_text(DOWN + ENTER)                    # default is marked: none
    keys.send_text(DOWN + SPACE + ENTER)            # bf16 too
    keys.send_text("mine" + ENTER)
    keys.send_text(ENTER)
    plan = wizard.run()
    assert (plan.model, plan.mode, plan.num_epochs, plan.eval_split) == (model, "full", 2.5, 0.1)
    assert (plan.mtp, plan.gguf, plan.name) == ("skip", ["q8_0", "bf16"], "mine")
    assert plan.learning_rate == 2e-5, "recommendations follow the answers"


def test_back_and_change(make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, analyst: Analyst) -> None:
    wizard = make({"model": model})
    keys.send_text(data + ENTER)
    keys.send_text(DOWN * 2 + ENTER)                # full
    keys.send_text(CTRL_U + "<" + ENTER)            # back from the epochs
    keys.send_text(UP * 2 + ENTER)                  # LoRA after all
    keys.send_text(CTRL_U + "1" + ENTER)
    keys.send_text(ENTER * 5)
    plan = wizard.run()
    assert (plan.mode, plan.num_epochs) == ("lora", 1.0)
    assert len(analyst.plans) == 1


def test_given_flags_are_not_asked(make: Callable[..., Wizard], keys: PipeInput, model: str, data: str) -> None:
    wizard = make({
        "model": model, "data": data, "mode": "lora", "num_epochs": 1.0, "eval_split": 0.0, "mtp": "skip", "gguf": [],
        "name": "n",
    })
    keys.send_text(ENTER)
    plan = wizard.run()
    assert (plan.name, plan.gguf, plan.origins["name"]) == ("n", [], "flag")


def test_any_line_can_be_edited_in_the_review(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, analyst: Analyst
) -> None:
    wizard = make({
        "model": model, "data": data, "mode": "lora", "num_epochs": 1.0, "mtp": "skip", "gguf": [], "name": "n",
        "lora_r": 8, "eval_split": 0.5,
    })
    # Run, Leave, then the eight asked fields in order: eval_split is the fifth
    keys.send_text(DOWN * 6 + ENTER + CTRL_U + "0.25" + ENTER)
    keys.send_text(DOWN * 4 + ENTER + DOWN * 2 + ENTER)     # mode: full
    keys.send_text(ENTER)
    plan = wizard.run()
    assert (plan.eval_split, plan.mode, plan.lora_r) == (0.25, "full", 8)
    assert plan.learning_rate == 2e-5
    assert [p.eval_split for p in analyst.plans] == [0.5, 0.25], "a changed split means another analysis"


def test_wrong_answers_are_refused_until_they_are_right(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str
) -> None:
    wizard = make({"model": model})
    keys.send_text("/nope" + ENTER + CTRL_U + data + ENTER)
    keys.send_text(ENTER)
    keys.send_text(CTRL_U + "-1" + ENTER + CTRL_U + "2" + ENTER)
    keys.send_text(CTRL_U + "1.5" + ENTER + CTRL_U + "0" + ENTER)
    keys.send_text(ENTER * 2)
    keys.send_text("bad/name" + ENTER + CTRL_U + "good" + ENTER)
    keys.send_text(ENTER)
    plan = wizard.run()
    assert (plan.num_epochs, plan.eval_split, plan.name) == (2.0, 0.0, "good")


def test_data_that_the_analysis_refuses_is_asked_again(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, analyst: Analyst
) -> None:
    analyst.fail = [StageFailed("prepare", 4), DataError("no row is usable")]
    wizard = make({"model": model})
    keys.send_text((data + ENTER) + (ENTER) * 2)
    keys.send_text(ENTER * 7)
    assert wizard.run().mode == "lora"
    assert len(analyst.plans) == 3


def test_refused_data_from_a_flag_ends_the_wizard(
    make: Callable[..., Wizard], model: str, data: str, analyst: Analyst
) -> None:
    analyst.fail = [StageFailed("prepare", 4)]
    with pytest.raises(StageFailed):
        make({"model": model, "data": data}).run()


def test_ctrl_c_keeps_the_answers(
    make: Callable[..., Wizard], keys: PipeInput, model: str, data: str, tmp_path: Path
) -> None:
    wizard = make({"model": model})
    keys.send_text(data + ENTER + ENTER + CTRL_U + "7" + ENTER + CTRL_C)
    with pytest.raises(KeyboardInterrupt):
        wizard.run()
    assert wizard.answers == {"data": data, "mode": "lora", "num_epochs": "7"}
    assert not list(tmp_path.glob(".pending-*")), "the analysis is discarded"


def test_saved_answers_are_offered_again(make: Callable[..., Wizard], keys: PipeInput, model: str, data: str) -> None:
    wizard = make({"model": model}, answers={"data": data, "num_epochs": "7", "gguf": ["bf16"]})
    keys.send_text(ENTER * 8)
    plan = wizard.run()
    assert (str(plan.data), plan.num_epochs, plan.gguf) == (data, 7.0, ["bf16"])


def test_leaving_from_the_review(make: Callable[..., Wizard], keys: PipeInput, model: str, data: str) -> None:
    wizard = make({"model": model, "data": data})
    keys.send_text(ENTER * 6 + DOWN + ENTER)
    with pytest.raises(LeftWizard):
        wizard.run()


def test_plain_questions_are_numbered(make: Callable[..., Wizard], model: str, data: str) -> None:
    screen = io.StringIO()
    answers = io.StringIO(f"6\n{model}\n{data}\n9\n3\n2\n\n\n1,2\n\n1\n")
    wizard = make(asker=PlainAsker(answers, screen))
    plan = wizard.run()
    assert (plan.model, plan.mode, plan.num_epochs, plan.gguf) == (model, "full", 2.0, ["q8_0", "bf16"])
    assert "  1. Qwen/Qwen3.5-0.8B" in screen.getvalue()
    assert "\x1b" not in screen.getvalue()


def test_plain_end_of_input_leaves(make: Callable[..., Wizard]) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(asker=PlainAsker(io.StringIO(""), io.StringIO())).run()


def test_what_is_seen_at_first_sight(tmp_path: Path) -> None:
    good, empty, bad = tmp_path / "g", tmp_path / "e", tmp_path / "b"
    good.write_text("\n" + json.dumps({"text": "x"}) + "\n")
    empty.write_text("\n\n")
    bad.write_text("\nnot json\n")
    assert check_data(str(good)) is None
    for path, words in ((empty, "empty"), (bad, "Line 2"), (tmp_path, "folder"), (tmp_path / "no", "no file")):
        assert words in str(check_data(str(path)))
    assert check_data("")
