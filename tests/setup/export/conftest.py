"""Tiny bases and adapters for the export tests; everything is made here, nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Tiny matrices: more threads only wait for each other, here and in every process these tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from sparktune.setup.demo_model import make_model

torch.set_num_threads(1)
MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded, tied, multimodal Qwen3.5 with vision tower and MTP head, bf16."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", vocab_size=1024)


@pytest.fixture(scope="session")
def tiny_base_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as one file, with a head of its own."""
    return make_model(tmp_path_factory.mktemp("models") / "untied", vocab_size=1024, sharded=False, tied=False)


@pytest.fixture(scope="session")
def make_adapter() -> MakeAdapter:
    """Returns a function that saves a trained-looking adapter with PEFT itself."""

    def make(base: Path, folder: Path, *, multimodal: bool = False, zero: bool = False, **config: object) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, Qwen3_5ForConditionalGeneration

        model_class = Qwen3_5ForConditionalGeneration if multimodal else AutoModelForCausalLM
        model = model_class.from_pretrained(base, dtype=torch.float32)
        targets = ["q_proj", "o_proj", "in_proj_qkv", "out_proj", "up_proj"]
        settings = {"r": 4, "lora_alpha": 8, "target_modules": targets}
        peft_model = get_peft_model(model, LoraConfig(**(settings | config)))
        generator = torch.Generator().manual_seed(7)
        if not zero:
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name or "lora_embedding_A" in name:
                    parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        peft_model.save_pretrained(folder)
        return folder

    return make
