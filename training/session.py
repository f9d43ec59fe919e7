"""One training process from its command line to its exit code: data, recommendations, model, loop, result."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from sparktune.setup.data.tokenise import PreparedData, prepare
from sparktune.setup.data.tokenizer import ChatTokenizer, load_tokenizer
from sparktune.setup.plan.basestorage import base_storage, check_base_storage
from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.errors import ExitCode, PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.flags import flag_of
from sparktune.setup.plan.intervals import tenth
from sparktune.setup.plan.memory import check_fits
from sparktune.setup.plan.models import NATIVE_FAMILIES, is_adapter_folder, probe, resolve_model_dir
from sparktune.setup.plan.outfolder import size_of
from sparktune.setup.plan.recommend import apply, recommend
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.setup.plan.trainable import TORCH_OPTIMIZERS
from sparktune.setup.plan.weights import safetensors_index
from sparktune.training import checkpoint as checkpoints
from sparktune.training.adapters import read_adapter_config
from sparktune.training.checkpoint import LoopState
from sparktune.training.engine_choice import Choice
from sparktune.training.gpu_lock import hold_gpu
from sparktune.training.loop import TrainingLoop
from sparktune.training.memory import (
    cap_allocator,
    check_recompute_layers,
    choose_recompute,
    host_available_gib,
    host_floor_gib,
    measure_machine,
    reset_peak,
)
from sparktune.training.merge_gap import write_merge_gap
from sparktune.training.metrics import MetricsLog
from sparktune.training.narrator import Narrator
from sparktune.training.native_engine import NativeEngine
from sparktune.training.packing import PackPlan
from sparktune.training.quantised import import_bitsandbytes
from sparktune.training.runs import Request, open_request, open_run
from sparktune.training.samples import sample_prompts, stop_ids
from sparktune.training.schedule import run_length
from sparktune.training.stop import StopRequest
from sparktune.training.unsloth_engine import UnslothEngine
from sparktune.training.watchdog import MemoryWatchdog

__all__ = [
    "assemble", "decide_plan", "device_of", "examine_result", "prepare_torch", "refuse_unsupported", "run_session",
]

_MATHS = (
    "model", "mode", "engine", "seed", "pack", "pack_length", "num_epochs", "max_steps", "per_device_batch_size",
    "gradient_accumulation", "learning_rate", "lr_scheduler", "warmup_ratio", "warmup_steps", "optimizer",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "max_grad_norm", "lora_r", "lora_alpha", "lora_dropout",
    "use_rslora", "target_modules", "quantise_base", "double_quantise", "dtype", "device",
)
"""Plan fields that change the numbers. What shapes the data is in the token cache's key, stored beside them."""


def run_session(
    flags: Mapping[str, Any], config: Path | None, env: Mapping[str, str], choice: Choice | None = None
) -> int:
    """Trains as the command line says and returns the exit code. Errors are one sentence on standard error.

    Args:
        flags: plan fields given on the command line.
        config: what --config names.
        env: the environment.
        choice: the engine for a plan that leaves it open, decided before torch was imported.
    """
    events, stop = Narrator(), StopRequest()
    stop.install()
    log: list[Path] = []
    try:
        with ExitStack() as held:
            _train(open_request(flags, config, env), events, stop, log, held, choice)
        return ExitCode.OK
    except SparktuneError as error:
        if error.__cause__ is not None:
            _keep_traceback(log)
        return _refuse(events, str(error), error.exit_code)
    except KeyboardInterrupt:
        if not stop.aborted:
            text = f"Stopped before the first step, {stop.why}: nothing was trained yet. Start it again."
            return _refuse(events, text, ExitCode.STOPPED)
        return _refuse(events, "Aborted; the last checkpoint is still good.", ExitCode.INTERRUPTED)
    except (torch.OutOfMemoryError, MemoryError) as error:
        where = _keep_traceback(log)
        fix = "Lower --pack-length or --max-seq-length, or pass --recompute layer"
        return _refuse(events, f"Out of memory: {error}. {fix}. Details: {where}", ExitCode.MEMORY)
    except OSError as error:
        _keep_traceback(log)
        refusal = checkpoints.storage_error(error, "the run's files")
        return _refuse(events, str(refusal), refusal.exit_code)
    except Exception as error:  # whatever else goes wrong is a bug, which a user meets as a sentence and a file
        where = _keep_traceback(log)
        what = f"{type(error).__name__}: {error}"
        return _refuse(events, f"Training failed unexpectedly ({what}). Details: {where}", ExitCode.FAILURE)
    finally:
        with contextlib.suppress(OSError):
            events.close()


def _refuse(events: Narrator, text: str, code: ExitCode) -> int:
    with contextlib.suppress(OSError):  # the disk that caused the refusal may refuse this too
        events.message(text, "error")
    print(text, file=sys.stderr, flush=True)
    return code


def _keep_traceback(log: list[Path]) -> Path:
    """Appends the current traceback to the run's log, or to a file of its own before there is a run."""
    if log:
        path = log[0]
    else:
        with tempfile.NamedTemporaryFile(prefix="sparktune-train-", suffix=".log", delete=False) as file:
            path = Path(file.name)
    with path.open("a", encoding="utf-8") as file_:
        traceback.print_exc(file=file_)
    return path


def _train(
    request: Request, events: Narrator, stop: StopRequest, log: list[Path], held: ExitStack, choice: Choice | None
) -> None:
    plan = _with_engine(request.plan, choice, events)
    for note in request.notes:
        events.message(note, "warning")
    spec = probe(plan.model)
    device = device_of(plan)
    held.enter_context(hold_gpu(device, plan.name or "that is being started"))
    run = None
    if request.existing is not None:  # its folder takes the events and errors of everything that follows
        run = open_run(request, plan, held)
        _attach(run, events, log, own_log=not request.as_stage)
    refuse_unsupported(plan, spec, device)
    model_dir = resolve_model_dir(plan.model)
    safetensors_index(model_dir)  # a base that was cut off is refused before the run takes its name
    tokenizer = load_tokenizer(str(model_dir))
    data = prepare(plan, spec, str(model_dir), events, tokenizer)
    plan = decide_plan(_as_adapter_says(plan), spec, data, device, events)
    refuse_unsupported(plan, spec, device)
    estimate = check_fits(plan, spec, data.report, measure_machine(device))
    if run is None:
        run = open_run(request, plan, held)
        plan = plan.model_copy(update={"name": run.name})
        save_plan(plan, run.plan)
        _attach(run, events, log, own_log=True)
    events.message(f"Run {run.name} in {run.root}; peak memory: {estimate.describe()}.")
    if not run.data_report.exists():
        run.data_report.parent.mkdir(exist_ok=True)
        run.data_report.write_text(data.report.model_dump_json(indent=1), encoding="utf-8")
    _run(request, plan, spec, model_dir, run, data, tokenizer, device, events, stop)


def _attach(run: RunDir, events: Narrator, log: list[Path], *, own_log: bool) -> None:
    try:
        events.attach(run.stage_events("train"), run.log if own_log else None)
    except OSError as error:
        raise checkpoints.storage_error(error, f"the run folder {run.root}") from error
    log.append(run.log)


def device_of(plan: Plan) -> torch.device:
    """Returns the device that trains.

    Raises:
        PreflightError: a GPU was asked for and torch sees none.
    """
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise PreflightError(
            "--device cuda needs a CUDA GPU and a CUDA build of torch; torch "
            f"{importlib.metadata.version('torch')} sees none. Use --device cpu, or mend the installation."
        )
    if plan.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0)


def decide_plan(plan: Plan, spec: ModelSpec, data: PreparedData, device: torch.device, events: Narrator) -> Plan:
    """Fills every open value and says each choice once."""
    still_open = {name for name in Plan.model_fields if getattr(plan, name) in (None, "auto")}
    origins = {name: "default" if name in still_open else origin for name, origin in plan.origins.items()}
    plan = plan.model_copy(update={"origins": origins})
    found = recommend(plan, spec, data.report, measure_machine(device))
    for item in found:
        events.choice(item.field, str(item.value), f"{item.reason}; {item.source}")
    plan = apply(plan, found)
    policy, layers, reason = choose_recompute(plan, spec, data.report, measure_machine(device))
    if plan.recompute == "auto":
        events.choice("recompute", policy if layers is None else f"{policy}, {layers} layers", reason)
    return plan.model_copy(update={
        "recompute": policy,
        "recompute_layers": layers,
        "engine": "native" if plan.engine == "auto" and spec.native else plan.engine,
        "gradient_accumulation": plan.gradient_accumulation or 1,
    })


def _as_adapter_says(plan: Plan) -> Plan:
    """A model that is an adapter brings rank, scale and targets with it; flags that say otherwise are refused."""
    folder = Path(plan.model)
    if not is_adapter_folder(folder):
        return plan
    if plan.mode == "full":
        raise UsageError(f"--mode full cannot train the adapter {folder}. Merge it into its base first, or use lora.")
    config = read_adapter_config(folder)
    own: dict[str, Any] = {
        "mode": "qlora" if plan.mode == "qlora" else "lora", "lora_r": config.r, "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": None if config.target_modules is None else list(config.target_modules),
    }
    for field, value in own.items():
        seen = getattr(plan, field)
        if plan.origins.get(field, "default") != "default" and seen not in ("auto", value):
            raise UsageError(
                f"{flag_of(field)} {seen} contradicts the adapter {folder}, whose {field} is {value}. Leave it out to "
                "go on with that adapter, or give its base as --model to start a new one."
            )
    return plan.model_copy(update={**own, "origins": {**plan.origins, **dict.fromkeys(own, "saved")}})


def _with_engine(plan: Plan, choice: Choice | None, events: Narrator) -> Plan:
    """Settles an open engine as the process has already decided, for Unsloth patches what is imported after it."""
    if plan.engine != "auto" or choice is None:
        return plan
    events.choice("engine", choice.engine, choice.reason)
    return plan.model_copy(
        update={"engine": choice.engine, "origins": {**plan.origins, "engine": "recommendation"}}
    )


def refuse_unsupported(plan: Plan, spec: ModelSpec, device: torch.device) -> None:
    """Refuses what this version cannot train, in one sentence each."""
    check_base_storage(plan)
    check_recompute_layers(plan, spec)
    if plan.engine == "unsloth":
        if device.type != "cuda":
            raise PreflightError(
                "--engine unsloth needs the Unsloth engine, which runs on a CUDA GPU only; torch sees none. Use "
                "--engine native, which also trains on a CPU."
            )
    elif not spec.native:
        raise PreflightError(
            f"{plan.model} cannot be trained natively: {spec.native_reason}. The native engine trains "
            f"{', '.join(NATIVE_FAMILIES)}; other models need --engine unsloth and a CUDA GPU."
        )
    elif base_storage(plan) == "nf4":
        import_bitsandbytes("A base in nf4", "--quantise-base int8, which needs no package, or --mode lora")
    if plan.optimizer not in TORCH_OPTIMIZERS:
        if device.type == "cpu":
            raise PreflightError(
                f"--optimizer {plan.optimizer} needs a CUDA GPU: bitsandbytes has no CPU kernels for its optimisers, "
                "and torch sees no GPU here. Use --optimizer adamw."
            )
        import_bitsandbytes(f"--optimizer {plan.optimizer}", "--optimizer adamw")


def _maths(plan: Plan, data: PreparedData) -> dict[str, Any]:
    values = plan.model_dump(mode="json", include=set(_MATHS))
    return {**values, "training data (file, split, tokenizer, template)": data.train.key}


def _run(
    request: Request, plan: Plan, spec: ModelSpec, model_dir: Path, run: RunDir, data: PreparedData,
    tokenizer: ChatTokenizer, device: torch.device, events: Narrator, stop: StopRequest,
) -> None:
    """Builds model and loop, resumes where there is something to resume, trains to the end."""
    prepare_torch(plan, device)
    cap = cap_allocator(device)
    if cap is not None:
        events.message(f"GPU and CPU share their memory: this process may take {cap:.1f} GiB of it.")
    with MemoryWatchdog(stop, host_floor_gib(device), host_available_gib):
        _train_to_end(request, plan, spec, model_dir, run, data, tokenizer, device, events, stop)


def _train_to_end(
    request: Request, plan: Plan, spec: ModelSpec, model_dir: Path, run: RunDir, data: PreparedData,
    tokenizer: ChatTokenizer, device: torch.device, events: Narrator, stop: StopRequest,
) -> None:
    checkpoint, state = _resume_point(request, plan, run, data, events)
    loop = assemble(
        plan, spec, model_dir, run, data, tokenizer, device, events, stop, checkpoint=checkpoint, state=state
    )
    try:
        result = loop.run_to_end()
    finally:
        loop.log.close()
    examine_result(loop, model_dir, events)
    events.emit("artifact", path=str(result), bytes=size_of(result))
    events.message(f"Trained: {result}")
    events.emit("end", ok=True, spent=loop.spent)


def examine_result(loop: TrainingLoop, model_dir: Path, events: Narrator) -> None:
    """Measures what the merge will lose, where the base was stored in fewer bits."""
    storage = base_storage(loop.plan)
    if isinstance(loop.engine, NativeEngine) and storage != "none":
        write_merge_gap(
            loop.engine.model, model_dir, storage, loop.evaluation, loop.train, loop.run.merge_gap, events.message
        )


def prepare_torch(plan: Plan, device: torch.device) -> None:
    """Sets torch's global state for a run: its seed and, on a CPU, deterministic algorithms."""
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and changes nothing here
    torch.manual_seed(plan.seed)


def assemble(
    plan: Plan, spec: ModelSpec, model_dir: Path, run: RunDir, data: PreparedData, tokenizer: ChatTokenizer,
    device: torch.device, events: Narrator, stop: StopRequest, *, checkpoint: Path | None, state: LoopState,
) -> TrainingLoop:
    """Builds model, data order and loop of a decided plan, at `checkpoint` where there is one; writes plan.yaml.

    Raises:
        SparktuneError: the data no longer fits the checkpoint, or the disk has no room for checkpoints.
    """
    pad = device.type == "cuda"  # kernels and graphs are made once a length; a CPU would only compute more
    train = PackPlan(
        data.train, pack=plan.pack, pack_length=plan.pack_length, per_device_batch_size=plan.per_device_batch_size,
        seed=plan.seed, pad=pad,
    )
    held_out = None
    if data.evaluation is not None:
        held_out = PackPlan(data.evaluation, pack=plan.pack, pack_length=plan.pack_length, shuffle=False, pad=pad)
    events.message(train.describe())
    engine = _engine_class(plan).build(plan, spec, model_dir, device)
    plan = plan.model_copy(update={"kernels": engine.reasons})
    save_plan(plan, run.plan)
    length = run_length(len(train), plan.gradient_accumulation or 1, plan.num_epochs, plan.max_steps)
    size = sum(t.numel() * t.element_size() for t in engine.state().values())
    saves = length.total_steps // tenth(plan.save_steps, length.total_steps) + 1
    checkpoints.check_room(run.root, size, plan.keep_checkpoints, saves)
    if checkpoint is not None:
        if state.position != length.position_after(state.step):
            raise SparktuneError(
                f"{checkpoint} stands at micro-batch {state.position} of the data, but step {state.step} of this plan "
                f"is micro-batch {length.position_after(state.step)}. The data changed; start a new run."
            )
        engine.load_state(checkpoints.load_engine_state(checkpoint))
        checkpoints.restore_rng(checkpoint)
    reset_peak(device)
    metrics = MetricsLog(run, state, events, tensorboard=plan.tensorboard, say=events.message)
    events.message(
        f"{length.total_steps} steps ({length.steps_per_epoch} an epoch), {engine.describe()}, seed {plan.seed}."
    )
    return TrainingLoop(
        engine=engine, plan=plan, run=run, length=length, train=train,
        evaluation=held_out,
        prompts=sample_prompts(plan, tokenizer, data.evaluation),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip(),
        stop_ids=stop_ids(tokenizer, data.train), log=metrics, state=state, stop=stop, say=events.message,
        show=events.line,
    )


def _engine_class(plan: Plan) -> type[NativeEngine] | type[UnslothEngine]:
    return UnslothEngine if plan.engine == "unsloth" else NativeEngine


def _resume_point(
    request: Request, plan: Plan, run: RunDir, data: PreparedData, events: Narrator
) -> tuple[Path | None, LoopState]:
    """Returns the checkpoint to go on from, None for a fresh start, and the loop's state there."""
    checkpoints.remove_leftovers(run.root)
    maths = _maths(plan, data)
    if request.checkpoint is not None:
        checkpoint: Path | None = request.checkpoint
        checkpoints.validate(request.checkpoint)
    else:
        checkpoint = checkpoints.newest_valid(run.root, lambda text: events.message(text, "warning"))
    if checkpoint is None:
        return None, LoopState(maths=maths)
    state = checkpoints.load_loop_state(checkpoint)
    checkpoints.check_same_run(state.maths, maths, checkpoint)
    for later in checkpoints.checkpoints_of(run.root):
        if int(later.name.split("-")[1]) > state.step:
            moved = checkpoints.set_aside(later, "superseded")
            events.message(f"{later.name} belongs to steps that run again; it is now {moved.name}.", "warning")
    events.message(f"Resuming from {checkpoint.name}: step {state.step}, micro-batch {state.position} of the data.")
    return checkpoint, state
