"""One training process from its command line to its exit code: data, recommendations, model, loop, result."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from sparktune.setup.data.tokenise import PreparedData, prepare
from sparktune.setup.data.tokenizer import ChatTokenizer, load_tokenizer
from sparktune.setup.plan.basestorage import base_storage
from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.errors import ExitCode, SparktuneError, StoppedResumable, UsageError
from sparktune.setup.plan.intervals import tenth
from sparktune.setup.plan.memory import check_fits
from sparktune.setup.plan.models import probe, resolve_model_dir
from sparktune.setup.plan.outfolder import size_of
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.setup.plan.trainable import refuse_ranks
from sparktune.setup.plan.weights import safetensors_index
from sparktune.training import checkpoint as checkpoints
from sparktune.training.checkpoint import LoopState
from sparktune.training.dealing import DealtPacks, StepCost
from sparktune.training.decisions import (
    as_adapter_says,
    decide_plan,
    device_of,
    maths_of,
    refuse_unsupported,
    with_engine,
)
from sparktune.training.distributed import Members, RankLost, World, is_collective
from sparktune.training.engine_choice import Choice
from sparktune.training.finished import finished_result
from sparktune.training.gpu_lock import hold_gpu
from sparktune.training.heard import heard_plan, heard_resume_point, heard_state
from sparktune.training.loop import TrainingLoop
from sparktune.training.memory import (
    cap_allocator,
    host_available_gib,
    host_floor_gib,
    measure_machine,
    reset_peak,
)
from sparktune.training.merge_gap import write_merge_gap
from sparktune.training.metrics import MetricsLog, NoMetrics
from sparktune.training.narrator import Narrator
from sparktune.training.native_engine import NativeEngine
from sparktune.training.packing import PackPlan
from sparktune.training.runs import Request, open_request, open_run
from sparktune.training.samples import sample_prompts, stop_ids
from sparktune.training.schedule import run_length
from sparktune.training.stop import StopRequest
from sparktune.training.unsloth_engine import UnslothEngine
from sparktune.training.watchdog import MemoryWatchdog

__all__ = ["assemble", "examine_result", "prepare_torch", "run_session"]


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
    try:
        world = World(members=Members.of(env))
    except UsageError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    events, stop = Narrator(speaks=world.leads), StopRequest()
    world.tell = lambda text, aloud: _say_error(events, text, aloud)
    stop.install()
    log: list[Path] = []
    code = _guarded(lambda held: _train(flags, config, env, events, stop, log, held, choice, world),
                    world, events, stop, log)
    with contextlib.suppress(OSError):
        events.close()
    if code != ExitCode.OK and not world.alone:
        sys.stdout.flush()
        os._exit(code)  # collectives that will never end hold threads that an ordinary exit would wait for
    return code


def _guarded(
    work: Callable[[ExitStack], None], world: World, events: Narrator, stop: StopRequest, log: list[Path]
) -> ExitCode:
    """Does the work; returns the exit code that it earned, after a sentence for the user if it failed."""
    try:
        with ExitStack() as held:
            work(held)
        return ExitCode.OK
    except SparktuneError as error:
        if error.__cause__ is not None:
            _keep_traceback(log)
        if isinstance(error, RankLost):
            world.wait_for_verdict()
        if isinstance(error, StoppedResumable):  # all ranks agreed on it
            _say_error(events, str(error), world.leads)
            return error.exit_code
        return _refuse(world, events, str(error), error.exit_code)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED if stop.aborted else ExitCode.STOPPED
        text = "Aborted; the last checkpoint is still good." if stop.aborted else (
            f"Stopped before the first step, {stop.why}: nothing was trained yet. Start it again."
        )
        _say_error(events, text, world.leads)
        return code
    except (torch.OutOfMemoryError, MemoryError) as error:
        where = _keep_traceback(log)
        fix = "Lower --pack-length or --max-seq-length, or pass --recompute layer"
        return _refuse(world, events, f"Out of memory: {error}. {fix}. Details: {where}", ExitCode.MEMORY)
    except OSError as error:
        _keep_traceback(log)
        refusal = checkpoints.storage_error(error, "the run's files")
        return _refuse(world, events, str(refusal), refusal.exit_code)
    except Exception as error:  # whatever else goes wrong is a bug, which a user meets as a sentence and a file
        if not world.alone and is_collective(error):
            world.wait_for_verdict()
        where = _keep_traceback(log)
        what = f"{type(error).__name__}: {error}"
        return _refuse(world, events, f"Training failed unexpectedly ({what}). Details: {where}", ExitCode.FAILURE)


def _refuse(world: World, events: Narrator, text: str, code: ExitCode) -> ExitCode:
    _say_error(events, text, world.fails(text, code))
    return code


def _say_error(events: Narrator, text: str, aloud: bool) -> None:
    with contextlib.suppress(OSError):  # the disk that caused the refusal may refuse this too
        events.message(text, "error")
    if aloud:
        print(text, file=sys.stderr, flush=True)


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
    flags: Mapping[str, Any], config: Path | None, env: Mapping[str, str], events: Narrator, stop: StopRequest,
    log: list[Path], held: ExitStack, choice: Choice | None, world: World,
) -> None:
    """The whole session of one rank: rank 0 reads the command line and decides, the others hear of it."""
    world.join()
    request = run = found = None
    if world.leads:
        before = world.recall()  # the run of the ranks that torchrun started before these
        request = open_request(flags, config, env) if before is None else open_request(
            {"resume_from_checkpoint": Path(before)}, None, env
        )
        for note in request.notes:
            events.message(note, "warning")
    plan = heard_plan(world, None if request is None else with_engine(request.plan, choice, events))
    spec, device = probe(plan.model), device_of(plan, world.members)
    held.enter_context(hold_gpu(device, plan.name or "that is being started"))
    if request is not None and request.existing is not None:  # its folder takes the events and errors that follow
        run = open_run(request, plan, held)
        _attach(run, events, log, own_log=not request.as_stage)
    refuse_unsupported(plan, spec, device)
    refuse_ranks(plan, world.size)
    with world.in_turn():
        model_dir = resolve_model_dir(plan.model)
        safetensors_index(model_dir)  # a base that was cut off is refused before the run takes its name
        tokenizer = load_tokenizer(str(model_dir))
        data = prepare(plan, spec, str(model_dir), events, tokenizer)
    if request is not None:
        plan = decide_plan(as_adapter_says(plan), spec, data, device, events)
        refuse_unsupported(plan, spec, device)
        refuse_ranks(plan, world.size)
        found = _resume_point(request, plan, run, data, events)
        if run is not None and world.alone and _is_finished(plan, run, data, *found, events):
            return
        run, plan = _ready_folder(request, run, plan, spec, data, device, events, log, held)
        world.remember(str(run.root.resolve()))
    plan = heard_plan(world, plan)
    run = run or RunDir(name=str(plan.name), results_root=plan.results, output_root=plan.output)
    _run(found, plan, spec, model_dir, run, data, tokenizer, device, events, stop, world)
    world.leave()


def _ready_folder(
    request: Request, run: RunDir | None, plan: Plan, spec: ModelSpec, data: PreparedData, device: torch.device,
    events: Narrator, log: list[Path], held: ExitStack,
) -> tuple[RunDir, Plan]:
    """Returns the run, its folder there with plan and data report in it, and the plan with the run's name."""
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
    return run, plan


def _attach(run: RunDir, events: Narrator, log: list[Path], *, own_log: bool) -> None:
    try:
        events.attach(run.stage_events("train"), run.log if own_log else None)
    except OSError as error:
        raise checkpoints.storage_error(error, f"the run folder {run.root}") from error
    log.append(run.log)


def _run(
    found: tuple[Path | None, LoopState] | None, plan: Plan, spec: ModelSpec, model_dir: Path, run: RunDir,
    data: PreparedData, tokenizer: ChatTokenizer, device: torch.device, events: Narrator, stop: StopRequest,
    world: World,
) -> None:
    """Builds model and loop, resumes where there is something to resume, trains to the end."""
    prepare_torch(plan, device)
    cap = cap_allocator(device)
    if cap is not None:
        events.message(f"GPU and CPU share their memory: this process may take {cap:.1f} GiB of it.")
    with MemoryWatchdog(stop, host_floor_gib(device), host_available_gib):
        _train_to_end(found, plan, spec, model_dir, run, data, tokenizer, device, events, stop, world)


def _train_to_end(
    found: tuple[Path | None, LoopState] | None, plan: Plan, spec: ModelSpec, model_dir: Path, run: RunDir,
    data: PreparedData, tokenizer: ChatTokenizer, device: torch.device, events: Narrator, stop: StopRequest,
    world: World,
) -> None:
    checkpoint, state = heard_resume_point(world, found)
    if world.leads and checkpoint is not None:
        _set_later_aside(run, checkpoint, state, events)
    loop = assemble(
        plan, spec, model_dir, run, data, tokenizer, device, events, stop, checkpoint=checkpoint, state=state,
        world=world,
    )
    began_after = loop.state.step
    try:
        result = loop.run_to_end()
    finally:
        loop.log.close()
    if not world.leads:
        return
    examine_result(loop, model_dir, events)
    events.emit("artifact", path=str(result), bytes=size_of(result))
    events.message(f"Trained: {result}")
    events.emit("end", ok=True, began_after=began_after, spent=loop.spent, first_spent=loop.first_spent)


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
    world: World | None = None,
) -> TrainingLoop:
    """Builds model, data order and loop of a decided plan, at `checkpoint` where there is one; writes plan.yaml.

    With a `world` of several ranks, each gets its share of every step; rank 0 alone writes.

    Raises:
        SparktuneError: the data no longer fits the checkpoint, or the disk has no room for checkpoints.
    """
    world = world or World()
    pad = device.type == "cuda"  # kernels and graphs are made once a length; a CPU would only compute more
    packs = PackPlan(
        data.train, pack=plan.pack, pack_length=plan.pack_length, per_device_batch_size=plan.per_device_batch_size,
        seed=plan.seed, pad=pad,
    )
    held_out = None
    if data.evaluation is not None:
        held_out = PackPlan(data.evaluation, pack=plan.pack, pack_length=plan.pack_length, shuffle=False, pad=pad)
    train: PackPlan | DealtPacks = packs
    if not world.alone:
        train = DealtPacks(
            packs, rank=world.rank, ranks=world.size, fill=plan.mode == "full",
            cost=StepCost.of(plan, spec, data.report.supervised_share),
        )
    events.message(train.describe())
    engine: NativeEngine | UnslothEngine
    if plan.engine == "unsloth":
        engine = UnslothEngine.build(plan, spec, model_dir, device)
    else:
        engine = NativeEngine.build(plan, spec, model_dir, device, world=world)
    plan = plan.model_copy(update={"kernels": engine.reasons})
    if world.leads:
        save_plan(plan, run.plan)
    length = run_length(len(train), plan.gradient_accumulation or 1, plan.num_epochs, plan.max_steps)
    size = sum(t.numel() * t.element_size() for t in engine.state().values())
    saves = length.total_steps // tenth(plan.save_steps, length.total_steps) + 1
    if world.leads:
        checkpoints.check_room(run.root, size, plan.keep_checkpoints, saves)
    if checkpoint is not None:
        if state.position != length.position_after(state.step):
            raise SparktuneError(
                f"{checkpoint} stands at micro-batch {state.position} of the data, but step {state.step} of this plan "
                f"is micro-batch {length.position_after(state.step)}. The data changed; start a new run."
            )
        engine.load_state(heard_state(world, checkpoint))
        if world.leads:
            checkpoints.restore_rng(checkpoint)
        world.advise(f"{checkpoint.name} is whole: python train.py --resume-from-checkpoint {checkpoint}")
    reset_peak(device)
    metrics = NoMetrics() if not world.leads else MetricsLog(
        run, state, events, tensorboard=plan.tensorboard, say=events.message
    )
    events.message(
        f"{length.total_steps} steps ({length.steps_per_epoch} an epoch), {engine.describe()}, seed {plan.seed}."
    )
    return TrainingLoop(
        engine=engine, plan=plan, run=run, length=length, train=train,
        evaluation=held_out,
        prompts=sample_prompts(plan, tokenizer, data.evaluation),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip(),
        stop_ids=stop_ids(tokenizer, data.train), log=metrics, state=state, stop=stop, say=events.message,
        show=events.line, world=world,
    )


def _is_finished(
    plan: Plan, run: RunDir, data: PreparedData, checkpoint: Path | None, state: LoopState, events: Narrator
) -> bool:
    """Says whether there is nothing left to train, and tells it as the end of a training."""
    found = finished_result(plan, run, data.train, checkpoint, state)
    if found is None:
        return False
    result, holder = found
    events.emit("artifact", path=str(result), bytes=size_of(result))
    events.message(f"Trained before: {result}, as {holder.name} has it.")
    events.emit("end", ok=True)
    return True


def _resume_point(
    request: Request, plan: Plan, run: RunDir | None, data: PreparedData, events: Narrator
) -> tuple[Path | None, LoopState]:
    """Returns the checkpoint to go on from, None for a fresh start, and the loop's state there."""
    maths = maths_of(plan, data)
    if run is None:
        return None, LoopState(maths=maths)
    checkpoints.remove_leftovers(run.root)
    if request.checkpoint is not None:
        checkpoint: Path | None = request.checkpoint
        checkpoints.validate(request.checkpoint)
    else:
        checkpoint = checkpoints.newest_valid(run.root, lambda text: events.message(text, "warning"))
    if checkpoint is None:
        return None, LoopState(maths=maths)
    state = checkpoints.load_loop_state(checkpoint)
    checkpoints.check_same_run(state.maths, maths, checkpoint)
    return checkpoint, state


def _set_later_aside(run: RunDir, checkpoint: Path, state: LoopState, events: Narrator) -> None:
    """Renames checkpoints of steps that will be made again."""
    for later in checkpoints.checkpoints_of(run.root):
        if int(later.name.split("-")[1]) > state.step:
            moved = checkpoints.set_aside(later, "superseded")
            events.message(f"{later.name} belongs to steps that run again; it is now {moved.name}.", "warning")
    events.message(f"Resuming from {checkpoint.name}: step {state.step}, micro-batch {state.position} of the data.")
