"""How a GB10 box fails: signatures in logs, each with its cause and what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["SIGNATURES", "Finding", "Signature", "diagnose"]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """A text that names its failure."""

    name: str
    pattern: re.Pattern[str]
    cause: str
    fix: str
    source: str = ""
    """The public report it was taken from; authors' claims."""
    warning: bool = False
    """Usually harmless: shown after what is not."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A signature that was met, with the line that met it."""

    name: str
    line: str
    cause: str
    fix: str
    source: str
    warning: bool

    def sentence(self) -> str:
        """Returns cause and fix in one line."""
        return f"{self.cause} {self.fix}" + (f" ({self.source})" if self.source else "")


def _s(name: str, pattern: str, cause: str, fix: str, source: str = "", warning: bool = False) -> Signature:
    return Signature(
        name=name, pattern=re.compile(pattern, re.IGNORECASE), cause=cause, fix=fix, source=source, warning=warning
    )


SIGNATURES: tuple[Signature, ...] = (
    # -- what our own build refuses
    _s("base-without-torch", r"sparktune-check: the base image has no torch",
       "The base image is not a PyTorch image.", "Use the base that the stack's stack.yaml names."),
    _s("torch-in-lock", r"sparktune-check: the lock file would install",
       "A lock file would replace a package that the base built for this chip.",
       "Take it out of the lock file; docker/stacks/overrides.txt does that when the lock is made."),
    _s("torch-replaced", r"sparktune-check: a pip step replaced",
       "A pip step replaced the base's own CUDA packages.", "Install with --no-deps from a lock file only."),
    _s("pip-check", r"sparktune-check: pip check says",
       "Installed packages disagree in a way this stack is not known for.",
       "Mend the pin, or allow the exact line in the stack's pip-check.allow if it is known to be harmless."),
    _s("wrong-hash", r"DO NOT MATCH THE HASHES",
       "A downloaded package is not the one that was locked: another file, or a damaged download.",
       "Start again; if it stays, compare the lock file with the index and do not install the package."),
    _s("no-locked-version", r"No matching distribution found for",
       "The package index does not offer a pinned version for this platform.",
       "Check the network and the index that pip is configured with."),
    # -- the host
    _s("disk-full", r"No space left on device|disk quota exceeded", "The disk is full.",
       "Free space (docker system df shows what the engine holds) and start again; finished steps are kept."),
    _s("engine-gone", r"error during connect|Cannot connect to the Docker daemon|connection reset by peer|"
                      r"RemoteDisconnected|Connection aborted|error reading from server: EOF|transport is closing",
       "The Docker engine went away.", "Start it (sudo systemctl start docker), see its log (journalctl -u docker)."),
    _s("registry", r"no such host|TLS handshake timeout|failed to resolve source metadata|pull access denied|"
                   r"unauthorized: authentication required",
       "The registry cannot be reached or wants a login.",
       "Check the network; for nvcr.io, docker login nvcr.io with user $oauthtoken and an NGC key."),
    _s("unified-memory", r"NV_ERR_NO_MEMORY|_memdescAllocInternal",
       "Unified memory is exhausted; the host can hang without an error from Python.",
       "Lower the pack length or turn on --recompute; close what else uses memory.",
       "open-gpu-kernel-modules#1358, dgx-spark-playbooks#97"),
    _s("page-cache", r"Free memory on device \([\d.]+/[\d.]+ GiB\) on startup is less than desired",
       "The GPU counts the page cache as used memory.",
       "Free it: sync; echo 3 | sudo tee /proc/sys/vm/drop_caches.", "vllm#48140"),
    _s("nvml", r"NVMLError_NotSupported|memory\.(total|used|free) \[MiB\][^\n]*\n[^\n]*\[N/A\]",
       "GB10 has no memory of its own to report.",
       "Read /proc/meminfo instead.", "NeMo-RL#2203", warning=True),
    _s("oom-killed", r"ninja: build stopped|exit code: 137|returned a non-zero code: 137",
       "Too many compilers at once took all memory.", "Build with MAX_JOBS=2 or 1.", "flashinfer#3634"),
    # -- torch, Triton and friends
    _s("ptxas", r"ptxas fatal\s*:\s*Value 'sm_121a?' is not defined",
       "Triton's bundled ptxas is too old for this chip.",
       "Set TRITON_PTXAS_BLACKWELL_PATH to the toolkit's ptxas (for Triton 3.6 TRITON_PTXAS_PATH is not read here).",
       "triton#8539"),
    _s("capability-warning", r"Found GPU0 NVIDIA GB10 which is of cuda capability 12\.1",
       "torch warns that it was built for 12.0; code for 12.0 runs on 12.1.", "Nothing to do.",
       "unsloth#3898", warning=True),
    _s("cpu-torch", r"libtorch_cuda\.so: cannot open shared object file|torch[ =]+[\d.]+\+cpu",
       "A resolver replaced the CUDA build of torch.", "Rebuild the image: ./install.sh --rebuild=clean.",
       "dgx-spark-playbooks#90"),
    _s("no-kernel-image", r"CUDA error: no kernel image is available",
       "A compiled package has no code for sm_121.", "Build it from source for this chip, as docker/Dockerfile.opt "
       "does for causal-conv1d.", "causal-conv1d#119, #105"),
    _s("shared-memory", r"out of resource: shared memory, Required: \d+, Hardware limit: 101376",
       "A kernel's tiles were made for data-centre chips.", "Use smaller tiles or fewer stages.", "triton#8182"),
    _s("misaligned", r"Triton Error \[CUDA\]: misaligned address",
       "The gated delta rule's backward pass is known to fail so on Blackwell.",
       "Train with --engine native, which checks gradients at step 1.", "fla#913"),
    _s("slow-path", r"The fast path is not available", "fla or causal-conv1d is missing or disabled; training is slow.",
       "Use the image of docker/Dockerfile.opt; ./install.sh tells whether its fast path works.",
       "transformers#48718, unsloth#6850"),
    _s("hub-kernel", r"(FileNotFoundError|KeyError).*kernels-community/vllm-flash-attn3",
       "A kernel from the hub has no build for this platform.", "Choose another attention implementation.",
       "unsloth#4867"),
    _s("bnb-unsloth", r"'Parameter' object has no attribute 'compress_statistics'",
       "bitsandbytes and unsloth do not fit together.", "Use one of the pinned stacks (--stack).",
       "dgx-spark-playbooks#57"),
    _s("torchao", r"Skipping import of cpp extensions due to incompatible torch version",
       "torchao was built for another torch; usually cosmetic.", "Nothing to do.", "axolotl#3432", warning=True),
    _s("triton-mismatch", r"cannot import name '(specialize_impl|triton_key)'",
       "torch and Triton do not belong together.",
       "Restore the base's pair: ./install.sh --rebuild=clean.", "sglang#12783, triton#7835"),
    _s("recompile-limit", r"FailOnRecompileLimitHit",
       "torch.compile met more shapes than it allows; its settings are per thread from torch 2.12.",
       "Keep packed shapes fixed (--pack), or train with --engine native.", "unsloth#6825"),
    _s("native-arch", r"Unsupported gpu architecture 'compute_No CUDA devices found",
       "A build asked for this machine's GPU where none is visible.", "Name the architecture: 121a.",
       "llama.cpp#18430"),
    _s("cpu-llama", r"Available devices:\s*\(none\)", "llama.cpp was built without CUDA.",
       "Use the one in the image, /opt/llama.cpp/bin.", "unsloth#10491"),
    _s("stream-capture", r"cudaErrorStreamCaptureUnsupported|operation not permitted when stream is capturing",
       "A CUDA graph cannot hold this step: PEFT's dictionaries, Unsloth's patches and bitsandbytes break capture.",
       "Train with --engine native, whose passes are captured whole.", "published, DGX Spark"),
    _s("liger-rotary", r"liger_rotary_pos_emb",
       "Liger's patches for qwen3_5 do not install: a gated delta net has no standard rotary embedding.",
       "Leave Liger out; --engine native and Unsloth bring fused kernels of their own.", "published, DGX Spark"),
    _s("cluster-dims", r"cluster_dims",
       "The base image's inductor is older than its Triton and does not know `cluster_dims` (NGC 25.10).",
       "Use the base that the stack's stack.yaml names: ./install.sh --rebuild=clean.", "published, DGX Spark"),
    _s("out-of-memory", r"torch\.(cuda\.)?OutOfMemoryError|CUDA out of memory|CUDA error: out of memory",
       "The step does not fit in the GPU's memory.",
       "Shorten --max-seq-length (and --pack-length) first, then --recompute layer, then --per-device-batch-size 1.",
       "published practice"),
    _s("loss-not-finite", r"The (loss|gradient norm) is (nan|-?inf)|[\"']?(loss|grad_norm)[\"']?[:=] *nan",
       "The loss or a gradient stopped being a number: too large a step, float16, or a damaged row.",
       "Stay with bfloat16, lower --learning-rate to 1e-4, raise --warmup-ratio, and look at the rows that are named.",
       "published practice"),
    _s("chat-loop", r"(--no-conversation|-no-cnv).*(not supported|llama-completion|no longer)",
       "This llama-cli talks in a loop whatever it is told, and fills the disk with prompts.",
       "Use llama-completion for a single answer.", "published, DGX Spark"),
    _s("vocabulary", r"vocab size mismatch|tokenizer.*does not match.*(vocab|embedding)",
       "The GGUF's vocabulary is not the trained model's: the tokenizer changed and was not saved along.",
       "Convert from output/RUN as written; it carries the tokenizer of the training.", "published practice"),
    _s("xid", r"NVRM: Xid",
       "The GPU's driver reports a fault of the device or of a program on it.",
       "Read the number after Xid in NVIDIA's list; 79 and 119 want a power cycle.", "NVIDIA's Xid catalogue"),
    _s("mtp-mismatch", r"Can not map tensor 'model\.layers\.\d+\.eh_proj\.weight'",
       "The config and the MTP weights disagree.", "Convert from output/RUN-mtp or output/RUN-mtp-default as written.",
       "unsloth-zoo#904"),
    _s("mtp-dropped", r"QWEN35_MTP requires nextn_predict_layers > 0", "The model has no MTP head.",
       "Run with --mtp default or --mtp trained."),
    _s("specs-folder", r"cannot read spec file './specs': Is a directory",
       "gcc reads a file named specs from the working directory while Triton compiles.",
       "Start from a folder that holds none."),
    _s("no-tty", r"the input device is not a TTY|Input is not a terminal \(fd=0\)",
       "A terminal was asked for and standard input is none.", "Add --non-interactive.", "prompt-toolkit#1639"),
    _s("other-machine", r"DistStoreError.*\d+/\d+ clients joined", "The other machine never came up.",
       "Check the cable and NCCL_SOCKET_IFNAME (the Up interface of ibdev2netdev).", "unsloth#10280"),
)


def diagnose(text: str) -> list[Finding]:
    """Returns what a log's text is known for, failures before warnings, each once, with the first line that met it."""
    found = []
    for signature in SIGNATURES:
        match = signature.pattern.search(text)
        if match is None:
            continue
        begin = text.rfind("\n", 0, match.start()) + 1
        end = text.find("\n", match.end())
        found.append(Finding(
            name=signature.name, line=text[begin:end if end >= 0 else len(text)].strip(), cause=signature.cause,
            fix=signature.fix, source=signature.source, warning=signature.warning,
        ))
    return sorted(found, key=lambda f: f.warning)
