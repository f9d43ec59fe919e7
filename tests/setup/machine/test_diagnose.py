"""Every signature is met by the text it was made for, and plain logs meet none."""

from __future__ import annotations

import pytest

from sparktune.setup.machine.diagnose import SIGNATURES, diagnose

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
