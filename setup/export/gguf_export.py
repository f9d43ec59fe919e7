"""One model to several GGUF files: converted, quantised, read back, proven in llama.cpp, and only then named."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparktune.mtp.extract_upstream_mtp import find_head
from sparktune.setup.export.convert_demo import MARKER
from sparktune.setup.export.gguf_checks import check_file, needed_bytes
from sparktune.setup.export.handover import modelfile
from sparktune.setup.export.llama_build import Tools, build_tools, find_tools
from sparktune.setup.export.llama_cpp import (
    COMMIT,
    PACKAGE,
    SDIST_SHA256,
    TREE_SHA256,
    child_environment,
    converter_sources,
    run_child,
)
from sparktune.setup.export.llama_server import llama_server
from sparktune.setup.export.proof import Probe, Reference, make_reference, prove
from sparktune.setup.export.quantise import importance_matrix, predict, quantise
from sparktune.setup.plan.errors import PreflightError, SparktuneError
from sparktune.setup.plan.events import EventWriter
from sparktune.setup.plan.exports import check_gguf_types, needs_quantiser
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.outfolder import build_folder, gib, write_durably
from sparktune.setup.plan.schema import ModelSpec
from sparktune.setup.plan.weights import safetensors_header, safetensors_index

__all__ = ["MANIFEST", "export_gguf", "gguf_name", "read_manifest"]

MANIFEST = "manifest.json"
# The converter reads these families' vocabularies through the sentencepiece package, even where they do not use it.
_SENTENCEPIECE_FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
_PICTURES = "preprocessor_config.json"
_VISION_KIND = "f16"


def gguf_name(name: str, kind: str) -> str:
    """Returns the file name of a type, as llama.cpp spells them: NAME-Q8_0.gguf."""
    return f"{name}-{kind.upper()}.gguf"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a GGUF folder; empty when it is not one of ours."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("made_by") == "sparktune" else {}


def _preflight(model_dir: Path, spec: ModelSpec) -> None:
    for package, why in (("torch", "reads the weights with it"), ("transformers", "reads the tokenizer with it")):
        if importlib.util.find_spec(package) is None:
            raise PreflightError(f"llama.cpp's converter {why}, but the package {package} is not installed here. "
                                 "Run this stage in the training environment.")
    if spec.model_type in _SENTENCEPIECE_FAMILIES and importlib.util.find_spec("sentencepiece") is None:
        raise PreflightError(f"llama.cpp's converter needs the Python package sentencepiece for {spec.model_type} "
                             "models; it is not installed. Install it with `pip install sentencepiece`.")
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    stored = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if stored:
        how = stored.get("quant_method", "unknown method") if isinstance(stored, dict) else "unknown method"
        raise PreflightError(
            f"{model_dir} holds quantised weights ({how}); quantising them again loses more than the type says. Merge "
            "onto the unquantised base and export that."
        )


_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|OSError: \d+ requested and \d+ written")
"""The last is what numpy says of a write that came short."""


def _explain(log: str, model_dir: Path) -> str:
    """Turns the converter's last words into a sentence."""
    if _DISK_FULL.search(log):
        return "The disk filled up while llama.cpp's converter wrote. Free some space and start again."
    # its warning of that is in every log of a demo's model, whose own rule stands in; the exception ends the converter
    if "NotImplementedError: BPE pre-tokenizer was not recognized" in log:
        return (
            f"llama.cpp {COMMIT[:9]} does not know the tokenizer of {model_dir}: its pre-tokenizer check gives a hash "
            "that no published model has. With a guessed pre-tokenizer the file would split text differently from the "
            "model, so none is made. Use the base's own tokenizer files, unchanged."
        )
    said = [line.strip() for line in log.splitlines() if line.strip()]
    return (
        f"llama.cpp's converter ({COMMIT[:9]}) refused {model_dir}: {said[-1] if said else 'it said nothing'}. "
        "Its whole output is in the log."
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Export:
    """One model on its way to several GGUF files."""

    def __init__(
        self, model_dir: Path, sources: Path, scratch: Path, events: EventWriter, *, name: str = "model",
        tools: Tools | None = None, keep_mtp: bool = True,
    ) -> None:
        self.model_dir, self.sources, self.scratch, self.events = model_dir, sources, scratch, events
        self.name, self.tools = name, tools
        self.spec = probe(str(model_dir))
        self.hybrid = self.spec.model_type == "qwen3_5_text"
        # llama.cpp asserts on a declared head without tensors and on neither; only both together give a loadable file.
        there = self.hybrid and bool(find_head(model_dir)) and self.spec.mtp_layers > 0
        self.with_mtp = there and keep_mtp
        self.why_mtp = "tensors and declaration are there" if self.with_mtp else (
            "asked for with --mtp skip" if there else "no mtp.* tensors, or no declaration of them in config.json")
        self.demo = (model_dir / MARKER).is_file()
        self.pictures = any("visual." in n for n in safetensors_index(model_dir))
        # what the quantiser reads must hold the checkpoint's values exactly
        headers = [safetensors_header(f) for f in set(safetensors_index(model_dir).values())]
        matrices = {e.dtype for h in headers for e in h.values() if len(e.shape) > 1}
        self.exact = "bf16" if matrices <= {"BF16"} else "f32"
        self._matrix: Path | None = None

    @property
    def head_block(self) -> int | None:
        return self.spec.num_layers if self.with_mtp else None

    def sizes(self, types: Sequence[str]) -> dict[str, int]:
        """Returns type -> predicted bytes of all that lies on the disk at once, the intermediate included."""
        between = any(map(needs_quantiser, types)) and not {self.exact, "f32"} & {*types}
        kinds = [*types, *([self.exact] if between else [])]
        return {kind: needed_bytes(self.model_dir, kind, with_mtp=self.with_mtp) for kind in kinds}

    def arguments(self, target: Path, kind: str, name: str, *flags: str) -> list[str]:
        """Returns the converter's command line."""
        demo = ["-m", "sparktune.setup.export.convert_demo"]
        script = demo if self.demo else [str(self.sources / "convert_hf_to_gguf.py")]
        more = ["--outfile", str(target.absolute()), "--outtype", kind, "--model-name", name, *flags]
        more += ["--no-mtp"] if self.hybrid and not self.with_mtp and "--mmproj" not in flags else []
        return [sys.executable, *script, str(self.model_dir.resolve()), *more]

    def convert(self, target: Path, kind: str, size: int, *flags: str) -> None:
        """Writes one file of a converter's type, reporting its growth."""
        done = run_child(
            self.arguments(target, kind, self.name, *flags), child_environment(self.sources, self.scratch),
            self.scratch,
            lambda: self.events.progress(f"gguf {kind}", _size(target), max(size, _size(target)), "bytes"),
        )
        print(done.output, flush=True)
        if done.code or not target.is_file():
            raise SparktuneError(_explain(done.output, self.model_dir))

    def quantise(self, source: Path, target: Path, kind: str, examples: Probe | None) -> dict[str, Any]:
        """Writes one file of a quantiser's type. Returns what the manifest says about it."""
        assert self.tools is not None
        predicted = predict(self.tools, source, kind, self.scratch, head_block=self.head_block)
        matrix = None
        if predicted.wants_matrix and examples is not None:
            self._matrix = self._matrix or importance_matrix(self.tools, source, examples.text, self.scratch,
                                                             self.events)
            matrix = self._matrix
            self.events.choice("gguf importance matrix", "from the run's data", f"llama.cpp makes {kind} only with one")
        if predicted.fallbacks:
            shown = ", ".join(f"{t} as {k}" for t, k in list(predicted.fallbacks.items())[:5])
            self.events.message(f"{kind}: {len(predicted.fallbacks)} tensors get another type, because their width is "
                                f"no multiple of its block: {shown}.", "warning")
        quantise(self.tools, source, target, kind, self.scratch, self.events, predicted=predicted,
                 head_block=self.head_block, matrix=matrix)
        return {"predicted_bytes": predicted.bytes, "quantiser_fallbacks": predicted.fallbacks,
                "importance_matrix": matrix is not None}


class _Proof:
    """The comparisons in llama.cpp, with the merged model's side computed once, when it is first wanted."""

    def __init__(self, export: _Export, examples: Probe, device: str) -> None:
        self._export, self._examples, self._device = export, examples, device
        self._reference: Reference | None = None

    def of(self, file: Path, kind: str) -> dict[str, Any]:
        e = self._export
        assert e.tools is not None
        self._reference = self._reference or make_reference(e.model_dir, self._examples, self._device, e.sources,
                                                            e.scratch, e.events)
        return prove(e.tools, file, kind, e.model_dir, self._examples, self._reference, with_mtp=e.with_mtp,
                     device=self._device, sources=e.sources, scratch=e.scratch, events=e.events)


def _make_files(
    export: _Export, folder: Path, types: Sequence[str], sizes: Mapping[str, int], proof: _Proof | None,
    examples: Probe | None,
) -> list[dict[str, Any]]:
    """Fills the folder, files of the converter's types first, and returns their entries in the order asked for."""
    made: dict[str, dict[str, Any]] = {}
    exact = "f32" if "f32" in types else export.exact
    source = folder / gguf_name(export.name, exact)
    if exact not in types and any(map(needs_quantiser, types)):
        source = folder / f".{exact}-intermediate.partial"
        export.convert(source, exact, sizes[exact])
    for kind in sorted(types, key=needs_quantiser):
        partial = folder / (gguf_name(export.name, kind) + ".partial")
        entry: dict[str, Any] = {"predicted_bytes": sizes[kind]}
        if needs_quantiser(kind):
            entry = export.quantise(source, partial, kind, examples)
        else:
            export.convert(partial, kind, sizes[kind])
        if _size(partial) > sizes[kind]:
            raise SparktuneError(f"The {kind} file takes {_size(partial):,} bytes, at most {sizes[kind]:,} were "
                                 "predicted; it is not kept.")
        entry["checks"] = check_file(partial, export.model_dir, kind, export.spec, with_mtp=export.with_mtp,
                                     sources=export.sources, scratch=export.scratch, events=export.events)
        if proof is not None:
            entry["proof"] = proof.of(partial, kind)
        final = folder / gguf_name(export.name, kind)
        os.rename(partial, final)
        made[kind] = {"file": final.name, "type": kind, "bytes": _size(final), "sha256": _sha256(final), **entry}
    if source.name.endswith(".partial"):
        source.unlink()
    return [made[kind] for kind in types]


def _make_vision(export: _Export, folder: Path, text_file: Path, prove_it: bool) -> dict[str, Any] | None:
    """Writes the vision tower's file where the base has one; None where it cannot be."""
    if not export.pictures:
        return None
    if not (export.model_dir / _PICTURES).is_file():
        export.events.choice("gguf mmproj", "left out", f"the model has a vision tower but no {_PICTURES}")
        return None
    final = folder / f"mmproj-{export.name}-{_VISION_KIND.upper()}.gguf"
    partial = final.with_name(final.name + ".partial")
    export.convert(partial, _VISION_KIND, 0, "--mmproj")
    loaded = False
    if prove_it:
        assert export.tools is not None
        with llama_server(export.tools, text_file, arguments=["--mmproj", str(partial)]):
            loaded = True
    os.rename(partial, final)
    export.events.choice("gguf mmproj", final.name, "the base reads pictures")
    return {"file": final.name, "type": _VISION_KIND, "bytes": _size(final), "sha256": _sha256(final),
            "loaded_by_llama_cpp": loaded}


def export_gguf(
    model_dir: Path,
    out_dir: Path,
    types: Sequence[str],
    name: str,
    events: EventWriter,
    *,
    record: Mapping[str, Any] | None = None,
    replace: Callable[[Path], bool] | None = None,
    examples: Callable[[], Probe] | None = None,
    device: str = "cpu",
    keep_mtp: bool = True,
) -> dict[str, Any]:
    """Writes `out_dir` with one GGUF a type, a Modelfile and manifest.json; it appears whole or not at all.

    Every file is read back by llama.cpp's own reader: architecture, pre-tokenizer, block count, the type of each tensor
    (no fallback that nobody was told), and each tensor's values against the model's. Where llama.cpp's programs are
    compiled (a type that needs them has them compiled), every file is also run there and held against the model.

    Args:
        model_dir: a model in safetensors.
        out_dir: must not exist.
        types: of `GGUF_TYPES`.
        name: the files' stem.
        events: progress, choices and messages.
        record: entries added to the manifest.
        replace: says whether an existing `out_dir` may be replaced.
        examples: gives what the comparison in llama.cpp runs on; without it there is none.
        device: where the merged model runs for the comparison.
        keep_mtp: False leaves an MTP head out even where the model has one.

    Returns:
        The manifest.

    Raises:
        UsageError: an unknown type, or `out_dir` exists.
        PreflightError: the converter cannot be fetched, no compiler, a package is missing, too little space, quantised
            weights.
        SparktuneError: llama.cpp refused the model, or a file failed a check (it is not kept).
    """
    check_gguf_types(types)
    _preflight(model_dir, probe(str(model_dir)))
    sources = converter_sources(events)
    tools = build_tools(events) if any(map(needs_quantiser, types)) else find_tools()
    with tempfile.TemporaryDirectory(prefix="sparktune-gguf-") as private:
        export = _Export(model_dir, sources, Path(private), events, name=name, tools=tools, keep_mtp=keep_mtp)
        sizes = export.sizes(types)
        if export.hybrid:
            events.choice("gguf mtp", "included" if export.with_mtp else "left out (--no-mtp)", export.why_mtp)
        if export.demo:
            events.choice("gguf pre-tokenizer", "qwen35", f"{MARKER}: the demo made this tokenizer by Qwen3.5's rule")
        proof, material = None, None
        if examples is not None and (tools is not None):
            material = examples()
            proof = _Proof(export, material, device)
        else:
            events.choice("gguf proof in llama.cpp", "not made", "its programs are not compiled here; --gguf with a "
                          "k-quant compiles them, so does python -m sparktune.setup.export.llama_build")
        parts = ", ".join(f"{k}{'' if k in types else ' in between'} {gib(b)}" for k, b in sizes.items())
        with build_folder(out_dir, needs_bytes=sum(sizes.values()), what=f"The GGUF export ({parts})",
                          replace=replace) as folder:
            files = _make_files(export, folder, types, sizes, proof, material)
            vision = _make_vision(export, folder, folder / str(files[0]["file"]), proof is not None)
            manifest = {
                "made_by": "sparktune",
                "llama_cpp": {"commit": COMMIT, "package": PACKAGE, "sdist_sha256": SDIST_SHA256,
                              "tree_sha256": TREE_SHA256, "programs": tools.record["sha256"] if tools else None},
                "source": {"folder": str(model_dir), "mtp": export.with_mtp, "demo_tokenizer": export.demo},
                "files": files, **({"mmproj": vision} if vision else {}), **(record or {}),
            }
            write_durably(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
            write_durably(folder / "Modelfile", modelfile(gguf_name(name, types[0]), model_dir, hybrid=export.hybrid))
    for file in [*files, *([vision] if vision else [])]:
        events.emit("artifact", path=str(out_dir / str(file["file"])), bytes=file["bytes"])
        events.message(f"{out_dir / str(file['file'])}: {gib(int(str(file['bytes'])))}{_proven(file)}")
    return manifest


def _proven(file: Mapping[str, Any]) -> str:
    """Returns what is known of one file, for the message that names it."""
    proof = file.get("proof")
    if proof is None:
        return ", every tensor checked." if "checks" in file else "."
    return (f", every tensor checked; in llama.cpp mean KL {proof['mean_kl']:.2g} against the merged model, "
            f"{proof['same_top']:.1%} same first choice.")
