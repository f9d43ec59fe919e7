"""The demo's model, tokenizer and corpora."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from sparktune.setup import demo, demo_pretrain
from sparktune.setup.arguments import parse
from sparktune.setup.demo import (
    CORPORA,
    MARKER_FILE,
    make_model,
    plan_for,
    run_demo,
    verdict,
    write_smoke,
    write_stdlib,
)
from sparktune.setup.demo_corpus import smoke_rows, stdlib_rows
from sparktune.setup.demo_model import is_made_as
from sparktune.setup.demo_tokenizer import PRETOKENIZE_REGEX
from sparktune.setup.plan.config import resolve
from sparktune.setup.plan.errors import SparktuneError, UsageError
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path):
    return transformers.AutoTokenizer.from_pretrained(model_dir)


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def test_pretrained_knows_which_token_follows_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_pretrain, "_STEPS", 12)  # a fifth of the real thing
    monkeypatch.setattr(demo_pretrain, "_CONTEXTS", 256)
    losses = []
    for pretrained in (False, True):
        folder = make_model(tmp_path / str(pretrained), vocab_size=512, pretrained=pretrained)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = tokenizer("\n\nReturn a list of the names of the files in the directory.", return_tensors="pt").input_ids
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    assert losses[1] < losses[0] - 1.0, losses
    assert not is_made_as(tmp_path / "True", vocab_size=512)
    assert is_made_as(tmp_path / "True", vocab_size=512, pretrained=True)
    with pytest.raises(ValueError, match="tied embeddings"):
        make_model(tmp_path / "x", tied=False, pretrained=True)


def test_both_classes_load_every_tensor(model_dir: Path) -> None:
    logits = []
    for cls in (transformers.AutoModelForCausalLM, transformers.Qwen3_5ForConditionalGeneration):
        model, info = cls.from_pretrained(model_dir, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        with torch.no_grad():
            logits.append(model(torch.arange(40, 60)[None]).logits.float())
    assert torch.isfinite(logits[0]).all()
    assert logits[0].std() > 0.05
    torch.testing.assert_close(logits[0], logits[1])


def test_layout_is_the_multimodal_one(model_dir: Path) -> None:
    names = set(_stored(model_dir))
    config = json.loads((model_dir / "config.json").read_text())
    assert sum(n.startswith("mtp.") for n in names) == 15
    assert any(n.startswith("model.visual.blocks.0.") for n in names)
    assert "lm_head.weight" not in names
    assert "model.language_model.embed_tokens.weight" in names
    text = config["text_config"]
    assert text["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert text["linear_num_value_heads"] == 2 * text["linear_num_key_heads"] > 2
    assert text["vocab_size"] % 128 == 0


def test_input_widths_fit_k_quants(model_dir: Path) -> None:
    wide = {n: t for n, t in _stored(model_dir).items() if t.ndim == 2 and ".visual." not in n}
    assert wide
    assert all(t.shape[1] % 256 == 0 for t in wide.values()), {n: t.shape for n, t in wide.items()}


def test_single_file_and_untied(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", sharded=False, tied=False, vocab_size=512)
    assert (folder / "model.safetensors").is_file()
    assert not (folder / "model.safetensors.index.json").exists()
    tensors = _stored(folder)
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.language_model.embed_tokens.weight"])
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(model.lm_head.weight.detach(), tensors["lm_head.weight"])


def test_same_arguments_same_bytes_and_kept(tmp_path: Path) -> None:
    one, two = (make_model(tmp_path / n, vocab_size=512) for n in "ab")
    for file in sorted(p.name for p in one.iterdir()):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    before = (one / MARKER_FILE).stat().st_mtime_ns
    assert make_model(one, vocab_size=512) == one
    assert (one / MARKER_FILE).stat().st_mtime_ns == before


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not a demo model"):
        make_model(tmp_path / "m", vocab_size=512)
    assert (tmp_path / "m" / "mine.txt").read_text() == "keep"


def test_nothing_is_left_of_a_failed_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_model(tmp_path / "m", vocab_size=512)
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_keeps_the_regex_and_nfc(tokenizer) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    patterns = [p["pattern"]["Regex"] for p in backend["pre_tokenizer"]["pretokenizers"] if p["type"] == "Split"]
    assert patterns == [PRETOKENIZE_REGEX]
    assert r"\p{M}" in PRETOKENIZE_REGEX
    assert backend["normalizer"]["type"] == "NFC"
    # A combining mark stays with its letter; Qwen2's regex would split it off.
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("नमस्ते")
    assert len(words) == 1


@pytest.mark.parametrize(
    "text",
    ["17 + 17?", "naïve façade", "  two\n\n\nlines\t", "日本語 🎉 مرحبا", "x" * 99, "don't\r\nstop", "\x00\x7f"],
)
def test_tokenizer_round_trip(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_one_id_and_end_the_turn(tokenizer) -> None:
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"):
        assert len(tokenizer(token).input_ids) == 1, token
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def _render(tokenizer, messages: list[dict], **options: object) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_template_thinking(tokenizer) -> None:
    ask = [{"role": "user", "content": "q"}]
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert _render(tokenizer, ask, add_generation_prompt=True) == head + "<think>\n\n</think>\n\n"
    assert _render(tokenizer, ask, add_generation_prompt=True, enable_thinking=True) == head + "<think>\n"
    old = {"role": "assistant", "content": "<think>\nold thought\n</think>\n\nold"}
    new = {"role": "assistant", "content": "new", "reasoning_content": "why"}
    text = _render(tokenizer, [*ask, old, *ask, new])
    assert "old thought" not in text
    assert "assistant\nold<|im_end|>" in text
    assert text.endswith("assistant\n<think>\nwhy\n</think>\n\nnew<|im_end|>\n")


def test_template_refuses(tokenizer) -> None:
    user, system = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}
    assert _render(tokenizer, [system, user]).startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user")
    for bad, reason in (([user, system], "first"), ([system], "user message"),
                        ([user, {"role": "robot", "content": "x"}], "robot")):
        with pytest.raises(Exception, match=reason):
            _render(tokenizer, bad)


def test_template_tools(tokenizer) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    text = _render(tokenizer, [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "done"},
    ], tools=[tool])
    assert "<tools>\n" in text
    assert '"name": "add"' in text
    assert text.count("<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\ntwo\n") == 2
    assert "user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>" in text


def test_smoke_corpus(tmp_path: Path) -> None:
    assert write_smoke(tmp_path / "smoke.jsonl") == 50
    rows = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    assert rows == smoke_rows()
    assert rows[16]["messages"] == [{"role": "user", "content": "What is 17 + 17?"},
                                    {"role": "assistant", "content": "17 + 17 = 34."}]


def test_stdlib_corpus(tmp_path: Path, tokenizer) -> None:
    count = write_stdlib(tmp_path / "stdlib.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "stdlib.jsonl").read_text(encoding="utf-8").splitlines()]
    assert count == len(rows) > 3000
    first = {r["messages"][0]["content"]: r for r in rows}
    assert "path" in first["What does `os.path.join` do?"]["messages"][1]["content"]
    assert sum(sum(m["role"] == "user" for m in r["messages"]) > 1 for r in rows) > 80
    assert 0.10 < sum(r["messages"][0]["role"] == "system" for r in rows) / count < 0.25
    assert all(m["content"].strip() for r in rows for m in r["messages"])
    lengths = sorted(
        sum(len(i) for i in tokenizer([m["content"] for m in r["messages"]]).input_ids) for r in rows
    )
    # A long tail: the 99th percentile is over ten times the median.
    assert lengths[int(0.99 * count)] > 10 * lengths[count // 2]


def test_stdlib_rows_never_run_the_sources(tmp_path: Path) -> None:
    (tmp_path / "bomb.py").write_text(
        '"""A module."""\nraise SystemExit("ran")\n'
        'if True:\n    def f():\n        """Does f."""\nelse:\n    def f():\n        """Does another f."""\n'
        'class C:\n    """A class."""\n    def m(self):\n        """Does m."""\n'
        '    def _p(self):\n        """Hidden."""\n'
    )
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "_private.py").write_text('"""No."""')
    rows = stdlib_rows(tmp_path)
    asked = {r["messages"][-2]["content"]: r["messages"][-1]["content"] for r in rows}
    assert asked["What is the module `bomb` for?"] == "A module."
    assert asked["What does `bomb.f` do?"] == "Does f."
    assert len(rows) in (3, 4)


def test_stdlib_limit_is_spread(tmp_path: Path) -> None:
    assert write_stdlib(tmp_path / "some.jsonl", limit=100) == 100
    rows = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == stdlib_rows()[0]
    assert rows[50] == stdlib_rows()[len(stdlib_rows()) // 2]


# -- the command


SMOKE = next(c for c in CORPORA if c.name == "smoke")


def _samples(path: Path, answers: list[tuple[str, str, str]]) -> None:
    path.parent.mkdir(parents=True)
    rows: list[dict] = [{"step": 60, "prompt": "What is 5 + 5?", "answer": "in training"}]
    rows += [{"stage": "before" if who == "base" else "after", "source": who, "prompt": q, "answer": a}
             for who, q, a in answers]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


RIGHT = [(who, f"What is {n} + {n}?", f"{n} + {n} = {2 * n}.") for who in ("merged", "gguf bf16", "gguf q8_0")
         for n in (5, 17)]


@pytest.mark.parametrize(
    ("answers", "ok"),
    [
        ([("base", "What is 5 + 5?", "gibberish"), *RIGHT], True),
        ([a for a in RIGHT if a[0] != "merged"], False),
        ([a for a in RIGHT if a[0] == "merged"], False),
        ([*RIGHT[:-1], ("gguf q8_0", "What is 17 + 17?", "17 + 17 = 35.")], False),
        ([(w, q, a) for w, q, a in RIGHT if q != "What is 17 + 17?"], False),
        ([], False),
    ],
)
def test_verdict_wants_every_answer_of_every_result(tmp_path: Path, answers: list, ok: bool) -> None:
    run = RunDir(name="r", results_root=tmp_path, output_root=tmp_path / "o")
    _samples(run.samples, answers)
    assert verdict(run, SMOKE)["ok"] is ok


def test_the_plan_is_the_demos_where_it_must_be_and_open_elsewhere(tmp_path: Path) -> None:
    given = resolve({"results": tmp_path / "r", "output": tmp_path / "o"}, {}, {}, {})
    plan = plan_for(given, SMOKE, tmp_path / "m", tmp_path / "d.jsonl", "demo-smoke-1")
    assert (plan.results, plan.output, plan.backend) == (tmp_path / "r", tmp_path / "o", "local")
    assert plan.origins["learning_rate"] == "config"
    for field in ("lora_r", "gradient_accumulation", "engine", "dtype"):
        assert plan.origins[field] == "default"


def test_with_another_machine_it_runs_in_containers(tmp_path: Path) -> None:
    given = resolve({"peers": ["192.168.100.2"]}, {}, {}, {})
    one_pack_a_step = next(c for c in CORPORA if c.settings.get("gradient_accumulation") == 1)
    plan = plan_for(given, one_pack_a_step, tmp_path / "m", tmp_path / "d.jsonl", "demo-smoke-1")
    assert (plan.backend, list(plan.peers)) == ("docker", ["192.168.100.2"])
    assert plan.gradient_accumulation >= 2
    assert parse(["--demo", "--peers", "192.168.100.2"]).demo


class _Pipeline:
    """Stands for the pipeline: writes what the evaluation would."""

    def __init__(self, codes: list[int], answers: list[tuple[str, str, str]]) -> None:
        self.codes, self.answers, self.plans = codes, answers, []

    def __call__(self, plan: Plan, **_: object) -> int:
        self.plans.append(plan)
        run = RunDir(name=str(plan.name), results_root=plan.results, output_root=plan.output)
        _samples(run.samples, self.answers)
        return self.codes.pop(0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the demo with the pipeline and the making of the model replaced."""

    def run(codes: list[int], answers: list, json_out: bool = False) -> tuple[int, _Pipeline, str]:
        pipeline, text = _Pipeline(codes, answers), io.StringIO()
        monkeypatch.setattr(demo, "run_pipeline", pipeline)
        monkeypatch.setattr(demo, "_model", lambda folder, backend: folder / "model")
        plan = resolve({"results": tmp_path / "results", "output": tmp_path / "output"}, {}, {}, {})
        console = Console(file=text, width=300)
        code = run_demo(plan, console=console, plain=True, json_out=json_out, folder=tmp_path / "demo")
        return code, pipeline, text.getvalue()

    return run


def test_demo_runs_both_corpora_and_says_so(quick, tmp_path: Path) -> None:
    code, pipeline, text = quick([0, 0], [("base", "What is 5 + 5?", "[red]x"), *RIGHT])
    assert code == 0
    assert [p.data.name for p in pipeline.plans] == ["smoke.jsonl", "stdlib.jsonl"]
    assert all(p.data.is_file() for p in pipeline.plans)
    assert "every expected answer was given" in text
    assert "[red]x" in text
    assert "5 + 5 = 10." in text


def test_demo_fails_honestly(quick) -> None:
    code, _, text = quick([0, 0], [("merged", "What is 5 + 5?", "5 + 5 = 11.")])
    assert code == 1
    assert "an expected answer is missing" in text


@pytest.mark.parametrize("failed", [3, 75])
def test_demo_passes_a_stages_exit_code_on(quick, failed: int) -> None:
    code, pipeline, _ = quick([failed], RIGHT)
    assert code == failed
    assert len(pipeline.plans) == 1


def test_demo_as_json(quick, capsys: pytest.CaptureFixture[str]) -> None:
    quick([0, 0], RIGHT, json_out=True)
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["ok"] is True
    assert outcome["runs"][0]["answers"]["What is 5 + 5?"]["gguf q8_0"] == "5 + 5 = 10."


def test_another_folder_of_that_name_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-qwen3.5").mkdir()

    def make(command: list[str], **_: object) -> subprocess.CompletedProcess:
        Path(command[-1]).mkdir()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", make)
    assert demo._model(tmp_path) == tmp_path / "tiny-qwen3.5-2"


def test_a_model_made_before_is_taken(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_made_as(model_dir)
    assert not is_made_as(tmp_path)
    monkeypatch.setattr(demo, "is_made_as", lambda folder, **_: is_made_as(folder))
    (tmp_path / "tiny-qwen3.5").symlink_to(model_dir)
    assert demo._model(tmp_path) == tmp_path / "tiny-qwen3.5"


def test_a_model_that_cannot_be_made_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "Traceback\nOSError: No space left on device\n")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(SparktuneError, match=r"could not be made in .*: OSError: No space left"):
        demo._model(tmp_path)


class _Image:
    """Stands for a backend with an image."""

    def __init__(self, code: int = 0, said: str = "") -> None:
        self.code, self.said, self.asked = code, said, []

    def run_module(self, module: str, argument: str, folder: Path) -> tuple[int, str]:
        self.asked.append((module, argument, folder))
        return self.code, self.said


def test_with_an_image_the_model_is_made_in_it(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "local_python", lambda root: pytest.fail("this machine's Python needs no torch then"))
    image = _Image()
    assert demo._model(tmp_path, image) == tmp_path / "tiny-qwen3.5"
    assert image.asked == [("sparktune.setup.demo_model", str(tmp_path / "tiny-qwen3.5"), tmp_path)]
    with pytest.raises(SparktuneError, match=r"could not be made in .*: No space left"):
        demo._model(tmp_path, _Image(1, "first\nNo space left\n"))

    # one that another Python made will do there, and there alone
    other = tmp_path / "other"
    other.mkdir()
    marker = json.loads((model_dir / MARKER_FILE).read_text(encoding="utf-8"))
    marker["recipe"]["python"] = "3.99.0"
    (other / MARKER_FILE).write_text(json.dumps(marker), encoding="utf-8")
    assert is_made_as(other, any_python=True)
    assert not is_made_as(other)
    assert not is_made_as(other, any_python=True, pretrained=True)


def test_same_rows_keep_their_file(tmp_path: Path) -> None:
    path = tmp_path / "smoke.jsonl"
    write_smoke(path)
    before = path.stat().st_mtime_ns
    write_smoke(path)
    assert path.stat().st_mtime_ns == before
    path.write_text("{}")
    write_smoke(path)
    assert len(path.read_text().splitlines()) == 50
