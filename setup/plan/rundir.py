"""Where a run keeps its files: `results/RUN/` and `output/RUN*/`. The one place that knows these names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.untrusted import excerpt

__all__ = ["RunDir", "cache_dir", "check_run_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_run_name(name: str) -> str:
    """Returns `name` if it can be a folder name on every system, otherwise raises UsageError."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(
            f"--name takes 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit; got "
            f"{excerpt(name)}."
        )
    return name


def cache_dir(kind: str) -> Path:
    """Returns `$XDG_CACHE_HOME/sparktune/KIND` (tokens, llama.cpp, stubs); does not create it."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # its specification has a relative path ignored; one would make a cache in every folder that a start is made from
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "sparktune" / kind


@dataclass(frozen=True, kw_only=True)
class RunDir:
    """The paths of one run."""

    name: str
    """RUN: the run's name."""
    results_root: Path
    """The folder that holds all runs' records, `results` by default."""
    output_root: Path
    """The folder that holds all runs' models, `output` by default."""

    @property
    def root(self) -> Path:
        """`results/RUN`."""
        return self.results_root / self.name

    @property
    def plan(self) -> Path:
        """The plan as it was run."""
        return self.root / "plan.yaml"

    @property
    def state(self) -> Path:
        """Stage -> input hash, output hash; written by the pipeline only."""
        return self.root / "state.json"

    @property
    def events(self) -> Path:
        """All stages' events, in order; written by the pipeline only."""
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """One object a training step."""
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """Standard output and error of all stages."""
        return self.root / "log.txt"

    @property
    def data_report(self) -> Path:
        """The DatasetReport."""
        return self.root / "data" / "report.json"

    @property
    def samples(self) -> Path:
        """Answers during and after training."""
        return self.root / "samples.jsonl"

    @property
    def evaluation(self) -> Path:
        """What the evaluation measured: figures a source, paired differences, alarms."""
        return self.root / "evaluation.json"

    @property
    def judged(self) -> Path:
        """For people and the next round: unlabelled A/B pairs with their key, and rejected rows."""
        return self.root / "judged"

    @property
    def merge_gap(self) -> Path:
        """Over a quantised base: how far the merged model is from the trained one."""
        return self.root / "quantised_base.json"

    @property
    def summary(self) -> Path:
        """What a script wants at the end."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.root / "report.html"

    @property
    def adapter(self) -> Path:
        """The trained LoRA adapter (PEFT format)."""
        return self.root / "adapter"

    @property
    def weights(self) -> Path:
        """The trained tensors of full fine-tuning."""
        return self.root / "weights"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.root / "tensorboard"

    @property
    def merged(self) -> Path:
        """`output/RUN`: the merged model."""
        return self.output_root / self.name

    def mtp(self, mode: str) -> Path:
        """`output/RUN-mtp` for mode trained, `output/RUN-mtp-default` for mode default."""
        return self.output_root / (self.name + ("-mtp" if mode == "trained" else "-mtp-default"))

    def served_mtp(self, mode: str) -> Path | None:
        """The folder with the head that the result carries: the trained one if it was the better one, or the default.

        None for mode skip, and where the base has no head.
        """
        wanted = {"trained": ("trained", "default"), "default": ("default",)}.get(mode, ())
        return next((self.mtp(m) for m in wanted if self.mtp(m).is_dir()), None)

    @property
    def mtp_work(self) -> Path:
        """`results/RUN/mtp`: the trained head, its checkpoints, and what was measured of both heads."""
        return self.root / "mtp"

    @property
    def gguf(self) -> Path:
        """`output/RUN-gguf`."""
        return self.output_root / (self.name + "-gguf")

    def checkpoint(self, step: int) -> Path:
        """`results/RUN/checkpoint-N`, written after step N."""
        return self.root / f"checkpoint-{step}"

    def stage_events(self, stage: str) -> Path:
        """The NDJSON file that `stage` appends to."""
        return self.root / "stages" / f"{stage}.ndjson"

    @classmethod
    def from_root(cls, root: Path, output_root: Path) -> RunDir:
        """Returns the run whose record folder is `root`."""
        root = root.resolve()
        return cls(name=root.name, results_root=root.parent, output_root=output_root)
