"""What is fuzzed: every reader of something that came from elsewhere, with what must hold whatever it reads.

A target takes bytes. It may refuse them with the project's own errors, which end in a documented exit code; any other
exception is a finding, and so is an answer that breaks a promise of the reader.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from sparktune.lab import fuzz_mutate as mutate
from sparktune.lab import fuzz_seeds as seeds
from sparktune.setup.plan.errors import SparktuneError

__all__ = ["TARGETS", "Broken", "Target"]

Check = Callable[[bytes], None]
ROOT = Path(__file__).resolve().parents[1]


class Broken(AssertionError):
    """A reader accepted something and broke a promise."""


def promise(held: bool, what: str) -> None:
    """Raises Broken with `what` where a promise was not held."""
    if not held:
        raise Broken(what)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One reader."""

    name: str
    about: str
    make: Callable[[Path], Check]
    """Imports what it needs, prepares a scratch folder, and returns the check of one input."""
    seeds: Sequence[bytes]
    mutation: mutate.Mutation
    share: float
    """Of the executions asked for in all: how many fall to this target (thousands of two millions); by its speed."""


def refused(work: Callable[[], Any]) -> Any:
    """Returns what `work` returns, or None where it refused with one of our errors, in a sentence."""
    try:
        return work()
    except SparktuneError as error:
        text = str(error)
        promise(bool(text.strip()), "an error says nothing")
        promise(len(text) < 4000, f"an error of {len(text)} characters is no sentence")
        promise(int(error.exit_code) in (1, 2, 3, 4, 5), "an error without a documented exit code")
        return None


# -- rows of a JSONL


def _rows(scratch: Path) -> Check:
    from sparktune.setup.data.checks import facts_of
    from sparktune.setup.data.duplicates import row_parts
    from sparktune.setup.data.read import Row, file_facts, parse_row, raw_line_at, raw_lines

    path = scratch / "data.jsonl"

    def judge(line: int, raw: bytes, field: str) -> None:
        parsed = parse_row(line, raw, field)
        if isinstance(parsed, Row):
            promise((parsed.messages is None) != (parsed.text is None), "a row is a chat or a text")
            promise(len(parsed.digest) == 32, "a row has a digest")
            facts_of(parsed, ("<|im_end|>",))
            row_parts(parsed)
            return
        promise(parsed.line == line and bool(parsed.code), "a problem names its line and kind")
        promise(parsed.text.isprintable() and len(parsed.text) < 800, f"unfit for a screen: {parsed.text!r}")

    def check(data: bytes) -> None:
        path.write_bytes(data)
        field = "body" if data[:1] == b" " else "text"
        lines = refused(lambda: list(raw_lines(path))) or []
        again = crc32(data) % 4 == 0
        for raw in lines:
            judge(raw.line, raw.data, field)
            promise(not again or raw_line_at(path, raw.offset) == raw.data, "a line is read again where it was")
        if lines and again:
            facts = file_facts(path)
            promise(facts.bytes == len(data) and facts.lines == data.count(b"\n"), "a file's size is its size")

    return check


# -- chats through templates


def _renderers(scratch: Path) -> list[Any]:
    from tokenizers import AddedToken, Tokenizer

    from sparktune.setup.data.render import ChatRenderer
    from sparktune.setup.data.tokenizer import load_tokenizer
    from sparktune.setup.demo_tokenizer import CHAT_TEMPLATE, train_tokenizer

    specials = ("<s>", "</s>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
                "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
    tokenizer = Tokenizer.from_str(train_tokenizer(("system user assistant tool 17 + 17 = 34.\n\n",) * 3, 420))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    templates = {"demo": CHAT_TEMPLATE}
    for file in sorted((ROOT / "tests" / "setup" / "data" / "templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    ends = {"llama3": "<|eot_id|>", "mistral": "</s>", "harmony": "<|return|>"}
    made = []
    for name, template in templates.items():
        folder = scratch / name
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ends.get(name, "<|im_end|>")}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        made.append((name, template, ChatRenderer(load_tokenizer(str(folder)))))
    return made


def _chat(scratch: Path) -> Check:
    from sparktune.setup.data.formats import RowRefused
    from sparktune.setup.data.read import Row, parse_row
    from sparktune.setup.data.render import supervised_mask

    renderers = _renderers(scratch)

    def judge(name: str, template: str, renderer: Any, row: Row) -> None:
        messages = row.messages or []
        before = json.dumps(messages)
        try:
            rendered = renderer.render(messages, row.tools)
        except RowRefused as refusal:
            promise(bool(refusal.code) and bool(refusal.text), "a refusal says why")
            return
        promise(json.dumps(messages) == before, "rendering leaves the row as it is")
        edges = [edge for span in rendered.spans for edge in span]
        promise(edges == sorted(edges) and all(0 <= e <= len(rendered.text) for e in edges), f"{name}: spans {edges}")
        promise(len(rendered.spans) == sum(m["role"] == "assistant" for m in messages), f"{name}: a span a turn")
        learned = "\n".join(rendered.text[a:b] for a, b in rendered.spans)
        said = "\n".join(json.dumps(m, ensure_ascii=False) for m in messages if m["role"] == "assistant")
        for message in messages:
            text = message["content"].strip()
            if message["role"] != "assistant" and len(text) > 11 and text not in template and "<" not in text:
                promise(json.dumps(text, ensure_ascii=False)[1:-1] in said or text not in learned,
                        f"{name}: what the {message['role']} said is learned")
        tokens = renderer.tokenizer.encode_batch([rendered.text])[0]
        promise(len(supervised_mask(tokens.starts, rendered.spans)) == len(tokens.ids), "a mask is as long as its ids")

    def check(data: bytes) -> None:
        row = parse_row(1, data)
        if isinstance(row, Row) and row.messages is not None:
            # each input goes through two of the templates, always the same
            for number in {crc32(data) % len(renderers), (crc32(data) >> 8) % len(renderers)}:
                judge(*renderers[number], row)

    return check


# -- plan.yaml


def _plan(scratch: Path) -> Check:
    from sparktune.setup.plan.config import load_plan, read_config, resolve, save_plan
    from sparktune.setup.plan.rundir import check_run_name
    from sparktune.setup.replay import replay_command

    path, again = scratch / "plan.yaml", scratch / "again.yaml"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        notes: list[str] = []
        config = refused(lambda: read_config(path, notes))
        plan = None if config is None else refused(lambda: resolve({}, config, {}, {}))
        if plan is not None:
            promise(plan.results.is_absolute() and plan.output.is_absolute(), "folders are absolute")
            promise(plan.name is None or check_run_name(plan.name) == plan.name, "a name is a folder's name")
            if crc32(data) % 64 == 0:
                save_plan(plan, again)
                promise(load_plan(again) == plan, "a plan is read as it was written")
                replay_command(plan)
        refused(lambda: load_plan(path))

    return check


# -- checkpoints


def _manifest(scratch: Path) -> Check:
    from sparktune.training.checkpoint import LoopState, load_loop_state, newest_valid, validate

    run = scratch / "run"
    outside = scratch / "outside.safetensors"
    outside.write_bytes(b"x")

    def fill(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("engine.safetensors", "rng.safetensors"):
            (folder / name).write_bytes(struct.pack("<Q", 8) + b"{}      ")
        (folder / "loop.json").write_text(seeds.MANIFESTS[1].decode())

    good = run / "checkpoint-2"

    def hashed(name: str) -> dict[str, Any]:
        raw = (good / name).read_bytes()
        return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    def check(data: bytes) -> None:
        for folder in run.glob("checkpoint-*"):
            folder.rename(good)
        fill(good)
        if data[:1] == b"M":
            # names that the mutation knows get the true sizes and hashes, so that what lies behind is reached
            (good / "manifest.json").write_bytes(data[1:].replace(b"HASH", hashed("loop.json")["sha256"].encode()))
        else:
            (good / "loop.json").write_bytes(data)
            files = {n: hashed(n) for n in ("engine.safetensors", "rng.safetensors", "loop.json")}
            (good / "manifest.json").write_text(json.dumps({"format": 1, "step": 2, "files": files}))
        if refused(lambda: validate(good) or True):
            names = json.loads((good / "manifest.json").read_bytes())["files"]
            promise(all((good / n).resolve().is_relative_to(good.resolve()) for n in names), "a file lies outside")
            state = refused(lambda: load_loop_state(good))
            if state is not None:
                _plausible(state, LoopState)
        refused(lambda: newest_valid(run, lambda text: None))

    return check


def _plausible(state: Any, kind: type) -> None:
    promise(isinstance(state, kind), "a loop's state is one")
    counts = (state.step, state.position, state.tokens, state.evals_without_gain, state.metrics_bytes,
              state.samples_bytes)
    promise(all(type(n) is int and n >= 0 for n in counts), f"a count of the loop is {counts}")
    promise(isinstance(state.maths, dict) and isinstance(state.pending, bool), "settings are a mapping")


# -- safetensors


def _safetensors(scratch: Path) -> Check:
    from safetensors import SafetensorError, safe_open

    from sparktune.setup.plan.weights import safetensors_header

    path = scratch / "model.safetensors"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        entries = refused(lambda: safetensors_header(path))
        if entries is None:
            return
        for name, entry in entries.items():
            promise(0 <= entry.begin <= entry.end <= len(data), f"{name!r} lies outside the file")
        try:
            with safe_open(path, framework="numpy") as file:
                promise(set(file.keys()) == set(entries), "the library sees other tensors")
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in entries}
            promise(shapes == {name: entry.shape for name, entry in entries.items()}, "the library sees other shapes")
        except SafetensorError as error:
            raise Broken(f"accepted here, refused by the library that reads it: {error}") from error

    return check


def _index(scratch: Path) -> Check:
    from sparktune.setup.plan.weights import INDEX_NAME, safetensors_index

    folder = scratch / "model"
    folder.mkdir(exist_ok=True)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_bytes(seeds.HEADERS[0])
    (scratch / "secret.safetensors").write_bytes(seeds.HEADERS[0])

    def check(data: bytes) -> None:
        (folder / INDEX_NAME).write_bytes(data)
        for file in (refused(lambda: safetensors_index(folder)) or {}).values():
            promise(file.parent == folder and file.is_file(), f"{file} is not a file of the folder")

    return check


# -- GGUF


def _gguf(scratch: Path) -> Check:
    import gguf

    from sparktune.setup.export.gguf_header import read_gguf_header

    path = scratch / "model.gguf"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        header = refused(lambda: read_gguf_header(path))
        if header is None:
            return
        reader = gguf.GGUFReader(path)  # what reads the file next: it must not meet anything it cannot read
        seen = {t.name: (t.data_offset, t.data_offset + t.n_bytes, t.tensor_type.name) for t in reader.tensors}
        ours = {n: (t.begin, t.end, t.kind) for n, t in header.tensors.items()}
        promise(seen == ours, "the reader sees other tensors")
        for field in reader.fields.values():
            field.contents()

    return check


# -- a model's folder


def _model(scratch: Path) -> Check:
    from sparktune.setup.plan.models import adapter_base, probe

    folder, adapter = scratch / "base", scratch / "adapter"
    folder.mkdir(exist_ok=True)
    adapter.mkdir(exist_ok=True)

    def check(data: bytes) -> None:
        if data[:1] == b"A":
            (adapter / "adapter_config.json").write_bytes(data[1:])
            refused(lambda: adapter_base(adapter))
            return
        (folder / "config.json").write_bytes(data)
        spec = refused(lambda: probe(str(folder)))
        if spec is not None:
            promise(len(spec.layer_types) == spec.num_layers and spec.parameters >= 0, "a spec contradicts itself")

    return check


def _adapter(scratch: Path) -> Check:
    from sparktune.setup.export.adapter import read_adapter
    from sparktune.setup.plan.weights import TensorEntry

    folder = scratch / "lora"
    folder.mkdir(exist_ok=True)
    base = {"model.layers.0.mlp.up_proj.weight": TensorEntry(dtype="F32", shape=(4, 2), begin=0, end=32)}
    keys = [f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.weight" for x in "AB"]
    header = json.dumps({keys[0]: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
                         keys[1]: {"dtype": "F32", "shape": [4, 2], "data_offsets": [16, 48]}}).encode()
    header += b" " * (-len(header) % 8)
    (folder / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + struct.pack("<12f", *range(12))
    )

    def check(data: bytes) -> None:
        (folder / "adapter_config.json").write_bytes(data)
        found = refused(lambda: read_adapter(folder, base, tied=False))
        if found is not None:
            promise(len(found.updates) == 1, "one module has one update")

    return check


# -- what a run left, read again by `runs`, resume and the report


def _run(scratch: Path) -> Check:
    from sparktune.setup.plan.schema import SCHEMA_VERSION
    from sparktune.setup.report import write_report
    from sparktune.setup.runs import compare, describe

    run = scratch / "results" / "one"
    (run / "stages").mkdir(parents=True, exist_ok=True)
    (run / "plan.yaml").write_text(f"schema_version: {SCHEMA_VERSION}\nname: one\noutput: {scratch / 'output'}\n")
    names = ("state.json", "metrics.jsonl", "samples.jsonl", "stages/train.ndjson", "evaluation.json",
             "data/report.json", "quantised_base.json", "mtp/acceptance.json")

    def check(data: bytes) -> None:
        name = names[data[0] % len(names)] if data else names[0]
        path = run / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data[1:])
        refused(lambda: describe(run))
        refused(lambda: compare([run, run]))
        if crc32(data) % 4 == 0:
            refused(lambda: write_report(run))
        path.unlink()

    return check


def _plan_words() -> tuple[str, ...]:
    from sparktune.setup.plan.schema import Plan
    from sparktune.setup.plan.template import SECTIONS

    return (*Plan.model_fields, *SECTIONS, *(key for keys in SECTIONS.values() for key in keys))


def _marked(mutation: mutate.Mutation) -> mutate.Mutation:
    """The first byte says what kind of file the rest is; it stays, mostly."""
    return lambda rng, data: (
        (data[:1] if rng.random() < 0.9 else bytes([rng.randrange(256)])) + mutation(rng, data[1:]) if data else b"M"
    )


_TREE_OR_MARKED = {
    "manifest": mutate.json_tree(seeds.LOOP_WORDS), "model": mutate.json_tree(seeds.CONFIG_WORDS),
}


def _maybe_marked(name: str, mark: bytes) -> mutate.Mutation:
    inner = _TREE_OR_MARKED[name]
    return lambda rng, data: mark + inner(rng, data[1:]) if data[:1] == mark else inner(rng, data)


_SHARDS = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
_INDEX = json.dumps({"metadata": {}, "weight_map": _SHARDS}).encode()
_INDEX_WORDS = ("weight_map", "metadata", "../secret.safetensors", "/etc/hostname", "a", "b")
_ADAPTER = b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {}}'

TARGETS: dict[str, Target] = {target.name: target for target in (
    Target(name="rows", about="the JSONL reader", make=_rows, seeds=seeds.ROWS,
           mutation=mutate.json_lines(seeds.ROW_WORDS), share=200),
    Target(name="chat", about="chats through six templates", make=_chat, seeds=seeds.CHATS,
           mutation=mutate.json_tree(seeds.ROW_WORDS), share=40),
    Target(name="plan", about="plan.yaml and configs", make=_plan, seeds=seeds.PLANS,
           mutation=mutate.yaml_lines(_plan_words()), share=40),
    Target(name="manifest", about="a checkpoint's manifest and loop.json", make=_manifest, seeds=seeds.MANIFESTS,
           mutation=_maybe_marked("manifest", b"M"), share=40),
    Target(name="safetensors", about="safetensors headers", make=_safetensors, seeds=seeds.HEADERS,
           mutation=mutate.safetensors_header(seeds.SAFETENSORS_WORDS), share=900),
    Target(name="index", about="the shards' index", make=_index, seeds=(_INDEX,),
           mutation=mutate.json_tree(_INDEX_WORDS), share=120),
    Target(name="gguf", about="GGUF headers", make=_gguf, seeds=(seeds.gguf_seed(),), mutation=mutate.gguf_fields,
           share=500),
    Target(name="model", about="config.json", make=_model, seeds=seeds.CONFIGS,
           mutation=_maybe_marked("model", b"A"), share=200),
    Target(name="adapter", about="adapter_config.json", make=_adapter, seeds=(_ADAPTER,),
           mutation=mutate.json_tree(seeds.ADAPTER_WORDS), share=50),
    Target(name="run", about="what a run left, and its report", make=_run, seeds=seeds.RUNS,
           mutation=_marked(mutate.json_lines(seeds.RUN_WORDS)), share=4),
)}
