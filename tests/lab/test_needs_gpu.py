"""A bench that measures a GPU says so on a machine without one, before it builds anything."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import torch

BENCHES = [
    ("bench_matmul",), ("gpu_check",), ("gpu_check_mixers",), ("lossless",), ("memory_sweep",), ("mtp",),
    ("profile", "native"), ("scale_bench", "run"), ("side_by_side", "native"), ("sweep_mixers",),
    ("training_loop.qwen_minimal_bench", "--mode", "lora"),
]


@pytest.mark.parametrize("words", BENCHES, ids=lambda words: words[0])
def test_a_sentence_and_the_code_of_a_machine_that_lacks_something(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(SystemExit) as ended:
        sys.exit(import_module(f"sparktune.lab.{words[0]}").main())
    assert ended.value.code == 3
    assert "needs a CUDA GPU" in capsys.readouterr().err
