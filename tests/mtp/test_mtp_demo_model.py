"""On the demo's model, whose default head knows its base's corpus: what fine-tuning takes, training gives back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparktune.mtp.acceptance import answers_of, compare, match_flags, summarise, walk
from sparktune.mtp.choose import split_for_heads
from sparktune.mtp.extract_upstream_mtp import find_head
from sparktune.mtp.head import load_head
from sparktune.mtp.speculative import HeadDrafter, speculate
from sparktune.mtp.train_mtp import load_tower
from sparktune.mtp.trainer import HeadTrainer, Recipe
from sparktune.setup.data.tokenise import prepare
from sparktune.setup.data.tokenizer import load_tokenizer
from sparktune.setup.demo_corpus import write_smoke
from sparktune.setup.demo_model import make_model
from sparktune.setup.plan.events import NullEvents
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.schema import Plan
from sparktune.training.native_engine import NativeEngine
from sparktune.training.packing import PackPlan
from sparktune.training.samples import stop_ids

GENERAL = ["What does `os.path.join` do?", "What is the module `json` for?", "What does `shutil.copy` do?"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fine_tuning_takes_acceptance_and_training_the_head_gives_it_back(tmp_path: Path) -> None:
    base = make_model(tmp_path / "tiny", pretrained=True)
    data_file = tmp_path / "sums.jsonl"
    write_smoke(data_file)
    plan = Plan(model=str(base), data=data_file, mode="lora", eval_split=0.0, dtype="float32", device="cpu",
                recompute="none", lora_r=16, lora_alpha=32.0)
    spec, tokenizer = probe(str(base)), load_tokenizer(str(base))
    data = prepare(plan, spec, str(base), NullEvents(), tokenizer)
    stops = stop_ids(tokenizer, data.train)

    def rates(tower, heads, prompts):
        walks = {name: [] for name in heads}
        for answer in answers_of(tower, prompts, 24, stops):
            for name, found in match_flags(tower, heads, answer, 2)[0].items():
                walks[name].append(walk(found, len(answer.prompt)))
        return walks

    plain = load_tower(base, torch.device("cpu"))
    general = [tokenizer.tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True,
                                                       tokenize=True, return_dict=False) for q in GENERAL]
    at_home = rates(plain, {"default": load_head(plain, find_head(base), "the base")}, general)["default"]
    assert summarise(at_home, 2)["positions"][0] > 0.5, "worth beating on the base's own corpus"

    engine = NativeEngine.build(plan, spec, base, torch.device("cpu"))
    packs = PackPlan(data.train, pack=True, pack_length=640, seed=1)
    steps = 75
    for i in range(steps):
        batch = packs.micro_batch(*divmod(i, len(packs)))
        engine.forward_backward([batch], batch.supervised_tokens)
        engine.optimiser_step(4e-3 * min(1.0, (i + 1) / 5) * (1 - i / steps))
    tower = engine.model.eval()
    learn, prompts, _ = split_for_heads(data.train, None, 24)
    heads = {name: load_head(tower, find_head(base), "the base") for name in ("default", "trained")}
    trainer = HeadTrainer(tower, heads["trained"], Recipe())
    packs = PackPlan(learn, pack=True, pack_length=128, seed=1)
    for i in range(60):
        trainer.step([packs.micro_batch(*divmod(i, len(packs)))], 1e-3 * min(1.0, (i + 1) / 3) * (1 - i / 60))
    walks = rates(tower, heads, prompts)
    gain = compare(walks["default"], walks["trained"], 2)
    print({name: summarise(found, 2) for name, found in walks.items()}, gain)
    for low, high in (*gain["positions_ci95"], gain["acceptance_length_ci95"]):
        assert 0 < low <= high, gain
    for prompt in [*prompts, *general]:
        want = tower.generate(prompt, 24, stops)
        found = speculate(tower, HeadDrafter(tower, heads["trained"], 2, len(prompt) + 24), prompt, 24, stops)
        assert found.tokens == want
