"""Two and three gloo processes train what one trains: every loss and every weight, adapters and whole models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("ranks")]

CASES = [
    # name, family, mode, type, dropout, recompute, also saved on three and resumed on two and one
    ("hybrid-full-64", "qwen3_5", "full", "float64", 0.0, "norms", True),
    ("dense-lora", "qwen3", "lora", "float32", 0.0, "none", True),
    ("hybrid-lora-64", "qwen3_5", "lora", "float64", 0.1, "none", False),
    ("dense-full", "qwen3", "full", "float32", 0.0, "layer", False),
    ("hybrid-lora", "qwen3_5", "lora", "float32", 0.0, "none", True),
    ("hybrid-full", "qwen3_5", "full", "float32", 0.0, "none", True),
    ("dense-lora-64", "qwen3", "lora", "float64", 0.0, "layer", True),
    ("dense-full-64", "qwen3", "full", "float64", 0.0, "none", True),
]
SAMPLE = ("dense-full-sample", "qwen3", "full", "float64", 0.0, "none", True)
"""The default tier's: on two ranks, resumed on one."""
STEPS, SAVED = 4, 2
FIELDS = ("name", "model", "mode", "dtype", "dropout", "recompute", "resumed")


def named(numbers: tuple[int, ...], sample: int, resumed: bool = False) -> list[Any]:
    """(case, number of ranks) as parameters, those of the nightly tier marked."""
    return [pytest.param(SAMPLE[0], sample, id=f"{SAMPLE[0]}-{sample}")] + [
        pytest.param(case[0], number, id=f"{case[0]}-{number}", marks=pytest.mark.slow)
        for case in CASES if case[-1] or not resumed for number in numbers
    ]


@pytest.fixture(scope="module")
def work(
    oracles: Callable[[str], tuple[Any, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Case -> the folder with its runs in every world; the cases of a tier are made by one program."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("ranks")
            tier, worlds, fewer = ([SAMPLE], [1, 2], [1]) if name == SAMPLE[0] else (CASES, [1, 2, 3], [1, 2])
            cases = [dict(zip(FIELDS, (c[0], str(oracles(c[1])[1]), *c[2:]), strict=True)) for c in tier]
            spec = {"work": str(folder), "cases": cases, "worlds": worlds, "resumed_on": fewer}
            (folder / "spec.json").write_text(json.dumps(spec))
            done = subprocess.run(
                [sys.executable, str(Path(__file__).with_name("ranks_worker.py")), str(folder / "spec.json")],
                env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            made.update({case["name"]: folder for case in cases})
        return made[name]

    return get


def losses(run: Path) -> dict[tuple[int, str], float]:
    """(step, loss or eval_loss) -> value."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], key): row[key] for row in rows for key in ("loss", "eval_loss") if key in row}


def tolerance(name: str) -> float:
    return 1e-10 if name.endswith(("-64", "-sample")) else 1e-5


def distance(got: dict[str, torch.Tensor], ref: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    assert got.keys() == ref.keys()
    gap = sum((got[n].double() - ref[n].double()).square().sum() for n in ref)
    return float((gap / sum(ref[n].double().square().sum() for n in ref)).sqrt())


def masters(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    state = load_file(run / f"checkpoint-{step}" / "engine.safetensors")
    return {name: t for name, t in state.items() if name.startswith("master.")}


@pytest.mark.parametrize(("name", "ranks"), named((2, 3), 2))
def test_losses_and_weights_are_those_of_one_process(work: Callable[[str], Path], name: str, ranks: int) -> None:
    one, many = work(name) / f"{name}-1", work(name) / f"{name}-{ranks}"
    ref, got = losses(one), losses(many)
    assert [step for step, key in ref if key == "loss"] == list(range(1, STEPS + 1))
    assert got.keys() == ref.keys()
    assert max(abs(got[k] - ref[k]) for k in ref) <= tolerance(name)
    assert distance(masters(many), masters(one)) <= tolerance(name)
    start = masters(one, 1)
    assert distance(start, masters(one)) > 100 * tolerance(name)  # it did learn
    result = "adapter/adapter_model.safetensors" if "lora" in name else "weights/trained-00001.safetensors"
    assert distance(load_file(many / result), load_file(one / result)) <= max(tolerance(name), 1e-7)


def test_the_data_has_what_the_deal_must_cope_with() -> None:
    """Ranks without a pack in an epoch's last step, and so without a supervised token; uneven packs; mute documents."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from ranks_worker import dataset
    finally:
        sys.path.pop(0)
    from sparktune.training.dealing import DealtPacks, StepCost
    from sparktune.training.packing import PackPlan

    packs = PackPlan(dataset(), pack=True, pack_length=48, seed=3)
    shares = [DealtPacks(packs, rank=r, ranks=3, cost=StepCost(a_token=1, a_square=0), fill=False) for r in range(3)]
    steps = [(first, min(first + 3, len(packs))) for first in range(0, len(packs), 3)]
    dealt = [[list(share.of_step(0, *step)) for share in shares] for step in steps]
    assert any(sum(b.supervised_tokens for b in share) == 0 for step in dealt for share in step)
    assert any(not share for share in dealt[-1])
    assert len({b.real_tokens for step in dealt for share in step for b in share}) > 2


@pytest.mark.parametrize(("name", "ranks"), named((1, 2), 1, resumed=True))
def test_a_checkpoint_does_not_know_how_many_ranks_wrote_it(work: Callable[[str], Path], name: str, ranks: int) -> None:
    most = 2 if name == SAMPLE[0] else 3
    more, fewer = work(name) / f"{name}-{most}", work(name) / f"{name}-{most}to{ranks}"
    saved = load_file(more / f"checkpoint-{SAVED}" / "engine.safetensors")
    taken = load_file(fewer / "taken.safetensors")
    assert taken.keys() == saved.keys()
    assert all(torch.equal(taken[key], saved[key]) for key in saved)
    ref, got = losses(more), losses(fewer)
    assert {step for step, _ in got} == set(range(SAVED + 1, STEPS + 1))
    assert max(abs(got[k] - ref[k]) for k in got) <= tolerance(name)
    assert distance(masters(fewer), masters(more)) <= tolerance(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid-full-64", "dense-lora"])
def test_three_ranks_write_the_files_that_one_writes(work: Callable[[str], Path], name: str) -> None:
    """The same files, tensors, shapes and types: nothing tells how many ranks there were."""
    one, three = (load_file(work(name) / f"{name}-{n}" / f"checkpoint-{SAVED}" / "engine.safetensors") for n in (1, 3))
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in three.items()}
