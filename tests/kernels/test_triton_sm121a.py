"""Every fused kernel, at the launches its host makes for the usual and the widest model, compiled for GB10."""

import ast
from pathlib import Path

import pytest
import torch

import sparktune.kernels
from sparktune.kernels.silu_mul.triton import silu_mul_fwd
from sparktune.lab.sm121a import SHARED_LIMIT, compile_for_gb10, recorded_launches
from sparktune.lab.sm121a_launches import launches_of_size
from sparktune.lab.sm121a_mixers import mixer_launches

USUAL = launches_of_size("2B")
# kernels whose tile depends on the model's width; the others have the same launch at every size
WIDEST = [x for x in launches_of_size("27B") if x.name.startswith(("rms_norm", "gdn_gates"))]


def label(launch):
    flags = [k.lower() for k, v in launch.constants.items() if v is True]
    return "-".join([launch.name.replace(" ", "-"), *flags])


@pytest.mark.parametrize("launch", USUAL + WIDEST, ids=label)
def test_fits_gb10(launch):
    got = compile_for_gb10(launch)
    assert got.shared_bytes <= SHARED_LIMIT
    assert got.spill_bytes == 0
    assert got.mma or not launch.has_dot
    if "token_positions" not in launch.name and "gates" not in launch.name:
        assert got.widest_load_bits >= 64, "a row is read in narrow pieces"


def shipped_kernels():
    """Every @triton.jit function of the rooms that ship which is launched: the others are called by these."""
    root = Path(sparktune.kernels.__file__).resolve().parents[1]
    for path in (path for room in ("kernels", "mtp", "training") for path in (root / room).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from (
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
            and any(ast.unparse(mark).startswith("triton.jit") for mark in node.decorator_list)
        )


def test_every_kernel_is_listed():
    listed = {x.kernel.__name__ for x in (*USUAL, *mixer_launches("27B"))}
    shipped = set(shipped_kernels())
    assert len(shipped) > 20
    # the tiles of this one have a table and tests of their own (test_sm121a_matmul.py)
    assert shipped - listed == {"sm121a_matmul_kernel"}


def test_the_check_sees_a_kernel_that_spills():
    gate = torch.empty(64, 8192, dtype=torch.bfloat16, device="meta")
    with recorded_launches() as found:
        silu_mul_fwd(gate, gate)
    greedy = found[0]
    greedy.constants.update(BT=64, BI=1024)
    assert compile_for_gb10(greedy).spill_bytes > 0
