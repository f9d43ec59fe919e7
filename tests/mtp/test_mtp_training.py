"""Training the head: acceptance rises over a default head worth beating; kill -9 and resume end in the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparktune.lab.native import Rerun
from sparktune.mtp.acceptance import answers_of, compare, match_flags, summarise, walk
from sparktune.mtp.head import MtpHead
from sparktune.mtp.train_mtp import choose_pack_length, main
from sparktune.mtp.trainer import HeadTrainer, Recipe
from sparktune.setup.demo_corpus import write_smoke
from sparktune.setup.demo_model import make_model
from sparktune.training.batch import MicroBatch
from sparktune.training.model import train_everything
from sparktune.training.tower import TextTower

Load = Callable[..., tuple[TextTower, MtpHead]]
Row = Callable[..., MicroBatch]
WORDS = 97


class Language:
    """A language of which each word is said by the two before it, most of the time."""

    def __init__(self, seed: int, words: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.next = torch.randint(0, words, (words, 3), generator=generator)
        self.words, self.seed = words, seed

    def texts(self, count: int, seed: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        for _ in range(count):
            text = torch.randint(0, self.words, (2,), generator=generator).tolist()
            while len(text) < 24:
                # the word before decides, and a little of the one before that
                choice = text[-2] % 3 if float(torch.rand((), generator=generator)) < 0.9 else 0
                text.append(int(self.next[text[-1], choice]))
            yield text


def batches(language: Language, row: Row, count: int) -> list[MicroBatch]:
    texts = list(language.texts(8 * count, 1))
    return [row(texts[8 * i : 8 * i + 8], [2] * 8) for i in range(count)]


def teach_base(tower: TextTower, rows: list[MicroBatch], rate: float) -> float:
    tower.train()
    for p in tower.parameters():
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(tower.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    loss = torch.zeros(())
    for i, batch in enumerate(rows):
        optimiser.param_groups[0]["lr"] = rate * min(1.0, (i + 1) / 5) * (1 - i / len(rows))
        loss = tower.loss_sum(batch) / batch.supervised_tokens
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    tower.eval().requires_grad_(False)
    return float(loss.detach())


def teach_head(tower: TextTower, head: MtpHead, rows: list[MicroBatch], recipe: Recipe, rate: float) -> MtpHead:
    trainer = HeadTrainer(tower, head, recipe)
    for i, batch in enumerate(rows):
        trainer.step([batch], rate * min(1.0, (i + 1) / 5) * (1 - i / len(rows)))
    return head.requires_grad_(False)


def copy_of(load: Load, head: MtpHead) -> MtpHead:
    _, again = load(torch.float32)
    again.fill(head.tensors())
    return again


def test_training_raises_acceptance_at_both_positions_on_held_out_prompts(loaded: Load, row: Row) -> None:
    general, narrow = Language(1, WORDS), Language(2, 30)
    tower, head = loaded(torch.float32)
    with torch.no_grad():
        for p in tower.parameters():
            p.mul_(0.5 if p.ndim > 1 else 1.0)
    train_everything(tower)
    teach_base(tower, batches(general, row, 150), 1e-2)
    default = teach_head(tower, head, batches(general, row, 100), Recipe(), 5e-3)
    held_out = [t[:2] for t in general.texts(24, 9)]
    at_home = measure(tower, {"default": default}, held_out)["default"]
    assert summarise(at_home, 2)["positions"][0] > 0.4, "the default head is worth beating on its own corpus"
    teach_base(tower, batches(narrow, row, 150), 5e-3)
    trained = teach_head(tower, copy_of(loaded, default), batches(narrow, row, 100), Recipe(), 5e-3)
    walks = measure(tower, {"default": default, "trained": trained}, [t[:2] for t in narrow.texts(24, 9)])
    gain = compare(walks["default"], walks["trained"], 2)
    for point, (low, high) in zip(gain["positions"], gain["positions_ci95"], strict=True):
        assert 0 < low <= point <= high, gain
    assert gain["acceptance_length_ci95"][0] > 0


def measure(tower: TextTower, heads: dict[str, MtpHead], prompts: list[list[int]]) -> dict[str, list]:
    walks: dict[str, list] = {name: [] for name in heads}
    for answer in answers_of(tower, prompts, 20, ()):
        flags, _ = match_flags(tower, heads, answer, 2)
        for name, found in flags.items():
            walks[name].append(walk(found, len(answer.prompt)))
    return walks


@pytest.mark.parametrize("kind", ["kl", "lk", "hard"])
def test_every_loss_falls_and_the_base_stays(loaded: Load, row: Row, kind: str) -> None:
    tower, head = loaded(torch.float32)
    before = [p.clone() for p in tower.parameters()]
    rows = batches(Language(3, 20), row, 1) * 12
    trainer = HeadTrainer(tower, head, Recipe(loss=kind))
    found = [float(trainer.step([batch], 3e-3)) for batch in rows]
    assert found[-1] < 0.8 * found[0], found
    assert all(torch.equal(a, b) for a, b in zip(before, tower.parameters(), strict=True))
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in trainer.tensors().values())


def test_lm_head_opt_changes_no_gradient(loaded: Load, row: Row) -> None:
    found = []
    for opt in (True, False):
        tower, head = loaded(torch.float64)
        trainer = HeadTrainer(tower, head, Recipe(lm_head_opt=opt))
        trainer.forward_backward(batches(Language(3, 20), row, 2))
        found.append({n: g.clone() for n, g in trainer.named_gradients() if g is not None})
    assert len(found[0]) == 12  # 15 tensors: q, k, v are one parameter, gate and up another
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).abs().max() <= 1e-12 * gradient.abs().max(), name


def test_a_recorded_base_teaches_the_same(loaded: Load, row: Row) -> None:
    """One recording serves other packings of its length; every step's gradients are those of plain passes."""
    language, plain, recorded = Language(3, 20), *(HeadTrainer(*loaded(torch.float64), Recipe()) for _ in range(2))
    assert "CUDA" in plain.graphs.objection
    recorded.graphs.objection, recorded.graphs.recorder = "", Rerun
    for seed, cut in enumerate((24, 12, 30, 6, 40)):
        words = [token for text in language.texts(2, seed) for token in text]
        batch = row([words[:cut], words[cut:]], [2, 2])
        assert recorded.graphs.find(batch) is None or seed
        losses = [float(trainer.forward_backward([batch])) for trainer in (plain, recorded)]
        assert losses[0] == losses[1], cut
        found = dict(recorded.named_gradients())
        for name, gradient in plain.named_gradients():
            assert gradient is not None
            assert torch.equal(gradient, found[name]), (name, cut)
    assert recorded.graphs.find(batch) is recorded.graphs.find(batch) is not None


def test_packs_shrink_where_the_data_is_small() -> None:
    assert choose_pack_length([3000] * 24_000) == 8192
    assert choose_pack_length([25] * 50) == 128
    assert choose_pack_length([400] * 100) == 1250
    assert choose_pack_length([5400] * 30) == 5400


# -- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    make_model(folder / "tiny", vocab_size=512)
    write_smoke(folder / "d.jsonl")
    return folder


def command(place: Path, out: str) -> list[str]:
    return ["--model", str(place / "tiny"), "--data", str(place / "d.jsonl"), "--out", str(place / out),
            "--pack-length", "128", "--save-steps", "2", "--device", "cpu", "--learning-rate", "1e-3",
            "--max-steps", "20"]


def test_a_killed_training_ends_in_the_same_bits(place: Path) -> None:
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    try:
        assert main(command(place, "whole.safetensors")) == 0
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = [sys.executable, "-m", "sparktune.mtp.train_mtp", *command(place, "cut.safetensors")]
        process = subprocess.Popen(started, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        log = place / "cut.safetensors.work" / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (log.exists() and '"step": 4,' in log.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert not (place / "cut.safetensors").exists()
        assert main(command(place, "cut.safetensors")) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    assert (place / "whole.safetensors").read_bytes() == (place / "cut.safetensors").read_bytes()
    start = {n: t for f in (place / "tiny").glob("*.safetensors") for n, t in load_file(f).items()}
    moved = load_file(place / "whole.safetensors")
    assert len(moved) == 15
    assert sum(not torch.equal(t, start[n]) for n, t in moved.items()) >= 10
    steps = [line.split(",")[0] for line in log.read_text().splitlines()]
    assert steps == [f'{{"step": {n}' for n in range(1, 21)]


def test_data_without_answers_and_a_model_without_a_head_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    headless = tmp_path / "headless"
    headless.mkdir()
    for file in (place / "tiny").iterdir():
        if file.suffix == ".json" and not file.name.endswith("index.json"):
            (headless / file.name).write_bytes(file.read_bytes())
    held = {n: t for f in (place / "tiny").glob("*.safetensors") for n, t in load_file(f).items()}
    save_file({n: t for n, t in held.items() if not n.startswith("mtp.")}, headless / "model.safetensors")
    arguments = command(place, "x.safetensors")
    arguments[1] = str(headless)
    assert main(arguments) == 2
    assert "extract_upstream_mtp --model HUB-ID" in capsys.readouterr().err
