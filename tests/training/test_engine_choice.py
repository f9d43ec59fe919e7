"""The choice of an engine, and the Unsloth engine's own arithmetic on a plain transformers model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from sparktune.setup.plan import recommend as recommend_module
from sparktune.setup.plan.engines import Choice, choose_engine
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.models import CATALOGUE, probe, spec_from_config
from sparktune.setup.plan.schema import Machine, Plan
from sparktune.setup.plan.speeds import Speed
from sparktune.training import engine_choice, unsloth_engine
from sparktune.training.batch import MicroBatch
from sparktune.training.engine_choice import engine_of_command, load_unsloth
from sparktune.training.native_engine import NativeEngine
from sparktune.training.unsloth_engine import UnslothEngine, adapter_key, documents_of
from sparktune.training.unsloth_trainer import SFT_SETTINGS, document_inputs, document_trainer

SPEC = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
GPU = Machine(device="cuda", gpu_name="NVIDIA GB10", capability=(12, 1), memory_gib=100, cpu_cores=4, disk_free_gib=10)
CPU = Machine(device="cpu", memory_gib=10, cpu_cores=4, disk_free_gib=10)


def measured(native: float, unsloth: float, chip: str = "NVIDIA GB10", mode: str = "lora") -> tuple[Speed, ...]:
    return tuple(
        Speed(chip=chip, engine=engine, mode=mode, dtype="bfloat16", recompute="none", parameters=SPEC.parameters,
              flop_per_s=speed, source="measured", origin=f"a test of {engine}")
        for engine, speed in (("native", native), ("unsloth", unsloth))
    )


@pytest.mark.parametrize(
    ("machine", "speeds", "mode", "installed", "engine", "says"),
    [
        (GPU, measured(7e12, 3.5e12), "lora", True, "native", "2.0 times"),
        (GPU, measured(3e12, 3.5e12), "lora", True, "unsloth", "0.9 times"),
        (GPU, measured(3e12, 3.5e12), "lora", None, "unsloth", "a test of native"),
        (GPU, measured(3e12, 3.5e12), "lora", False, "native", "not installed"),
        (GPU, measured(3e12, 3.5e12, chip="NVIDIA H200"), "lora", True, "native", "nobody has measured"),
        (GPU, measured(3e12, 3.5e12, mode="full"), "lora", True, "native", "--engine-duel"),
        (GPU, measured(3e12, 3.5e12, mode="full"), "full", True, "unsloth", "full"),
        (GPU, measured(3e12, 3.5e12), "qlora", True, "unsloth", "lora"),
        (GPU, measured(1e12, 2e12)[1:], "lora", True, "native", "nobody"),
        (CPU, measured(1, 2), "lora", True, "native", "CUDA GPU"),
    ],
)
def test_native_where_it_is_not_measured_slower(
    machine: Machine, speeds: tuple[Speed, ...], mode: str, installed: bool | None, engine: str, says: str
) -> None:
    choice = choose_engine(SPEC, machine, mode=mode, unsloth_installed=installed, speeds=speeds)
    assert choice.engine == engine
    assert says in choice.reason


def test_the_recommendation_and_the_process_ask_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = GPU.model_copy(update={"gpu_name": "NVIDIA H200"})
    choice = choose_engine(SPEC, h200, mode="lora", unsloth_installed=True)
    assert choice.engine == "native"
    assert "measured, one H200" in choice.reason
    for module in (recommend_module, engine_choice):
        monkeypatch.setattr(module, "choose_engine", lambda *a, **k: Choice(engine="unsloth", reason="a test"))
    found = recommend_module._engine(Plan(mode="lora", device="cuda"), SPEC, None, h200)
    assert [(item[1], item[2]) for item in found] == [("unsloth", "a test")]


def test_what_the_native_engine_does_not_know_goes_to_unsloth() -> None:
    odd = SPEC.model_copy(update={"native": False, "native_reason": "gemma is new to it"})
    choice = choose_engine(odd, GPU, mode="lora", unsloth_installed=False)
    assert choice.engine == "unsloth"
    assert "gemma is new to it" in choice.reason


def test_a_command_line_is_read_before_torch(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"model": str(tiny_model), "data": "x.jsonl"}
    asked = engine_of_command({**flags, "engine": "unsloth"}, None, {})
    assert asked is not None
    assert asked.engine == "unsloth"
    from_env = engine_of_command(flags, None, {"SPARKTUNE_ENGINE": "unsloth"})
    assert from_env is not None
    assert from_env.engine == "unsloth"
    assert engine_of_command(flags, None, {}) is None  # unsloth is not installed: nothing to import first
    monkeypatch.setattr(engine_choice, "_machine", lambda: GPU)
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda name: object())
    assert engine_of_command({"model": str(tiny_model)}, None, {}) is None  # no data: the session says so
    left_open = engine_of_command(flags, None, {})
    assert left_open is not None
    assert left_open.engine == "native"
    assert engine_of_command({**flags, "model": "/nowhere/model"}, None, {}) is None


def test_without_unsloth_it_says_so_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PreflightError, match="which this Python does not have") as caught:
        load_unsloth()
    assert caught.value.exit_code == 3


def test_an_unsloth_that_refuses_the_machine_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unsloth.py").write_text("raise NotImplementedError('Unsloth needs a GPU\\nand more')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PreflightError, match=r"NotImplementedError: Unsloth needs a GPU\. It needs"):
        load_unsloth()


def test_without_a_gpu_the_engine_refuses() -> None:
    with pytest.raises(PreflightError, match="needs a CUDA GPU"):
        UnslothEngine.build(Plan(engine="unsloth"), SPEC, Path("model"), torch.device("cpu"))


def test_adapter_keys() -> None:
    inside = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert adapter_key(inside, "text") == "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert adapter_key(inside, "multimodal") == inside.replace(".default", "")
    plain = "base_model.model.model.layers.3.self_attn.q_proj.lora_B.default.weight"
    assert adapter_key(plain, "text") == plain.replace(".default", "")
    assert adapter_key("base_model.model.model.embed_tokens.weight", "text") is None


def row() -> MicroBatch:
    """Three documents of 7, 5 and 9 tokens; the second teaches nothing."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([7, 5, 9])
    cu_seqlens = torch.tensor([0, 7, 12, 21], dtype=torch.int32)
    ids = torch.randint(3, 500, (21,), generator=generator)
    rows = torch.tensor([2, 3, 5, 13, 14, 18, 19])
    return MicroBatch(
        ids=ids, position_ids=torch.cat([torch.arange(n) for n in lengths]), cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens, max_seqlen=9, supervised_rows=rows, targets=ids[rows + 1], examples=(0, 1, 2),
        real_tokens=21,
    )


def test_a_row_falls_apart_into_the_documents_that_teach() -> None:
    found = list(documents_of(row()))
    assert [ids.shape[1] for ids, _, _ in found] == [7, 9]
    assert [n for _, _, n in found] == [3, 4]
    for ids, labels, n in found:
        learned = labels != -100
        assert int(learned.sum()) == n
        assert torch.equal(labels[learned], ids[learned])
        assert not learned[0, 0]


TRAINERS = ["transformers", *(["trl"] if importlib.util.find_spec("trl") else [])]
"""SFTTrainer's parent always; SFTTrainer itself where TRL is installed, which development does without."""


def trainer_of(model: Any, plan: Plan, folder: Path, kind: str = "transformers") -> Any:
    if kind == "trl":
        trl = importlib.import_module("trl")
        base, config, settings = trl.SFTTrainer, trl.SFTConfig, {**SFT_SETTINGS, "max_length": 64}
    else:
        base, config, settings = Trainer, TrainingArguments, {}
    return document_trainer(
        model, AutoTokenizer.from_pretrained(plan.model), plan, folder, base=base, config=config,
        data=[{"input_ids": [0, 1], "labels": [0, 1]}], settings=settings, checkpointing=False,
    )


@pytest.fixture(params=TRAINERS)
def engines(tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> SimpleNamespace:
    """Our native engine and the Unsloth engine around transformers + PEFT, with the same weights."""
    torch.manual_seed(0)
    plan = Plan(model=str(tiny_model), mode="lora", dtype="float32", device="cpu", recompute="none", lora_r=4,
                lora_alpha=8.0, target_modules=["q_proj", "down_proj", "in_proj_qkv"])
    spec = probe(str(tiny_model))
    native = NativeEngine.build(plan, spec, tiny_model, torch.device("cpu"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=plan.target_modules))
    trainer = trainer_of(peft, plan, tmp_path / "trainer", request.param)
    other = UnslothEngine(trainer, plan, spec, tiny_model)
    return SimpleNamespace(plan=plan, native=native, other=other, peft=peft, trainer=trainer)


@pytest.mark.parametrize("heeds", [True, False])
def test_a_step_is_the_trainers_and_it_does_not_matter_who_counts(
    engines: SimpleNamespace, heeds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = engines.trainer
    monkeypatch.setattr(trainer, "model_accepts_loss_kwargs", heeds)
    seen: list[int] = []
    step = type(trainer).training_step

    def counted(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        seen.append(num_items_in_batch)
        return step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(type(trainer), "training_step", counted)
    loss = engines.other.forward_backward([row()], 20)
    assert seen == [20, 20]
    gradients = {n: g.clone() for n, g in engines.other.named_gradients() if g is not None}
    engines.peft.zero_grad()
    expected = torch.zeros(())
    for ids, labels, supervised in documents_of(row()):
        mean = engines.peft(input_ids=ids, labels=labels).loss
        (mean * supervised / 20).backward()
        expected += mean.detach() * supervised / 20
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in engines.other.named_gradients():
        assert gradient is None or torch.allclose(gradient, gradients[name], rtol=1e-4, atol=1e-7), name
    documents = [document_inputs(*document) for document in documents_of(row())]
    sums = [trainer.compute_loss(engines.peft, inputs, num_items_in_batch=1).item() for inputs in documents]
    assert sum(sums) == pytest.approx(engines.other.loss_sum(row()).item(), rel=1e-5)
    assert sum(sums) == pytest.approx(20 * expected.item(), rel=1e-5)


def test_losses_and_steps_are_the_native_engines(engines: SimpleNamespace, tmp_path: Path) -> None:
    native, other = engines.native, engines.other
    native.export(tmp_path / "start")
    engines.peft.load_adapter(tmp_path / "start", "default", is_trainable=True)
    assert all(p.requires_grad for n, p in engines.peft.named_parameters() if "lora_" in n)
    other = UnslothEngine(engines.trainer, engines.plan, other.spec, Path(engines.plan.model))
    batches = [row(), row()]
    assert other.loss_sum(row()).item() == pytest.approx(native.loss_sum(row()).item(), rel=1e-5)
    for step in range(4):
        ours, theirs = (e.forward_backward(batches, 14).item() for e in (native, other))
        assert theirs == pytest.approx(ours, rel=2e-5), step
        norms = [e.optimiser_step(1e-2).item() for e in (native, other)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    kept = {name: value.clone() for name, value in other.state().items()}
    other.forward_backward(batches, 14)
    other.optimiser_step(1e-2)
    moved = other.loss_sum(row()).item()
    other.load_state(kept)
    assert other.loss_sum(row()).item() != moved


def test_the_adapter_is_pefts_and_loads_with_b_not_zero(engines: SimpleNamespace, tmp_path: Path) -> None:
    other = engines.other
    other.forward_backward([row()], 7)
    other.optimiser_step(1e-2)
    other.export(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "in_proj_qkv", "q_proj"]
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert all(key.startswith("base_model.model.model.layers.") for key in list(file.keys()))
    base = AutoModelForCausalLM.from_pretrained(engines.plan.model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    b = [p for n, p in loaded.named_parameters() if "lora_B" in n]
    assert b
    assert all(bool(p.any()) for p in b)
    answer = other.generate([5, 6, 7], 4, [1])
    assert 1 <= len(answer) <= 4


def test_generation_leaves_checkpointing_as_the_plan_has_it(engines: SimpleNamespace) -> None:
    seen: list[object] = []
    switch = SimpleNamespace(
        for_inference=lambda model: seen.append("inference"),
        for_training=lambda model, use_gradient_checkpointing=True: seen.append(use_gradient_checkpointing),
    )
    for recompute, wanted in (("none", False), ("layer", "unsloth")):
        plan = engines.plan.model_copy(update={"recompute": recompute})
        engine = UnslothEngine(engines.trainer, plan, engines.other.spec, Path(plan.model), switch)
        assert seen[-1:] == [wanted]  # Unsloth's SFTTrainer leaves a model as for inference
        engine.generate([5, 6], 2, [1])
        assert seen[-2:] == ["inference", wanted]
        assert "packing is off (--pack has no effect)" in engine.describe()


@pytest.mark.parametrize(("storage", "four", "eight"), [("nf4", True, False), ("int8", False, True)])
def test_what_unsloth_is_asked_for(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, storage: str, four: bool, eight: bool
) -> None:
    asked: dict[str, dict[str, object]] = {}
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    class FastModel:
        # the parameters of unsloth 2026.5.2 that are given by name; an unknown one would vanish in its **kwargs
        @staticmethod
        def from_pretrained(
            model_name: str, *, max_seq_length: int, dtype: torch.dtype, load_in_4bit: bool, load_in_8bit: bool,
            full_finetuning: bool, use_gradient_checkpointing: object, random_state: int,
        ) -> tuple[object, object]:
            asked["load"] = {"four": load_in_4bit, "eight": load_in_8bit, "full": full_finetuning}
            return model, AutoTokenizer.from_pretrained(tiny_model)

        @staticmethod
        def get_peft_model(
            model: object, *, r: int, target_modules: list[str], lora_alpha: float, lora_dropout: float, bias: str,
            use_gradient_checkpointing: object, random_state: int, use_rslora: bool,
        ) -> object:
            asked["peft"] = {"r": r, "targets": target_modules, "checkpointing": use_gradient_checkpointing}
            return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules))

        @staticmethod
        def for_training(model: object, *, use_gradient_checkpointing: object) -> None:
            asked["training"] = {"checkpointing": use_gradient_checkpointing}

    def config(**settings: Any) -> TrainingArguments:
        asked["sft"] = {name: settings.pop(name) for name in (*SFT_SETTINGS, "max_length")}
        return TrainingArguments(**settings)

    stack = {
        "trl": SimpleNamespace(SFTTrainer=Trainer, SFTConfig=config),
        "datasets": SimpleNamespace(Dataset=SimpleNamespace(from_dict=lambda columns: [columns])),
    }
    for name, module in stack.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(unsloth_engine, "load_unsloth", lambda: SimpleNamespace(FastModel=FastModel))
    monkeypatch.setattr(unsloth_engine.torch.cuda, "is_bf16_supported", lambda: True)
    plan = Plan(model=str(tiny_model), mode="qlora", quantise_base=storage, engine="unsloth", lora_r=4,
                target_modules=["q_proj"], recompute="norms")
    built = UnslothEngine.build(plan, probe(str(tiny_model)), tiny_model, torch.device("cuda"))
    assert asked["load"] == {"four": four, "eight": eight, "full": False}
    assert asked["peft"] == {"r": 4, "targets": ["q_proj"], "checkpointing": False}
    assert asked["sft"] == {**SFT_SETTINGS, "max_length": plan.max_seq_length}
    assert asked["training"] == {"checkpointing": False}
    assert built.device.type == "cpu"


def test_versions_are_named(engines: SimpleNamespace) -> None:
    assert "transformers" in engines.other.reasons["model"]
    assert "one document a row" in engines.other.describe()
    assert unsloth_engine.UnslothEngine is UnslothEngine
