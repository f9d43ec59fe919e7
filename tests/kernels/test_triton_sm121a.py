"""Every fused kernel, at the launches its host makes for the usual and the widest model, compiled for GB10."""

import pytest
import torch

from sparktune.kernels.silu_mul.triton import silu_mul_fwd
from sparktune.lab.sm121a import SHARED_LIMIT, compile_for_gb10, recorded_launches
from sparktune.lab.sm121a_launches import launches_of_size

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


def test_every_kernel_is_listed():
    listed = {x.kernel.__name__ for x in USUAL}
    assert listed >= {
        "rms_norm_fwd_kernel", "rms_norm_bwd_kernel", "gated_rms_norm_fwd_kernel", "gated_rms_norm_bwd_kernel",
        "silu_mul_fwd_kernel", "silu_mul_bwd_kernel", "sigmoid_gate_fwd_kernel", "sigmoid_gate_bwd_kernel",
        "attention_prologue_fwd_kernel", "attention_prologue_bwd_kernel", "causal_conv1d_fwd_kernel",
        "causal_conv1d_bwd_kernel", "token_positions_kernel", "gdn_gates_fwd_kernel", "gdn_gates_bwd_kernel",
        "softmax_loss_kernel", "scatter_rows_kernel",
    }


def test_the_check_sees_a_kernel_that_spills():
    gate = torch.empty(64, 8192, dtype=torch.bfloat16, device="meta")
    with recorded_launches() as found:
        silu_mul_fwd(gate, gate)
    greedy = found[0]
    greedy.constants.update(BT=64, BI=1024)
    assert compile_for_gb10(greedy).spill_bytes > 0
