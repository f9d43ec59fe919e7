"""What vLLM and SGLang accept, read from their wheels without installing them: flags, weight names, stacked parameters.

    python -m sparktune.lab.serving_facts --vllm WHEEL --sglang WHEEL --out tests/setup/export/serving_facts.json

The wheels are opened as archives and their Python is parsed, never run. The commands that setup/export/handover.py
prints and the names and shapes of a merged checkpoint are compared with these facts by the tests, in every run; the
nightly tier reads the wheels again and compares the facts with the committed ones.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shlex
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparktune.setup.plan.weights import safetensors_header, safetensors_index

__all__ = ["VERSIONS", "check_command", "check_weights", "expected_shapes", "read_sglang", "read_vllm"]

VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23"}
"""The pinned wheels."""

_MODELS = "model_executor/models/"


def _parse(wheel: zipfile.ZipFile, name: str) -> ast.Module:
    return ast.parse(wheel.read(name))


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)


def _attributes(cls: ast.ClassDef) -> list[str]:
    """Returns what a class assigns to `self`: its submodules and parameters among them."""
    found = {
        t.attr for n in ast.walk(cls) if isinstance(n, ast.Assign | ast.AnnAssign)
        for t in (n.targets if isinstance(n, ast.Assign) else [n.target])
        if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == "self"
    }
    return sorted(found)


def _flags_of_calls(tree: ast.Module) -> set[str]:
    return {
        a.value for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
        and n.func.attr == "add_argument" for a in n.args
        if isinstance(a, ast.Constant) and isinstance(a.value, str) and a.value.startswith("-")
    }


def _fields(cls: ast.ClassDef) -> list[str]:
    return [n.target.id for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]


def _strings(node: ast.AST) -> Iterator[str]:
    for n in ast.walk(node):
        if isinstance(n, ast.Constant) and isinstance(n.value, str):
            yield n.value


def _stacked_dictionaries(tree: ast.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """Returns fused parameter -> the checkpoint's names, from class-level `packed_modules_mapping` literals."""
    found: dict[str, list[str]] = {}
    for n in ast.walk(tree):
        targets = n.targets if isinstance(n, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id in names for t in targets):
            for d in ast.walk(n):
                if isinstance(d, ast.Dict):
                    found |= {k.value: list(_strings(v)) for k, v in zip(d.keys, d.values, strict=True)
                              if isinstance(k, ast.Constant) and isinstance(v, ast.List)}
    return found


def _stacked_tuples(tree: ast.Module) -> dict[str, list[str]]:
    """Returns the same from `stacked_params_mapping` lists of (fused, original, shard)."""
    found: dict[str, list[str]] = {}
    for n in ast.walk(tree):
        targets = n.targets if isinstance(n, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id == "stacked_params_mapping" for t in targets):
            for pair in ast.walk(n.value):
                names = [e.value.strip(".") for e in getattr(pair, "elts", [])[:2]
                         if isinstance(e, ast.Constant) and isinstance(e.value, str)]
                if isinstance(pair, ast.Tuple) and len(names) == 2:
                    found.setdefault(names[0], [])
                    found[names[0]] += [] if names[1] in found[names[0]] else [names[1]]
    return found


def _source(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        return {"wheel": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_vllm(path: Path) -> dict[str, Any]:
    """Returns the facts of a vLLM wheel.

    Args:
        path: the wheel.

    Raises:
        KeyError, StopIteration: a file or class is not where it was: the facts have to be looked up anew.
    """
    with zipfile.ZipFile(path) as wheel:
        arguments = [_parse(wheel, f"vllm/{n}") for n in
                     ("engine/arg_utils.py", "entrypoints/cli/serve.py", "entrypoints/common/cli_args.py")]
        speculative = _parse(wheel, "vllm/config/speculative.py")
        model, head, older, moe = (_parse(wheel, f"vllm/{_MODELS}{n}.py") for n in
                                   ("qwen3_5", "qwen3_5_mtp", "qwen3_next", "qwen2_moe"))
        gdn = _parse(wheel, "vllm/model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py")
        return {
            **_source(path), "positional": True, "flags": sorted(set().union(*map(_flags_of_calls, arguments))),
            "speculative_keys": _fields(_class(speculative, "SpeculativeConfig")),
            "speculative_methods": sorted({s for s in _strings(speculative) if re.fullmatch(r"[a-z0-9_]*mtp", s)}),
            "model_types": sorted({s for s in _strings(speculative) if s.startswith("qwen3_5")}),
            "stacked": _stacked_dictionaries(model, ["packed_modules_mapping"]),
            "head_prefix": "mtp." if "mtp." in set(_strings(head)) else "",
            "classes": {
                "layer": _attributes(_class(model, "Qwen3_5DecoderLayer")),
                "self_attn": _attributes(_class(older, "Qwen3NextAttention")),
                "linear_attn": _attributes(_class(gdn, "QwenGatedDeltaNetAttention")),
                "mlp": _attributes(_class(moe, "Qwen2MoeMLP")),
                "model": _attributes(_class(model, "Qwen3_5Model")),
                "head": _attributes(_class(head, "Qwen3_5MultiTokenPredictor")),
            },
        }


def read_sglang(path: Path) -> dict[str, Any]:
    """Returns the facts of an SGLang wheel (see read_vllm)."""
    with zipfile.ZipFile(path) as wheel:
        flags: set[str] = set()
        for name in wheel.namelist():
            if name.startswith("sglang/srt/arg_groups/fields/") and name.endswith(".py"):
                for cls in (n for n in _parse(wheel, name).body if isinstance(n, ast.ClassDef)):
                    flags |= {"--" + field.replace("_", "-") for field in _fields(cls)}
                    flags |= {s for s in _strings(cls) if re.fullmatch(r"--[a-z0-9-]+", s)}
        model, head = (_parse(wheel, f"sglang/srt/models/{n}.py") for n in ("qwen3_5", "qwen3_5_mtp"))
        older = _parse(wheel, "sglang/srt/models/qwen2_moe.py")
        spec = wheel.read("sglang/srt/arg_groups/fields/spec.py").decode()
        algorithms = re.search(r"Builtins: ([A-Z0-9, ]+)", spec)
        attention, linear = (_class(model, f"Qwen3_5{n}DecoderLayer") for n in ("Attention", "Linear"))
        return {
            **_source(path), "positional": False, "flags": sorted(flags),
            "speculative_methods": algorithms[1].split(", ") if algorithms else [],
            "stacked": _stacked_tuples(model), "head_prefix": "mtp." if "mtp." in set(_strings(head)) else "",
            "classes": {
                "layer": sorted({*_attributes(attention), *_attributes(linear), "self_attn"}),
                "self_attn": _attributes(attention), "linear_attn": _attributes(_class(model, "Qwen3_5GatedDeltaNet")),
                "mlp": _attributes(_class(older, "Qwen2MoeMLP")),
                "model": _attributes(_class(model, "Qwen3_5ForCausalLM")),
                # its decoder is a whole model of one layer, whose final norm is the head's
                "head": sorted({*_attributes(_class(head, "Qwen3_5ForCausalLMMTP")), "norm", "layers"}),
            },
        }


def check_command(command: str, facts: dict[str, Any]) -> list[str]:
    """Returns what a server of these facts would not understand in a command line.

    Args:
        command: as handover.serving_commands prints it.
        facts: of that server.
    """
    wrong, words = [], shlex.split(command)
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        if not flag.startswith("--"):
            continue
        if flag not in facts["flags"]:
            wrong.append(f"{flag} is unknown")
        if flag == "--speculative-config":
            given = json.loads(value)
            wrong += [f"--speculative-config has no {key}" for key in given if key not in facts["speculative_keys"]]
            if given.get("method") not in facts["speculative_methods"]:
                wrong.append(f"--speculative-config has no method {given.get('method')}")
        if flag == "--speculative-algorithm" and value not in facts["speculative_methods"]:
            wrong.append(f"--speculative-algorithm has no {value}")
    return wrong


def expected_shapes(text: dict[str, Any]) -> dict[str, list[int]]:
    """Returns the shapes that both servers' layers of a dense Qwen3.5 are built with, by the checkpoint's names.

    Source: the constructors named in read_vllm; H hidden, query heads doubled by the gate.

    Args:
        text: the text config.
    """
    h, i, d = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    n, kv = text["num_attention_heads"], text["num_key_value_heads"]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    heads = text["linear_num_value_heads"]
    values = heads * text["linear_value_head_dim"]
    gate = 2 if text.get("attn_output_gate", True) else 1
    return {
        "self_attn.q_proj.weight": [gate * n * d, h], "self_attn.k_proj.weight": [kv * d, h],
        "self_attn.v_proj.weight": [kv * d, h], "self_attn.o_proj.weight": [h, n * d],
        "self_attn.q_norm.weight": [d], "self_attn.k_norm.weight": [d], "mlp.gate_proj.weight": [i, h],
        "mlp.up_proj.weight": [i, h], "mlp.down_proj.weight": [h, i], "input_layernorm.weight": [h],
        "post_attention_layernorm.weight": [h], "linear_attn.in_proj_qkv.weight": [2 * keys + values, h],
        "linear_attn.in_proj_z.weight": [values, h], "linear_attn.in_proj_a.weight": [heads, h],
        "linear_attn.in_proj_b.weight": [heads, h], "linear_attn.out_proj.weight": [h, values],
        "linear_attn.conv1d.weight": [2 * keys + values, 1, text["linear_conv_kernel_dim"]],
        "linear_attn.A_log": [heads], "linear_attn.dt_bias": [heads],
        "linear_attn.norm.weight": [text["linear_value_head_dim"]], "embed_tokens.weight": [text["vocab_size"], h],
        "norm.weight": [h], "lm_head.weight": [text["vocab_size"], h], "fc.weight": [h, 2 * h],
        "pre_fc_norm_embedding.weight": [h], "pre_fc_norm_hidden.weight": [h],
    }


def _place(name: str, facts: dict[str, Any]) -> str:
    """Returns why a server would not find a place for a checkpoint's tensor; empty when it has one."""
    classes = facts["classes"]
    fused = {piece: whole for whole, pieces in facts["stacked"].items() for piece in pieces}
    rest = name.replace("model.language_model.", "model.", 1)
    if rest.startswith("mtp."):
        if facts["head_prefix"] != "mtp.":
            return "the server knows no head of this prefix"
        rest, top = rest.removeprefix("mtp."), "head"
    else:
        rest, top = rest.removeprefix("model."), "model"
    if rest == "lm_head.weight":
        return ""
    if not rest.startswith("layers."):
        return "" if rest.split(".")[0] in classes[top] else f"no {rest.split('.')[0]} in the {top}"
    _, _, part, *inner = rest.split(".")
    if part not in classes["layer"]:
        return f"no {part} in a layer"
    if part.endswith("layernorm"):
        return ""
    leaf = fused.get(inner[0], inner[0])
    return "" if leaf in classes.get(part, []) else f"no {leaf} in {part}"


def check_weights(folder: Path, facts: dict[str, Any]) -> list[str]:
    """Returns what a server would miss, not know, or find in another shape in a checkpoint of a dense Qwen3.5.

    Args:
        folder: the model.
        facts: of that server.
    """
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = text.get("text_config", text)
    shapes, wrong = expected_shapes(text), []
    index = safetensors_index(folder)
    headers = {file: safetensors_header(file) for file in set(index.values())}
    for name, file in index.items():
        if "visual." in name:
            continue
        reason = _place(name, facts)
        tail = re.sub(r"^(mtp\.|model\.language_model\.|model\.)?(layers\.\d+\.)?", "", name)
        seen = list(headers[file][name].shape)
        if reason:
            wrong.append(f"{name}: {reason}")
        elif shapes.get(tail) != seen:
            wrong.append(f"{name}: has the shape {seen}, the server makes {shapes.get(tail)}")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Reads both wheels and writes the facts. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--sglang", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    facts = {"vllm": read_vllm(args.vllm), "sglang": read_sglang(args.sglang)}
    args.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
