"""The one schema: what a user may ask, what we know of model, data and machine, and what a run will do.

Every flag, config key and wizard question is a field of `Plan`; its docstring is its help text, `flags(...)` its
spelling on the command lines. Parsers are generated from here (setup/plan/flags.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

__all__ = [
    "SCHEMA_VERSION",
    "Cleaned",
    "DatasetReport",
    "Finding",
    "LengthStats",
    "Machine",
    "ModelSpec",
    "Origin",
    "Plan",
    "Recommendation",
    "RowProblem",
]

SCHEMA_VERSION = 1

Origin = Literal["flag", "environment", "config", "saved", "recommendation", "default"]
Mode = Literal["auto", "lora", "qlora", "full"]
Recompute = Literal["auto", "none", "norms", "layer", "all"]

_HOST = r"^([A-Za-z_][A-Za-z0-9_.-]*@)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?$"
"""What --peers takes: nothing that a program could read as an option, a path or a line of a shell."""

MTP_ANSWERS: dict[str, Any] = {"y": "trained", "d": "default", "n": "skip"}
"""The published wizard's answers."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


def flags(*names: str, surface: Literal["both", "run", "train"] = "both") -> dict[str, Any]:
    """Metadata of a field: its spellings (first is shown) and which command lines take it.

    Without names the flag is the field's name in kebab case.
    """
    return {"flags": list(names), "surface": surface}


class Plan(_Strict):
    """A run, fully decided. `auto` values are resolved by setup/plan/recommend.py before anything starts."""

    # -- what
    model: str = Field("Qwen/Qwen3.5-2B", json_schema_extra=flags("--model"))
    """Base model: a hub id, a local folder, or a PEFT adapter folder."""
    data: Path | None = Field(None, json_schema_extra=flags("--data", "--train-data"))
    """Training data: a JSONL file."""
    name: str | None = Field(None, json_schema_extra=flags("--name"))
    """Name of the run; MODE-YYYY-MM-DD-HHMMSS when left out."""
    mode: Mode = Field("auto", json_schema_extra=flags("--mode"))
    """Method: LoRA, LoRA on a 4-bit base, or full fine-tuning."""
    engine: Literal["auto", "native", "unsloth"] = Field("auto", json_schema_extra=flags("--engine"))
    """Training engine."""
    engine_duel: bool = Field(False, json_schema_extra=flags("--engine-duel", surface="train"))
    """With engine auto on a chip where nobody has measured both engines: race them for 20 steps each before the run."""
    seed: int = Field(3407, ge=0, lt=2**63, json_schema_extra=flags("--seed"))
    """Seed of initialisation, data order, dropout and sampling."""

    # -- data
    eval_data: Path | None = Field(None, json_schema_extra=flags("--eval-data"))
    """Evaluation data: a JSONL file of its own; replaces the split."""
    eval_split: float = Field(0.02, ge=0.0, lt=1.0, json_schema_extra=flags("--eval-split"))
    """Share of rows held out for evaluation; chosen by a hash of the row, so appending rows moves none."""
    text_field: str = Field("text", json_schema_extra=flags("--text-field"))
    """Name of the field that holds plain text in rows of the `text` format."""
    thinking: Literal["auto", "on", "off"] = Field("auto", json_schema_extra=flags("--thinking"))
    """Value of `enable_thinking` given to the chat template; auto leaves the template's own default."""
    max_seq_length: int = Field(16384, ge=16, json_schema_extra=flags("--max-seq-length"))
    """Longest example in tokens."""
    over_length: Literal["drop", "truncate", "error"] = Field("drop", json_schema_extra=flags("--over-length"))
    """What happens to examples longer than max_seq_length."""
    bad_row_limit: float = Field(0.01, ge=0.0, le=1.0, json_schema_extra=flags("--bad-row-limit"))
    """Share of unusable rows above which the run stops (exit 4)."""
    dedupe: Literal["off", "exact", "near"] = Field("off", json_schema_extra=flags("--dedupe"))
    """Repeated rows to leave out, all but the first: none, exact ones, or also near ones; the file stays as it is."""
    redact_pii: bool = Field(False, json_schema_extra=flags("--redact-pii"))
    """Replace e-mail addresses, phone and card numbers and keys by [EMAIL] and so on; the file stays as it is."""
    pack: bool = Field(True, json_schema_extra=flags("--pack"))
    """Put several documents into one pack; they never see each other."""
    pack_length: int | None = Field(None, ge=16, json_schema_extra=flags("--pack-length"))
    """Token budget of a pack; recommended from the data when left out."""

    # -- optimisation
    num_epochs: float = Field(3.0, gt=0, json_schema_extra=flags("--epochs", "--num-epochs"))
    """Passes over the training data."""
    max_steps: int | None = Field(None, ge=1, json_schema_extra=flags("--max-steps"))
    """Stop after this many optimiser steps; the schedule ends there too."""
    per_device_batch_size: int = Field(1, ge=1, json_schema_extra=flags("--per-device-batch-size"))
    """Packs (or, unpacked, documents) in a micro-batch."""
    gradient_accumulation: int | None = Field(None, ge=1, json_schema_extra=flags("--gradient-accumulation"))
    """Micro-batches a step, on all GPUs together; recommended when left out."""
    learning_rate: float | None = Field(None, gt=0, json_schema_extra=flags("--learning-rate"))
    """Peak learning rate; recommended when left out."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", json_schema_extra=flags("--lr-scheduler"))
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1, json_schema_extra=flags("--warmup-ratio"))
    """Share of the steps over which the learning rate rises; at least one step."""
    warmup_steps: int | None = Field(None, ge=0, json_schema_extra=flags("--warmup-steps"))
    """Steps over which the learning rate rises; replaces warmup_ratio."""
    optimizer: Literal["adamw", "adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = Field(
        "adamw", json_schema_extra=flags("--optimizer", "--optim")
    )
    """AdamW over float32 masters: moments in float32 (adamw, also called adamw_torch), in 8 bits, or paged: in memory
    that moves to the host when the device is full."""
    weight_decay: float = Field(0.01, ge=0, json_schema_extra=flags("--weight-decay"))
    """AdamW's decoupled weight decay; applied to matrices, not to vectors."""
    adam_beta1: float = Field(0.9, ge=0, lt=1, json_schema_extra=flags("--adam-beta1"))
    """AdamW's first decay rate."""
    adam_beta2: float = Field(0.999, ge=0, lt=1, json_schema_extra=flags("--adam-beta2"))
    """AdamW's second decay rate."""
    adam_eps: float = Field(1e-8, gt=0, json_schema_extra=flags("--adam-eps"))
    """AdamW's epsilon."""
    max_grad_norm: float = Field(1.0, ge=0, json_schema_extra=flags("--max-grad-norm"))
    """Gradient clipping by global norm; 0 turns it off."""

    # -- adapter
    lora_r: int | None = Field(None, ge=1, json_schema_extra=flags("--lora-r"))
    """Rank of the LoRA adapters; recommended when left out."""
    lora_alpha: float | None = Field(None, gt=0, json_schema_extra=flags("--lora-alpha"))
    """LoRA alpha; equal to the rank when left out."""
    lora_dropout: float = Field(0.0, ge=0, lt=1, json_schema_extra=flags("--lora-dropout"))
    """Dropout on the adapters' input."""
    use_rslora: bool = Field(False, json_schema_extra=flags("--use-rslora"))
    """Scale adapters by alpha / sqrt(r) instead of alpha / r."""
    quantise_base: Literal["auto", "none", "nf4", "int8"] = Field("auto", json_schema_extra=flags("--quantise-base"))
    """Storage of the frozen base under LoRA: NF4 (4 bits), int8, or none; auto is NF4 for qlora and none otherwise."""
    double_quantise: bool = Field(True, json_schema_extra=flags("--double-quantise"))
    """NF4: store the blocks' scales in 8 bits too, 0.05 bytes a weight less."""
    target_modules: list[str] | None = Field(None, json_schema_extra=flags("--target-modules"))
    """Projections that get an adapter, by their last name; every large projection of the model when left out."""
    layout: Literal["text", "multimodal"] = Field("text", json_schema_extra=flags("--layout"))
    """Module names in the adapter: AutoModelForCausalLM's (text) or the multimodal class's."""
    static_lora: bool = Field(False, json_schema_extra=flags("--static-lora"))
    """Select the native engine's StaticLoRA modules (same as --engine native --mode lora)."""
    wrap_full_ft: bool = Field(False, json_schema_extra=flags("--wrap-full-ft"))
    """Select the native engine's full fine-tuning modules (same as --engine native --mode full)."""

    # -- machine
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field("auto", json_schema_extra=flags("--dtype"))
    """Compute type; auto is bfloat16 on a GPU and float32 on a CPU."""
    recompute: Recompute = Field("auto", json_schema_extra=flags("--recompute"))
    """What the backward pass computes again instead of keeping: nothing, norms and activations, whole layers, all."""
    recompute_layers: int | None = Field(None, ge=1, json_schema_extra=flags("--recompute-layers"))
    """With recompute layer: only the first so many layers whole, of the others norms and activations; all layers when
    left out. recompute auto finds the number itself."""
    gpus: int = Field(1, ge=1, le=1024, json_schema_extra=flags("--gpus"))
    """GPUs of this machine that train together, and of each of the --peers; processes where there is no GPU."""
    peers: list[Annotated[str, StringConstraints(pattern=_HOST)]] = Field(
        default_factory=list, max_length=63,
        json_schema_extra=flags("--peers", surface="run") | {"takes": "machines as [USER@]HOST[:PORT], commas between"}
    )
    """Other machines that train with this one, as ssh takes them ([USER@]HOST[:PORT]), by their address on the link
    between them."""
    device: Literal["auto", "cpu", "cuda"] = Field("auto", json_schema_extra=flags("--device"))
    """Device that trains."""

    # -- during training
    save_steps: int | None = Field(None, ge=1, json_schema_extra=flags("--save-steps"))
    """Steps between checkpoints; a tenth of the run when left out."""
    keep_checkpoints: int = Field(2, ge=1, json_schema_extra=flags("--keep-checkpoints"))
    """Checkpoints kept; the newest loadable one is never deleted."""
    eval_steps: int | None = Field(None, ge=1, json_schema_extra=flags("--eval-steps"))
    """Steps between evaluations; a tenth of the run when left out."""
    on_bad_step: Literal["stop", "skip", "rewind"] = Field("stop", json_schema_extra=flags("--on-bad-step"))
    """A step with NaN, infinity, a loss spike or nothing to learn: stop with a checkpoint, learn nothing from it, or
    also go back to the last checkpoint's weights."""
    loss_spike: float = Field(10.0, ge=0, json_schema_extra=flags("--loss-spike"))
    """A loss so many spreads (and 2 nats) above the median of the last 64 steps is a bad step; 0 looks for none."""
    early_stopping: int | None = Field(None, ge=1, json_schema_extra=flags("--early-stopping"))
    """Stop after this many evaluations without a lower loss."""
    sample_steps: int | None = Field(None, ge=1, json_schema_extra=flags("--sample-steps"))
    """Steps between answers to the sample prompts; with each evaluation when left out."""
    sample_prompts: list[str] = Field(default_factory=list, json_schema_extra=flags("--sample-prompts"))
    """User messages answered during training; the first held-out prompts when left out."""
    tensorboard: bool = Field(True, json_schema_extra=flags("--tensorboard"))
    """Write TensorBoard curves into the run folder."""
    tracker: Literal["none", "wandb", "mlflow", "trackio"] = Field(
        "none", json_schema_extra=flags("--tracker", surface="run")
    )
    """Experiment tracker that also gets the figures; its library is an extra of the same name."""
    tracker_project: str = Field("sparktune", json_schema_extra=flags("--tracker-project", surface="run"))
    """Project (W&B, Trackio) or experiment (MLflow) that the tracker files the run under."""
    resume_from_checkpoint: Path | None = Field(
        None, json_schema_extra=flags("--resume-from-checkpoint", surface="train")
    )
    """A checkpoint folder to go on from; the run continues in the folder that holds it."""

    # -- after training
    mtp: Literal["trained", "default", "skip"] = Field(
        "default", json_schema_extra=flags("--mtp", surface="run") | {"aliases": MTP_ANSWERS}
    )
    """MTP head of the result: trained on the data, the base's own, or none (y, d, n for short)."""
    mtp_head: str | None = Field(None, json_schema_extra=flags("--mtp-head", surface="run"))
    """Where the MTP head comes from when the base has none: a hub id, a model folder or a safetensors file."""
    mtp_epochs: float = Field(1.0, gt=0, json_schema_extra=flags("--mtp-epochs", surface="run"))
    """Passes over the data when the MTP head is trained."""
    mtp_learning_rate: float = Field(5e-5, gt=0, json_schema_extra=flags("--mtp-learning-rate", surface="run"))
    """Peak learning rate of the MTP head."""
    gguf: list[str] = Field(default_factory=lambda: ["q8_0"], json_schema_extra=flags("--gguf", surface="run"))
    """GGUF types to write, or none."""
    trial: bool = Field(False, json_schema_extra=flags("--trial", surface="run"))
    """Try the plan first: 100 steps or a tenth of it, base and tuned model compared, nothing merged or exported."""
    calibrate: Literal["auto", "yes", "no"] = Field("auto", json_schema_extra=flags("--calibrate", surface="run"))
    """Time some steps of the plan on this machine before it starts; auto does so for runs of over an hour."""
    eval_prompts: int = Field(8, ge=0, json_schema_extra=flags("--eval-prompts", surface="run"))
    """Held-out prompts that base and result answer at the end; 0 for the sample prompts alone."""
    validator: list[str] | None = Field(None, json_schema_extra=flags("--validator", surface="run"))
    """Your own judge of an answer: a command that reads {prompt, reference, answer} as JSON and exits 0 or 1."""
    baseline: str | None = Field(None, json_schema_extra=flags("--baseline", surface="run"))
    """A run known to be good, whose model answers the same prompts."""
    eval_checkpoints: bool = Field(False, json_schema_extra=flags("--eval-checkpoints", surface="run"))
    """Let every kept checkpoint answer the same prompts too."""
    backend: Literal["auto", "docker", "local"] = Field("auto", json_schema_extra=flags("--backend", surface="run"))
    """Where the stages run."""
    stack: str = Field("2026.05", json_schema_extra=flags("--stack", surface="run"))
    """Pinned software stack of the Docker image."""
    results: Path = Field(Path("results"), json_schema_extra=flags("--results"))
    """Folder of the runs' records."""
    output: Path = Field(Path("output"), json_schema_extra=flags("--output"))
    """Folder of the runs' models."""

    # -- bookkeeping, never asked
    schema_version: int = Field(SCHEMA_VERSION, json_schema_extra={"flags": None})
    """Version of this schema."""
    origins: dict[str, Origin] = Field(default_factory=dict, json_schema_extra={"flags": None})
    """Where each value came from."""
    ranks: int = Field(0, ge=0, json_schema_extra={"flags": None})
    """Processes that train together, one a GPU; written when training starts, 0 before."""
    kernels: dict[str, str] = Field(default_factory=dict, json_schema_extra={"flags": None})
    """The implementation chosen for each op, with its reason; written when the model is built."""

    @property
    def processes(self) -> int:
        """Processes that train together: as they were started, or as they are asked for."""
        return self.ranks or self.gpus * (1 + len(self.peers))

    @property
    def recompute_choice(self) -> str:
        """Policy and number of layers in a word: auto, none, norms, layer, layer:8, all."""
        return self.recompute if self.recompute_layers is None else f"{self.recompute}:{self.recompute_layers}"


class ModelSpec(_Strict):
    """The shape of a causal language model, read from its config.json alone."""

    source: str
    """Hub id or folder it was read from."""
    model_type: str
    """`model_type` of the text tower: qwen3_5_text, qwen3, qwen2, llama, mistral, or an unknown one."""
    multimodal: bool = False
    """The checkpoint is laid out as a multimodal model (text keys under `model.language_model.`)."""
    native: bool
    """The native engine knows this architecture."""
    native_reason: str = ""
    """Why the native engine cannot train it; empty when it can."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_types: list[Literal["full_attention", "linear_attention", "sliding_attention"]]
    """Kind of token mixer of each layer."""
    sliding_window: int | None = None
    """Window of sliding_attention layers, in tokens."""
    tie_word_embeddings: bool
    norm_eps: float
    zero_centred_norm: bool = False
    """RMSNorm multiplies by (1 + w)."""
    attention_bias: bool = False
    """q, k, v projections have a bias (qwen2)."""
    attention_output_bias: bool = False
    """o_proj has a bias too (llama with attention_bias)."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over head_dim on q and k."""
    attention_gate: bool = False
    """q_proj is doubled; its second half, per head, gates the output."""
    rope_theta: float
    rope_dim: int
    """Rotary dimensions of a head (head_dim times the partial factor)."""
    rope_scaling: dict[str, Any] | None = None
    """llama3-style scaling parameters, or None."""
    gdn_key_heads: int = 0
    gdn_value_heads: int = 0
    gdn_key_dim: int = 0
    """Head dim of GDN queries and keys."""
    gdn_value_dim: int = 0
    """Head dim of GDN values."""
    gdn_conv_kernel: int = 0
    mtp_layers: int = 0
    """`mtp_num_hidden_layers`: MTP layers the config declares."""
    max_position_embeddings: int
    parameters: int
    """Parameters of the text tower, embeddings included once when tied."""

    @property
    def text_prefix(self) -> str:
        """Key prefix of the text tower in the checkpoint."""
        return "model.language_model." if self.multimodal else "model."

    @property
    def end_parameters(self) -> int:
        """Parameters of the model's two ends, embedding and output projection, counted once when tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)


class RowProblem(_Strict):
    """One unusable row."""

    line: int
    """Line number in the file, from 1."""
    code: str
    """Kind of problem: not_json, not_utf8, unknown_format, unknown_role, no_assistant, empty_assistant, image,
    template, token_range, all_masked, over_length, empty_row."""
    text: str
    """What was expected, seen, and what to do; never the row's content."""


class Finding(_Strict):
    """Something found in rows that are used all the same."""

    rows: int
    """Rows it was found in."""
    count: int
    """Places it was found at."""
    lines: list[int]
    """Line numbers of the first 1,000 of those rows, ascending."""


class Cleaned(_Strict):
    """A cleaned copy of a data file; the original was left as it is."""

    original: str
    original_sha256: str
    path: str
    """The copy; its name ends in the hash of what made it."""
    sha256: str
    rows: int
    """Rows of the original."""
    removed: dict[str, Finding]
    """duplicate, near_duplicate -> rows of the original that are not in the copy."""
    redacted: dict[str, Finding]
    """email, phone, card, key -> rows of the original in which places were replaced by [EMAIL] and so on."""


class LengthStats(_Strict):
    """Lengths of examples in tokens."""

    count: int
    total: int
    mean: float
    p50: int
    p90: int
    p99: int
    max: int
    histogram_edges: list[int]
    histogram_counts: list[int]


class DatasetReport(_Strict):
    """What the data is, from every row."""

    path: str
    sha256: str
    bytes: int
    rows: int
    """Non-blank lines."""
    kept: int
    """Examples that train or evaluate."""
    train_examples: int
    eval_examples: int
    formats: dict[str, int]
    """Row format -> rows (messages, prompt_completion, alpaca, sharegpt, text)."""
    dropped: dict[str, int]
    """Problem code -> rows."""
    problems: list[RowProblem]
    """The first ten problems of each code."""
    truncated: int = 0
    """Kept rows that were cut at max_seq_length."""
    lengths: LengthStats
    """Of the training examples, before packing."""
    supervised_tokens: int
    """Of the training examples."""
    supervised_share: float
    multi_turn: int
    with_system: int
    with_thinking: int
    duplicates: int
    """Training rows that repeat an earlier one exactly (kept)."""
    eval_leaks: int
    """Held-out rows whose exact twin is in the training part."""
    near_duplicates: int = 0
    """Training rows that say nearly the same as an earlier one (kept)."""
    near_leaks: int = 0
    """Held-out rows that say nearly the same as a training row."""
    findings: dict[str, Finding] = Field(default_factory=dict)
    """Of the data, by code: duplicate, near_duplicate, eval_leak, near_eval_leak, markup (template markup inside a
    message), left_out (a message that the template does not show), pii_email, pii_phone, pii_card, pii_key."""
    eval_findings: dict[str, Finding] = Field(default_factory=dict)
    """The same, of evaluation data of its own."""
    split: str = ""
    """RULE-HASH of the held-out rows: equal exactly where the same rows are held out."""
    cleaned: Cleaned | None = None
    """How the data was cleaned (--dedupe, --redact-pii); `path` is then the cleaned copy."""
    eval_cleaned: Cleaned | None = None
    """The same, of evaluation data of its own."""
    packing: dict[int, float]
    """Candidate pack_length -> share of real tokens in padded micro-batches."""
    cache_key: str
    """Key of the token cache."""
    warnings: list[str] = Field(default_factory=list)


class Machine(_Strict):
    """The machine a plan is made for."""

    device: Literal["cpu", "cuda"]
    gpu_name: str | None = None
    capability: tuple[int, int] | None = None
    unified_memory: bool = False
    """GPU and CPU share one pool (GB10)."""
    memory_gib: float
    """Memory a training process may use: of the device, or of the host."""
    cpu_name: str = ""
    """As /proc/cpuinfo names it."""
    cpu_cores: int
    disk_free_gib: float
    docker: bool = False
    gpus: int = 1
    """GPUs like the first one."""


class Recommendation(_Strict):
    """A value the program proposes, with its reason."""

    field: str
    value: Any
    reason: str
    source: str
    """Where the rule comes from: a published figure, a measurement of ours, or an estimate."""
