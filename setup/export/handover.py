"""What the user gets into their hands: serving commands and Ollama's Modelfile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparktune.setup.plan.models import probe
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.setup.plan.untrusted import shell_word

__all__ = ["modelfile", "result_lines", "serving_commands"]

_DRAFT_TOKENS = 2
"""Drafted tokens a step; the head is one layer, applied again for the second."""


def modelfile(gguf: str, model_dir: Path, *, hybrid: bool) -> str:
    """Returns Ollama's Modelfile for a GGUF file beside it.

    Args:
        gguf: the file's name.
        model_dir: the model; its generation_config gives the sampling parameters.
        hybrid: a Qwen3.5, for which Ollama has a renderer and a parser of its own; other models bring their template in
            the GGUF.
    """
    try:
        found = json.loads((model_dir / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    defaults: dict[str, Any] = {"temperature": 1, "top_k": 20, "top_p": 0.95} if hybrid else {}
    given = {k: found.get(k) for k in ("temperature", "top_k", "top_p")}
    parameters = defaults | {k: value for k, value in given.items() if isinstance(value, int | float)}
    lines = [f"FROM ./{gguf}"]
    if hybrid:
        lines += ["TEMPLATE {{ .Prompt }}", "RENDERER qwen3.5", "PARSER qwen3.5"]
    lines += [f"PARAMETER {key} {value:g}" for key, value in parameters.items()]
    return "\n".join(lines) + "\n"


def serving_commands(
    spec: ModelSpec, model: Path, *, mtp: Path | None = None, gguf: Path | None = None, name: str = "model"
) -> dict[str, str]:
    """Returns server -> command, as the layout of the files wants it.

    Args:
        spec: the model's shape. In the multimodal layout vLLM leaves the vision tower out with --language-model-only.
        model: the merged folder.
        mtp: the folder with the MTP head; its commands draft with it.
        gguf: a GGUF file; without one there is nothing for llama-server and Ollama.
        name: what Ollama shall call it.
    """
    hybrid = spec.model_type == "qwen3_5_text"
    folder = shell_word(str(mtp or model))
    vllm = f"vllm serve {folder}" + (" --language-model-only" if hybrid and spec.multimodal else "")
    sglang = f"python -m sglang.launch_server --model-path {folder}"
    if mtp is not None:
        draft = json.dumps({"method": "mtp", "num_speculative_tokens": _DRAFT_TOKENS}, separators=(",", ":"))
        vllm += f" --speculative-config {shell_word(draft)}"
        sglang += (f" --speculative-algorithm NEXTN --speculative-draft-model-path {folder} --speculative-num-steps "
                   f"{_DRAFT_TOKENS} --speculative-eagle-topk 1 --speculative-num-draft-tokens {_DRAFT_TOKENS + 1}")
    commands = {"vLLM": vllm, "SGLang": sglang}
    if gguf is not None:
        commands["llama.cpp"] = f"llama-server -m {shell_word(str(gguf))} --jinja" + (
            " --spec-type draft-mtp" if mtp is not None else ""
        )
        modelfile_path = shell_word(str(gguf.parent / "Modelfile"))
        commands["Ollama"] = f"ollama create {shell_word(name.lower())} -f {modelfile_path}"
    return commands


def result_lines(plan: Plan, run: RunDir) -> list[str]:
    """Returns the result card's lines on serving: one command a server, for the files that are there."""
    if not run.merged.is_dir():
        return []
    mtp = run.served_mtp(plan.mtp)
    # the vision tower's file (mmproj-...) is no model of its own
    gguf = next(iter(sorted(run.gguf.glob(f"{run.name}-*.gguf"))), None)
    commands = serving_commands(probe(str(run.merged)), run.merged, mtp=mtp, gguf=gguf, name=run.name)
    width = max(map(len, commands))
    return [f"{server:<{width}}  {command}" for server, command in commands.items()]
