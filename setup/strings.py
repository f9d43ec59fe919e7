"""Every sentence that the wizard, the commands and the pipeline show. Change a wording here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import sparktune
from sparktune.setup.plan.errors import ExitCode
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.untrusted import shell_word

STAGES = {
    "prepare": "Read and tokenise the data",
    "train": "Train",
    "merge": "Merge into the base model",
    "mtp": "Attach the MTP head",
    "gguf": "Export GGUF",
    "evaluate": "Evaluate",
    "report": "Write the report",
    "calibrate": "Time some steps",
}
CHOICE = "{what}: {chosen} ({reason})"

# -- the run
NAME_TAKEN = (
    "A run named {name} exists already ({path}). Go on with it (./run.sh resume {name}), or choose another --name."
)
UNWRITABLE = "{path} cannot be written: {why}. Make it writable, or choose another folder with --results."
STOPPING = (
    "Stopping: training saves a checkpoint and says how long that takes, any other stage ends now. Press Ctrl-C again "
    "to abort at once."
)
KEYS_TRAIN = "s or Ctrl-C: save and stop   a twice, or Ctrl-C twice: abort without saving"
KEYS_STAGE = "s or Ctrl-C: stop   a twice, or Ctrl-C twice: abort"
ABORT_AGAIN = "Press a again to abort at once; what was not saved is lost."
ABOUT_LEFT = ", about {time} left"
FALLING = "falling"
RISING = "rising"
STOPPED_AT = "Stopped in the stage {stage}. Nothing finished is lost; go on with: {resume}"
FAILED_AT = "The run stopped in the stage {stage}. When the cause is repaired, go on with: {resume}"
NOT_FINISHED = "The stage {stage} of the run {run} is not finished. Finish it first: ./run.sh resume {run}"
NO_OUTPUT = "The stage {stage} ended well but left no {path}. This is a defect; the log is {log}."
LOG_TAIL = "The stage {stage} ended with exit code {code}. The last lines of {log}:"
REPLAY = "The same run again: {command}"
RUN_BEGINS = "Run {name}, in {folder}"
PLAN_TITLE = "The plan"
DATA_TITLE = "The data"
CHECKS_TITLE = "Preflight"
RESULT_TITLE = "Result of {name}"
NEXT_TITLE = "What to do next"

TRACKER_LOST = "The tracker {name} is left out from here on: {why}. Training goes on; metrics.jsonl has every step."

# -- commands
ABOUT = "From a chat JSONL to a fine-tuned, merged, exported model."
USAGE = "./run.sh [COMMAND] [RUN] [flags]"
COMMANDS_HELP = """commands:
  (none)            ask what is not given as a flag, then run
  doctor            check this machine, the model and the folders
  analyze           read the data and describe it; runs nothing else
  plan              show the complete plan with the reason of every value; runs nothing
  resume RUN        go on with a stopped or failed run; --on-bad-step, --loss-spike, --mtp..., --gguf may be given anew
  runs [RUN ...]    list the runs; with two or more names, compare their plans, figures and answers
  evaluate RUN      evaluate a finished run again
  chat RUN          talk to the merged model of a run
  push RUN          show, then send a run's result to the hub (--push-to OWNER/NAME)
  diagnose [FILE]   say what a log, or a run, is known for; without a name, the state of this machine

exit codes: 0 ok, 1 failure, 2 usage, 3 preflight, 4 data, 5 memory, 75 stopped and resumable, 130 interrupted"""
HELP_COMMAND = "doctor, analyze, plan, resume, runs, evaluate, chat, push or diagnose; the wizard when left out"
HELP_RUN = "for resume, evaluate, chat and push: the run's name, or its folder in results/"
HELP_PUSH_TO = "with push: the repository of the merged model; its GGUF files go to OWNER/NAME-GGUF"
HELP_KEY_FILE = "with push: a file with the hub's token; otherwise HF_TOKEN or an earlier `hf auth login`"
HELP_PUBLIC = "with push: make new repositories public"
PUSH_ALONE = "{flags} goes with the command push: ./run.sh push RUN --push-to OWNER/NAME."
PUSH_WHERE = "`push RUN` needs --push-to OWNER/NAME. Nothing is sent before you have seen what and said yes."
HELP_DEMO = "make a tiny model and data here and take them through the whole journey"
HELP_NON_INTERACTIVE = "never ask; name everything that is missing and stop"
HELP_AS = "with the command plan: write the training as a script for torchrun, Slurm or SkyPilot on standard output"
HELP_NODES = "with --as: machines that train together, each with --gpus GPUs"
AS_ALONE = "--as and --nodes go with the command plan: ./run.sh plan --as torchrun --nodes 2 --gpus 1 --data FILE."
HELP_CONFIG = "a plan.yaml, or the published YAML template; flags override it"
HELP_DRY_RUN = "stop after the plan is complete (same as the command plan)"
HELP_JSON = "the result as JSON on standard output"
HELP_PLAIN = "no bars and no colours: numbered questions, one progress line every few seconds"
HELP_DATA_MISSING = "a JSONL file to train on"
HELP_CONFIRM = "to confirm the model: the native engine cannot train it, because {why}; Unsloth would"
HELP_YES = "do not ask for confirmation before the run starts"
HELP_REBUILD = (
    "build the Docker image although nothing changed; --rebuild=clean removes it first and reuses no layer"
)
HELP_DEV_MOUNT = "mount this checkout's package, read-only, over the one in the Docker image (for development)"
NO_TERMINAL = "Nothing can be asked here ({why}), and these are missing: {missing}."
WHY_FLAG = "--non-interactive"
WHY_STDIN = "standard input is not a terminal"
WHY_STDERR = "standard error, where questions appear, is not a terminal"
WHY_CI = "CI is set"
RUN_NEEDED = "`{command}` needs the name of a run: ./run.sh {command} RUN. The runs here: {runs}."
RUN_UNEXPECTED = "`{command}` takes no name (or none more), got {run!r}."
RUN_UNKNOWN = "There is no run {name} ({path} has no plan.yaml). The runs here: {runs}."
NO_RUNS = "none"
NO_RUNS_YET = "There are no runs here yet. Start one with ./run.sh"
RUN_FINISHED = "finished"
RUN_AFTER = "after {stage}"
RUN_BEGUN = "begun"
SAME_PLAN = "The plans are the same."
FINDINGS_TITLE = "Known failures"
NOTHING_KNOWN = "Nothing in {source} is a failure that is known here."
THIS_MACHINE = "the state of this machine"
KNOWN_FAILURE = "This is known: {sentence}"
KILLED = (
    "The kernel ended the process (exit code 137): the machine ran out of memory. Close other programs, lower "
    "--pack-length, or pass --recompute layer."
)
FLAGS_WITH_RUN = (
    "`{command} RUN` works on the plan in the run's folder; {flags} would change it. Start a new run instead.{but}"
)
FLAGS_OF_RESUME = " Of a plan, resume takes {flags}."
DEMO_ALONE = "--demo brings its own data and model; drop {flags}."
UNKNOWN_FLAG = "Unrecognised argument {given}; the nearest valid one is {nearest}."
UNKNOWN_COMMAND = "There is no command {given}; the nearest one is {nearest}."
INTERRUPTED = "Interrupted."
ANSWERS_SAVED = "Your answers are kept; the next start of the wizard offers them again."
FAILED_UNEXPECTEDLY = "This is a defect of sparktune: {kind}: {text}. Please report it with the lines above."

# -- chat
CHAT_HELLO = "Talking to {model}. An empty line or Ctrl-D ends."
CHAT_NO_MODEL = "{path} holds no merged model. Finish the run first: ./run.sh resume {run}"
CHAT_PROMPT = "you> "

# -- wizard
WELCOME = "sparktune. Arrow keys and Enter choose, Escape goes back, Ctrl-C keeps your answers and leaves."
SCREENS = {
    "machine": "This machine", "model": "Model", "data": "Data", "lengths": "Lengths", "plan": "Recommended plan",
    "review": "Review",
}
KEYS = "(arrows, Enter)"
KEYS_BACK = "(arrows, Enter; Esc: back)"
KEYS_MANY = "(Space ticks, Enter takes; Esc: back)"
GO_ON = "Go on"
CHANGE = "Change"
LEAVE = "Leave"
CHECK_AGAIN = "Check again"
CHECKS_WELL = "well"
NO_GPU = "none; the CPU trains (small models only)"
SHARED = ", shared by GPU and CPU"
MACHINE_READY = "Ready?"
MACHINE_BLOCKED = "What is marked X must be repaired first."
SAVED_ANSWERS = "Answers of an earlier session are offered again: {answers}."
FORGET_SAVED = "Forget the earlier answers"
ASK_MODEL = "Which model?"
ASK_MODEL_CUSTOM = "Folder or hub id of the model (Tab completes folders):"
MODEL_CUSTOM = "another model (folder or hub id)"
FITS, TIGHT, TOO_BIG = "fits", "tight", "needs"
SPEEDS = "Speeds in tokens a second: {reason}."
SPEEDS_NONE = "Speeds: nothing is known of this chip yet."
BADGES = "Memory in GiB (G), estimated; tight: with recomputation and short packs only."
NATIVE_YES = "native: packs without leaks, fused kernels where there are any for the device"
NATIVE_NO = "Unsloth only: {reason}"
MULTIMODAL = " (in a multimodal checkpoint; the text tower is trained)"
ASK_UNKNOWN = "The native engine cannot train it, because {why}; Unsloth would have to. Take this model?"
UNKNOWN_TAKE = "Yes, with Unsloth"
UNKNOWN_OTHER = "No"
ASK_DATA = "Training data (a JSONL file; Tab completes):"
DATA_MISSING = "There is no file {path}."
DATA_NOT_FILE = "{path} is a folder; give a JSONL file."
DATA_EMPTY = "{path} is empty."
DATA_UNREADABLE = "{path} cannot be read."
PREVIEW = "Line {line} ({format}) as the model sees it, {tokens:,} tokens:"
PREVIEW_LEARNED = "{learned:,} learned ({share:.0%})"
PREVIEW_MARKS = "(between {begin} and {end})"
LEARNED_MARKS = ("»", "«")
FOUND_REPEATS = (
    "Repeats: {exact:,} rows are an earlier one again, {near:,} are nearly one; {held_out:,} held-out rows are in "
    "training too."
)
FOUND_PERSONAL = "Personal data: {kinds}. The report names lines, never what stands there."
ASK_DEDUPE = "Leave repeats out? (A cleaned copy is used; the file stays as it is.)"
DEDUPES = {
    "off": "no: train on every row", "exact": "exact ones: all but the first",
    "near": "exact and near ones: all but the first",
}
ASK_REDACT = "Replace personal data? (In a cleaned copy; the file stays as it is.)"
REDACTS = {"false": "no: train on the rows as they are", "true": "yes: by [EMAIL], [PHONE], [CARD], [KEY]"}
ASK_PREVIEW = "Is this what shall be learned?"
ANOTHER_ROW = "Show another row"
NO_MORE_ROWS = "There is no further row."
ASK_LENGTHS = "Lengths right?"
OVER_NONE = "none above --max-seq-length {limit:,}"
OVER_DROPPED = "{count:,} rows left out, above --max-seq-length {limit:,}"
OVER_CUT = "{count:,} rows cut at --max-seq-length {limit:,}"
ASK_PLAN = "Take this plan?"
TAKE_PLAN = "Take it"
PART = " ({number} of {count})"
PLAN_MORE = "Show the rest ({number} of {count})"
PLAN_FIRST = "Show the first part again"
ASK_ONE_BY_ONE = "Ask me about each: method, epochs, evaluation, MTP head, GGUF, name"
ASK_MODE = "Which method?"
MODES = {
    "lora": "LoRA: small adapters on the frozen model",
    "qlora": "QLoRA: LoRA on a 4-bit model, for little memory",
    "full": "full fine-tuning: every weight learns",
}
ASK_EPOCHS = "How many passes over the data (epochs)?"
ASK_EVAL = "Share of rows held out for evaluation (0 for none)?"
ASK_MTP = "Which MTP head (for speculative decoding) should the result carry?"
MTPS = {
    "trained": "y: trained on your data, one pass, and shipped if it drafts better than the base's own",
    "default": "d: the base model's own",
    "skip": "n: none",
}
ASK_PEERS = "Which machines train?"
PEERS_ALONE = "this one"
PEERS_WITH = "this one and {host}, which is on the fast link and lets you in"
ASK_GGUF = "Which GGUF files?"
GGUFS = {
    "q8_0": "8 bits, next to no loss", "bf16": "16 bits, exact",
    "q4_k_m": "4 bits, a quarter of bf16 (its quantiser is compiled here once)",
}
ASK_NAME = "Name of the run (empty: method and time):"
ASK_REVIEW = "Everything right? Choose a line to change it."
REVIEW_BLOCKED = "This cannot run yet (see above). Choose a line to change it."
REVIEW_RUN = "Run it"
REVIEW_OTHER = "Change another setting"
REVIEW_QUIT = "Leave (answers are kept)"
ASK_OTHER = "Which setting?"
OUTLOOK_STEPS = "{steps:,} optimiser steps"
OUTLOOK_DISK = "{need:.1f} GiB written ({parts}); {free:.0f} GiB free"
OUTLOOK_TIME = "{low} to {high}, likely {likely} (training: {why})"
OUTLOOK_NO_TIME = "not known: {why}"
BLOCKED = "cannot run"
ORIGINS = {
    "flag": "given", "environment": "environment", "config": "config file", "saved": "earlier answer",
    "recommendation": "recommended", "default": "default",
}
BACK = "back"
BACK_HINT = "(< goes back)"
PLAIN_NUMBER = "Number from 1 to {count}:"
PLAIN_NUMBERS = "Numbers from 1 to {count}, commas between (0 for none):"
RECOMMENDED = "Recommended: {value}, because: {reason}"
MARKED = "(recommended)"
ANSWERED = "your answer"
OPEN_NAME = "method and time"
NOTHING = "none"


# -- time before the start
ETA_TITLE = "Time"
ETA_STAGE, ETA_TIME, ETA_RANGE, ETA_SOURCE = "stage", "likely", "range", "from"
ETA_TOTAL = "all"
ETA_RENTED = "on a rented {gpu}"
ETA_RENTED_WHY = "estimate: published time with Unsloth, prices of May 2026; the training alone"
CALIBRATING = "Timing some steps of this plan on your data first (--calibrate no leaves that out)."
CALIBRATION_ALONE = "Several GPUs train: nothing is timed first (--calibrate yes), one process could not show it."
CALIBRATION_FAILED = "The plan could not be timed; the estimate above stands."
TRIAL_TITLE = "Trial of {steps} steps: {name}"
TRIAL_SLOW = "The fast kernels seem not to be in use. {why} The log is {log}; ./run.sh doctor looks at the machine."
SLOW_OPS = "No fused kernel serves {ops}; plan.yaml says why of each."
SLOW_LOG = "The log says: {line}"
SLOW_SPEED = "{speed:,.0f} tok/s were reached, where {least:,.0f} are the least to expect ({source})."
SLOW_PEAK = "The peak was {peak:.1f} GiB, where {predicted:.1f} were predicted."
TRIAL_DAMAGED = "{count} of {rows} rows in {path} are damaged and left out of this table."
TRIAL_NEXT = "When you like it, the whole run is:"


def run_script() -> str:
    """Returns how to call run.sh from the current folder, quoted."""
    script = Path(sparktune.__file__).resolve().parents[2] / "run.sh"
    return "./run.sh" if script.parent == Path.cwd() else shell_word(str(script))


def run_command(command: str, run: RunDir) -> str:
    """Returns the call of `command` on `run`, as it works from the current folder."""
    where = run.name if run.results_root == Path.cwd() / "results" else os.fspath(run.root)
    return f"{run_script()} {command} {shell_word(where)}"


def check_line(name: str, seen: str, fix: str) -> str:
    """Returns one check of the preflight as a sentence."""
    return f"{name}: {seen.rstrip('.')}. {fix}".rstrip()


def sample_line(event: dict[str, Any]) -> str:
    """Returns one answer of the model, during training or after it."""
    who = f"step {event['step']}" if event.get("step") is not None else event.get("source", event.get("stage", ""))
    return f"{who}: {event.get('prompt', '')!r} -> {event.get('answer', '')!r}"


def stage_end(code: int) -> str:
    """Returns how a stage ended, in a few words."""
    words = {ExitCode.OK: "done", ExitCode.STOPPED: "stopped with a checkpoint", ExitCode.INTERRUPTED: "interrupted"}
    return words.get(ExitCode(code), "failed") if code in set(ExitCode) else "failed"
