"""What a user is sent may be hostile: names, links, tags, pickles, model code, escape codes, HTML, shell words."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.data.read import read_rows
from sparktune.setup.data.tokenizer import load_tokenizer
from sparktune.setup.demo import make_model
from sparktune.setup.plan.config import load_plan, read_config, resolve
from sparktune.setup.plan.errors import DataError, PreflightError, UsageError
from sparktune.setup.plan.flags import flag_of
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.rundir import RunDir, check_run_name
from sparktune.setup.plan.schema import Plan
from sparktune.setup.plan.weights import INDEX_NAME, safetensors_index
from sparktune.setup.progress import PlainDisplay
from sparktune.setup.replay import replay_command
from sparktune.setup.report import write_report
from sparktune.setup.runs import compare, compare_table, describe, runs_in, runs_table
from sparktune.setup.terminal import Terminal
from sparktune.training.checkpoint import CheckpointDamaged, rotate, validate

ROOT = Path(__file__).resolve().parents[1]
PWNED = "PWNED"
SHELL = f"x; touch {PWNED}; $(touch {PWNED}) `touch {PWNED}` | touch {PWNED} & > {PWNED} ' \" \\ \n # *"
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e"
SCRIPT = "<script>document.title='PWNED'</script><img src=x onerror=\"document.title='PWNED'\">"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def fit_for_a_screen(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in text)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "tiny"
    make_model(folder, vocab_size=512)
    return folder


# -- names and links


@pytest.mark.parametrize(
    "name", ["../x", "a/../b", "/etc", "a/b", "..", ".", ".hidden", "-x", "a..b", "a b", "a\n", "a\x00", "$(x)", "a;b",
             "\x1b[2J", "é", "", "x" * 101],
)
def test_a_name_is_one_folder_below_results(name: str) -> None:
    with pytest.raises(UsageError, match="--name") as caught:
        check_run_name(name)
    assert fit_for_a_screen(str(caught.value))


@pytest.mark.parametrize("field", ["results", "output"])
def test_a_link_to_the_root_of_the_file_system_is_no_folder_for_runs(field: str, tmp_path: Path) -> None:
    (tmp_path / "rooted").symlink_to("/")
    with pytest.raises(UsageError, match=f"--{field} .*rooted leads to /, the root of the file system"):
        resolve({field: tmp_path / "rooted"}, {}, {}, {})
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    resolve({field: tmp_path / "elsewhere"}, {}, {}, {})


def test_a_pipe_for_data_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="it is a pipe or a device"):
        next(iter(read_rows(tmp_path / "pipe")))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/hostname", "a/../../x.safetensors", "..", "x\x00"])
def test_an_index_names_files_of_its_folder(shard: str, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(next(tiny.glob("*.safetensors")), tmp_path / "secret.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(PreflightError, match="index"):
        safetensors_index(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "", "./loop.json"])
def test_a_manifest_names_files_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    import hashlib

    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"x")
    files = {}
    for file in ("engine.safetensors", "rng.safetensors", "loop.json"):
        (folder / file).write_bytes(b"x")
        files[file] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 2, "files": files}))
    validate(folder)
    files[name] = files["loop.json"]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 2, "files": files}))
    with pytest.raises(CheckpointDamaged, match="no file of a checkpoint"):
        validate(folder)


def test_a_linked_checkpoint_is_never_emptied(tmp_path: Path) -> None:
    treasure, run = tmp_path / "treasure", tmp_path / "run"
    treasure.mkdir()
    run.mkdir()
    (treasure / "kept").write_text("x")
    (run / "checkpoint-1").symlink_to(treasure)
    for step in (2, 3):
        (run / f"checkpoint-{step}").mkdir()
    rotate(run, 1, set())
    assert (treasure / "kept").read_text() == "x"


def test_an_unnamed_folder_that_is_a_link_is_not_swept(tmp_path: Path) -> None:
    from sparktune.setup.pipeline import _sweep

    treasure, results = tmp_path / "treasure", tmp_path / "results"
    treasure.mkdir()
    results.mkdir()
    (treasure / "kept").write_text("x")
    (results / ".pending-x").symlink_to(treasure)
    _sweep(results)
    assert [p.name for p in treasure.iterdir()] == ["kept"]


# -- YAML, pickle, code of a model


@pytest.mark.parametrize(
    "text", ["seed: !!python/object/apply:os.system ['touch PWNED']", "seed: !!python/name:os.system",
             "model: !<tag:yaml.org,2002:python/object/new:os.system> [x]", "seed: !!binary aGk=", "seed: !!set {a}",
             "model: !!str x", "a: &a [x, x]\nb: &b [*a, *a]", "seed: &a [*a]", "seed: 0x" + "f" * 4000],
)
def test_a_plan_has_no_tags_no_bombs_and_no_numbers_without_end(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(text)
    for reader in (read_config, load_plan):
        with pytest.raises(UsageError) as caught:
            reader(tmp_path / "plan.yaml")
        assert len(str(caught.value)) < 600
    assert not (tmp_path / PWNED).exists()


class _Bomb:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {PWNED}",)


def test_a_pickled_base_is_refused_unopened(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(_Bomb()))
    probe(str(folder))
    load_tokenizer(str(folder))
    with pytest.raises(PreflightError, match="a pickle, which is never opened here"):
        safetensors_index(folder)
    assert not (tmp_path / PWNED).exists()


def test_the_code_of_a_model_is_not_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "coded"
    shutil.copytree(tiny, folder)
    (folder / "code.py").write_text(f"open({str(tmp_path / PWNED)!r}, 'w')\nclass M: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        config["auto_map"] = {"AutoConfig": "code.M", "AutoTokenizer": ["code.M", "code.M"],
                              "AutoModelForCausalLM": "code.M"}
        (folder / name).write_text(json.dumps(config))
    probe(str(folder))
    load_tokenizer(str(folder))
    assert not (tmp_path / PWNED).exists()


def _calls(tree: ast.AST) -> list[tuple[str, dict[str, ast.expr]]]:
    return [(ast.unparse(node.func), {k.arg: k.value for k in node.keywords if k.arg}) for node in ast.walk(tree)
            if isinstance(node, ast.Call)]


def _sources() -> list[Path]:
    rooms = ("setup", "training", "kernels", "mtp", "lab", "docker")
    return [ROOT / "train.py", *(p for room in rooms for p in sorted((ROOT / room).rglob("*.py")))]


def test_our_own_code_loads_no_pickle_runs_no_shell_and_trusts_no_remote_code() -> None:
    wrong = []
    for path in _sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        wrong += [(path.name, m) for m in imported & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}]
        for name, words in _calls(tree):
            said = {key: ast.unparse(value) for key, value in words.items()}
            if (
                name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
                or said.get("trust_remote_code", "False") != "False" or said.get("shell", "False") != "False"
                or said.get("allow_pickle", "False") != "False"
                or (name == "torch.load" and said.get("weights_only") != "True")
            ):
                wrong.append((path.name, name))
    assert wrong == []


# -- shell words in every flag


def test_the_command_that_makes_a_run_again_survives_a_shell(tmp_path: Path) -> None:
    """Every field of the plan that takes a text holds shell words; a shell must hand them on as they are."""
    hostile: dict[str, Any] = {}
    for field, info in Plan.model_fields.items():
        kind = str(info.annotation)
        if field in ("name", "origins", "kernels", "schema_version", "results", "output"):
            continue
        if "Path" in kind:
            hostile[field] = tmp_path / SHELL.replace("/", "_")
        elif "list[str]" in kind:
            hostile[field] = [SHELL.replace(",", "_")]
        elif "Literal" not in kind and "str" in kind:
            hostile[field] = SHELL
    assert {"model", "data", "eval_data", "sample_prompts", "tracker_project", "text_field"} <= set(hostile)
    plan = Plan.model_construct(**{**Plan().model_dump(), **hostile})
    command = replay_command(plan)
    printed = command.replace(command.split(" ")[0], f"{sys.executable} -c 'import sys; print(ascii(sys.argv[1:]))'", 1)
    shown = subprocess.run(["bash", "-c", printed], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    words = ast.literal_eval(shown)
    for field, value in hostile.items():
        if flag_of(field) in command and field != "validator":
            text = str(value[0] if isinstance(value, list) else value)
            assert any(text in word for word in words), field
    assert list(tmp_path.iterdir()) == []


def test_no_flag_of_the_command_line_reaches_a_shell(tmp_path: Path) -> None:
    """One start a flag that takes a text: each ends in a sentence, and none in a command."""
    from sparktune.setup import cli

    (tmp_path / "d.jsonl").write_text("")
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        for field, info in Plan.model_fields.items():
            extra: Any = info.json_schema_extra or {}
            kind = str(info.annotation)
            if extra.get("flags") is None or "Literal" in kind or not ("str" in kind or "Path" in kind):
                continue
            words = ["--non-interactive", "--dry-run", "--backend", "local", "--data", "d.jsonl", "--model", "./none",
                     f"{flag_of(field)}={SHELL}"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stdout", io.StringIO())
                patch.setattr(sys, "stderr", io.StringIO())
                try:
                    code = cli.main(words)
                except SystemExit as left:
                    code = int(left.code or 0)
            assert code in (2, 3, 4), field
    finally:
        os.chdir(before)
    assert list(tmp_path.rglob(PWNED)) == []


# -- the screen and the report


def _run(results: Path) -> RunDir:
    root = results / f"one [bold]{ESCAPES}"
    root.mkdir(parents=True)
    (root / "plan.yaml").write_text(json.dumps({"name": None, "model": f"[red]{ESCAPES}", "output": "/nowhere"}))
    said = f"{ESCAPES} {SCRIPT} [/bold]"
    rows = [{"step": 1, "prompt": said, "answer": said}, {"stage": "after", "prompt": said, "answer": said}]
    (root / "samples.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (root / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}))
    (root / "stages").mkdir()
    events = [{"kind": "start"}, {"kind": "choice", "what": said, "chosen": said, "reason": said},
              {"kind": "message", "level": "warning", "text": said},
              {"kind": "message", "level": "error", "text": said}, {"kind": "end", "ok": False, "seconds": 1.0}]
    (root / "stages" / "train.ndjson").write_text("\n".join(json.dumps(event) for event in events))
    return RunDir.from_root(root, Path("/nowhere"))


def test_no_escape_code_reaches_the_screen(tmp_path: Path) -> None:
    run = _run(tmp_path / "results")
    out = io.StringIO()
    console = Terminal(file=out, width=100, force_terminal=True, color_system=None)
    (found,) = runs_in(tmp_path / "results")
    console.print(runs_table([describe(found)]))
    console.print(compare_table(compare([found, found])))
    display = PlainDisplay(console)
    display.begin("train", 1, 1)
    for line in (run.root / "stages" / "train.ndjson").read_text().splitlines():
        display.event(json.loads(line))
    display.event({"kind": "sample", "step": 1, "prompt": ESCAPES, "answer": ESCAPES})
    display.end("train", 1.0, 1)
    shown = out.getvalue()
    assert "one [bold]" in shown
    assert "\\x1b[2J" in shown
    assert fit_for_a_screen(shown), [c for c in shown if not c.isprintable()]


def test_no_script_of_a_sample_runs_in_the_report(tmp_path: Path) -> None:
    page = write_report(_run(tmp_path / "results").root)
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    assert browser, f"This test opens the report in headless Chromium; install one of {', '.join(CHROMIUM)}."
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-extensions", "--virtual-time-budget=3000"]
    shown = subprocess.run(
        [browser, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout
    assert "&lt;script&gt;" in shown  # the sample is there, as text
    assert "<script" not in shown
    assert "<img" not in shown
    title = shown.partition("<title>")[2].partition("</title>")[0]
    assert title
    assert PWNED not in title
