"""The analysis as a whole: planted faults found at their lines, no false alarm, one process or several."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sparktune.lab.data_bench import main as bench
from sparktune.lab.data_bench import make_tokenizer, spec_of
from sparktune.lab.data_corpus import Corpus, write_corpus
from sparktune.setup.data.duplicates import shingles, similar
from sparktune.setup.data.examine import RowRules
from sparktune.setup.data.read import file_facts, read_rows
from sparktune.setup.data.render import ChatRenderer
from sparktune.setup.data.tokenise import prepare
from sparktune.setup.data.tokenizer import load_tokenizer
from sparktune.setup.data.workers import WorkerPool, examine_file
from sparktune.setup.plan.errors import DataError, SparktuneError
from sparktune.setup.plan.events import NullEvents
from sparktune.setup.plan.schema import Plan

DROPPED = (
    "empty_assistant", "over_length", "not_json", "not_utf8", "unknown_role", "no_assistant", "image", "empty_row",
)
FOUND = ("duplicate", "near_duplicate", "pii_email", "pii_phone", "pii_card", "pii_key", "markup")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("bench") / "tokenizer", Corpus(1, 150, 4000), 2048, 60_000)


def plan_of(data, **fields):
    return Plan(data=data, **{"eval_split": 0.0, "bad_row_limit": 1.0, "max_seq_length": 8192, **fields})


@pytest.fixture
def analyse(tokenizer, cache_home):
    def run(data, workers=1, **fields):
        return prepare(plan_of(data, **fields), spec_of(4096), str(tokenizer), NullEvents(), workers=workers)

    return run


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    data, held = folder / "data.jsonl", folder / "held.jsonl"
    planted = write_corpus(data, Corpus(2, 150, 4000), 120, faults=3, evaluation=held)
    return data, held, planted


def test_every_planted_fault_is_found_at_its_line(analyse, faulty):
    data, held, planted = faulty
    report = analyse(data, eval_data=held).report
    assert report.dropped == dict.fromkeys(DROPPED, 3)
    for code in DROPPED:
        assert [p.line for p in report.problems if p.code == code] == planted.data[code]
    found = {code: finding.lines for code, finding in report.findings.items()}
    assert found == {code: planted.data[code] for code in FOUND}
    assert {code: found.lines for code, found in report.eval_findings.items()} == planted.evaluation
    assert (report.duplicates, report.near_duplicates, report.eval_leaks, report.near_leaks) == (3, 3, 3, 3)
    text = report.model_dump_json()
    for secret in ("jane.doe", "9018", "4242", "ghp_"):
        assert secret not in text, "a report never quotes what it found"
    for code in ("e-mail addresses", "near", "markup", "--dedupe exact", "--redact-pii"):
        assert any(code in warning for warning in report.warnings)


def test_a_clean_file_raises_no_alarm(analyse, tmp_path):
    write_corpus(tmp_path / "clean.jsonl", Corpus(5, 150, 4000), 150, evaluation=tmp_path / "held.jsonl")
    report = analyse(tmp_path / "clean.jsonl", eval_data=tmp_path / "held.jsonl").report
    assert (report.dropped, report.findings, report.eval_findings, report.warnings) == ({}, {}, {}, [])
    assert report.kept == 165


def test_workers_give_the_very_same_tokens_and_findings(analyse, faulty, tmp_path, monkeypatch):
    data, held, _ = faulty
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    one = analyse(data, eval_data=held)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "several"))
    two = analyse(data, eval_data=held, workers=2)
    assert one.report == two.report
    for part in ("train", "evaluation"):
        for name in ("ids", "supervised", "offsets", "lines"):
            assert np.array_equal(getattr(getattr(one, part), name), getattr(getattr(two, part), name))


def test_a_worker_that_dies_or_refuses_is_a_sentence(tokenizer, faulty, tmp_path):
    with WorkerPool(1, RowRules(vocab_size=4096), str(tokenizer)) as pool:
        os.kill(pool._workers[0]._process.pid, signal.SIGKILL)
        with pytest.raises(SparktuneError, match=r"ended early, with signal SIGKILL, at lines 1 to .*RAYON"):
            list(pool.examine([list(_raw(faulty[0]))]))
    with (
        WorkerPool(1, RowRules(vocab_size=4096), str(tmp_path / "nowhere")) as pool,
        pytest.raises(DataError, match=r"tokenizer of .*nowhere"),
    ):
        list(pool.examine([list(_raw(faulty[0]))]))


def _raw(path):
    from sparktune.setup.data.read import raw_lines

    return raw_lines(path)


def test_a_worker_ends_with_its_parent(tokenizer):
    code = (
        "import sys, time\n"
        "from sparktune.setup.data.examine import RowRules\n"
        "from sparktune.setup.data.workers import WorkerPool\n"
        f"pool = WorkerPool(1, RowRules(vocab_size=4096), {str(tokenizer)!r})\n"
        "print(pool._workers[0]._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and Path(f"/proc/{child}/stat").exists():
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.2)
    else:
        assert not Path(f"/proc/{child}/stat").exists(), "the worker outlived its parent"


def test_starts_added_up_from_lengths_are_the_tokenizers_own(tokenizer, faulty):
    loaded = load_tokenizer(str(tokenizer))
    renderer = ChatRenderer(loaded)
    texts = [renderer.render(row.messages).text for row in read_rows(faulty[0]) if getattr(row, "messages", None)][:40]
    rng = random.Random(0)
    texts += ["".join(rng.choices("ab C\n\t .<|im_end|>0'é漢\r", k=80)) for _ in range(300)] + ["", "\n", "<|im_end|>"]
    fast = 0
    for text, encoding in zip(texts, loaded.backend.encode_batch(texts, add_special_tokens=False), strict=True):
        short = loaded._by_lengths(text, encoding.ids)
        fast += short is not None
        tokens = short or loaded.encode_batch([text])[0]
        assert tokens.starts.tolist() == [start for start, _ in encoding.offsets]
        assert tokens.ids.tolist() == encoding.ids
    assert fast >= 40


def test_appended_rows_move_no_row_and_keep_the_splits_name(analyse, tmp_path):
    write_corpus(tmp_path / "a.jsonl", Corpus(7, 40, 4000), 60)
    first = analyse(tmp_path / "a.jsonl", eval_split=0.3)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines()
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([*reversed(lines)]))
    assert analyse(tmp_path / "b.jsonl", eval_split=0.3).report.split == first.report.split, "order does not count"
    write_corpus(tmp_path / "more.jsonl", Corpus(8, 40, 4000), 40)
    (tmp_path / "c.jsonl").write_bytes(b"\n".join([*lines, (tmp_path / "more.jsonl").read_bytes()]))
    grown = analyse(tmp_path / "c.jsonl", eval_split=0.3)
    assert [n for n in grown.evaluation.lines.tolist() if n <= 60] == first.evaluation.lines.tolist()
    assert grown.report.split != first.report.split
    assert analyse(tmp_path / "a.jsonl", eval_split=0.3, workers=1).report.split.startswith("1-")


@pytest.mark.parametrize("dedupe", ["off", "exact", "near"])
def test_cleaning_leaves_the_original_alone_and_trains_on_the_copy(analyse, faulty, dedupe):
    data, held, planted = faulty
    before = data.read_bytes()
    prepared = analyse(data, eval_data=held, dedupe=dedupe, redact_pii=True)
    report = prepared.report
    assert data.read_bytes() == before
    cleaned = report.cleaned
    assert (cleaned.original, report.path) == (str(data), cleaned.path)
    assert report.cleaned.sha256 == hashlib.sha256(Path(cleaned.path).read_bytes()).hexdigest() == report.sha256
    codes = {"off": [], "exact": ["duplicate"], "near": ["duplicate", "near_duplicate"]}[dedupe]
    assert {code: found.lines for code, found in cleaned.removed.items()} == {c: planted.data[c] for c in codes}
    assert {f"pii_{kind}": found.lines for kind, found in cleaned.redacted.items()} == {
        code: planted.data[code] for code in FOUND if code.startswith("pii_")
    }
    text = Path(cleaned.path).read_text("utf-8", "replace")
    assert "jane.doe" not in text
    assert "4242 4242" not in text
    assert not [code for code in report.findings if code.startswith("pii_") or code in codes]
    assert (report.duplicates, report.near_duplicates) == (0 if codes else 3, 0 if dedupe == "near" else 3)
    assert len(text.splitlines()) == len(before.splitlines()) - 3 * len(codes)
    assert (prepared.train.file, prepared.evaluation.file) == (Path(cleaned.path), Path(report.eval_cleaned.path))


def test_a_cleaned_copy_is_found_again_and_a_damaged_one_made_anew(analyse, faulty):
    data, _, _ = faulty
    first = Path(analyse(data, dedupe="near").report.cleaned.path)
    content, made = first.read_bytes(), first.stat().st_mtime_ns
    assert Path(analyse(data, dedupe="near").report.cleaned.path).stat().st_mtime_ns == made
    assert analyse(data, dedupe="exact").report.cleaned.path != str(first), "another demand, another name"
    first.write_bytes(content[:-10])
    assert Path(analyse(data, dedupe="near").report.cleaned.path).read_bytes() == content


def test_redaction_keeps_structure_roles_and_ids(analyse, tmp_path):
    row = {"messages": [
        {"role": "user", "content": "4242424242424242"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "4242424242424242", "type": "function",
             "function": {"name": "pay", "arguments": {"card": 4242424242424242, "sum": 12, "ok": True}}}]},
        {"role": "tool", "content": "j@example.org", "tool_call_id": "4242424242424242"},
        {"role": "assistant", "content": "done \\ud83d\\ude00"},
    ]}
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row).replace("\\\\", "\\") + "\n" + '{"broken": "j@example.org"\n')
    cleaned = analyse(path, redact_pii=True).report.cleaned
    first, second = Path(cleaned.path).read_text().splitlines()
    messages = json.loads(first)["messages"]
    call = messages[1]["tool_calls"][0]
    assert call["function"]["arguments"] == {"card": "[CARD]", "sum": 12, "ok": True}
    assert (call["id"], messages[0]["content"], messages[2]["content"]) == ("4242424242424242", "[CARD]", "[EMAIL]")
    assert messages[3]["content"] == "done 😀"
    assert second == '{"broken": "[EMAIL]"'


def _chat(asked, answered, system=""):
    return system, asked, answered


def test_rows_about_one_document_are_no_near_duplicates():
    corpus = Corpus(3, 100, 4000)
    document, answer = corpus.text(800), corpus.text(120)
    one, other = _chat(document + " What then?", answer), _chat(document + " Who was it?", corpus.text(120))
    assert similar(one, _chat(document + " What then? Please", answer))
    assert not similar(one, other)
    assert not similar(one, _chat(document, answer, system="Answer like a pirate."))
    assert not similar(_chat("What is 17 + 25?", "17 + 25 = 42"), _chat("What is 17 + 26?", "17 + 26 = 43"))


def test_shingles_see_words_in_every_script():
    assert len(shingles("one two three four five six")) == 2
    assert np.array_equal(shingles("One, two THREE four five"), shingles("one two three\nfour five."))
    assert len(shingles("東京都は日本の首都です")) == 7
    assert len(shingles("...")) == 1
    assert not np.array_equal(shingles("..."), shingles("!!!"))


def test_a_message_that_the_template_leaves_out_is_found(make_plan, spec, tokenizer_folder, tmp_path, cache_home):
    folder = tmp_path / "template"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_folder("qwen25") / name).read_bytes())
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plan = make_plan([{"messages": turns}, {"messages": [{"role": "system", "content": "s"}, *turns]}])
    report = prepare(plan, spec, str(folder), NullEvents()).report
    assert report.findings["left_out"].lines == [2]
    assert any("does not show" in warning for warning in report.warnings)


def test_some_rows_with_thinking_are_said(make_plan, spec, tokenizer_folder, cache_home):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"<think>{t}</think>b"}]}
            for t in ("why", "")]
    report = prepare(make_plan(rows), spec, str(tokenizer_folder("qwen35_thinking")), NullEvents()).report
    assert report.with_thinking == 1
    assert any("1 of 2 conversations have thinking" in warning for warning in report.warnings)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_24000_long_rows_say_their_time_and_memory(tmp_path, capsys):
    assert bench(["--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    print(said)
    assert "Analysed 24,000 rows" in said


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_gigabyte_stays_in_bounded_memory(tmp_path, capsys):
    assert bench(["--folder", str(tmp_path), "--size-gb", "1", "--workers", "2"]) == 0
    said = capsys.readouterr().out
    print(said)
    peak = said.split("peak memory of all together ")[1].split(" GiB")[0]
    assert float(peak) < 4


def test_nothing_is_tokenised_to_find_repeats(faulty):
    rules = RowRules(tokenises=False)
    rows = [row for row in examine_file(faulty[0], rules, None, workers=1) if row.problem is None]
    assert rows
    assert not any(len(row.ids) for row in rows)
    assert file_facts(faulty[0]).lines > len(rows)
