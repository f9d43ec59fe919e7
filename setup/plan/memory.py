"""The only predictor of a training run's peak memory: pure arithmetic over the plan and the model's shape.

    peak = weights + trained state + kept activations + the largest working set of one moment + workspaces + runtime

with, per parameter, e bytes of the compute type (bfloat16 2, float32 4, float64 8):

    weights        e for each frozen parameter; a quantised base: 0.516 (NF4, double quantisation), 0.5625 (NF4) or 1
                   (int8) for projections, e for the rest, and a widened group of them in the working set
    LoRA state     4 + 8 (fp32 master, AdamW moments) + 4 (gradient, once several micro-batches add up)
    full state     as LoRA's, beside e for the weight
    moments        8 in fp32, 2.03 in eight bits (a byte each and a scale for 256); paged ones can leave the device, so
                   they count only where host and device share their memory
    activations    on a GPU in bfloat16: setup/plan/activations.py, tensor by tensor as the fused kernels keep them
    and working    elsewhere (the CPU's references): `_layer_floats`, coarse, never calibrated
    workspaces     cuBLAS's: one for the forward's thread, one for the backward's
    graphs         passes replay as CUDA graphs (no dropout, no quantised base): the head's memory and the tower's no
                   longer share, and gradients stay allocated
    runtime        what the allocator does not count: context, kernels, the allocator's fragments

`allocator_gib` is what torch.cuda.max_memory_allocated reports at the end of a step; lab/memory_sweep.py compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sparktune.setup.plan.activations import Step, step_bytes
from sparktune.setup.plan.basestorage import BYTES_A_WEIGHT, base_storage
from sparktune.setup.plan.errors import MemoryBudgetError
from sparktune.setup.plan.schema import DatasetReport, Machine, ModelSpec, Plan

__all__ = [
    "ADAPTED", "HEAD_CHUNK_ROWS", "RUNTIME_GIB", "PeakEstimate", "Policy", "adapter_parameters", "cheapest_policy",
    "check_fits", "checkpoint_bytes", "longest_row_tokens", "predict_peak", "projection_shapes",
]

GIB = 2**30
Policy = Literal["none", "norms", "layer", "all"]
_POLICIES: tuple[Policy, ...] = ("none", "norms", "layer", "all")

HEAD_CHUNK_ROWS = 1024
"""Supervised rows whose logits exist at once, for the references."""
ADAPTED = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkv", "in_proj_z", "out_proj",
)
"""Projections that get an adapter by default: all large ones (facts: a and b of the GDN are tiny)."""

_GDN_CHUNK = 64
# torch/aten/src/ATen/cuda/CublasHandlePool.cpp: 8,519,680 bytes a handle and stream, 32 MiB from Hopper on.
_CUBLAS_WORKSPACE = {False: 8_519_680, True: 32 * 2**20}
# Unsloth's head meets every token of the row: this fits its two peaks measured on an H200 (2B, LoRA r=128, 5376 tokens:
# 10.7 GiB with its checkpointing, 22.4 without) to 6 %, added to what the native engine needs.
_UNSLOTH_HEAD_BYTES = 3.6
# An allocator's slack and the process itself: torch with its libraries holds about 0.4 GiB of host memory before the
# first tensor; a CUDA context about as much of the device's. Estimates.
RUNTIME_GIB = 0.45
# What two pools reserve and neither can give the other, at most, and as a share of kept + working set where that is
# less: fitted to max_memory_reserved of ten runs on an H200 (docs/results/memory_graphs.csv), 0.4 to 2.1 GiB by
# themselves. No policy or size explains the spread: the same plan reserved 16.0 and 16.8 GiB in two processes.
_POOLS_GIB, _POOLS_SHARE = 1.6, 0.27
_SLACK = 0.03


@dataclass(frozen=True, kw_only=True)
class PeakEstimate:
    """Predicted memory of a training process at its highest, in GiB, by what holds it."""

    policy: Policy
    """Recompute policy it was computed for."""
    layers: int | None = None
    """Under `layer`: how many of the first layers are computed again whole; all of them when None."""
    tokens: int
    """Tokens of the largest micro-batch."""
    weights_gib: float
    trained_gib: float
    """Masters, optimiser moments, and gradients where several micro-batches add up."""
    activations_gib: float
    """Kept from forward to backward."""
    working_gib: float
    """The largest set that exists for a moment."""
    workspace_gib: float
    """cuBLAS's workspaces."""
    graphs_gib: float
    """What CUDA graphs of the tower cost beyond that: a pool of their own, reserved as a whole."""
    runtime_gib: float
    """What the process needs beside its tensors."""

    @property
    def recompute(self) -> str:
        """The policy in a word: none, norms, layer, layer:8 (of 8 layers), all."""
        return self.policy if self.layers is None else f"{self.policy}:{self.layers}"

    @property
    def allocator_gib(self) -> float:
        """The predicted peak of PyTorch's allocator on a GPU, passes run eagerly."""
        return self.weights_gib + self.trained_gib + self.activations_gib + self.working_gib + self.workspace_gib

    @property
    def total_gib(self) -> float:
        """The predicted peak of the process."""
        return self.allocator_gib + self.graphs_gib + self.runtime_gib

    def describe(self) -> str:
        """Returns the sum in one line."""
        return (
            f"estimate {self.total_gib:.1f} GiB = weights {self.weights_gib:.1f} + trained state {self.trained_gib:.1f}"
            f" + activations {self.activations_gib:.1f} ({self.tokens} tokens, recompute {self.recompute})"
            f" + working set {self.working_gib:.1f} + graphs {self.graphs_gib:.1f}"
            f" + runtime {self.workspace_gib + self.runtime_gib:.1f}"
        )


def projection_shapes(spec: ModelSpec) -> dict[str, tuple[int, int, int]]:
    """Returns projection -> (layers that have it, in, out)."""
    linear = spec.layer_types.count("linear_attention")
    attention = spec.num_layers - linear
    hidden, ffn, head = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q_out = spec.num_heads * head * (2 if spec.attention_gate else 1)
    shapes = {
        "q_proj": (attention, hidden, q_out),
        "k_proj": (attention, hidden, spec.num_kv_heads * head),
        "v_proj": (attention, hidden, spec.num_kv_heads * head),
        "o_proj": (attention, spec.num_heads * head, hidden),
        "gate_proj": (spec.num_layers, hidden, ffn),
        "up_proj": (spec.num_layers, hidden, ffn),
        "down_proj": (spec.num_layers, ffn, hidden),
    }
    if linear:
        values = spec.gdn_value_heads * spec.gdn_value_dim
        shapes["in_proj_qkv"] = (linear, hidden, 2 * spec.gdn_key_heads * spec.gdn_key_dim + values)
        shapes["in_proj_z"] = (linear, hidden, values)
        shapes["out_proj"] = (linear, values, hidden)
    return shapes


def adapter_parameters(spec: ModelSpec, rank: int, targets: list[str] | None = None) -> int:
    """Returns the parameters of LoRA adapters of `rank` on `targets` (all large projections when None)."""
    wanted = set(targets or ADAPTED)
    return sum(n * rank * (i + o) for name, (n, i, o) in projection_shapes(spec).items() if name in wanted)


def checkpoint_bytes(plan: Plan, spec: ModelSpec) -> int:
    """Returns the bytes of one checkpoint: the exported result, fp32 masters and two fp32 moments.

    A rank that is still open counts as 32, a mode that is still open as LoRA.
    """
    if plan.mode == "full":
        return spec.parameters * 14
    return adapter_parameters(spec, plan.lora_r or 32, plan.target_modules) * 16


def longest_row_tokens(plan: Plan, report: DatasetReport) -> int:
    """Returns the tokens of the largest micro-batch: full packs, or the longest example riding alone."""
    longest = min(report.lengths.max, plan.max_seq_length)
    pack = plan.pack_length if plan.pack and plan.pack_length else longest
    return max(longest, pack) * plan.per_device_batch_size


def predict_peak(
    plan: Plan, spec: ModelSpec, machine: Machine, *, tokens: int, longest: int, policy: Policy | None = None,
    layers: int | None = None, supervised: int | None = None,
) -> PeakEstimate:
    """Predicts the peak of one training process. No I/O, no measurement: an estimate.

    Args:
        plan: `mode` auto counts as lora; a rank left out counts as 16.
        spec: the model's shape.
        machine: where it runs; the CPU's plain references keep more than the fused kernels do.
        tokens: tokens of the largest micro-batch.
        longest: the longest document in it.
        policy: recompute policy; left out, the plan's own (auto: none on a CPU, layer on a GPU) and its layers.
        layers: beside the policy `layer`: how many of the first layers are computed again whole; all when left out.
        supervised: supervised tokens of that micro-batch; all of them when left out, the most there can be.
    """
    if policy is None:
        policy, layers = _policy_of(plan, machine), plan.recompute_layers if plan.recompute == "layer" else None
    if policy != "layer" or layers == spec.num_layers:
        layers = None
    e = _compute_bytes(plan, machine)
    weights, trained, gradients = _static_bytes(plan, spec, machine, e)
    workspace = graphs = 0.0
    if machine.device == "cuda" and e == 2:
        replays = plan.engine != "unsloth" and (
            plan.processes == 1 if plan.mode == "full"
            else plan.lora_dropout == 0 and base_storage(plan) == "none"
        )
        # Gradients that graphs add to stay where they are.
        several = replays or plan.gradient_accumulation != 1
        step = _step(plan, machine, tokens, tokens if supervised is None else supervised, several=several)
        found = step_bytes(spec, policy, step, layers)
        kept, working = float(found.kept), float(found.peak - found.kept - (found.gradients if several else 0))
        trained += gradients if several else 0
        if plan.engine == "unsloth":
            working += tokens * spec.vocab_size * _UNSLOTH_HEAD_BYTES
        elif replays:
            graphs = float(found.graphed - found.peak) + min(_POOLS_GIB * GIB, _POOLS_SHARE * (kept + working))
            if plan.mode == "full":
                # The head's gradient is made in float32 and handed on in bfloat16: the one's block is split for the
                # other and no longer free for the next micro-batch's.
                graphs += 4.0 * spec.vocab_size * spec.hidden_size
        workspace = 2.0 * _CUBLAS_WORKSPACE[(machine.capability or (0, 0))[0] >= 9]
    else:
        kept, working = _reference_bytes(plan, spec, tokens, longest, policy, layers, e)
        if base_storage(plan) != "none":
            working += 2 * max(i * o for _, i, o in projection_shapes(spec).values()) * e
        trained += gradients
    runtime = RUNTIME_GIB + _SLACK * (weights + trained + kept + working) / GIB
    return PeakEstimate(
        policy=policy, layers=layers, tokens=tokens, weights_gib=weights / GIB, trained_gib=trained / GIB,
        activations_gib=kept / GIB, working_gib=working / GIB, workspace_gib=workspace / GIB,
        graphs_gib=graphs / GIB, runtime_gib=runtime,
    )


def _step(plan: Plan, machine: Machine, tokens: int, supervised: int, *, several: bool) -> Step:
    full = plan.mode == "full"
    return Step(
        tokens=tokens, supervised=supervised, full=full, rank=0 if full else (plan.lora_r or 16),
        targets=frozenset(plan.target_modules or ADAPTED), dropout=plan.lora_dropout > 0,
        gradients_accumulate=several, widened=_widened(plan),
        split_heads=machine.capability is None or machine.capability[0] == 9,
    )


def _widened(plan: Plan) -> float:
    storage = base_storage(plan)
    return 0.0 if storage == "none" else 1.0 + (1 / 32 if storage == "nf4" and plan.double_quantise else 0.0)


def _reference_bytes(
    plan: Plan, spec: ModelSpec, tokens: int, longest: int, policy: Policy, layers: int | None, e: int
) -> tuple[float, float]:
    """Returns (kept, working set) in bytes where the references compute."""
    floats = [_layer_floats(spec, kind, plan, longest) for kind in spec.layer_types]
    hidden = spec.hidden_size
    heaviest = max(full for full, _ in floats)
    if policy == "none":
        kept, moment = sum(full for full, _ in floats), 0.0
    elif policy == "norms":
        kept, moment = sum(full - again for full, again in floats), max(again for _, again in floats)
    elif layers is not None:
        kept = layers * hidden + sum(full - again for full, again in floats[layers:])
        moment = max(*(again for _, again in floats[layers:]), max(full for full, _ in floats[:layers]))
    else:
        group = 1 if policy == "layer" else math.isqrt(spec.num_layers)
        kept = hidden * math.ceil(spec.num_layers / group)
        moment = heaviest + hidden * (group - 1)
    # The stream's gradient and one layer's gradients exist beside whatever is kept.
    moment += 2 * hidden + 2 * spec.intermediate_size
    head_rows = min(HEAD_CHUNK_ROWS, tokens)
    head = head_rows * spec.vocab_size * (e + 4 + 4) + 2 * tokens * hidden * e
    return tokens * kept * e, max(tokens * moment * e, head)


def cheapest_policy(
    plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine
) -> tuple[PeakEstimate, list[PeakEstimate]]:
    """Chooses the recompute policy that computes least again and still fits: none, norms, layer, all.

    Of `layer` it takes the smallest number of layers.

    Returns:
        The estimate of the policy chosen (the last, `all`, where none fits) and those of every policy tried.
    """
    tokens, longest = longest_row_tokens(plan, report), min(report.lengths.max, plan.max_seq_length)
    tried = []
    for policy in _POLICIES:
        tried.append(predict_peak(plan, spec, machine, tokens=tokens, longest=longest, policy=policy))
        if tried[-1].total_gib <= machine.memory_gib:
            if policy == "layer" and plan.engine != "unsloth":
                tried[-1] = _fewest_layers(plan, spec, machine, tokens, longest)
            break
    return tried[-1], tried


def _fewest_layers(plan: Plan, spec: ModelSpec, machine: Machine, tokens: int, longest: int) -> PeakEstimate:
    """Returns the estimate with the fewest layers computed again whole that fits, where all of them do."""
    mixed = (predict_peak(plan, spec, machine, tokens=tokens, longest=longest, policy="layer", layers=n)
             for n in range(1, spec.num_layers + 1))
    return next(estimate for estimate in mixed if estimate.total_gib <= machine.memory_gib)


def check_fits(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> PeakEstimate:
    """Returns the plan's estimate, or refuses a plan that the machine cannot hold.

    Raises:
        MemoryBudgetError: the estimate exceeds `machine.memory_gib`; the message names changes that would fit.
    """
    if plan.recompute == "auto" and machine.device == "cuda":
        estimate = cheapest_policy(plan, spec, report, machine)[0]
    else:
        tokens, longest = longest_row_tokens(plan, report), min(report.lengths.max, plan.max_seq_length)
        estimate = predict_peak(plan, spec, machine, tokens=tokens, longest=longest)
    if estimate.total_gib <= machine.memory_gib:
        return estimate
    ways = _ways_out(plan, spec, report, machine)
    advice = f"Pass {' or '.join(ways)}." if ways else (
        "No setting of pack length, recomputation or method fits; use a smaller model or a larger machine."
    )
    raise MemoryBudgetError(
        f"Training {plan.model} this way needs about {estimate.total_gib:.1f} GiB, but {machine.memory_gib:.1f} GiB "
        f"is there ({estimate.describe()}). {advice}"
    )


def _ways_out(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[str]:
    """Returns flags that would make the plan fit, least intrusive first; at most three."""
    ways: list[str] = []

    def fits(**changes: object) -> bool:
        other = plan.model_copy(update=changes)
        tokens, longest = longest_row_tokens(other, report), min(report.lengths.max, other.max_seq_length)
        if other.recompute == "auto" and machine.device == "cuda":
            return cheapest_policy(other, spec, report, machine)[0].total_gib <= machine.memory_gib
        return predict_peak(other, spec, machine, tokens=tokens, longest=longest).total_gib <= machine.memory_gib

    if plan.recompute == "layer" and plan.recompute_layers is not None:
        more = range(plan.recompute_layers + 1, spec.num_layers + 1)
        ways += [f"--recompute-layers {n}" for n in more if fits(recompute_layers=n)][:1]
    # auto has tried every policy already
    now = "all" if plan.recompute == "auto" and machine.device == "cuda" else _policy_of(plan, machine)
    for policy in _POLICIES[_POLICIES.index(now) + 1 :]:
        if not ways and fits(recompute=policy, recompute_layers=None):
            ways.append(f"--recompute {policy}")
    if plan.per_device_batch_size > 1 and fits(per_device_batch_size=1):
        ways.append("--per-device-batch-size 1")
    longest = min(report.lengths.max, plan.max_seq_length)
    if plan.pack and plan.pack_length and plan.pack_length > longest:
        shorter = _halve_until(plan.pack_length, max(longest, 128), lambda n: fits(pack_length=n))
        ways += [f"--pack-length {shorter}"] if shorter else []
    start = max(longest, plan.pack_length or 0)
    shorter = _halve_until(start, 256, lambda n: fits(max_seq_length=n, pack_length=n if plan.pack else None))
    if shorter:
        ways.append(f"--max-seq-length {shorter}" + (f" --pack-length {shorter}" if plan.pack else ""))
    if plan.mode == "full" and fits(mode="lora"):
        ways.append("--mode lora")
    if plan.mode != "qlora" and machine.device == "cuda" and fits(mode="qlora"):
        ways.append("--mode qlora")
    return ways[:3]


def _halve_until(start: int, least: int, fits: Callable[[int], bool]) -> int | None:
    length = start // 2
    while length >= least:
        if fits(length):
            return length
        length //= 2
    return None


def _policy_of(plan: Plan, machine: Machine) -> Policy:
    if plan.recompute != "auto":
        return plan.recompute
    return "none" if machine.device == "cpu" else "layer"


def _compute_bytes(plan: Plan, machine: Machine) -> int:
    dtype = plan.dtype if plan.dtype != "auto" else ("bfloat16" if machine.device == "cuda" else "float32")
    return {"bfloat16": 2, "float32": 4, "float64": 8}[dtype]


def _moment_bytes(plan: Plan, machine: Machine) -> float:
    """Bytes a parameter of AdamW's two moments, as far as they must be on the device."""
    if plan.optimizer.startswith("paged") and not machine.unified_memory:
        return 0.0
    return 2 * (1 + 4 / 256) if plan.optimizer.endswith("8bit") else 8.0


def _spread_bytes(plan: Plan, spec: ModelSpec, e: int, state: float) -> tuple[float, float, float]:
    """The same where FSDP2 spreads masters and moments over the ranks and gathers two blocks and the ends of the model.

    Gradients are kept whole, in four bytes, until the last micro-batch of a step: sent once a step, not once a pass.
    """
    ends = spec.end_parameters
    block = (spec.parameters - ends) / spec.num_layers
    several = (plan.gradient_accumulation or plan.processes + 1) > plan.processes
    gradients = spec.parameters * 4.0 if several else (2 * block + ends) * 4
    return (2 * block + ends) * e, spec.parameters * state / plan.processes, gradients


def _static_bytes(plan: Plan, spec: ModelSpec, machine: Machine, e: int) -> tuple[float, float, float]:
    """Returns (weights, masters and moments, gradients) in bytes; a parameter of 4 or 8 bytes is its own master."""
    state = 4 + _moment_bytes(plan, machine)
    if plan.mode == "full" and plan.processes > 1:
        return _spread_bytes(plan, spec, e, state)
    if plan.mode == "full":
        return spec.parameters * (0 if e == 4 else e), spec.parameters * state, spec.parameters * 4
    adapters = adapter_parameters(spec, plan.lora_r or 16, plan.target_modules)
    storage = base_storage(plan)
    if storage == "none":
        return spec.parameters * e, adapters * state, adapters * 4
    bytes_each = BYTES_A_WEIGHT["nf4 double" if storage == "nf4" and plan.double_quantise else storage]
    quantised = sum(n * i * o for n, i, o in projection_shapes(spec).values())
    return quantised * bytes_each + (spec.parameters - quantised) * e, adapters * state, adapters * 4


def _layer_floats(spec: ModelSpec, kind: str, plan: Plan, longest: int) -> tuple[float, float]:
    """Returns (elements kept per token by one layer of references, those of them that `norms` computes again).

    A projection keeps its input; a norm its input; the mixers q, k, v and their output; silu * up both factors; the
    references keep about twice that (fp32 copies inside norms, masks, intermediate products), attention's also a score
    for each earlier token of the document and head.
    """
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    norms = 2 * hidden + ffn  # two normed inputs, and silu(gate) * up
    mlp = 2 * hidden + 3 * ffn  # the stream, its norm; gate, up and their product
    rank = 0 if plan.mode == "full" else (plan.lora_r or 16)
    if kind == "linear_attention":
        keys = spec.gdn_key_heads * spec.gdn_key_dim
        values = spec.gdn_value_heads * spec.gdn_value_dim
        # qkv before and after the convolution, z, the rule's output and its gated norm; per chunk one state a head.
        state = spec.gdn_value_heads * spec.gdn_key_dim * spec.gdn_value_dim / _GDN_CHUNK
        mixer = 2 * (2 * keys + values) + 3 * values + state
        again, extra = values, 2 * state
    else:
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        gate = 2 * q if spec.attention_gate else 0
        mixer = 3 * q + 3 * kv + gate
        again, extra = q + kv, 2.0 * spec.num_heads * min(longest, spec.sliding_window or longest)
    full = 2 * hidden + mixer + mlp + 7 * rank  # the mixer's half: the stream and its norm
    return 2 * full + extra, float(norms + again)
