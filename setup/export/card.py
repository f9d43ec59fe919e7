"""The result's README: what it was made of and how, what was measured, whose licence applies, how it is served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sparktune.setup.export.gguf_export import read_manifest
from sparktune.setup.export.handover import serving_commands
from sparktune.setup.plan.exports import needs_quantiser
from sparktune.setup.plan.models import probe, resolve_model_dir
from sparktune.setup.plan.outfolder import gib, write_durably
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan

__all__ = ["licence_of", "model_card", "write_card"]

_FIGURES = ("exact_match", "chrf", "bleu", "validator", "perplexity")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def licence_of(base_dir: Path) -> dict[str, str]:
    """Returns `license`, `license_name` and `license_link` as the base's own card gives them; empty without a card."""
    try:
        text = (base_dir / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    names = ("license", "license_name", "license_link")
    return {k: str(front[k]) for k in names if isinstance(front, dict) and isinstance(front.get(k), str)}


def _losses(run: RunDir) -> tuple[float, float] | None:
    """Returns the first and the last training loss."""
    found = []
    for line in run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.is_file() else []:
        try:
            loss = json.loads(line).get("loss")
        except (ValueError, AttributeError):
            continue
        found += [float(loss)] if isinstance(loss, int | float) else []
    return (found[0], found[-1]) if found else None


def _data_rows(plan: Plan, run: RunDir) -> list[str]:
    report = _json(run.data_report)
    rows = [f"| data | {plan.data.name if plan.data else 'unknown'} |"]
    if report:
        rows += [f"| examples | {report['train_examples']} to learn from, {report['eval_examples']} held out |",
                 f"| learned tokens | {report['supervised_tokens']:,} |",
                 f"| sha256 of the data | `{report['sha256']}` |"]
    return rows


def _plan_rows(plan: Plan) -> list[str]:
    return [
        f"| epochs | {plan.num_epochs:g} |" if plan.max_steps is None else f"| steps | {plan.max_steps} |",
        f"| longest example | {plan.max_seq_length} tokens |",
        f"| learning rate | {plan.learning_rate:g} |" if plan.learning_rate else "| learning rate | as recommended |",
        *([f"| LoRA rank, alpha | {plan.lora_r}, {plan.lora_alpha or plan.lora_r:g} |"] if plan.lora_r else []),
        f"| seed | {plan.seed} |",
    ]


def _figures(run: RunDir) -> list[str]:
    """Returns the section on what was measured; empty before anything was."""
    lines: list[str] = []
    losses, found = _losses(run), _json(run.evaluation)
    if losses is not None:
        lines += [f"Training loss: {losses[0]:.4f} at the first step, {losses[1]:.4f} at the last.", ""]
    sources: Mapping[str, Mapping[str, float]] = found.get("sources", {})
    names = [n for n in _FIGURES if any(n in s for s in sources.values())]
    if names:
        lines += [f"Held-out prompts: {found['with_reference']}, answered greedily, up to {found['max_new_tokens']} "
                  "tokens. Exact match and validator are shares of 1, chrF and BLEU (sacrebleu) of 100.", "",
                  f"| model | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        lines += [f"| {who} | {' | '.join(f'{s[n]:.4g}' if n in s else '' for n in names)} |"
                  for who, s in sources.items()] + [""]
    lines += [f"- {sentence}" for sentence in found.get("alarms", [])] + ([""] if found.get("alarms") else [])
    files = read_manifest(run.gguf).get("files", [])
    if files:
        lines += ["| GGUF | size | mean KL from this model | same first choice |", "|---|---|---|---|"]
        for file in files:
            proof = file.get("proof")
            seen = f"{proof['mean_kl']:.2g} nats | {proof['same_top']:.1%}" if proof else "not run in llama.cpp |"
            lines.append(f"| {file['type']} | {gib(file['bytes'])} | {seen} |")
        lines.append("")
    return ["## Measured", "", *lines] if lines else []


def model_card(plan: Plan, run: RunDir, base_dir: Path) -> str:
    """Returns the README.md of `output/RUN`, with every figure that is known by now.

    It is written with the merge, which speaks of the later stages' folders by their fixed names, and again after the
    evaluation.

    Args:
        plan: as it was run.
        run: where records and models are.
        base_dir: the base's folder: its shape and its licence.
    """
    spec, licence = probe(str(base_dir)), licence_of(base_dir)
    method = {"full": "Full fine-tuning", "qlora": "LoRA on a 4-bit base, merged into the original weights"}.get(
        plan.mode, "LoRA, merged into the base's weights"
    )
    mtp = run.served_mtp(plan.mtp)
    if mtp is None and plan.mtp != "skip" and spec.model_type == "qwen3_5_text" and spec.mtp_layers:
        mtp = run.mtp(plan.mtp)  # to be made by a later stage
    gguf = run.gguf / f"{run.name}-{plan.gguf[0].upper()}.gguf" if plan.gguf else None
    siblings = [f"- `{mtp.name}/`: the same model with its MTP head for speculative decoding"] if mtp else []
    siblings += [f"- `{run.gguf.name}/`: GGUF files ({', '.join(plan.gguf)}) and an Ollama Modelfile"] if gguf else []
    commands = serving_commands(
        spec, Path(run.merged.name), mtp=Path(mtp.name) if mtp else None,
        gguf=Path(gguf.parent.name) / gguf.name if gguf else None, name=run.name,
    )
    base = plan.model if not Path(plan.model).is_absolute() else Path(plan.model).name
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [sparktune]"]
    front += [f"base_model: {base}"] if "/" in base else []
    front += [f"{key}: {json.dumps(value)}" for key, value in licence.items()]
    named = licence.get("license_name") or licence.get("license")
    quantised = [k for k in plan.gguf if needs_quantiser(k)]
    return "\n".join([
        *front, "---", "", f"# {run.name}", "",
        f"{base}, fine-tuned with sparktune. {method}; every tensor that was not trained has the base's bytes.", "",
        "| | |", "|---|---|", *_data_rows(plan, run), *_plan_rows(plan), "",
        *(["Beside this folder:", "", *siblings, ""] if siblings else []),
        *_figures(run),
        "## Serve", "", "From the folder that holds this one:", "", "```",
        *(f"# {server}\n{command}" for server, command in commands.items()), "```", "",
        *([f"The files {', '.join(quantised)} were made by llama.cpp's own quantiser, of the commit in "
           f"`{run.gguf.name}/manifest.json`.", ""] if quantised else []),
        f"The base model's licence applies{f': {named}' if named else ''}. The exact plan is in "
        f"`{run.root.name}/plan.yaml` of the run's records.", "",
    ])


def write_card(plan: Plan, run: RunDir) -> None:
    """Writes the merged folder's README.md anew, with what has been measured since the merge."""
    write_durably(run.merged / "README.md", model_card(plan, run, resolve_model_dir(plan.model)))
