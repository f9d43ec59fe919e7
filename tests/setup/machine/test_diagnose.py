"""Every signature is met by the text it was made for, and plain logs meet none."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from sparktune.setup.machine.diagnose import SIGNATURES, diagnose
from sparktune.setup.machine.symptoms import diagnose_source, metrics_symptoms
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
