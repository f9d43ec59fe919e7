"""What the program proposes for everything the user left open, each value with its reason and source. Pure."""

from __future__ import annotations

import math
from typing import Any

from sparktune.setup.plan.basestorage import base_storage
from sparktune.setup.plan.engines import choose_engine
from sparktune.setup.plan.flags import flag_of
from sparktune.setup.plan.intervals import tenth
from sparktune.setup.plan.memory import PeakEstimate, cheapest_policy, longest_row_tokens, predict_peak
from sparktune.setup.plan.schema import DatasetReport, Machine, ModelSpec, Plan, Recommendation

__all__ = ["apply", "planned_steps", "recommend"]

_LORA_EXAMPLES = 50_000
_FULL_EXAMPLES = 100_000
_FULL_TOKENS = 200_000_000
_STEP_EXAMPLES = 16
_LEAST_STEPS = 60
_SHORT = 1024
_TRIAL_STEPS = 100
_GOOD_SHARE = 0.85
_ROUND = 128
_EIGHT_BIT_PARAMETERS = 4_000_000_000

_RECIPE = "published DGX Spark recipe for Qwen3.5-2B (24,315 chat examples, pack near the mean, accumulation 16)"
_PRACTICE = "published LoRA practice (rank 16 to 32, 2e-4)"
_ESTIMATE = "estimate"
_HOUSE = "design of this program"


def recommend(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[Recommendation]:
    """Proposes a value for every open field: those still at their default that are `auto` or empty.

    The list is in the order the values depend on one another; each is found with the earlier ones in place. What the
    user, an environment variable, a config or a saved answer set is never touched. A value that stays as the schema has
    it comes with its reason too.

    Args:
        plan: the plan so far, with `origins`.
        spec: the model's shape.
        report: the data's report.
        machine: where it will run.
    """
    found: list[Recommendation] = []

    def propose(field: str, value: Any, reason: str, source: str) -> None:
        nonlocal plan
        if _is_open(plan, field):
            found.append(Recommendation(field=field, value=value, reason=reason, source=source))
            plan = plan.model_copy(update={field: value})

    propose("device", machine.device, _device_reason(machine), "measured on this machine")
    for step in (
        _dtype, _mode, _storage, _engine, _optimizer, _rank, _alpha, _learning_rate, _pack_length, _accumulation,
    ):
        for item in step(plan, spec, report, machine):
            propose(*item)
    if plan.trial:
        whole = planned_steps(plan, report)
        reason = f"a trial: {_TRIAL_STEPS} steps, or a tenth of the whole run's {whole}"
        propose("max_steps", min(_TRIAL_STEPS, math.ceil(whole / 10)), reason, _HOUSE)
    steps = planned_steps(plan, report)
    every = tenth(None, steps)
    propose("save_steps", every, f"a tenth of the run's {steps} steps: a crash costs at most that", _HOUSE)
    if report.eval_examples:
        propose("eval_steps", every, f"ten evaluations over the run's {steps} steps, each before a checkpoint", _HOUSE)
    for step in (_epochs, _held_out, _longest, _recompute, _mtp):
        for item in step(plan, spec, report, machine):
            propose(*item)
    return found


def apply(plan: Plan, recommendations: list[Recommendation]) -> Plan:
    """Returns the plan with the recommended values in it and `recommendation` as the origin of those that are new."""
    values = {r.field: r.value for r in recommendations if getattr(plan, r.field) != r.value}
    origins = {**plan.origins, **dict.fromkeys(values, "recommendation")}
    return Plan.model_validate({**plan.model_dump(), **values, "origins": origins})


def planned_steps(plan: Plan, report: DatasetReport) -> int:
    """Returns the optimiser steps the plan will take, from mean lengths: packing itself may differ by a few percent.

    A field still open counts as its fallback (one micro-batch a step; a pack of one example).
    """
    if plan.max_steps is not None:
        return plan.max_steps
    examples = max(1, report.train_examples)
    packs = float(examples)
    if plan.pack and plan.pack_length:
        real = plan.pack_length * _share(report, plan.pack_length)[1]
        packs = min(examples, max(1.0, report.lengths.total / max(real, report.lengths.mean, 1.0)))
    a_step = plan.per_device_batch_size * (plan.gradient_accumulation or 1)
    return max(1, math.ceil(plan.num_epochs * math.ceil(packs / a_step)))


def _is_open(plan: Plan, field: str) -> bool:
    return plan.origins.get(field, "default") == "default"


_Item = tuple[str, Any, str, str]


def _device_reason(machine: Machine) -> str:
    if machine.device == "cuda":
        return f"{machine.gpu_name or 'a CUDA GPU'} with {machine.memory_gib:.0f} GiB"
    return "no CUDA GPU was found"


def _dtype(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    if plan.device == "cuda":
        return [("dtype", "bfloat16", "the GPU multiplies bfloat16 at full speed; masters stay float32", _HOUSE)]
    return [("dtype", "float32", "a CPU has no fast bfloat16 product; float32 is faster and more exact", _HOUSE)]


def _engine(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    if not spec.native and plan.device != "cuda":
        return []
    where = machine if plan.device == machine.device else machine.model_copy(update={"device": plan.device})
    choice = choose_engine(spec, where, mode=plan.mode, unsloth_installed=None)
    return [("engine", choice.engine, choice.reason, _HOUSE)]


def _mode(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    examples, tokens = report.train_examples, report.lengths.total
    thresholds = "published recipe: LoRA up to 50k examples, full from 100k examples with 200M tokens"
    if plan.mode != "auto":
        return []
    if plan.quantise_base in ("nf4", "int8"):
        return [("mode", "qlora", f"--quantise-base {plan.quantise_base} asks for a quantised base", _HOUSE)]
    seen = f"{examples:,} examples, {tokens:,} tokens"
    if examples >= _FULL_EXAMPLES and tokens >= _FULL_TOKENS:
        if _fits(plan, "full", spec, report, machine):
            return [("mode", "full", f"{seen}: enough for full fine-tuning to pay", thresholds)]
        seen += "; enough for full fine-tuning, whose optimiser state does not fit here"
    if machine.device == "cuda" and not _fits(plan, "lora", spec, report, machine):
        if _fits(plan, "qlora", spec, report, machine):
            reason = f"the bfloat16 base does not fit in {machine.memory_gib:.0f} GiB, a 4-bit one does"
            return [("mode", "qlora", reason, "memory estimate (setup/plan/memory.py)")]
    elif examples <= _LORA_EXAMPLES:
        seen += f": up to {_LORA_EXAMPLES:,} examples an adapter learns as much and forgets less"
    elif _fits(plan, "full", spec, report, machine):
        seen += _trade(plan, spec, report, machine)
    return [("mode", "lora", seen, thresholds)]


def _storage(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    if plan.mode != "qlora":
        return []
    return [("quantise_base", base_storage(plan), "4 bits a weight: the smallest base that trains well",
             "published practice (Dettmers et al. 2023)")]


def _trade(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> str:
    """What speaks for either method between the thresholds."""
    lora, full = (_smallest(plan, mode, spec, report, machine).total_gib for mode in ("lora", "full"))
    few = report.lengths.total < _FULL_TOKENS and report.train_examples >= _FULL_EXAMPLES
    why = "many examples but few tokens" if few else "between the thresholds"
    return (
        f": {why}, so both are sound. LoRA forgets less, its file is small, and it takes from {lora:.0f} GiB on; full "
        f"fine-tuning can take in more and takes from {full:.0f} GiB on (--mode full)"
    )


def _fits(plan: Plan, mode: str, spec: ModelSpec, report: DatasetReport, machine: Machine) -> bool:
    """Whether `mode` fits at its smallest."""
    return _smallest(plan, mode, spec, report, machine).total_gib <= machine.memory_gib


def _smallest(plan: Plan, mode: str, spec: ModelSpec, report: DatasetReport, machine: Machine) -> PeakEstimate:
    """The peak of `mode` at its smallest: one longest example at a time, layers computed again."""
    eight_bit = mode == "full" and spec.parameters > _EIGHT_BIT_PARAMETERS and _is_open(plan, "optimizer")
    trial = plan.model_copy(update={
        "mode": mode, "pack_length": None, "per_device_batch_size": 1,
        "optimizer": "adamw_8bit" if eight_bit else plan.optimizer,
    })
    tokens = longest_row_tokens(trial, report)
    return predict_peak(trial, spec, machine, tokens=tokens, longest=tokens, policy="layer")


def _optimizer(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    if plan.mode != "full" or spec.parameters <= _EIGHT_BIT_PARAMETERS or plan.device != "cuda":
        return []
    billions = spec.parameters / 1e9
    reason = f"float32 masters and moments of {billions:.1f}B parameters would take {billions * 16:.0f} GB"
    return [("optimizer", "adamw_8bit", reason, _HOUSE)]


def _rank(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    if plan.mode == "full":
        return []
    examples = report.train_examples
    for limit, rank, source in ((1_000, 16, _PRACTICE), (10_000, 32, _PRACTICE), (None, 128, _RECIPE)):
        if limit is None or examples < limit:
            reason = f"{examples:,} examples" + (f" (fewer than {limit:,})" if limit else " (10,000 or more)")
            reason += ": more data fills more rank"
            if report.lengths.mean < _SHORT:
                rank *= 2
                reason += f"; doubled, as contexts are short (mean {report.lengths.mean:.0f} tokens) and memory is free"
                source += "; published: short contexts, under 1,024 tokens, take a larger rank"
            # A rank near the smallest width stores more than the matrix itself would.
            return [("lora_r", min(rank, max(1, spec.hidden_size // 8)), reason, source)]
    return []


def _alpha(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    if plan.mode == "full" or plan.lora_r is None:
        return []
    reason = "equal to the rank, so that the adapter's scale is 1 whatever the rank"
    return [("lora_alpha", float(plan.lora_r), reason, _PRACTICE)]


def _learning_rate(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    if plan.mode != "full":
        return [("learning_rate", 2e-4, "adapters start at zero and take ten times a full run's rate", _PRACTICE)]
    rate = 2e-5 if spec.parameters <= _EIGHT_BIT_PARAMETERS else 1e-5
    reason = f"full fine-tuning of {spec.parameters / 1e9:.1f}B parameters: larger models want smaller steps"
    return [("learning_rate", rate, reason, "common practice for full fine-tuning, 1e-5 to 2e-5; not measured here")]


def _pack_length(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    """Documents never see each other, so a longer pack costs memory only: it is bounded by that and by the data."""
    if not plan.pack:
        return []
    lengths = report.lengths
    if plan.engine == "unsloth":
        reason = f"Unsloth: near the mean of {lengths.mean:.0f} tokens, a multiple of {_ROUND}"
        return [("pack_length", min(_up(lengths.mean), plan.max_seq_length), reason, _RECIPE)]
    floor = _up(max(lengths.mean, lengths.p90))
    # Below this a forward pass is bound by reading the weights, not by arithmetic.
    target = 4096 if plan.device == "cuda" else 1024
    most = _up(lengths.total * plan.num_epochs / _LEAST_STEPS)
    wanted = min(max(floor, min(target, most)), plan.max_seq_length)
    choice, share = _best_candidate(plan, report, wanted, min(floor, wanted))
    reason = f"mean {lengths.mean:.0f}, 90 of 100 examples up to {lengths.p90} tokens"
    if share is not None:
        reason += f"; {share:.0%} of padded micro-batches is real text"
    while choice // 2 >= max(_ROUND, lengths.max) and not _pack_fits(plan, choice, spec, report, machine):
        choice = _up(choice // 2)
        reason += f"; halved to {choice} to fit in {machine.memory_gib:.0f} GiB (estimate)"
    source = "published tip (near the mean, a multiple of 128); documents are isolated, so longer costs memory only"
    return [("pack_length", choice, reason, source)]


def _best_candidate(plan: Plan, report: DatasetReport, wanted: int, floor: int) -> tuple[int, float | None]:
    """Returns a pack length and its measured share of real tokens (None where that very length was not measured).

    The longest measured length from `floor` to `wanted` that fills well; else `wanted` itself where the measured
    lengths on both sides of it fill well; else the next longer one that does, or the one that fills best.
    """
    measured = {n: s for n, s in report.packing.items() if n <= plan.max_seq_length}
    good = {n for n, s in measured.items() if s >= _GOOD_SHARE}
    inside = [n for n in good if floor <= n <= wanted]
    if wanted in inside or (inside and max(inside) * 2 > wanted):
        return max(inside), measured[max(inside)]
    below, above = (max((n for n in measured if n < wanted), default=None),
                    min((n for n in measured if n > wanted), default=None))
    if (below is None or below in good) and (above is None or above in good):
        return wanted, None
    longer = [n for n in good if n > wanted]
    best = min(longer) if longer else max(measured, key=lambda n: measured[n])
    return best, measured[best]


def _share(report: DatasetReport, pack_length: int) -> tuple[int, float]:
    """Returns the measured candidate nearest to `pack_length` and its share of real tokens."""
    if not report.packing:
        return pack_length, 0.9
    nearest = min(report.packing, key=lambda n: abs(n - pack_length))
    return nearest, report.packing[nearest]


def _pack_fits(plan: Plan, length: int, spec: ModelSpec, report: DatasetReport, machine: Machine) -> bool:
    trial = plan.model_copy(update={"pack_length": length})
    tokens = longest_row_tokens(trial, report)
    longest = min(report.lengths.max, plan.max_seq_length)
    return predict_peak(trial, spec, machine, tokens=tokens, longest=longest).total_gib <= machine.memory_gib


def _up(tokens: float) -> int:
    return max(_ROUND, math.ceil(tokens / _ROUND) * _ROUND)


def _accumulation(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    mean = max(report.lengths.mean, 1.0)
    pack = plan.pack_length if plan.pack and plan.pack_length else mean
    examples_a_pass = max(1.0, pack * 0.9 / mean) * plan.per_device_batch_size
    wanted = max(1, round(_STEP_EXAMPLES / examples_a_pass))
    one = planned_steps(plan.model_copy(update={"gradient_accumulation": 1}), report)
    sensible = min(wanted, one // _LEAST_STEPS)
    value = max(plan.processes, sensible)
    reason = f"a step then sees about {value * examples_a_pass:.0f} examples"
    if plan.processes > 1 and value > sensible:
        reason += f"; fewer than {value} packs cannot be shared by {value} processes"
    elif value < wanted:
        reason += f", fewer than {_STEP_EXAMPLES}, so that the run takes about {_LEAST_STEPS} steps or more"
    return [("gradient_accumulation", value, reason, _RECIPE)]


def _epochs(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    if plan.max_steps is not None:
        return []
    reason = "three passes; where the evaluation loss rises before, --early-stopping ends the run"
    return [("num_epochs", plan.num_epochs, reason, _RECIPE)]


def _held_out(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    if plan.eval_data is not None:
        return []
    count = report.eval_examples
    reason = f"{count:,} of {report.kept:,} examples are held out: they show overfitting, and training loses little"
    return [("eval_split", plan.eval_split, reason, _HOUSE)]


def _longest(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    over = report.dropped.get("over_length", 0) + report.truncated
    reason = f"{over:,} examples are longer" if over else f"the longest example has {report.lengths.max:,} tokens"
    return [("max_seq_length", plan.max_seq_length, reason, "the data's report")]


def _recompute(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    source = "memory estimate (setup/plan/memory.py)"
    if machine.device == "cpu":
        return [("recompute", plan.recompute, "on a CPU training takes none, which computes nothing twice", source)]
    peak = cheapest_policy(plan, spec, report, machine)[0]
    reason = (
        f"training takes the first of none, norms, layer and all that fits: {peak.recompute}, with "
        f"{peak.total_gib:.1f} of {machine.memory_gib:.0f} GiB"
    )
    return [("recompute", plan.recompute, reason, source)]


def _mtp(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> list[_Item]:
    if plan.mtp != "skip" and (spec.model_type != "qwen3_5_text" or (spec.mtp_layers == 0 and not plan.mtp_head)):
        return [("mtp", "skip", f"{flag_of('model')} {plan.model} declares no MTP head to carry over", _HOUSE)]
    reason = "the base's own head drafts for the tuned model too, at no cost; --mtp trained may draft better"
    return [("mtp", plan.mtp, reason, _HOUSE)] if plan.mtp == "default" else []
