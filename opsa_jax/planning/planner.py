"""One plan: a run on a topology, its programs compiled, what they hold, cost and exchange."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from opsa_jax.config import RunConfig
from opsa_jax.errors import UserError, did_you_mean
from opsa_jax.models import hf
from opsa_jax.models.config import DecoderConfig
from opsa_jax.objectives.objective import needs_teacher
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.parallel.topology import Topology
from opsa_jax.planning import costs
from opsa_jax.planning.presets import PRESETS, preset
from opsa_jax.planning.programs import Program, Shapes, abstract, compile_program, resident
from opsa_jax.training.setup import check_batches, micro_batches
from opsa_jax.training.supervision import teacher_paths


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it has a machine. Bytes are per device."""

    shapes: Shapes
    topology: Topology
    mesh: dict[str, int]
    programs: dict[str, Program]
    resident: dict[str, int]
    """What lies on a device throughout: parameters, optimizer, teacher, reference, batch."""
    cache: int
    """Keys and values of the rollout, at their largest."""
    peaks: dict[str, int]
    """Largest use while a program runs: what the compiler says, and what lies there that the program is not given."""
    limit: int | None
    costs: dict[str, costs.Cost]
    rooflines: dict[str, costs.Roofline]

    @property
    def fits(self) -> bool:
        return all(p.fits for p in self.programs.values()) and (self.limit is None or self.peak <= self.limit)

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def step_seconds(self) -> float | None:
        """Least seconds of an update, with its share of the rollout and of scoring."""
        parts = {name: r.seconds for name, r in self.rooflines.items()}
        if any(seconds is None for seconds in parts.values()):
            return None
        return sum(seconds / (1 if name == "update" else self.shapes.updates) for name, seconds in parts.items())

    @property
    def serial_seconds(self) -> float:
        """The same if compute, memory traffic and interconnect did not overlap; 0 where nothing is known. For ranking."""
        return sum(r.serial / (1 if name == "update" else self.shapes.updates) for name, r in self.rooflines.items())

    def temporary(self, name: str) -> int:
        """Activations, gradients, gathered weights and (in the rollout) the decoder's copy of the weights."""
        cache = self.cache if name == "rollout" else 0
        return max(self.peaks[name] - sum(self.resident.values()) - cache, 0)

    def to_json(self) -> dict[str, Any]:
        config = self.shapes.config
        found = {name: by_kind(p) for name, p in self.programs.items()}
        return {
            "topology": self.topology.name,
            "devices": len(self.topology.devices),
            "mesh": self.mesh,
            "model": config.model.path,
            "parameters": self.shapes.cfg.n_params,
            "fits": self.fits,
            "hbm_peak_bytes": self.peak,
            "hbm_limit_bytes": self.limit,
            "compile_seconds": round(sum(p.compile_seconds for p in self.programs.values()), 1),
            "collectives": found,
            "flops": {name: cost.flops for name, cost in self.costs.items()},
            "flops_per_token": {name: cost.flops / cost.tokens for name, cost in self.costs.items()},
            "hbm_bytes_per_token": {name: cost.bytes * len(self.topology.devices) / cost.tokens for name, cost in self.costs.items()},
            "memory": {"resident": self.resident, "cache": self.cache, "temporary": {n: self.temporary(n) for n in self.programs}},
            "programs": {
                name: {"fits": p.fits, "peak_bytes": self.peaks[name], "compile_seconds": round(p.compile_seconds, 1), "code_bytes": p.code}
                for name, p in self.programs.items()
            },
            "roofline": {n: {**dataclasses.asdict(r), "seconds": r.seconds, "bound": r.bound} for n, r in self.rooflines.items()},
            "step_seconds_at_least": self.step_seconds,
        }


def by_kind(program: Program) -> dict[str, dict[str, float]]:
    """Collectives of a program by kind: operations in the text, executions, bytes of their arrays, and bytes that leave a device."""
    empty = {"operations": 0, "runs": 0, "bytes": 0, "sent_bytes": 0.0, "largest_bytes": 0}
    found: dict[str, dict[str, float]] = defaultdict(lambda: dict(empty))
    for c in program.collectives:
        row = found[c.kind]
        row["operations"] += 1
        row["runs"] += c.runs
        row["bytes"] += c.bytes * c.runs
        row["sent_bytes"] += c.wire_bytes * c.runs
        row["largest_bytes"] = max(row["largest_bytes"], c.bytes)
    return dict(sorted(found.items()))


def architecture(path: str, config: RunConfig, platform: str) -> DecoderConfig:
    """A model's architecture with the execution settings of the run: a preset, a hub name that has one, or any `config.json`.

    Raises:
        UserError: no such model.
    """
    model = config.model
    cfg = preset(path)
    if cfg is None and "/" not in path and ":" not in path and not Path(path).is_dir():
        raise UserError(f"--model.path {path}: neither a preset, a folder with config.json, nor a hub name{did_you_mean(path, PRESETS)}")
    cfg = cfg or hf.load_config(path, model.revision)[0]
    compute = model.compute_dtype
    if compute == "auto":
        compute = "float32" if platform == "cpu" else "bfloat16"
    return dataclasses.replace(cfg, compute_dtype=compute, remat=model.remat, scan_unroll=model.scan_unroll, attention=model.attention)


def shapes_of(config: RunConfig, platform: str) -> Shapes:
    """What a run is made of.

    Raises:
        UserError: a model that cannot be found, or prompts without a room.
    """
    data = config.data
    taught = needs_teacher(config.objective) or config.rollout.writer == "teacher"
    for name, room in (("max-prompt-tokens", data.max_prompt_tokens), ("max-teacher-prompt-tokens", data.max_teacher_prompt_tokens)):
        if room < 1 and (taught or name == "max-prompt-tokens"):
            raise UserError(f"--data.{name} {room}: a plan reads no data; give the tokens of the longest prompt, such as 1024")
    cfg = architecture(config.model.path, config, platform)
    teachers = tuple(architecture(path, config, platform) for path in teacher_paths(config))
    return Shapes(config, cfg, teachers, data.max_prompt_tokens, data.max_teacher_prompt_tokens or data.max_prompt_tokens)


def check_shapes(shapes: Shapes, mesh: Mesh) -> None:
    """Everything that must divide over the mesh does.

    Raises:
        UserError: naming what does not.
    """
    check_batches(mesh, (shapes.cfg, *shapes.teacher_cfgs), shapes.config)


def make_plan(
    config: RunConfig, topology: Topology, only: tuple[str, ...] = (), say: Callable[[str], None] = lambda line: None, *,
    keep_text: bool = False,
) -> Plan:  # fmt: skip
    """Compile a run's programs for a topology. `say` gets a line before and after each.

    Args:
        only: names of programs to compile; empty is all.
        keep_text: keep the compiled text in the programs.

    Raises:
        UserError: a mesh that does not divide, rooms that are missing, a model that cannot be found.
    """
    shapes = shapes_of(config, topology.platform)
    mesh = make_mesh(config.mesh, topology.devices)
    check_shapes(shapes, mesh)
    sizes = dict(mesh.shape)
    arrays, programs = abstract(shapes, mesh)
    there = resident(arrays)
    compiled: dict[str, Program] = {}
    for name, (program, args) in programs.items():
        if only and name not in only:
            continue
        say(f"compiling {name} for {topology.name}, mesh {','.join(map(str, sizes.values()))} ...")
        compiled[name] = compile_program(name, program, args, mesh, chunks(shapes, sizes), keep_text)
        say(f"compiled  {name} in {compiled[name].compile_seconds:.0f} s")
    # A program is told only of the arrays it uses; the others lie there all the same.
    total = sum(there.values())
    peaks = {name: p.peak + max(total - p.arguments, 0) * p.fits for name, p in compiled.items()}
    limit = next((p.limit for p in compiled.values() if p.limit), None) or topology.chip.hbm_bytes
    cost = {
        "rollout": costs.rollout_cost(shapes, sizes),
        "score": costs.score_cost(shapes, sizes),
        "update": costs.update_cost(shapes, sizes, there["parameters"] + there["optimizer"]),
    }
    cost = {name: c for name, c in cost.items() if c is not None and name in compiled}
    sent = {name: costs.sent_bytes(compiled[name].collectives) if compiled[name].fits else None for name in cost}
    roofs = {name: costs.roofline(c, topology.chip, len(topology.devices), sent[name]) for name, c in cost.items()}
    cache = int(costs.cache_bytes(shapes, sizes, costs.writer_prompt(shapes) + shapes.room)) if "rollout" in programs else 0
    return Plan(shapes, topology, sizes, compiled, there, cache, peaks, limit, cost, roofs)


def chunks(shapes: Shapes, mesh: dict[str, int]) -> int:
    """Chunks of the loss per micro-batch, if all responses fill their room."""
    rows = shapes.config.train.update_batch // micro_batches(shapes.config) / (mesh["data"] * mesh["fsdp"])
    return max(1, math.ceil(rows * shapes.room / shapes.config.objective.chunk))
