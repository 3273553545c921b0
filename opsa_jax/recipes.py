"""From a recipe file and flags to one validated `RunConfig`, and back to JSON."""

import dataclasses
import hashlib
import importlib.util
import json
import re
import shlex
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opsa_jax.cli import parse
from opsa_jax.config import RunConfig
from opsa_jax.errors import UserError, did_you_mean

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def load_recipe(path: str) -> RunConfig:
    """Run `get_config()` of a recipe file.

    Raises:
        UserError: no such file, no `get_config`, an unknown field (with the nearest), or a result that is not a `RunConfig`.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no recipe file {path!r}{_nearest_recipe(file)}")
    spec = importlib.util.spec_from_file_location("recipe", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except TypeError as e:
        found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(e))
        if not found:
            raise
        known = _fields_of(found.group(1))
        raise UserError(f"recipe {path}: {found.group(1)} has no field {found.group(2)!r}{did_you_mean(found.group(2), known)}") from None
    except (SyntaxError, ImportError, AttributeError, NameError) as e:
        raise UserError(f"recipe {path}: {type(e).__name__}: {e}; a recipe is a Python file with get_config() -> RunConfig") from None
    if not isinstance(config, RunConfig):
        raise UserError(f"recipe {path}: get_config() must return a RunConfig, got {type(config).__name__}")
    return config


def _nearest_recipe(file: Path) -> str:
    folder = file.parent if file.parent != Path(".") and file.parent.is_dir() else Path("configs")
    return did_you_mean(str(file), [str(p) for p in folder.glob("**/*.py")] or ["a file of configs/"])


def _fields_of(class_name: str) -> list[str]:
    import opsa_jax.config as module

    kind = getattr(module, class_name, None)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def take_recipe(argv: list[str]) -> RunConfig:
    """The recipe that a command line begins with, taken off it; the defaults where it begins with a flag."""
    return load_recipe(argv.pop(0)) if argv and not argv[0].startswith("-") else RunConfig()


def parse_run(argv: list[str], prog: str, description: str) -> tuple[RunConfig, bool]:
    """`[recipe.py] [--section.field value ...] [--print-config]` -> (validated config, whether to only print it)."""
    argv = list(argv)
    only_print = "--print-config" in argv
    argv = [a for a in argv if a != "--print-config"]
    config = parse(RunConfig, take_recipe(argv), argv, prog, description)
    validate(config)
    return config, only_print


def validate(config: RunConfig) -> None:
    """Everything that can be known wrong before anything is loaded.

    Raises:
        UserError: naming the field, its value and what is allowed.
    """

    def check(ok: bool, name: str, value: Any, allowed: str) -> None:
        if not ok:
            raise UserError(f"--{name} {value}: {allowed}")

    c, t, o, r = config, config.train, config.objective, config.rollout
    for name, value in {
        "train.prompts-per-rollout": t.prompts_per_rollout,
        "train.update-batch": t.update_batch,
        "rollout.max-new-tokens": r.max_new_tokens,
        "rollout.samples-per-prompt": r.samples_per_prompt,
        "objective.k": o.k,
        "objective.chunk": o.chunk,
        "evals.batch": c.evals.batch,
        "train.keep": t.keep,
        "model.scan-unroll": c.model.scan_unroll,
    }.items():
        check(value >= 1, name, value, "must be at least 1")
    for name, value in {"objective.mix": o.mix, "objective.beta": o.beta, "rollout.top-p": r.top_p, "rollout.min-p": r.min_p}.items():
        check(0 <= value <= 1, name, value, "must be between 0 and 1")
    check(r.top_p > 0, "rollout.top-p", r.top_p, "must be above 0")
    check(o.divergence != "jsd" or 0 < o.beta < 1, "objective.beta", o.beta, "must be strictly between 0 and 1 for jsd")
    check(o.temperature > 0, "objective.temperature", o.temperature, "must be above 0")
    check(r.temperature >= 0, "rollout.temperature", r.temperature, "must be 0 (greedy) or above")
    check(r.top_k >= 0, "rollout.top-k", r.top_k, "must be 0 (off) or above")
    check(t.steps >= 0 and (t.steps or t.epochs > 0), "train.steps", t.steps, "must be positive, or 0 with a positive --train.epochs")
    check(c.optim.lr >= 0, "optim.lr", c.optim.lr, "must be 0 or above")
    check(c.optim.warmup >= 0, "optim.warmup", c.optim.warmup, "must be 0 or above")
    check(c.seed >= 0, "seed", c.seed, "must be 0 or above")
    sequences = t.prompts_per_rollout * r.samples_per_prompt
    whole = "must divide the sequences of a rollout batch, prompts_per_rollout * samples_per_prompt"
    check(sequences % t.update_batch == 0, "train.update-batch", t.update_batch, f"{whole} = {sequences}")
    micro = t.micro_batch or t.update_batch
    check(micro > 0 and t.update_batch % micro == 0, "train.micro-batch", micro, f"must divide --train.update-batch {t.update_batch}")
    at_a_time = r.micro_batch or sequences
    check(at_a_time > 0 and sequences % at_a_time == 0, "rollout.micro-batch", r.micro_batch, f"{whole} = {sequences}")
    check(c.teacher.weights != "checkpoint" or c.teacher.path, "teacher.weights", "checkpoint", "needs --teacher.path")
    check(0 <= c.teacher.ema_decay <= 1, "teacher.ema-decay", c.teacher.ema_decay, "must be between 0 and 1")
    check(bool(c.data.sources), "data.sources", "()", "at least one source is needed")
    for i, source in enumerate(c.data.sources):
        check(source.label in ("", "harmful", "benign"), f"data.sources.{i}.label", source.label, "must be harmful, benign or empty")
        check(source.weight > 0, f"data.sources.{i}.weight", source.weight, "must be above 0")
        check(source.where.count("=") == 1 or not source.where, f"data.sources.{i}.where", source.where, "must be FIELD=VALUE")
    _validate_method(config, check)
    _validate_processes(config, check)
    v = c.validation
    check(v.every >= 0, "validation.every", v.every, "must be 0 (never) or above")
    check(v.limit >= 1, "validation.limit", v.limit, "must be at least 1")
    check(not v.keep_best or v.every > 0, "validation.keep-best", "", "needs --validation.every")
    unknown = [x for x in c.model.lora.targets if x not in LORA_TARGETS]
    check(not unknown, "model.lora.targets", " ".join(unknown), f"allowed: {' '.join(LORA_TARGETS)}")
    check(c.model.lora.rank >= 0, "model.lora.rank", c.model.lora.rank, "must be 0 (all weights) or above")


def _validate_method(config: RunConfig, check: Callable[[bool, str, Any, str], None]) -> None:
    """What must fit together: loss, writer, teacher, weights."""
    o, r, t, p, w = config.objective, config.rollout, config.teacher, config.objective.policy, config.objective.weights
    check(o.support != "tokens" or o.tokens, "objective.support", "tokens", "needs --objective.tokens FILE (made by opsa steer)")
    check(o.entropy_floor >= 0, "objective.entropy-floor", o.entropy_floor, "must be 0 (off) or above, in nats")
    check(o.dpo_beta > 0, "objective.dpo-beta", o.dpo_beta, "must be above 0")
    for name, value in {"weights.keep": w.keep, "policy.floor-lambda": p.floor_lambda}.items():
        check(0 < value < 1, f"objective.{name}", value, "must be strictly between 0 and 1")
    for name, value in {"filter.quantile": o.filter.quantile, "weights.after": w.after, "weights.decay": w.decay}.items():
        check(0 <= value <= 1, f"objective.{name}", value, "must be between 0 and 1")
    check(w.first >= 1, "objective.weights.first", w.first, "must be at least 1")
    check(p.clip >= 0, "objective.policy.clip", p.clip, "must be 0 (off) or above")
    check(0 < p.gamma <= 1, "objective.policy.gamma", p.gamma, "must be above 0 and at most 1")
    check(0 <= t.constitution_share <= 1, "teacher.constitution-share", t.constitution_share, "must be between 0 and 1")
    names = [route.partition("=")[0] for route in t.routes]
    for route in t.routes:
        check(all(route.partition("=")), "teacher.routes", route, "must be NAME=CHECKPOINT")
    check(len(set(names)) == len(names), "teacher.routes", " ".join(names), "names must differ")
    check(not (names and t.steering), "teacher.steering", t.steering, "one teacher can be steered; leave --teacher.routes out")
    check(not (names and r.writer == "teacher"), "rollout.writer", "teacher", "needs a single teacher; leave --teacher.routes out")
    if o.loss == "policy":
        check(r.writer == "student", "rollout.writer", r.writer, "a policy gradient needs the student's own samples: student")
        if p.advantage in ("return", "token", "outcome"):
            n = r.samples_per_prompt
            why = f"--objective.policy.advantage {p.advantage} normalises over the samples of a prompt; use at least 2"
            check(n >= 2, "rollout.samples-per-prompt", n, why)
    if o.loss == "dpo":
        pairs = "loss=dpo reads pairs from the records: --rollout.writer file --rollout.samples-per-prompt 2"
        check(r.writer == "file", "rollout.writer", r.writer, pairs)
        check(r.samples_per_prompt == 2, "rollout.samples-per-prompt", r.samples_per_prompt, pairs)
        micro = config.train.micro_batch or config.train.update_batch
        check(micro % 2 == 0, "train.micro-batch", micro, "must be even: a pair stays together")
    elif r.writer == "file":
        check(r.samples_per_prompt == 1, "rollout.samples-per-prompt", r.samples_per_prompt, "a record of a file has one response: 1")


def _validate_processes(config: RunConfig, check: Callable[[bool, str, Any, str], None]) -> None:
    d = config.distributed
    given = [bool(d.coordinator), d.processes != 0, d.process_id != -1]
    rule = "--distributed.coordinator HOST:PORT, --distributed.processes N and --distributed.process-id I go together"
    check(all(given) or not any(given), "distributed.process-id", d.process_id, rule)
    if all(given):
        port = d.coordinator.rpartition(":")[2]
        listens = ":" in d.coordinator and port.isdigit() and 0 < int(port) < 65536
        check(listens, "distributed.coordinator", d.coordinator, "must be HOST:PORT")
        check(d.processes >= 1, "distributed.processes", d.processes, "must be at least 1")
        check(0 <= d.process_id < d.processes, "distributed.process-id", d.process_id, f"must be between 0 and {d.processes - 1}")
    check(d.timeout >= 1, "distributed.timeout", d.timeout, "must be at least 1 second")
    check(d.heartbeat >= 5, "distributed.heartbeat", d.heartbeat, "must be at least 5 seconds")
    local = "must be a local folder; checkpoints can go to an object store with --train.checkpoints"
    check("://" not in config.out, "out", config.out, local)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved run as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any], kind: type = RunConfig) -> Any:
    """The inverse of `to_dict`; fields that the file does not have take their defaults.

    Raises:
        UserError: a field that this version does not know.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"saved config: {kind.__name__} has no field {unknown[0]!r}{did_you_mean(unknown[0], known)}")

    def read(hint: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(hint):
            return from_dict(value, hint)
        if typing.get_origin(hint) is tuple:
            return tuple(read(typing.get_args(hint)[0], v) for v in value)
        return value

    return kind(**{name: read(hints[name], value) for name, value in values.items()})


def config_hash(config: RunConfig) -> str:
    """Short hash of what determines the result: everything but the run directory, `resume`, processes and logging."""
    d = {k: v for k, v in to_dict(config).items() if k not in ("out", "resume", "log", "distributed")}
    return hashlib.sha256(json.dumps(d, sort_keys=True).encode()).hexdigest()[:12]


def provenance(config: RunConfig) -> dict[str, Any]:
    """What is saved beside the config: hash, versions and the command line."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("opsa_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "safetensors", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "versions": versions | {"python": sys.version.split()[0]},
        "command": shlex.join(sys.argv),
    }
