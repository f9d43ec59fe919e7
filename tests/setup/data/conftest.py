"""A small byte-level tokenizer with the special tokens of several families, and one template of each kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.data.render import ChatRenderer
from sparktune.setup.data.tokenizer import ChatTokenizer, load_tokenizer
from sparktune.setup.demo_tokenizer import train_tokenizer
from sparktune.setup.plan.schema import ModelSpec, Plan

TEMPLATES = Path(__file__).parent / "templates"
SPECIALS = (
    "<s>", "</s>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|start|>",
    "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>",
)
TEXTS = (
    "What is 17 + 17? 17 + 17 = 34. You are a helpful assistant. The user asked the model to think before it answers.",
    "system user assistant tool ipython analysis final commentary json name arguments parameter function\n\n",
) * 3


def write_folder(folder: Path, template: str | None, bos: str | None, eos: str | None) -> Path:
    """Writes a tokenizer folder with `template` as chat_template.jinja."""
    from tokenizers import AddedToken, Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(train_tokenizer(TEXTS, 420))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos,
              "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a tokenizer with the named template of tests/setup/data/templates."""
    root = tmp_path_factory.mktemp("tokenizers")
    tokens = {
        "llama3": ("<|begin_of_text|>", "<|eot_id|>"), "mistral": ("<s>", "</s>"), "harmony": (None, "<|return|>"),
    }

    def folder(name: str) -> Path:
        if not (root / name).exists():
            bos, eos = tokens.get(name, (None, "<|im_end|>"))
            write_folder(root / name, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), bos, eos)
        return root / name

    return folder


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer_folder: Callable[[str], Path]) -> Callable[[str], ChatTokenizer]:
    """Returns the loaded tokenizer with the named template."""
    loaded: dict[str, ChatTokenizer] = {}

    def load(name: str) -> ChatTokenizer:
        if name not in loaded:
            loaded[name] = load_tokenizer(str(tokenizer_folder(name)))
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def renderer(chat_tokenizer: Callable[[str], ChatTokenizer]) -> Callable[..., ChatRenderer]:
    """Returns the renderer of the named template."""
    made: dict[tuple[str, str], ChatRenderer] = {}

    def make(name: str, thinking: Any = "auto") -> ChatRenderer:
        if (name, thinking) not in made:
            made[name, thinking] = ChatRenderer(chat_tokenizer(name), thinking)
        return made[name, thinking]

    return make


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Points the caches into the test's own folder and returns the token cache's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sparktune" / "tokens"


@pytest.fixture
def spec() -> ModelSpec:
    """A model shape with room for the fixture's vocabulary."""
    return ModelSpec(
        source="tiny", model_type="qwen3", native=True, vocab_size=512, hidden_size=8, intermediate_size=8,
        num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, layer_types=["full_attention"],
        tie_word_embeddings=True, norm_eps=1e-6, rope_theta=1e4, rope_dim=8, max_position_embeddings=4096, parameters=1,
    )


@pytest.fixture
def make_plan(tmp_path: Path) -> Callable[..., Plan]:
    """Returns a plan over rows (objects, or raw lines as str or bytes) written to data.jsonl."""

    def plan(rows: Sequence[Any], name: str = "data.jsonl", **fields: Any) -> Plan:
        path = tmp_path / name
        path.write_bytes(b"".join(
            (row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode())
            + b"\n" for row in rows
        ))
        return Plan(data=path, **{"eval_split": 0.0, **fields})

    return plan
