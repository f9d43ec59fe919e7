"""The pipeline: order, state, skipping, events, failures, signals. Stages here are small scripts, run for real."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from rich.console import Console

from sparktune.setup import pipeline
from sparktune.setup.demo import make_model, write_smoke
from sparktune.setup.machine.backends import LocalBackend
from sparktune.setup.plan.config import load_plan, resolve, save_plan
from sparktune.setup.plan.errors import ExitCode, PreflightError
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import DatasetReport, Plan
from sparktune.setup.runstate import STAGES, RunLock, RunState, outputs_of, stages_of

SCRIPT = '''
import json, os, signal, sys, time
from pathlib import Path
stage, root = sys.argv[1], Path(sys.argv[2])
outputs, control = json.loads(sys.argv[3]), Path(sys.argv[4])
behaviour = json.loads(control.read_text()).get(stage, {})
with (control.parent / "calls").open("a") as calls:
    calls.write(stage + "\\n")
(control.parent / ("env-" + stage)).write_text(json.dumps({"env": dict(os.environ), "cwd": os.getcwd()}))
def emit(kind, **fields):
    path = root / "stages" / (stage + ".ndjson")
    with path.open("a") as out:
        out.write(json.dumps({"time": 0, "stage": stage, "kind": kind, **fields}) + "\\n")
emit("start")
print("log line of", stage)
if behaviour.get("loop"):
    stopped = []
    def handler(*_):
        if behaviour["loop"] == "polite":
            stopped.append(1)
    signal.signal(signal.SIGINT, handler)
    emit("progress", phase=stage, done=1, total=10, unit="steps")
    (control.parent / "ready").touch()
    deadline = time.monotonic() + 90
    while not stopped and time.monotonic() < deadline:
        time.sleep(0.02)
    sys.exit(75 if stopped else 99)
emit("progress", phase=stage, done=10, total=10, unit="steps")
if behaviour.get("error"):
    emit("message", level="error", text=behaviour["error"])
if behaviour.get("code"):
    sys.exit(behaviour["code"])
if behaviour.get("signal"):
    signal.signal(behaviour["signal"], signal.SIG_DFL)
    os.kill(os.getpid(), behaviour["signal"])
for text_path, text in ([] if behaviour.get("nothing") else outputs):
    path = Path(text_path)
    if path.suffix in (".json", ".html", ".jsonl"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    else:
        path.mkdir(parents=True, exist_ok=True)
        (path / "file").write_text(text + behaviour.get("salt", ""))
        (path / "config.json").write_text((Path(sys.argv[5]) / "config.json").read_text())
emit("end", ok=True, seconds=0.0)
'''


def report() -> DatasetReport:
    lengths = {
        "count": 9, "total": 900, "mean": 100.0, "p50": 90, "p90": 120, "p99": 130, "max": 140,
        "histogram_edges": [0, 200], "histogram_counts": [9],
    }
    return DatasetReport.model_validate({
        "path": "d", "sha256": "0", "bytes": 1, "rows": 10, "kept": 10, "train_examples": 9, "eval_examples": 1,
        "formats": {"messages": 10}, "dropped": {}, "problems": [], "lengths": lengths, "supervised_tokens": 400,
        "supervised_share": 0.4, "multi_turn": 0, "with_system": 0, "with_thinking": 0, "duplicates": 0,
        "eval_leaks": 0, "packing": {128: 0.9, 256: 0.95}, "cache_key": "k",
    })


class ScriptedBackend(LocalBackend):
    """Starts SCRIPT in place of each stage, everything else as on this machine: for tests only."""

    name = "scripted"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.control = folder / "control.json"
        self.behave({})

    def behave(self, behaviour: dict) -> None:
        self.control.write_text(json.dumps(behaviour))

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().split() if path.exists() else []

    def command(self, stage: str, run: RunDir) -> list[str]:
        plan = load_plan(run.plan)
        texts = {run.data_report: report().model_dump_json(), run.metrics: '{"step": 1, "loss": 2.5}\n',
                 run.summary: '{"made": "here"}'}
        made = [run.mtp(plan.mtp)] if stage == "mtp" else outputs_of(stage, run, plan)
        outputs = [(str(p), texts.get(p, stage)) for p in made]
        return [sys.executable, "-P", "-c", SCRIPT, stage, str(run.root), json.dumps(outputs), str(self.control),
                plan.model]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptedBackend:
    made = ScriptedBackend(tmp_path)
    monkeypatch.setattr(pipeline, "choose_backend", lambda plan, image: (made, "for this test"))
    monkeypatch.setenv("SPARKTUNE_LORA_R", "3")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return made


@pytest.fixture
def plan(tmp_path: Path, model: Path) -> Plan:
    write_smoke(tmp_path / "d.jsonl")
    return resolve({
        "model": str(model), "data": tmp_path / "d.jsonl", "results": tmp_path / "results",
        "output": tmp_path / "out put", "name": "one",
    }, {}, {}, {})


def run(plan: Plan, **options) -> tuple[int, str]:
    text = io.StringIO()
    code = pipeline.run_pipeline(plan, console=Console(file=text, width=200), plain=True, **options)
    return code, text.getvalue()


def resume(plan: Plan, **options) -> tuple[int, str]:
    text = io.StringIO()
    code = pipeline.resume_pipeline(plan.results / "one", console=Console(file=text, width=200), plain=True, **options)
    return code, text.getvalue()


def test_all_stages_run_once_in_order(plan: Plan, backend: ScriptedBackend, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(plan)
    assert code == 0, said
    assert tuple(backend.calls()) == STAGES
    root = plan.results / "one"
    state = json.loads((root / "state.json").read_text())["stages"]
    assert tuple(state) == STAGES
    assert all(set(s) == {"input", "output", "seconds"} for s in state.values())
    events = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in events if e["kind"] == "end"] == list(STAGES)
    assert "log line of train" in (root / "log.txt").read_text()
    saved = load_plan(root / "plan.yaml")
    assert saved.mode == "lora"
    assert saved.origins["mode"] == "recommendation"
    out = capsys.readouterr().out
    assert "2.5000 -> 2.5000" in out
    assert str(plan.output / "one-gguf") not in said
    for text in (out, said):
        assert "--mode lora" in text, "the replay command is shown before training and at the end"
    assert sorted(p.name for p in plan.results.iterdir()) == ["one"], "nothing without a name is left"


def test_stages_get_a_clean_environment(plan: Plan, backend: ScriptedBackend) -> None:
    run(plan)
    seen = json.loads((backend.folder / "env-train").read_text())
    assert seen["env"]["TOKENIZERS_PARALLELISM"] == "false"
    assert not [k for k in seen["env"] if k.startswith("SPARKTUNE_") or k == "PYTHONPATH"]
    assert Path(seen["cwd"]) == plan.results / "one"


def test_json_prints_the_summary_alone(
    plan: Plan, backend: ScriptedBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(plan, json_out=True)[0] == 0
    assert json.loads(capsys.readouterr().out) == {"made": "here"}


def test_skipped_stages(plan: Plan, backend: ScriptedBackend) -> None:
    code, _ = run(plan.model_copy(update={"mtp": "skip", "gguf": []}))
    assert code == 0
    assert backend.calls() == ["prepare", "train", "merge", "evaluate", "report"]


def test_a_base_without_an_mtp_head_goes_on(plan: Plan, backend: ScriptedBackend) -> None:
    backend.behave({"mtp": {"nothing": True}})
    code, said = run(plan)
    assert code == 0, said
    assert backend.calls() == list(STAGES)
    assert not (plan.output / "one-mtp-default").exists()
    assert resume(plan)[0] == 0
    assert backend.calls() == list(STAGES), "nothing changed, nothing runs"


def test_a_failure_is_explained_and_resumed(plan: Plan, backend: ScriptedBackend) -> None:
    backend.behave({"merge": {"code": 3, "error": "No room for the merged model. Free 3 GiB."}})
    code, said = run(plan)
    assert code == 3
    assert "No room for the merged model" in said
    assert "resume" in said
    assert "log line" not in said, "a sentence that says it all needs no log"
    backend.behave({})
    code, _ = resume(plan)
    assert code == 0
    assert backend.calls() == ["prepare", "train", "merge", "merge", "mtp", "gguf", "evaluate", "report"]


def test_a_crash_shows_the_log(plan: Plan, backend: ScriptedBackend) -> None:
    backend.behave({"train": {"code": 1}})
    code, said = run(plan)
    assert code == 1
    assert "log line of train" in said
    assert "log line of prepare" not in said
    assert str(plan.results / "one" / "log.txt") in said


def test_a_stage_that_leaves_nothing_is_a_failure(plan: Plan, backend: ScriptedBackend) -> None:
    backend.behave({"merge": {"nothing": True}})
    code, said = run(plan)
    assert code == 1
    assert str(plan.output / "one") in said


def test_a_failed_analysis_leaves_no_run(plan: Plan, backend: ScriptedBackend) -> None:
    backend.behave({"prepare": {"code": 4, "error": "line 3 is not JSON"}})
    code, said = run(plan)
    assert code == 4
    assert "line 3 is not JSON" in said
    assert not plan.results.exists()


def test_a_refused_evaluation_leaves_the_plan_as_it_was(plan: Plan, backend: ScriptedBackend) -> None:
    assert run(plan)[0] == 0
    kept = (plan.results / "one" / "plan.yaml").read_bytes()
    for changes, words in (({"baseline": "nope"}, "--baseline nope should name a run"),
                           ({"validator": ["/no/such"]}, "--validator '/no/such' is no program here")):
        code, said = resume(plan, only="evaluate", changes=changes)
        assert (code, words in said) == (2, True), said
        assert (plan.results / "one" / "plan.yaml").read_bytes() == kept, "or a resume would fail for the same reason"
    assert resume(plan)[0] == 0


def test_a_resume_may_say_anew_what_follows_a_bad_step(plan: Plan, backend: ScriptedBackend) -> None:
    backend.behave({"train": {"code": 1, "error": "The loss is nan at step 3."}})
    assert run(plan)[0] == 1
    backend.behave({})
    before = len(backend.calls())
    code, said = resume(plan, changes={"on_bad_step": "skip", "loss_spike": 0.0})
    assert code == 0, said
    saved = load_plan(plan.results / "one" / "plan.yaml")
    assert (saved.on_bad_step, saved.loss_spike, saved.origins["on_bad_step"]) == ("skip", 0.0, "flag")
    assert backend.calls()[before:] == [stage for stage in STAGES if stage != "prepare"], "the tokens are still good"


def test_a_resume_may_ask_for_other_files_of_a_finished_run(
    plan: Plan, backend: ScriptedBackend, tmp_path: Path,
) -> None:
    assert run(plan)[0] == 0
    backend.behave({"gguf": {"salt": "another file"}})
    code, said = resume(plan, changes={"gguf": ["bf16"]})
    assert code == 0, said
    assert backend.calls()[len(STAGES):] == ["gguf", "evaluate", "report"]
    code, said = resume(plan, changes={"mtp_head": str(tmp_path / "no-such-head")})
    assert code == 2
    assert "--mtp-head" in said
    assert load_plan(plan.results / "one" / "plan.yaml").gguf == ["bf16"], "and the plan keeps what was possible"
    assert resume(plan, changes={"mtp_head": plan.model})[0] == 0
    assert "train" not in backend.calls()[len(STAGES):]
    assert "mtp" in backend.calls()[len(STAGES):]


def test_resume_skips_what_is_unchanged_and_repeats_what_is_not(plan: Plan, backend: ScriptedBackend) -> None:
    run(plan)
    before = len(backend.calls())
    assert resume(plan)[0] == 0
    assert len(backend.calls()) == before, "nothing changed, nothing runs"
    (plan.output / "one" / "file").write_text("touched by someone")
    assert resume(plan)[0] == 0
    assert backend.calls()[before:] == ["merge"], "the merge made the same again, so nothing after it has to run"
    (plan.output / "one" / "config.json").unlink()
    backend.behave({"merge": {"salt": "another merge"}})
    before = len(backend.calls())
    assert resume(plan)[0] == 0
    assert backend.calls()[before:] == ["merge", "mtp", "gguf", "evaluate", "report"]
    before = len(backend.calls())
    saved = load_plan(plan.results / "one" / "plan.yaml")
    save_plan(saved.model_copy(update={"gguf": ["bf16"]}), plan.results / "one" / "plan.yaml")
    assert resume(plan)[0] == 0
    assert backend.calls()[before:][0] == "gguf"


def test_changed_data_is_read_again(plan: Plan, backend: ScriptedBackend) -> None:
    run(plan)
    before = len(backend.calls())
    assert plan.data is not None
    with plan.data.open("a") as data:
        data.write("{}\n")
    assert resume(plan)[0] == 0
    assert backend.calls()[before] == "prepare"


def test_evaluate_alone(plan: Plan, backend: ScriptedBackend) -> None:
    run(plan)
    before = len(backend.calls())
    assert resume(plan, only="evaluate")[0] == 0
    assert backend.calls()[before:] == ["evaluate", "report"]


def test_evaluate_before_the_end_is_refused(plan: Plan, backend: ScriptedBackend) -> None:
    backend.behave({"train": {"code": 1}})
    run(plan)
    code, said = resume(plan, only="evaluate")
    assert code == 2
    assert "train" in said


def test_a_taken_name_is_refused_before_any_work(plan: Plan, backend: ScriptedBackend) -> None:
    (plan.output / "one-gguf").mkdir(parents=True)
    code, said = run(plan)
    assert code == 2
    assert "one" in said
    assert "--name" in said
    assert backend.calls() == []


def test_two_pipelines_on_one_run(plan: Plan, backend: ScriptedBackend) -> None:
    run(plan)
    with RunLock(RunDir.from_root(plan.results / "one", plan.output)):
        code, said = resume(plan)
    assert code == 3
    assert "Another process" in said


def test_the_lock_is_exclusive(tmp_path: Path) -> None:
    folder = RunDir.from_root(tmp_path, tmp_path)
    with RunLock(folder), pytest.raises(PreflightError):
        RunLock(folder)
    RunLock(folder).close()


def test_a_damaged_state_is_named(plan: Plan, backend: ScriptedBackend) -> None:
    run(plan)
    (plan.results / "one" / "state.json").write_text("{")
    code, said = resume(plan)
    assert code == 2
    assert "state.json" in said


def test_missing_data_and_model_are_named(plan: Plan, backend: ScriptedBackend, tmp_path: Path) -> None:
    code, said = run(plan.model_copy(update={"data": tmp_path / "nope.jsonl"}))
    assert code == 4
    assert "nope.jsonl" in said
    code, said = run(plan.model_copy(update={"model": str(tmp_path / "nope")}))
    assert code == 2
    assert "nope" in said


def test_an_unwritable_results_folder(plan: Plan, backend: ScriptedBackend, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, said = run(plan.model_copy(update={"results": tmp_path / "file" / "results"}))
    assert code == 3
    assert "--results" in said


def test_leftovers_of_a_killed_start_are_removed(plan: Plan, backend: ScriptedBackend) -> None:
    dead, alive = plan.results / ".pending-dead", plan.results / ".pending-alive"
    dead.mkdir(parents=True)
    alive.mkdir()
    with RunLock(RunDir.from_root(alive, plan.output)):
        assert run(plan)[0] == 0
        assert alive.exists()
    assert not dead.exists()


DRIVER = textwrap.dedent("""
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from rich.console import Console
    import test_pipeline as t
    from sparktune.setup import pipeline
    from sparktune.setup.plan.config import load_plan
    backend = t.ScriptedBackend(Path(sys.argv[2]))
    backend.behave({"train": {"loop": sys.argv[3]}})
    pipeline.choose_backend = lambda plan, image: (backend, "for this test")
    plan = load_plan(Path(sys.argv[2]) / "asked.yaml")
    sys.exit(pipeline.run_pipeline(plan, console=Console(stderr=True, width=200), plain=True))
""")


@pytest.mark.parametrize(("loop", "signals", "code"), [
    ("polite", [signal.SIGINT], ExitCode.STOPPED),
    ("polite", [signal.SIGTERM], ExitCode.STOPPED),
    ("deaf", [signal.SIGINT, signal.SIGINT], ExitCode.INTERRUPTED),
])
def test_signals(plan: Plan, tmp_path: Path, loop: str, signals: list[int], code: int) -> None:
    save_plan(plan, tmp_path / "asked.yaml")
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", DRIVER, str(Path(__file__).parent), str(tmp_path), loop],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "ready").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for number in signals:
            os.kill(process.pid, number)
            time.sleep(0.5)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == code, said
    assert "resume" in said
    state = RunState(RunDir.from_root(plan.results / "one", plan.output))
    assert set(state.stages) == {"prepare"}


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_stage_that_a_signal_meets_before_it_can_answer_is_no_failure(
    plan: Plan, backend: ScriptedBackend, number: int
) -> None:
    backend.behave({"train": {"signal": number}})
    code, said = run(plan)
    assert code == ExitCode.INTERRUPTED
    assert "resume" in said
    assert "repaired" not in said
    backend.behave({})
    assert resume(plan)[0] == 0


class Machines:
    """Stands for choose_backend: notes which other machines were wanted."""

    def __init__(self, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend, self.wanted = backend, []
        monkeypatch.setattr(pipeline, "choose_backend", self)
        monkeypatch.setattr(pipeline, "preflight", lambda plan, *rest: self.wanted.append(plan.peers))

    def __call__(self, plan: Plan, image: object) -> tuple[ScriptedBackend, str]:
        self.wanted.append(plan.peers)
        return self.backend, "for this test"


def test_once_training_is_done_the_other_machines_are_not_needed(
    plan: Plan, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan.model_copy(update={"peers": ["192.168.100.2"]})
    machines = Machines(backend, monkeypatch)
    backend.behave({"merge": {"code": 3, "error": "No room."}})
    assert run(plan)[0] == 3
    assert machines.wanted[-1] == ["192.168.100.2"]
    backend.behave({})
    machines.wanted.clear()
    assert resume(plan)[0] == 0
    assert machines.wanted == [[], []], "checks and stages alike"
    assert backend.calls().count("train") == 1


@pytest.mark.parametrize("what", ["adapter", "data"])
def test_training_that_runs_again_has_its_other_machines(
    plan: Plan, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The adapter was removed, or other rows are there: what decides that it runs decides who takes part."""
    plan = plan.model_copy(update={"peers": ["192.168.100.2"]})
    machines = Machines(backend, monkeypatch)
    assert run(plan)[0] == 0
    if what == "adapter":
        shutil.rmtree(RunDir(name="one", results_root=plan.results, output_root=plan.output).adapter)
    else:
        assert plan.data is not None
        plan.data.write_text(plan.data.read_text() + "\n")
    machines.wanted.clear()
    assert resume(plan)[0] == 0
    assert machines.wanted == [["192.168.100.2"]] * 2
    machines.wanted.clear()
    assert resume(plan, only="evaluate")[0] == 0
    assert machines.wanted == [[], []]


def test_a_second_machine_for_a_run_that_was_begun_without_an_image(
    plan: Plan, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan.model_copy(update={"backend": "local", "gradient_accumulation": 2, "origins": {
        **plan.origins, "gradient_accumulation": "flag"}})
    machines = Machines(backend, monkeypatch)
    backend.behave({"train": {"code": 1}})
    assert run(plan)[0] == 1
    backend.behave({})
    machines.wanted.clear()
    code, said = resume(plan, changes={"peers": ["192.168.100.2"]}, backend="local")
    assert code == 2
    assert "--backend is local (flag)" in said
    assert load_plan(plan.results / "one" / "plan.yaml").peers == []
    code, said = resume(plan, changes={"peers": ["192.168.100.2"]})
    assert code == 0, said
    assert machines.wanted == [["192.168.100.2"]] * 2
    saved = load_plan(plan.results / "one" / "plan.yaml")
    assert (saved.peers, saved.backend) == (["192.168.100.2"], "docker")


def test_a_run_whose_second_machine_is_gone_goes_on_alone(
    plan: Plan, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan.model_copy(update={"peers": ["192.168.100.2"]})
    machines = Machines(backend, monkeypatch)
    backend.behave({"train": {"code": 1}})
    assert run(plan)[0] == 1
    backend.behave({})
    machines.wanted.clear()
    assert resume(plan, changes={"peers": []})[0] == 0
    assert machines.wanted == [[], []]
    assert load_plan(plan.results / "one" / "plan.yaml").peers == []
    assert backend.calls().count("prepare") == 1


def test_stage_lists() -> None:
    assert stages_of(Plan()) == STAGES
    assert "gguf" not in stages_of(Plan(gguf=[]))
    assert "mtp" not in stages_of(Plan(mtp="skip"))
