"""Where a plan's values come from: flags, environment, config file, saved answers; and plan.yaml itself.

Precedence: flag > environment > config > saved > recommendation > default. The first four and the default are settled
here, recommendations by setup/plan/recommend.py, which touches only values whose origin is `default`.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import tempfile
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.flags import flag_of
from sparktune.setup.plan.rundir import check_run_name
from sparktune.setup.plan.schema import SCHEMA_VERSION, Origin, Plan
from sparktune.setup.plan.template import SECTIONS, read_template
from sparktune.setup.plan.trainable import refuse_ranks
from sparktune.setup.plan.untrusted import excerpt

__all__ = ["ENV_PREFIX", "SAID", "load_plan", "read_config", "resolve", "save_plan", "settle_peers"]

ENV_PREFIX = "SPARKTUNE_"
_SHOWN_KEYS = 10
_SHOWN_CHARACTERS = 80
_BOOKKEEPING = ("schema_version", "origins", "ranks", "kernels")
_PATHS = ("data", "eval_data", "resume_from_checkpoint", "results", "output")
SAID: tuple[Origin, ...] = ("flag", "environment", "config", "saved")
"""Origins of a value that somebody said, from first to last; what follows from data or machine has others."""


class _PlainYAML(yaml.SafeLoader):
    """safe_load that refuses a key given twice (PyYAML would keep the last one without a word), every tag, and an
    alias of more than a scalar: a few lines of those describe a list of billions.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        node = super().compose_node(parent, index)
        what = "an alias (*name) of a list or a mapping" if (
            isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode)
        ) else f"the tag {event.tag}" if getattr(event, "tag", None) not in (None, "!") else ""
        if what:
            raise yaml.constructor.ConstructorError(None, None, f"{what} is not read here", event.start_mark)
        return node


def _mapping(loader: _PlainYAML, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is no word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _integer(loader: _PlainYAML, node: yaml.ScalarNode) -> int:
    value = loader.construct_yaml_int(node)
    if abs(value) >= 2**63:  # a number of thousands of digits cannot even be shown
        raise yaml.constructor.ConstructorError(None, None, "a number beyond 64 bits", node.start_mark)
    return value


_PlainYAML.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_PlainYAML.add_constructor("tag:yaml.org,2002:int", _integer)


def _names() -> dict[str, str]:
    """Returns every spelling of a config key (field names, and flags without their dashes) -> field."""
    names: dict[str, str] = {}
    for field, info in Plan.model_fields.items():
        if field in _BOOKKEEPING:
            continue
        extra = typing.cast(dict[str, Any], info.json_schema_extra or {})
        for spelling in [field, *(extra.get("flags") or [])]:
            names[spelling.lstrip("-").replace("-", "_")] = field
    return names


def _read_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping. Raises UsageError for anything else, in one sentence."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"--config {path}: there is no such file. Give the path of a plan.yaml.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path}: not UTF-8 at byte {error.start}. Save the file as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror}). Give a readable YAML file.") from None
    try:
        loader = _PlainYAML(text)
        try:
            loaded = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(
            f"--config {path}{where}: not plain YAML ({error.problem or error.context}). "
            "Only mappings, lists and scalars are read; tags such as !!python/... are refused."
        ) from None
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path}: not YAML ({error}). Save the file as plain-text YAML.") from None
    except RecursionError:
        raise UsageError(f"--config {path}: nested too deeply to be a plan. Keep `key: value` lines.") from None
    except ValueError as error:  # what looks like a date or a number and is none: 2026-13-45, 0x_
        raise UsageError(
            f"--config {path}: a value looks like a number or a date and is none ({error}). Put it in quotes."
        ) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(
            f"--config {path}: expected `key: value` lines, found a {type(loaded).__name__}. "
            "A plan.yaml starts like `model: Qwen/Qwen3.5-2B`."
        )
    for key in loaded:
        if not isinstance(key, str):
            raise UsageError(f"--config {path}: the key {excerpt(key)} should be a word, such as `model`.")
    return loaded


def _check_version(path: Path, version: Any) -> None:
    if version is not None and version != SCHEMA_VERSION:
        raise UsageError(
            f"{path}: schema_version {excerpt(version)}, this program reads {SCHEMA_VERSION}. "
            "Use the version of sparktune that wrote it, or make the plan again."
        )


def read_config(path: Path, notes: list[str] | None = None) -> dict[str, Any]:
    """Reads what `--config` names: a plan.yaml, the published template with its sections, or a mix.

    Args:
        path: the YAML file.
        notes: receives one sentence for each key that is accepted without effect or read differently.

    Returns:
        Plan fields -> values as written; keys left empty are left out, bookkeeping fields are dropped.

    Raises:
        UsageError: unreadable, not a mapping, YAML tags, an unknown key (its nearest valid one is named), or one
            field given under two names.
    """
    raw = _read_mapping(path)
    _check_version(path, raw.get("schema_version"))
    names = _names()
    found: dict[str, tuple[str, Any]] = {}

    def put(field: str, spelling: str, value: Any) -> None:
        if field in found:
            raise UsageError(
                f"--config {path}: `{found[field][0]}` and `{spelling}` set the same value. Keep one of them."
            )
        found[field] = (spelling, value)

    unknown: list[str] = []
    for key, value in raw.items():
        if key in _BOOKKEEPING or value is None:
            if key not in _BOOKKEEPING and key.replace("-", "_") not in names and key not in SECTIONS:
                unknown.append(key)
            continue
        if key in SECTIONS and isinstance(value, dict):
            for field, spelling, item in read_template(path, key, value, notes if notes is not None else [], unknown):
                put(field, spelling, item)
        elif key.replace("-", "_") in names:
            put(names[key.replace("-", "_")], key, value)
        elif key in SECTIONS:
            raise UsageError(f"--config {path}: `{key}` is a section; expected `key: value` lines under it.")
        else:
            unknown.append(key)
    if unknown:
        raise UsageError(_unknown_keys(path, unknown, names))
    return {field: value for field, (_, value) in found.items()}


def _unknown_keys(path: Path, unknown: list[str], names: Mapping[str, str]) -> str:
    valid = [*names, *SECTIONS, *(f"{s}.{k}" for s, keys in SECTIONS.items() for k in keys)]
    sentences = []
    for key in unknown[:_SHOWN_KEYS]:
        pool = [v for v in valid if v.startswith(key.split(".")[0] + ".")] if "." in key else valid
        near = difflib.get_close_matches(key.replace("-", "_"), pool, n=1, cutoff=0.0) or [""]
        shown = key if len(key) <= _SHOWN_CHARACTERS else key[:_SHOWN_CHARACTERS] + "..."
        sentences.append(f"unknown key `{shown}`; the nearest valid one is `{near[0]}`")
    if len(unknown) > _SHOWN_KEYS:
        sentences.append(f"and {len(unknown) - _SHOWN_KEYS} more unknown keys")
    return f"--config {path}: " + "; ".join(sentences) + "."


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    names = _names()
    values: dict[str, Any] = {}
    for variable, text in env.items():
        if not variable.startswith(ENV_PREFIX) or not text:
            continue
        spelling = variable.removeprefix(ENV_PREFIX).lower()
        if spelling in names:
            values[names[spelling]] = text
        elif near := difflib.get_close_matches(spelling, names, n=1, cutoff=0.8):
            raise UsageError(
                f"{variable} is set but means nothing; the nearest variable is {ENV_PREFIX}{near[0].upper()}."
            )
    return values


def _inner(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def _coerced(field: str, value: Any) -> Any:
    """Turns what YAML or a variable says into what the field's type takes; leaves what it cannot to pydantic."""
    kind = _inner(Plan.model_fields[field].annotation)
    if typing.get_origin(kind) is list:
        if isinstance(value, str):
            return [] if value == "none" else [w.strip() for w in value.split(",") if w.strip()]
        return value
    if typing.get_origin(kind) is Literal and isinstance(value, bool) and {"on", "off"} <= set(typing.get_args(kind)):
        return "on" if value else "off"  # YAML 1.1 reads a bare `on` as true
    if kind in (int, float) and isinstance(value, bool):
        return str(value)  # pydantic would take true as 1
    if kind is Path and isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        return Path(os.path.abspath(os.path.expanduser(text))) if text else value
    return value


def _spelled(field: str, origin: Origin) -> str:
    if origin == "environment":
        return ENV_PREFIX + field.upper()
    return flag_of(field) if origin == "flag" else f"{flag_of(field)} (from the {origin} value `{field}`)"


def _allowed(field: str) -> str:
    """Returns what a field takes, in words."""
    info = Plan.model_fields[field]
    if words := typing.cast(dict[str, Any], info.json_schema_extra or {}).get("takes"):
        return str(words)
    kind = _inner(info.annotation)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(str(a) for a in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return "a list, or words separated by commas"
    noun = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}.get(kind, "a text")
    limits = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    bounds = [
        f"{limits[b]} {getattr(m, b)}" for m in info.metadata for b in limits if getattr(m, b, None) is not None
    ]
    return noun + (" " + " and ".join(bounds) if bounds else "")


def _validated(values: dict[str, Any], origins: Mapping[str, Origin]) -> Plan:
    """Builds the plan; every wrong value becomes one sentence of one UsageError."""
    wrong: dict[str, str] = {}
    plan = None

    def told(field: str) -> str:
        seen = excerpt(values[field])
        return f"{_spelled(field, origins.get(field, 'default'))} takes {_allowed(field)}; got {seen}."

    try:
        plan = Plan(**values)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            field = str(item["loc"][0])
            wrong.setdefault(field, told(field))
    for field, value in values.items():
        number = value
        if isinstance(value, str) and _inner(Plan.model_fields[field].annotation) is float:
            with contextlib.suppress(ValueError):
                number = float(value)
        if isinstance(number, float) and not math.isfinite(number):
            wrong[field] = told(field)
    if wrong or plan is None:
        raise UsageError("\n".join(wrong[f] for f in Plan.model_fields if f in wrong))
    if plan.name is not None:
        check_run_name(plan.name)
    return plan


_IMPLIED = {"static_lora": ("native", "lora"), "wrap_full_ft": ("native", "full")}


def _expand(layer: dict[str, Any], origin: Origin) -> None:
    """`--static-lora` and `--wrap-full-ft` say engine and mode too; a contradiction within one source is an error."""
    truth = {name: excerpt(layer.get(name)).strip("'").lower() in ("true", "1", "yes", "on") for name in _IMPLIED}
    if all(truth.values()):
        raise UsageError(
            "--static-lora (LoRA) and --wrap-full-ft (full fine-tuning) exclude each other. Keep one of them."
        )
    for name, (engine, mode) in _IMPLIED.items():
        if not truth[name]:
            continue
        for field, value in (("engine", engine), ("mode", mode)):
            given = layer.get(field, "auto")
            if given not in ("auto", value):
                seen = excerpt(given).strip("'")
                raise UsageError(
                    f"{_spelled(name, origin)} means {flag_of(field)} {value}, "
                    f"but {flag_of(field)} {seen} was given too. Drop one of them."
                )
            layer[field] = value


def _check_implied(plan: Plan) -> None:
    for name, (engine, mode) in _IMPLIED.items():
        if getattr(plan, name):
            for field, value in (("engine", engine), ("mode", mode)):
                seen = getattr(plan, field)
                if seen != value:
                    raise UsageError(
                        f"{flag_of(name)} ({plan.origins[name]}) means {flag_of(field)} {value}, but "
                        f"{flag_of(field)} is {seen} ({plan.origins[field]}). Drop one of them, or pass "
                        f"--no-{name.replace('_', '-')}."
                    )


def _local_model(model: str) -> str:
    """A model (or a head) given as a folder or file becomes absolute: stages do not run in the user's directory."""
    path = Path(os.path.expanduser(model))  # not Path.expanduser: it raises for the ~name of a user that is none
    if model.startswith(("/", "./", "../", "~")) or model in (".", "..") or os.path.exists(path):
        return os.path.abspath(path)
    return model


def resolve(
    flags: Mapping[str, Any], config: Mapping[str, Any], env: Mapping[str, str], saved: Mapping[str, Any]
) -> Plan:
    """Merges what the user said, by precedence, into a validated plan with `origins` filled for every field.

    Args:
        flags: fields given on the command line (`given_flags`).
        config: what `read_config` returned, or {}.
        env: the environment; `SPARKTUNE_<FIELD>` is read, an empty variable counts as not set.
        saved: saved answers, fields -> values.

    Returns:
        The plan, with relative paths (and a model that is a folder) made absolute against the current directory.

    Raises:
        UsageError: one sentence for each wrong value, naming the flag, the value and what is allowed; or a conflict.
    """
    layers: dict[Origin, dict[str, Any]] = {
        "flag": dict(flags), "environment": _from_env(env), "config": dict(config), "saved": dict(saved)
    }
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for origin in SAID:
        layer = {f: _coerced(f, v) for f, v in layers[origin].items() if v is not None and f not in _BOOKKEEPING}
        _expand(layer, origin)
        for field, value in layer.items():
            if field not in values:
                values[field] = value
                origins[field] = origin
    for field in ("model", "mtp_head"):
        if isinstance(values.get(field), str):
            values[field] = _local_model(values[field])
    if isinstance(values.get("validator"), list):
        values["validator"] = _found_files(values["validator"])
    plan = _validated(values, origins)
    for field in _PATHS:
        if field not in values and isinstance(getattr(plan, field), Path):
            setattr(plan, field, Path(os.path.abspath(getattr(plan, field))))
    plan.origins = {f: origins.get(f, "default") for f in Plan.model_fields if f not in _BOOKKEEPING}
    _check_implied(plan)
    _check_places(plan)
    settle_peers(plan)
    refuse_ranks(plan, plan.processes)
    return plan


def settle_peers(plan: Plan) -> None:
    """Gives a plan for several machines its backend: they train in containers, so that all run the same software.

    Raises:
        UsageError: its backend is local.
    """
    if plan.peers and plan.backend == "local":
        raise UsageError(
            f"{flag_of('peers')} ({plan.origins['peers']}) trains in containers, the same image on every machine, but "
            f"{flag_of('backend')} is local ({plan.origins['backend']}). Leave one of them out, or start train.py "
            "under torchrun on all machines: ./run.sh plan --as torchrun."
        )
    if plan.peers:
        plan.backend = "docker"


def _check_places(plan: Plan) -> None:
    """Refuses the root of the file system, which a link can turn out to be: runs would lie beside /usr."""
    for field in ("results", "output"):
        given = getattr(plan, field)
        if os.path.realpath(given) == os.path.abspath(os.sep):
            raise UsageError(
                f"{flag_of(field)} {given} leads to {os.sep}, the root of the file system. Give a folder of its own."
            )


def _found_files(words: list[Any]) -> list[Any]:
    """Makes the words of a command that name files of this folder absolute: a stage works in the run's own folder.

    A program without a slash is looked up on PATH, as a shell would.
    """
    return [os.path.abspath(w) if (i or os.sep in str(w)) and os.path.isfile(w) else w for i, w in enumerate(words)]


def load_plan(path: Path) -> Plan:
    """Reads a plan.yaml that `save_plan` wrote, origins and kernels included.

    Raises:
        UsageError: missing, unreadable, of another schema version, or with unknown or wrong values.
    """
    raw = _read_mapping(path)
    _check_version(path, raw.get("schema_version"))
    unknown = [key for key in raw if key not in Plan.model_fields]
    if unknown:
        raise UsageError(_unknown_keys(path, unknown, {f: f for f in Plan.model_fields}))
    return _validated(raw, dict.fromkeys(raw, "saved"))


def save_plan(plan: Plan, path: Path) -> None:
    """Writes `plan` as YAML with each field's help above it; the file appears by rename, whole or not at all."""
    lines = ["# A sparktune plan. Run it again with: ./run.sh --config THIS_FILE --name NEW_NAME", ""]
    for field, value in plan.model_dump(mode="json").items():
        about = " ".join((Plan.model_fields[field].description or "").split())
        origin = plan.origins.get(field)
        flag = "" if field in _BOOKKEEPING else f" [{flag_of(field)}{', ' + origin if origin else ''}]"
        lines.append(f"# {about}{flag}")
        lines.append(yaml.safe_dump({field: value}, allow_unicode=True, width=10_000, sort_keys=False).rstrip())
        lines.append("")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(lines))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
