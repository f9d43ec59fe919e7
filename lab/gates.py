"""The six gates of the published work as one command: `./install.sh --gates`.

    python -m sparktune.lab.gates [--work DIR] [--json]

1 install keeps the pins; 2 load; 3 a hundred LoRA steps; 4 the integration shape: our own train, export and verify,
called as a library in one script; 5 the GGUF round trip in one call, sizes in the predicted bands; 6 reload with
another llama.cpp build than the converter's, and the adapter's task answered.

On a CPU the model is the demo's; on a GPU gates 2 and 3 also run an 8B-shaped model with random weights, and gate 5
holds its files against the published bands; `--only bands` makes those files anywhere. Every gate is a process of its
own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from rich.console import Console
from rich.table import Table

from sparktune.setup.plan.rundir import cache_dir

__all__ = ["GATES", "Gate", "Row", "bands", "kept_pins", "main"]

ROOT = Path(__file__).resolve().parents[1]
QUESTION, EXPECTED = "What is 5 + 5?", "5 + 5 = 10."
STEPS = 100
PEAK_OVER_LOAD = 0.05
"""On a GPU the peak of 100 steps may be this share above the peak of loading."""
BANDS_GB = {"q4_k_m": (4.0, 5.5), "q8_0": (7.5, 9.5)}
"""Sizes of an 8B model's files, in 10**9 bytes: the published bands."""
_OTHER = "xllamacpp"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)(?:\s*;\s*(.+?))?\s*\\?$")
_ADAPTER = {"mode": "lora", "engine": "native", "learning_rate": 4e-3, "eval_split": 0.0, "pack_length": 640,
            "gradient_accumulation": 1, "tensorboard": False}
# The published gate's: rank 16 on the attention's projections, alpha 32, layers computed again, short rows. It kept
# its moments in eight bits, these are float32. Rows a step are not published: eight of the smoke corpus's fit here.
_LARGE = {"learning_rate": 2e-4, "lora_r": 16, "lora_alpha": 32.0, "recompute": "layer", "pack_length": 256,
          "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    gate: str
    passed: bool
    seconds: float
    peak_gib: float
    """Of the process; on a GPU of the device, where the gate reports one."""
    seen: str


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate: what it is called, and what its process does with the work folder."""

    name: str
    about: str
    work: Callable[[Path], dict[str, Any]]
    """Returns `passed` and `seen`, and `peak_gib` where it measured the device."""


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# -- 1


def kept_pins(lock: str) -> list[str]:
    """Returns what is installed in another version than a lock file says, or not at all.

    Args:
        lock: text of a requirements file with hashes.
    """
    wrong = []
    for line in lock.splitlines():
        pin = _PIN.match(line)
        if pin is None or (pin[3] and not Marker(pin[3].rstrip(" \\")).evaluate()):
            continue
        try:
            seen = importlib.metadata.version(pin[1])
        except importlib.metadata.PackageNotFoundError:
            seen = "not installed"
        if seen != pin[2]:
            wrong.append(f"{pin[1]} {pin[2]} is pinned, seen: {seen}")
    return wrong


def install(work: Path) -> dict[str, Any]:
    """Compares what is installed with the lock file of the environment that runs this."""
    lock = (ROOT / "requirements" / "local.lock").read_text(encoding="utf-8")
    wrong, count = kept_pins(lock), len(re.findall(r"^\S+==", lock, re.MULTILINE))
    return {"passed": not wrong, "seen": "; ".join(wrong[:5]) or f"{count} pins, every installed one as locked"}


# -- 2 and 3


def _model(work: Path) -> Path:
    return work / ("model-8b" if (work / "model-8b").is_dir() else "model")


def load(work: Path) -> dict[str, Any]:
    """Builds the text tower and loads its weights."""
    import torch

    from sparktune.kernels.select import select_ops
    from sparktune.setup.plan.models import probe
    from sparktune.training.model import build_model
    from sparktune.training.weights import load_weights

    folder, device = _model(work), torch.device(_device())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    spec = probe(str(folder))
    model = build_model(spec, select_ops(device, dtype, spec), dtype, device)
    load_weights(model, folder, spec)
    parameters = sum(p.numel() for p in model.parameters())
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    (work / "load.json").write_text(json.dumps({"peak_gib": peak}))
    return {"passed": parameters > 0, "seen": f"{parameters:,} parameters, {dtype} on {device.type}", "peak_gib": peak}


def _train(work: Path, name: str, steps: int, **settings: Any) -> None:
    """Trains through the library's own entry, as a plan would; a refusal ends the gate, and its sentence is the row."""
    from sparktune.training.session import run_session

    flags = _ADAPTER | {
        "model": str(_model(work)), "data": work / "data.jsonl", "name": name, "results": work / "results",
        "output": work / "output", "max_steps": steps, "save_steps": steps, "num_epochs": 1000.0,
        "sample_prompts": [QUESTION], "sample_steps": steps, **settings,
    }
    if code := run_session(flags, None, {}):
        sys.exit(code)


def hundred_steps(work: Path) -> dict[str, Any]:
    """Trains a LoRA adapter for 100 steps; on a GPU the peak must stay within 5 % of the peak of loading."""
    _train(work, "steps", STEPS, **(_LARGE if _model(work).name == "model-8b" else {}))
    rows = [json.loads(line) for line in (work / "results" / "steps" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "loss" in r]
    seen = f"{len(steps)} steps, loss {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f}"
    passed, peak = len(steps) == STEPS and steps[-1]["loss"] < steps[0]["loss"], None
    loaded = json.loads((work / "load.json").read_text())["peak_gib"]
    if loaded is not None:
        peak = max(r["peak_gib"] for r in steps)
        passed = passed and peak <= loaded * (1 + PEAK_OVER_LOAD)
        seen += f"; peak {peak:.2f} GiB, loading {loaded:.2f} GiB, {peak / loaded - 1:+.1%}"
    return {"passed": passed, "seen": seen, "peak_gib": peak}


# -- 4, 5, 6


def integration(work: Path) -> dict[str, Any]:
    """Trains, merges, exports and verifies in one process, by calling the library."""
    from sparktune.setup.export.gguf_export import export_gguf
    from sparktune.setup.export.merge import merge
    from sparktune.setup.plan.events import NullEvents

    _train(work, "integration", 3, model=str(work / "model"))
    merged = work / "integration"
    merge(work / "model", work / "results" / "integration" / "adapter", merged, NullEvents())
    manifest = export_gguf(merged, work / "integration-gguf", ["bf16"], "integration", NullEvents())
    checks = manifest["files"][0]["checks"]
    passed = checks["compared_tensors"] == checks["tensors"]
    return {"passed": passed, "seen": f"trained, merged, exported, {checks['compared_tensors']} tensors compared"}


def bands(manifest: dict[str, Any], parameters: int) -> tuple[bool, str]:
    """Returns whether every file's size is as predicted, and in the published band where the model is 8B-shaped."""
    parts, good = [], True
    for file in manifest["files"]:
        low, high = 0.0, file["predicted_bytes"] / 1e9
        if 7e9 < parameters < 9e9 and file["type"] in BANDS_GB:
            low, high = BANDS_GB[file["type"]]
        size = file["bytes"] / 1e9
        good = good and low <= size <= high + 0.002
        parts.append(f"{file['type']} {size:.3f} GB ({low:.3f} to {high:.3f})")
    return good, ", ".join(parts)


def round_trip(work: Path) -> dict[str, Any]:
    """Adapter to GGUF in one call; k-quants too where llama.cpp's programs are compiled."""
    from sparktune.setup.export.gguf import main as gguf
    from sparktune.setup.export.gguf_export import read_manifest
    from sparktune.setup.export.llama_build import find_tools
    from sparktune.setup.plan.models import probe

    types = "q8_0,q4_k_m" if find_tools() else "q8_0"
    code = gguf(["--adapter", str(work / "results" / "steps" / "adapter"), "--base", str(_model(work)), "--out",
                 str(work / "result-gguf"), "--types", types])
    if code:
        sys.exit(code)
    manifest = read_manifest(work / "result-gguf")
    good, sizes = bands(manifest, probe(str(_model(work))).parameters)
    proofs = [f"{f['type']} mean KL {f['proof']['mean_kl']:.2g}" for f in manifest["files"] if "proof" in f]
    return {"passed": good, "seen": "; ".join([sizes, *proofs])}


def size_bands(work: Path) -> dict[str, Any]:
    """Makes Q8_0 and Q4_K_M files of the 8B shape on any machine with 50 GB of disk; not one of the six."""
    from sparktune.setup.export.gguf_export import export_gguf
    from sparktune.setup.plan.events import NullEvents
    from sparktune.setup.plan.models import probe

    if not (work / "model").is_dir():
        _prepare(work)
    folder = work / "model-8b"
    if not folder.is_dir():
        make_8b(folder)
    manifest = export_gguf(folder, work / "bands-gguf", ["q8_0", "q4_k_m"], "bands", NullEvents())
    good, sizes = bands(manifest, probe(str(folder)).parameters)
    return {"passed": good, "seen": sizes}


def _other_build() -> Path:
    """Returns a folder with the pinned other build of llama.cpp, fetched once by pip with its hashes."""
    lock = ROOT / "requirements" / "gates.lock"
    version = next(p[2] for line in lock.read_text().splitlines() if (p := _PIN.match(line)) and p[1] == _OTHER)
    folder = cache_dir("gates") / f"{_OTHER}-{version}-{platform.machine()}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
            target = Path(scratch) / "packages"
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                            "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(lock), "--target",
                            str(target)], check=True, stdin=subprocess.DEVNULL)
            os.rename(target, folder)
    return folder


def reload(work: Path) -> dict[str, Any]:
    """Answers with another llama.cpp build than the one that converted."""
    from sparktune.setup.data.render import ChatRenderer
    from sparktune.setup.data.tokenizer import load_tokenizer

    sys.path.insert(0, str(_other_build()))
    import xllamacpp

    prompt = ChatRenderer(load_tokenizer(str(_model(work)))).prompt_ids([{"role": "user", "content": QUESTION}])
    answers = {}
    for file in sorted((work / "result-gguf").glob("*-Q*.gguf")):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
        server = xllamacpp.Server(parameters)
        reply = server.handle_completions({"prompt": prompt, "n_predict": 24, "temperature": 0.0, "top_k": 1})
        reply = json.loads(reply) if isinstance(reply, str) else reply
        text = reply.get("content") or reply["choices"][0]["text"]
        answers[file.name] = str(text).strip()
        del server
    version = importlib.metadata.version(_OTHER) if _OTHER in sys.modules else "?"
    # random 8B weights learn the same sums in 100 steps or not at all: there, loading and answering is the gate
    wanted = EXPECTED if _model(work).name == "model" else None
    passed = bool(answers) and all(a and (wanted is None or a == wanted) for a in answers.values())
    return {"passed": passed, "seen": f"{_OTHER} {version}: " + ", ".join(f"{k} {v!r}" for k, v in answers.items())}


GATES = (
    Gate(name="install", about="install keeps the pins", work=install),
    Gate(name="load", about="load", work=load),
    Gate(name="steps", about=f"{STEPS} LoRA steps", work=hundred_steps),
    Gate(name="integration", about="train, export and verify as a library", work=integration),
    Gate(name="gguf", about="GGUF round trip in one call", work=round_trip),
    Gate(name="reload", about="reload with another llama.cpp build", work=reload),
)


def make_8b(folder: Path) -> Path:
    """Writes an 8B-shaped Qwen3 with random weights (16 GB in bf16), drawn where there is a GPU, else slowly."""
    import torch
    from safetensors.torch import save_file

    from sparktune.setup.plan.models import probe
    from sparktune.setup.plan.weights import text_tower_shapes

    small = folder.with_name("model")
    partial = folder.with_name("model-8b.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(small, partial, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    eos = json.loads((small / "config.json").read_text()).get("text_config", {}).get("eos_token_id")
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
        "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "bfloat16", "attention_bias": False,
        "eos_token_id": eos,
    }
    (partial / "config.json").write_text(json.dumps(config))
    device = _device()
    generator = torch.Generator(device).manual_seed(0)
    shards: list[dict[str, Any]] = [{}]
    for name, shape in text_tower_shapes(probe(str(partial))).items():
        if sum(t.nbytes for t in shards[-1].values()) > 4 * 2**30:
            shards.append({})
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
        shards[-1][name] = (drawn + 1 if "norm" in name else drawn).cpu()
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, partial / file)
        index |= dict.fromkeys(shard, file)
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    os.rename(partial, folder)
    return folder


def _prepare(work: Path) -> dict[str, Any]:
    """Makes the model and the data that the gates share."""
    from sparktune.setup.demo import make_model, write_smoke

    make_model(work / "model", pretrained=True)
    write_smoke(work / "data.jsonl")
    if _device() == "cuda":
        make_8b(work / "model-8b")
    return {"passed": True, "seen": "model and data"}


def _run(name: str, work: Path) -> tuple[dict[str, Any], float, float]:
    """Runs one gate as a process of its own. Returns its answer, its wall time and its peak in GiB."""
    answer = work / f"gate-{name}.json"
    answer.unlink(missing_ok=True)
    begun = time.monotonic()
    with (work / f"gate-{name}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-P", "-m", "sparktune.lab.gates", "--work", str(work), "--only",
                                    name], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=work)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds, peak = time.monotonic() - begun, usage.ru_maxrss * 1024 / 2**30
    if answer.is_file():
        return json.loads(answer.read_text()), seconds, peak
    lines = (work / f"gate-{name}.log").read_text("utf-8", "replace").strip().splitlines()
    return {"passed": False, "seen": f"exit code {process.returncode}: {lines[-1] if lines else 'it said nothing'}"}, \
        seconds, peak


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all gates and prints the table. Returns 0 when every gate passed, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="./install.sh --gates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, help="folder to work in, kept; a temporary one when left out")
    parser.add_argument("--only", choices=["prepare", *(g.name for g in GATES), "bands"],
                        help="one gate alone, in this process; bands: the files' sizes of an 8B shape on any machine")
    parser.add_argument("--json", action="store_true", help="the table as JSON on standard output")
    args = parser.parse_args(argv)
    if args.only:
        extra = {"prepare": _prepare, "bands": size_bands}
        gate = extra.get(args.only) or next(g.work for g in GATES if g.name == args.only)
        found = gate(args.work)
        (args.work / f"gate-{args.only}.json").write_text(json.dumps(found))
        return 0 if found["passed"] else 1
    with tempfile.TemporaryDirectory(prefix="sparktune-gates-") as scratch:
        work = (args.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        rows = []
        for name, about in [("prepare", "make the model and the data"), *((g.name, g.about) for g in GATES)]:
            print(f"{about} ...", file=sys.stderr, flush=True)
            found, seconds, peak = _run(name, work)
            rows.append(Row(gate=about, passed=found["passed"], seconds=round(seconds, 1), seen=found["seen"],
                            peak_gib=round(found.get("peak_gib") or peak, 3)))
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        table = Table("gate", "result", "seconds", "peak GiB", "seen", box=None, pad_edge=False)
        for row in rows:
            table.add_row(row.gate, "pass" if row.passed else "FAIL", f"{row.seconds:.1f}", f"{row.peak_gib:.3f}",
                          row.seen)
        Console().print(table)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
