"""A whole tiny Qwen3.5 on the fused ops against the same tower on the references: loss and every gradient."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from sparktune.kernels.candidates import FUSED
from sparktune.kernels.select import OPS, OpTable, reference_ops
from sparktune.setup.plan.models import probe
from sparktune.training.adapters import LoraConfig, attach_lora
from sparktune.training.model import build_model, load_weights, train_everything

SOURCE = Path(__file__).parents[2] / "training" / "model" / "conftest.py"
LENGTHS = (9, 1, 14)


def oracle_module():
    found = importlib.util.spec_from_file_location("oracle_models", SOURCE)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    # head dimensions that the attention and delta rule kernels take
    module.HYBRID.update(
        linear_key_head_dim=16, linear_value_head_dim=16, num_hidden_layers=4, head_dim=64, hidden_size=32
    )
    return module


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    module = oracle_module()
    return module, module.save_checkpoint(module.make_oracle("qwen3_5"), tmp_path_factory.mktemp("tiny"))


def fused_ops():
    chosen = {op: getattr(importlib.import_module(FUSED[op][0].module), FUSED[op][0].function) for op in OPS}
    return OpTable(**chosen, reasons=dict.fromkeys(OPS, "the first candidate"))


def gradients(oracle, ops, dtype, full, policy):
    module, folder = oracle
    spec = probe(str(folder))
    model = build_model(spec, ops, dtype, "cpu")
    load_weights(model, folder, spec)
    if full:
        train_everything(model)
    else:
        attach_lora(model, LoraConfig(r=4, alpha=8, dropout=0.0), seed=3)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.data.normal_(generator=generator).mul_(0.1)
    model.set_recompute(policy)
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randint(0, module.VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]
    loss = model.loss_sum(module.lay_out(parts, 27))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("full", "policy"), [(False, "norms"), (True, "none")])
def test_loss_and_gradients_match_the_references(oracle, full, policy):
    ref_loss, ref = gradients(oracle, reference_ops(), torch.float32, full, "none")
    loss, got = gradients(oracle, fused_ops(), torch.float32, full, policy)
    assert abs(loss - ref_loss) <= 1e-5 * abs(ref_loss)
    assert got.keys() == ref.keys()
    for name, g in got.items():
        assert g is not None, f"{name} has no gradient"
        worst = (g - ref[name]).abs().max() / ref[name].abs().max().clamp_min(1e-12)
        assert worst < 2e-4, f"{name}: {worst}"
