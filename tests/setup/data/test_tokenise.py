"""From rows to a cache that is reused: counts, limits, splits, damage, full disks, and the stage's exit codes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparktune.setup.data import cache as cache_module
from sparktune.setup.data import tokenise
from sparktune.setup.data.cache import CacheWriter, TokenDataset, open_cache, remove_leftovers
from sparktune.setup.data.tokenise import prepare
from sparktune.setup.data.tokenizer import load_tokenizer
from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.errors import DataError, PreflightError, UsageError
from sparktune.setup.plan.events import NullEvents
from sparktune.setup.plan.schema import DatasetReport, Plan


def chat(question, answer="yes", **extra):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **extra}


MANY = [chat(f"question {i}", f"answer {i}") for i in range(40)]
IMAGE_ROW = chat([{"type": "image_url", "image_url": {"url": "x"}}])


class Heard(NullEvents):
    """Keeps events in memory."""

    def __init__(self):
        super().__init__()
        self.events = []

    def emit(self, kind, **fields):
        self.events.append({"kind": kind, **fields})

    def of(self, kind):
        return [e for e in self.events if e["kind"] == kind]


@pytest.fixture
def run(cache_home, tokenizer_folder, spec):
    """Prepares a plan's data with the qwen25 tokenizer."""

    def prepare_(plan, events=None, spec=spec, family="qwen25"):
        return prepare(plan, spec, str(tokenizer_folder(family)), events or NullEvents())

    return prepare_


def texts(dataset, tokenizer):
    return [tokenizer.decode(dataset[i][0].tolist()) for i in range(len(dataset))]


def test_rows_become_examples_in_the_files_order(run, make_plan, chat_tokenizer):
    plan = make_plan([chat("one", "uno"), "", {"text": "plain"}, {"prompt": "p", "completion": "c"}])
    data = run(plan)
    assert data.train.lines.tolist() == [1, 3, 4]
    assert data.evaluation is None
    first, second, _ = texts(data.train, chat_tokenizer("qwen25"))
    assert first.endswith("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nuno<|im_end|>\n")
    assert second == "plain<|im_end|>", "text ends with the tokenizer's end-of-text token"
    ids, supervised = data.train[1]
    assert supervised.tolist() == [1] * len(ids), "text rows learn everything"
    ids, supervised = data.train[0]
    assert chat_tokenizer("qwen25").decode(ids[supervised == 1].tolist()) == "uno<|im_end|>"
    assert (ids.dtype, supervised.dtype) == (np.uint32, np.uint8)
    report = data.report
    assert report.formats == {"messages": 1, "text": 1, "prompt_completion": 1}
    assert (report.rows, report.kept, report.dropped) == (3, 3, {})
    assert report.supervised_tokens == sum(int(data.train[i][1][1:].sum()) for i in range(3))
    assert report.supervised_tokens == int(data.train.supervised_counts.sum())
    assert report.lengths.total == len(data.train.ids)
    assert report.cache_key == data.train.key


def test_a_tokenizer_without_its_vocabulary_is_refused(tokenizer_folder, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(tokenizer_folder("qwen25"), folder)
    (folder / "tokenizer.json").unlink()
    # with this class transformers makes an empty tokenizer, for which every text is no token at all
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"bare should have a vocabulary.*Copy tokenizer.json"):
        load_tokenizer(str(folder))


def test_text_rows_begin_and_end_as_the_tokenizer_says(make_plan, spec, tokenizer_folder, tmp_path, cache_home):
    from tokenizers import processors

    folder = tmp_path / "with_bos"
    tokenizer = load_tokenizer(str(tokenizer_folder("llama3"))).tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", tokenizer.convert_tokens_to_ids("<|begin_of_text|>"))],
    )
    tokenizer.save_pretrained(folder)
    plan = make_plan([{"text": "plain"}, {"text": "done<|eot_id|>"}])
    data = prepare(plan, spec, str(folder), NullEvents())
    loaded = load_tokenizer(str(folder))
    assert texts(data.train, loaded) == ["<|begin_of_text|>plain<|eot_id|>", "<|begin_of_text|>done<|eot_id|>"]


def test_a_second_run_reuses_the_cache_and_does_not_tokenise(run, make_plan, cache_home, monkeypatch):
    plan = make_plan(MANY, eval_split=0.3)
    heard = Heard()
    first = run(plan, heard)
    assert [e["chosen"] for e in heard.of("choice")] == ["made"]
    progress = heard.of("progress")
    assert progress[-1]["done"] == progress[-1]["total"] == 40
    monkeypatch.setattr(tokenise, "examine_file", None)  # would fail if anything were tokenised
    heard = Heard()
    second = run(plan, heard)
    assert [e["chosen"] for e in heard.of("choice")] == ["reused"]
    assert second.report == first.report
    for part in ("train", "evaluation"):
        for name in ("ids", "supervised", "offsets", "lines"):
            one, two = (getattr(getattr(d, part), name) for d in (first, second))
            assert np.array_equal(one, two)
            assert isinstance(two, np.memmap)
    assert len(list(cache_home.iterdir())) == 1, "no temporary folder stays"


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "meta", "empty_meta"])
def test_a_damaged_cache_is_noticed_and_made_again(run, make_plan, cache_home, damage):
    plan = make_plan(MANY)
    first = run(plan)
    expected = np.array(first.train.ids)
    folder = cache_home / first.report.cache_key
    ids = folder / "train" / "ids.npy"
    if damage == "flip":
        data = bytearray(ids.read_bytes())
        data[-3] ^= 1
        ids.write_bytes(data)
    elif damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "remove":
        (folder / "train" / "lines.npy").unlink()
    else:
        (folder / "meta.json").write_text("{" if damage == "meta" else "[]")
    heard = Heard()
    again = run(plan, heard)
    assert [e["chosen"] for e in heard.of("choice")] == ["made"]
    assert "damaged" in heard.of("choice")[0]["reason"]
    assert np.array_equal(again.train.ids, expected)


@pytest.mark.parametrize("change", [
    {"max_seq_length": 64}, {"over_length": "truncate"}, {"thinking": "off"}, {"eval_split": 0.5},
    {"text_field": "body"},
])
def test_whatever_decides_the_tokens_changes_the_key(run, make_plan, change):
    plan = make_plan(MANY)
    assert run(plan).report.cache_key != run(plan.model_copy(update=change)).report.cache_key


def test_the_key_follows_data_template_and_vocabulary_not_paths(run, make_plan, spec, tokenizer_folder, tmp_path):
    plan = make_plan(MANY)
    key = run(plan).report.cache_key
    assert run(make_plan(MANY, name="copy.jsonl")).report.cache_key == key
    assert run(make_plan(MANY[1:])).report.cache_key != key
    assert run(plan.model_copy(update={"data": tmp_path / "copy.jsonl"}), family="llama3").report.cache_key != key
    assert run(
        make_plan(MANY), spec=spec.model_copy(update={"vocab_size": 600})
    ).report.cache_key != key


def test_the_split_follows_the_row_so_appending_moves_none(run, make_plan):
    held = run(make_plan(MANY, eval_split=0.3)).evaluation.lines.tolist()
    assert 4 <= len(held) <= 20
    more = [chat(f"more {i}") for i in range(20)]
    grown = run(make_plan([*MANY, *more], eval_split=0.3))
    assert [line for line in grown.evaluation.lines.tolist() if line <= 40] == held
    wider = run(make_plan(MANY, eval_split=0.6)).evaluation.lines.tolist()
    assert set(held) < set(wider)


def test_at_least_one_row_trains(run, make_plan):
    data = run(make_plan(MANY[:5], eval_split=0.999999))
    assert (len(data.train), len(data.evaluation)) == (1, 4)
    assert sorted(data.train.lines.tolist() + data.evaluation.lines.tolist()) == [1, 2, 3, 4, 5]
    assert data.report.kept == 5


def test_a_split_that_holds_out_nothing_says_so(run, make_plan):
    data = run(make_plan(MANY[:2], eval_split=1e-9))
    assert data.evaluation is None
    assert any("holds out none" in w for w in data.report.warnings)


def test_evaluation_data_of_its_own_replaces_the_split_and_leaks_are_counted(run, make_plan):
    held = make_plan([MANY[3], chat("new"), MANY[3]], name="held.jsonl").data
    data = run(make_plan(MANY, eval_data=held, eval_split=0.5))
    assert (len(data.train), len(data.evaluation)) == (40, 3)
    assert data.report.eval_leaks == 2
    assert any("held.jsonl" in w and "2 held-out" in w for w in data.report.warnings)


def test_duplicates_turns_system_and_thinking_are_counted(run, make_plan):
    two = chat("a", "b")["messages"]
    data = run(make_plan([
        chat("a", "b"), chat("a", "b"), {"prompt": "a", "completion": "b"},
        {"messages": [*two, *two]}, {"messages": [{"role": "system", "content": "s"}, *two]},
        {"messages": [{"role": "system", "content": " "}, *two]},
        chat("a", "<think>why</think>b"), chat("a", "<think>\n</think>b"),
        {"messages": [two[0], {**two[1], "reasoning_content": "so"}]},
    ]), family="qwen35_thinking")
    report = data.report
    assert (report.duplicates, report.multi_turn, report.with_system, report.with_thinking) == (2, 1, 1, 2)


def test_bad_rows_within_the_limit_are_reported_and_skipped(run, make_plan):
    heard = Heard()
    plan = make_plan([*MANY, "not json", IMAGE_ROW], bad_row_limit=0.05)
    data = run(plan, heard)
    assert data.report.dropped == {"not_json": 1, "image": 1}
    assert [(p.line, p.code) for p in data.report.problems] == [(41, "not_json"), (42, "image")]
    assert len(data.train) == 40
    (message,) = [e["text"] for e in heard.of("message")]
    assert "2 of 42 rows are not used" in message
    assert "line 41" in message


def test_bad_rows_above_the_limit_stop_the_run_and_leave_no_cache(run, make_plan, cache_home):
    with pytest.raises(DataError) as refused:
        run(make_plan([*["nope"] * 14, *MANY, IMAGE_ROW]))
    text = str(refused.value)
    assert refused.value.exit_code == 4
    assert "data.jsonl: 15 of 55 rows (27.3 %)" in text
    assert "not_json: 14 rows, lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 4 more" in text
    assert "image: 1 row, line 55." in text
    assert "--bad-row-limit" in text
    assert list(cache_home.iterdir()) == []


def test_the_limit_also_holds_for_a_cache_made_under_another(run, make_plan):
    plan = make_plan([*MANY, "nope"], bad_row_limit=0.5)
    run(plan)
    with pytest.raises(DataError, match=r"1 of 41 rows"):
        run(plan.model_copy(update={"bad_row_limit": 0.0}))


@pytest.mark.parametrize("row", [
    "nope", b'{"text": "\xff"}', {"question": "q"}, {"messages": [{"role": "narrator", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x"}]}, chat("q", ""), IMAGE_ROW, {}, 5,
])
def test_every_kind_of_bad_row_alone_means_nothing_usable(run, make_plan, row):
    with pytest.raises(DataError, match=r"data\.jsonl"):
        run(make_plan([row], bad_row_limit=1.0))


def test_a_template_that_refuses_rows(run, make_plan):
    late = {"messages": [*chat("q")["messages"], {"role": "system", "content": "late"}]}
    with pytest.raises(DataError, match=r"template: 1 row, line 2\. .*System message must be at the beginning"):
        run(make_plan([chat("q"), late]), family="qwen35_thinking")


def test_a_tokenizer_with_ids_past_the_vocabulary(run, make_plan, spec):
    small = spec.model_copy(update={"vocab_size": 300})
    with pytest.raises(DataError, match=r"token_range: 40 rows.*vocabulary ends at 299.*do not belong together"):
        run(make_plan(MANY), spec=small)


def test_a_missing_or_broken_tokenizer_is_named(make_plan, spec, tmp_path, cache_home):
    (tmp_path / "model").mkdir()
    for content in (None, "{", '{"version": "1.0"}'):
        if content is not None:
            (tmp_path / "model" / "tokenizer.json").write_text(content)
            (tmp_path / "model" / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "PreTrainedTokenizerFast"}'
            )
        with pytest.raises(DataError, match=r"tokenizer of .*model should load"):
            prepare(make_plan(MANY), spec, str(tmp_path / "model"), NullEvents())


LONG = chat("q", "word " * 300)


@pytest.mark.parametrize("policy", ["drop", "truncate", "error"])
def test_over_length_policies(run, make_plan, policy):
    plan = make_plan([*MANY, LONG], max_seq_length=100, over_length=policy)
    if policy == "error":
        with pytest.raises(DataError, match=r"over_length: 1 row, line 41"):
            run(plan)
        return
    report = run(plan).report
    assert report.lengths.max == (100 if policy == "truncate" else max(len(run(plan).train[i][0]) for i in range(40)))
    assert report.truncated == (policy == "truncate")
    assert report.dropped == ({"over_length": 1} if policy == "drop" else {})
    assert len(report.warnings) == 1


def test_where_every_row_is_too_long_the_way_out_is_named(run, make_plan):
    with pytest.raises(DataError, match=r"(?s)none of its 40 rows is.*and 30 more.*--over-length truncate"):
        run(make_plan(MANY, max_seq_length=16))


def test_rows_that_lose_every_label_are_dropped_and_too_many_stop_the_run(run, make_plan):
    lost = chat("word " * 300)
    fields = {"max_seq_length": 100, "over_length": "truncate"}
    assert run(make_plan([*MANY, lost], **fields)).report.dropped == {"all_masked": 1}
    with pytest.raises(DataError, match=r"20 of 60 rows \(33\.3 %\) have no token left"):
        run(make_plan([*MANY, *[lost] * 20], **fields))


def test_nothing_usable_stops_the_run(run, make_plan):
    with pytest.raises(DataError, match="none of its 2 rows"):
        run(make_plan([LONG, LONG], max_seq_length=100))


def test_data_is_needed(run):
    with pytest.raises(UsageError, match="--data"):
        run(Plan())


def test_a_file_that_grows_while_it_is_read_is_refused(run, make_plan, monkeypatch, cache_home):
    plan = make_plan(MANY)
    real = tokenise.file_facts

    def facts_then_grow(path):
        facts = real(path)
        with path.open("a") as file:
            file.write(json.dumps(chat("late")) + "\n")
        return facts

    monkeypatch.setattr(tokenise, "file_facts", facts_then_grow)
    with pytest.raises(DataError, match="changed while"):
        run(plan)
    assert list(cache_home.iterdir()) == []


@pytest.mark.parametrize("place", ["append", "finish", "mkdir"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(run, make_plan, monkeypatch, cache_home, place):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "mkdir":
        monkeypatch.setattr(Path, "mkdir", full)
    else:
        monkeypatch.setattr(cache_module._ArrayFile, place, full)
    with pytest.raises(PreflightError, match=r"disk .* is full .*XDG_CACHE_HOME"):
        run(make_plan(MANY))
    monkeypatch.undo()
    assert not cache_home.exists() or list(cache_home.iterdir()) == []


def test_an_unwritable_cache_folder_is_named(run, make_plan, cache_home):
    cache_home.parent.mkdir(parents=True)
    cache_home.write_text("a file where the folder should be")
    with pytest.raises(PreflightError, match=r"tokens.*XDG_CACHE_HOME"):
        run(make_plan(MANY))


def test_a_cache_another_process_finished_first_is_kept(cache_home):
    def write(token):
        writer = CacheWriter(cache_home / "key")
        writer.add("train", [token, 2], [0, 1], 1)
        writer.finish()
        return writer

    first, second = write(1), write(1)
    with first, second:
        first.commit({"n": 1})
        inode = (cache_home / "key").stat().st_ino
        second.commit({"n": 1})
    assert (cache_home / "key").stat().st_ino == inode
    assert [p.name for p in cache_home.iterdir()] == ["key"]
    train, held, facts = open_cache(cache_home / "key", "k")
    assert (train[0][0].tolist(), len(held), facts, train.key) == ([1, 2], 0, {"n": 1}, "k")
    assert held.lengths.tolist() == held.supervised_counts.tolist() == []


def test_leftovers_of_dead_processes_are_removed_when_quiet(cache_home, monkeypatch):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for pid in (dead.stdout.strip(), os.getpid()):
        (cache_home / f"key.{pid}-abcd.partial" / "train").mkdir(parents=True)
    remove_leftovers(cache_home)
    assert len(list(cache_home.iterdir())) == 2, "a folder that was just written to may belong to another container"
    monkeypatch.setattr(cache_module, "_QUIET_S", -1.0)
    remove_leftovers(cache_home)
    assert [p.name for p in cache_home.iterdir()] == [f"key.{os.getpid()}-abcd.partial"]


def test_token_dataset_refuses_arrays_that_do_not_fit():
    ids, supervised = np.arange(3, dtype=np.uint32), np.ones(3, dtype=np.uint8)
    with pytest.raises(ValueError, match="fit together"):
        TokenDataset(ids, supervised, np.array([0, 2]), np.array([1]), "k")
    dataset = TokenDataset(ids, supervised, np.array([0, 2, 3]), np.array([1, 2]), "k")
    with pytest.raises(IndexError):
        dataset[2]
    assert dataset.supervised_counts.tolist() == [1, 0]


# -- the stage, as a process without torch

BLOCK_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, NoTorch())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "torch" else real(name, package)
import runpy
sys.argv = ["tokenise", "--run", sys.argv[1]]
runpy.run_module("sparktune.setup.data.tokenise", run_name="__main__")
"""


@pytest.fixture
def stage(tmp_path, cache_home, tokenizer_folder):
    """Runs the stage on a plan in a process that has no torch; returns (process, run folder)."""

    def start(plan):
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        for file in tokenizer_folder("qwen25").iterdir():
            (model / file.name).write_bytes(file.read_bytes())
        (model / "config.json").write_text(json.dumps({
            "model_type": "qwen3", "vocab_size": 512, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64, "tie_word_embeddings": True,
        }))
        run = tmp_path / "results" / "run"
        save_plan(plan.model_copy(update={"model": str(model)}), run / "plan.yaml")
        command = [sys.executable, "-c", BLOCK_TORCH, str(run)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120), run

    return start


def test_the_stage_writes_the_report_and_its_events_without_torch(stage, make_plan):
    done, run = stage(make_plan(MANY, eval_split=0.2))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = DatasetReport.model_validate_json((run / "data" / "report.json").read_text())
    assert report.kept == 40
    events = [json.loads(line) for line in (run / "stages" / "prepare.ndjson").read_text().splitlines()]
    assert (events[0]["kind"], events[-1]["kind"], events[-1]["ok"]) == ("start", "end", True)
    assert {"progress", "choice", "artifact"} <= {e["kind"] for e in events}


def test_the_stage_ends_with_four_and_a_sentence_on_bad_data(stage, make_plan):
    done, run = stage(make_plan(["nope", "nope"]))
    assert done.returncode == 4
    assert "data.jsonl: 2 of 2 rows" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run / "data" / "report.json").exists()
    events = [json.loads(line) for line in (run / "stages" / "prepare.ndjson").read_text().splitlines()]
    assert events[-1]["ok"] is False
    assert any(e["kind"] == "message" and e["level"] == "error" for e in events)
