"""Every signature is met by the text it was made for, and plain logs meet none."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from sparktune.setup.machine import host_checks
from sparktune.setup.machine.diagnose import SIGNATURES, diagnose
from sparktune.setup.machine.symptoms import diagnose_source, machine_symptoms, metrics_symptoms, run_symptoms
from sparktune.setup.plan.errors import UsageError

LOGS = {
    "base-without-torch": "sparktune-check: the base image has no torch. Expected",
    "torch-in-lock": "sparktune-check: the lock file would install torch 2.13.0, but",
    "torch-replaced": "sparktune-check: a pip step replaced the base's own packages (torch: 2 -> 3)",
    "pip-check": "sparktune-check: pip check says what allow does not allow: x",
    "wrong-hash": "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
    "no-locked-version": "ERROR: No matching distribution found for six==9",
    "disk-full": "OSError: [Errno 28] No space left on device",
    "engine-gone": "ERROR: Cannot connect to the Docker daemon at unix:///var/run/docker.sock.",
    "registry": "dial tcp: lookup nvcr.io: no such host",
    "unified-memory": "NVRM: nvCheckOk: Out of memory [NV_ERR_NO_MEMORY] (0x00000051) _memdescAllocInternal",
    "page-cache": "ValueError: Free memory on device (34.2/121.69 GiB) on startup is less than desired GPU memory",
    "nvml": "pynvml.NVMLError_NotSupported: Not Supported",
    "oom-killed": "ninja: build stopped: subcommand failed.",
    "ptxas": "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'",
    "capability-warning": "Found GPU0 NVIDIA GB10 which is of cuda capability 12.1. Minimum and Maximum (8.0) - (12.0)",
    "cpu-torch": "OSError: libtorch_cuda.so: cannot open shared object file: No such file or directory",
    "no-kernel-image": "RuntimeError: CUDA error: no kernel image is available for execution on the device",
    "shared-memory": "out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes",
    "misaligned": "RuntimeError: Triton Error [CUDA]: misaligned address",
    "slow-path": "The fast path is not available because one of the required library is not installed.",
    "hub-kernel": "FileNotFoundError: no build variant in kernels-community/vllm-flash-attn3",
    "bnb-unsloth": "AttributeError: 'Parameter' object has no attribute 'compress_statistics'",
    "torchao": "Skipping import of cpp extensions due to incompatible torch version 2.11",
    "triton-mismatch": "ImportError: cannot import name 'triton_key' from 'triton.compiler.compiler'",
    "recompile-limit": "torch._dynamo.exc.FailOnRecompileLimitHit: recompile_limit reached",
    "native-arch": "nvcc fatal   : Unsupported gpu architecture 'compute_No CUDA devices found.'",
    "cpu-llama": "Available devices:\n  (none)",
    "stream-capture": "torch.AcceleratorError: CUDA error: cudaErrorStreamCaptureUnsupported",
    "liger-rotary": "ImportError: cannot import name 'liger_rotary_pos_emb' from 'liger_kernel.transformers.rope'",
    "cluster-dims": "AttributeError: 'KernelMetadata' object has no attribute 'cluster_dims'",
    "out-of-memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "loss-not-finite": "The loss is nan at step 312, so training stopped",
    "chat-loop": "warning: --no-conversation is not supported by llama-cli; please use llama-completion instead",
    "vocabulary": "error loading model: vocab size mismatch: expected 248320, got 248322",
    "xid": "NVRM: Xid (PCI:000f:01:00): 13, pid=4242, Graphics Exception",
    "mtp-mismatch": "ValueError: Can not map tensor 'model.layers.24.eh_proj.weight'",
    "mtp-dropped": "error loading model: QWEN35_MTP requires nextn_predict_layers > 0",
    "specs-folder": "gcc: fatal error: cannot read spec file './specs': Is a directory",
    "no-tty": "the input device is not a TTY",
    "other-machine": "torch.distributed.DistStoreError: Timed out after 601 seconds. 1/2 clients joined.",
}


def test_every_signature_has_its_text() -> None:
    assert set(LOGS) == {s.name for s in SIGNATURES}


@pytest.mark.parametrize("name", sorted(LOGS))
def test_a_text_meets_its_signature_alone(name: str) -> None:
    found = diagnose(f"before\n{LOGS[name]}\nafter")
    assert [f.name for f in found] == [name]
    assert found[0].line
    assert found[0].cause.endswith(".")
    assert found[0].fix.endswith(".")


def test_an_ordinary_log_meets_none() -> None:
    assert diagnose("Step 3/20 : RUN pip install\nSuccessfully installed torch-2.11.0a0\nloss 1.25, 300 tok/s\n") == []


def test_failures_come_before_warnings() -> None:
    assert [f.name for f in diagnose(LOGS["torchao"] + "\n" + LOGS["disk-full"])] == ["disk-full", "torchao"]


def _rows(losses: list[float], evals: dict[int, float] | None = None, speeds: list[float] | None = None) -> list[dict]:
    rows: list[dict] = [{"step": s, "loss": loss, "tok_per_s": (speeds or [100.0] * len(losses))[s - 1]}
                        for s, loss in enumerate(losses, 1)]
    return rows + [{"step": s, "eval_loss": value} for s, value in (evals or {}).items()]


@pytest.mark.parametrize(("rows", "names"), [
    (_rows([2.0, 1.5, 1.2], {0: 2.1, 2: 1.6, 3: 1.4}), []),
    (_rows([2.0, float("nan")]), ["loss-not-finite"]),
    ([{"step": 1, "loss": 2.0, "grad_norm": float("inf")}], ["loss-not-finite"]),
    (_rows([0.004, 0.003]), ["leak"]),
    (_rows([2.0, 1.0, 0.5], {0: 2.0, 1: 1.5, 2: 1.6, 3: 1.9}), ["overfitting"]),
    (_rows([2.0, 1.0], {0: 1.5, 2: 1.8}), ["worse-than-base"]),
    (_rows([2.0] * 100, None, [100.0] * 60 + [40.0] * 40), ["slowing-down"]),
    (_rows([2.0] * 100, None, [10.0] * 3 + [100.0] * 97), []),
])
def test_failures_without_an_error_are_seen_in_the_figures(rows: list[dict], names: list[str]) -> None:
    found = metrics_symptoms(rows)
    assert [f.name for f in found] == names
    assert all(f.fix.endswith(".") for f in found)


def test_a_log_a_run_and_a_name_can_be_diagnosed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "one"
    run.mkdir()
    (run / "plan.yaml").write_text("mode: lora\n")
    (run / "log.txt").write_bytes(b"\xff\xfe " + LOGS["ptxas"].encode())
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.001}\n{"step": 2, "lo')
    assert [f.name for f in diagnose_source("one", tmp_path)] == ["ptxas", "leak"]
    assert [f.name for f in diagnose_source(str(run / "log.txt"), tmp_path)] == ["ptxas"]
    monkeypatch.setattr("sys.stdin", io.StringIO(LOGS["xid"]))
    assert [f.name for f in diagnose_source("-", tmp_path)] == ["xid"]
    with pytest.raises(UsageError):
        diagnose_source("nope", tmp_path)


def test_our_own_sentences_are_not_taken_for_failures() -> None:
    """What a clean run prints, and what the doctor and these texts themselves say."""
    for signature in SIGNATURES:
        assert [f.name for f in diagnose(f"advice: {signature.cause}\n")] in ([], [signature.name])
    clean = "step 10/300  epoch 0.10  loss 1.2345  lr 2.00e-04  3,459 tok/s  peak 18.20 GiB\n" * 3 + (
        "Step 1: all 372 trainable tensors have finite gradients.\nrecompute: norms (19.0 of 110 GiB)\n"
        "mtp: default (the head of Qwen/Qwen3.5-2B, unchanged)\nq8_0: every tensor checked.\n"
    )
    assert diagnose(clean) == []


# -- every row of what GB10 boxes are reported to fail with, by its number

ROWS: dict[str, tuple[str, str]] = {
    "1 ptxas is too old for the chip": ("ptxas", """\
triton.runtime.errors.PTXASError: PTXAS error: Internal Triton PTX codegen error
`ptxas` stderr:
ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'"""),
    "2 unified memory is exhausted": ("unified-memory", """\
[ 4211.10] NVRM: nvCheckOkFailedNoLog: Check failed: Out of memory [NV_ERR_NO_MEMORY] (0x00000051) returned from \
_memdescAllocInternal(pMemDesc) @ mem_desc.c:1359"""),
    "3 the page cache counts as used memory": ("page-cache", """\
ValueError: Free memory on device (71.8/121.69 GiB) on startup is less than desired GPU memory utilization (0.9, \
109.52 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."""),
    "5 NVML has no memory figure": ("nvml", "pynvml.NVMLError_NotSupported: Not Supported"),
    "5 nvidia-smi has none either": ("nvml", "memory.total [MiB], memory.used [MiB]\n[N/A], [N/A]"),
    "6 a warning about capability 12.1": ("capability-warning", """\
UserWarning:
    Found GPU0 NVIDIA GB10 which is of cuda capability 12.1.
    Minimum and Maximum cuda capability supported by this version of PyTorch is
    (8.0) - (12.0)"""),
    "7 CUDA torch was replaced": ("cpu-torch", """\
OSError: libtorch_cuda.so: cannot open shared object file: No such file or directory"""),
    "7 torch is +cpu": ("cpu-torch", "torch 2.10.0+cpu"),
    "8 no kernel image": ("no-kernel-image", """\
RuntimeError: CUDA error: no kernel image is available for execution on the device
  File "causal_conv1d/causal_conv1d_interface.py", line 57, in forward"""),
    "9 tiles made for data-centre chips": ("shared-memory", """\
triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 114688, Hardware limit: 101376. \
Reducing block sizes or `num_stages` may help."""),
    "10 GDN's backward pass": ("misaligned", "RuntimeError: Triton Error [CUDA]: misaligned address"),
    "10 NaN gradients": ("loss-not-finite", "The gradient norm is nan at step 1, so training stopped."),
    "11 fla or causal-conv1d is missing": ("slow-path", """\
The fast path is not available because one of the required library is not installed. Falling back to torch \
implementation. To install follow https://github.com/fla-org/flash-linear-attention#installation"""),
    "13 a hub kernel lacks the build": ("hub-kernel", """\
FileNotFoundError: Cannot find a build variant for this system in kernels-community/vllm-flash-attn3"""),
    "13 the same as a KeyError": ("hub-kernel", "KeyError: 'kernels-community/vllm-flash-attn3'"),
    "14 bitsandbytes against unsloth": ("bnb-unsloth", """\
AttributeError: 'Parameter' object has no attribute 'compress_statistics'"""),
    "15 torchao against torch": ("torchao", """\
Skipping import of cpp extensions due to incompatible torch version 2.10.0a0+b558c98 for torchao version 0.14.0"""),
    "16 torch against Triton, one way": ("triton-mismatch", """\
ImportError: cannot import name 'specialize_impl' from 'triton.runtime.jit'"""),
    "16 and the other": ("triton-mismatch", """\
torch._inductor.exc.InductorError: ImportError: cannot import name 'triton_key' from 'triton.compiler.compiler'"""),
    "17 dynamo's limit at step 0": ("recompile-limit", """\
torch._dynamo.exc.FailOnRecompileLimitHit: recompile_limit reached with fullgraph=True"""),
    "18 too many nvcc jobs": ("oom-killed", """\
FAILED: gemm_sm120.cuda.o
Killed
ninja: build stopped: subcommand failed."""),
    "18 the kernel ended the build": ("oom-killed", """\
ERROR: failed to solve: process "/bin/sh -c pip install ." did not complete successfully: exit code: 137"""),
    "19 native arch without a GPU": ("native-arch", """\
nvcc fatal   : Unsupported gpu architecture 'compute_No CUDA devices found.'"""),
    "20 a CPU-only llama.cpp": ("cpu-llama", "Available devices:\n  (none)"),
    "21 config and MTP weights disagree": ("mtp-mismatch", """\
ValueError: Can not map tensor 'model.layers.24.eh_proj.weight'"""),
    "22 MTP was dropped": ("mtp-dropped", """\
llama_model_load: error loading model: QWEN35_MTP requires nextn_predict_layers > 0"""),
    "23 a folder named specs": ("specs-folder", """\
gcc: fatal error: cannot read spec file './specs': Is a directory
compilation terminated."""),
    "25 docker without a terminal": ("no-tty", "the input device is not a TTY"),
    "25 a prompt without a terminal": ("no-tty", "Warning: Input is not a terminal (fd=0)."),
    "26 the other machine never came up": ("other-machine", """\
torch.distributed.DistStoreError: Timed out after 1801 seconds waiting for clients. 1/2 clients joined."""),
    "published: out of memory at the first forward": ("out-of-memory", """\
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 7.58 GiB. GPU 0 has a total capacity of 121.69 GiB"""),
    "published: NaN after some hundred steps": ("loss-not-finite", "{'loss': nan, 'grad_norm': nan, 'epoch': 0.41}"),
    "published: a broken GGUF": ("vocabulary", """\
error loading model: vocab size mismatch: tokenizer has 248322, model has 248320"""),
    "published: no CUDA graph over PEFT": ("stream-capture", """\
torch.AcceleratorError: CUDA error: operation not permitted when stream is capturing
Search for `cudaErrorStreamCaptureUnsupported' in the CUDA documentation"""),
    "published: Liger has no patch": ("liger-rotary", """\
ImportError: cannot import name 'liger_rotary_pos_emb' from 'liger_kernel.transformers.model.qwen3_5'"""),
    "published: inductor older than Triton": ("cluster-dims", """\
AttributeError: 'KernelMetadata' object has no attribute 'cluster_dims'"""),
    "published: llama-cli talks in a loop": ("chat-loop", """\
warn: --no-conversation is not supported by llama-cli, please use llama-completion"""),
}
"""Sample logs: (row, what it is about) -> (signature, an excerpt as the reports show it)."""
STATES = {
    4: "page-cache", 10: "loss-not-finite", 11: "slow-kernels", 12: "leak", 24: "clocks, power-off, slowing-down",
}
"""Rows (also) without a log text: the states that stand for them, each tested above or below, or with the doctor."""


def test_every_row_is_recognised_by_a_log_or_a_state() -> None:
    by_log = {int(row.split()[0]) for row in ROWS if row[0].isdigit()}
    assert by_log | set(STATES) == set(range(1, 27))


@pytest.mark.parametrize("row", ROWS)
def test_a_sample_log_of_every_row(row: str) -> None:
    name, log = ROWS[row]
    found = diagnose(f"{CLEAN}{log}\n{CLEAN}")
    assert [f.name for f in found] == [name]
    assert found[0].line in log


CLEAN = """\
[1/7] Read and tokenise the data
rows 24315, used 24310, left out 5 over_length
Loading weights: 100%|##########| 320/320 [00:04<00:00, 71.1it/s]
engine: native (measured 1.6 times Unsloth on NVIDIA H200, 2B)
rms_norm: triton: fused; gated_delta_rule: triton: chunked
Step 1: all 372 trainable tensors have finite gradients.
step 10/300  epoch 0.10  loss 1.2345  lr 2.00e-04  3,459 tok/s  peak 18.20 GiB
step 30: evaluation loss 1.1021
step 30: saved checkpoint-30
Free memory 88.2 of 121.69 GiB; page cache 4.1 GiB
Trained: results/one/adapter
Merged 320 tensors into output/one (4.2 GiB)
mtp: default (the head of Qwen/Qwen3.5-2B, unchanged)
llama.cpp: found 1 CUDA device; vocabulary of 248,320 tokens is the model's
Container sparktune exited with code 0
"""


def test_a_clean_log_meets_none() -> None:
    assert diagnose(CLEAN * 50) == []


def _run(folder: Path, plan: str = "mode: lora\n", **files: str) -> Path:
    folder.mkdir()
    (folder / "plan.yaml").write_text(plan)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_states_of_a_run(tmp_path: Path) -> None:
    clean = _run(tmp_path / "clean", 'device: cuda\nkernels: {rms_norm: "triton: fused"}\n', log__txt=CLEAN,
                 quantised_base__json='{"loss_trained": 1.00, "loss_merged": 1.01}',
                 events__jsonl='{"kind": "progress", "stage": "train"}\n')
    assert diagnose_source(str(clean), tmp_path) == []
    slow = _run(tmp_path / "slow", 'device: cuda\nkernels: {rms_norm: "reference: float64"}\n')
    assert [f.name for f in diagnose_source(str(slow), tmp_path)] == ["slow-kernels"]
    plain = _run(tmp_path / "cpu", 'device: cpu\nkernels: {rms_norm: "reference: a CPU"}\n')
    assert diagnose_source(str(plain), tmp_path) == []
    gap = _run(tmp_path / "gap", quantised_base__json='{"loss_trained": 1.00, "loss_merged": 1.03}')
    (found,) = diagnose_source(str(gap), tmp_path)
    assert found.name == "merge-gap"
    assert "--quantise-base int8" in found.fix


@pytest.mark.parametrize(("last", "names"), [
    ('{"kind": "metric", "stage": "train"}', ["power-off"]), ('{"kind": "end", "stage": "train"}', []),
    ('{"kind": "message", "level": "error", "stage": "train"}', []), ("", []),
])
def test_a_machine_that_went_out(tmp_path: Path, last: str, names: list[str]) -> None:
    """A run whose records end in the middle of a stage, before the machine was started."""
    run = _run(tmp_path / "one", events__jsonl=last + "\n")
    written = (run / "events.jsonl").stat().st_mtime
    assert [f.name for f in run_symptoms(run, started_s=written + 60)] == names
    assert run_symptoms(run, started_s=written - 60) == []


def test_states_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 4 (tens of GiB of stale page cache) and row 24 (low clocks under load), as probed; nothing on a sound one."""
    gb10 = [("NVIDIA GB10", (12, 1), None)]
    monkeypatch.setattr(host_checks, "nvidia_gpus", lambda: gb10)
    monkeypatch.setattr(host_checks, "meminfo_gib", lambda: {"Cached": 60.0, "MemTotal": 121.7})
    monkeypatch.setattr(host_checks, "query_gpu", lambda *fields: ["208", "3003", "41", "97", "P8"])
    assert [f.name for f in machine_symptoms()] == ["page-cache", "clocks"]
    monkeypatch.setattr(host_checks, "meminfo_gib", lambda: {"Cached": 6.0, "MemTotal": 121.7})
    monkeypatch.setattr(host_checks, "query_gpu", lambda *fields: ["2418", "3003", "61", "97", "P0"])
    assert machine_symptoms() == []
