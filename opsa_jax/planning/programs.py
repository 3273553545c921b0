"""The programs of a run - rollout, score, update - compiled from abstract arrays, and what the compiler says of them."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jax
from jax.sharding import Mesh

from opsa_jax.config import RunConfig
from opsa_jax.models.config import DecoderConfig
from opsa_jax.objectives.objective import needs_scores
from opsa_jax.parallel.mesh import batch_shards
from opsa_jax.planning.arrays import abstract_batch, abstract_run, device_bytes, scalar, with_scores
from opsa_jax.planning.hlo import Collective, collectives
from opsa_jax.training import optim
from opsa_jax.training.score import make_score
from opsa_jax.training.setup import make_sampler, micro_batches, sequences
from opsa_jax.training.state import Frozen, TrainState
from opsa_jax.training.step import make_update
from opsa_jax.training.views import RolloutBatch

_TOO_LARGE = re.compile(r"total memory required[^(]*\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Shapes:
    """A run to compile: its arrays and their rooms."""

    config: RunConfig
    cfg: DecoderConfig
    teacher_cfgs: tuple[DecoderConfig, ...]
    """Of teachers with weights of their own."""
    prompt: int
    teacher_prompt: int

    @property
    def room(self) -> int:
        return self.config.rollout.max_new_tokens

    @property
    def rows(self) -> int:
        """Sequences of a rollout batch."""
        return sequences(self.config)

    @property
    def updates(self) -> int:
        """Updates per rollout batch."""
        return self.rows // self.config.train.update_batch


@dataclass(frozen=True)
class Arrays:
    """What lies on the devices between programs."""

    state: TrainState
    frozen: Frozen
    batch: RolloutBatch
    """With its scores, where the objective has them."""


@dataclass(frozen=True)
class Program:
    """A compiled program, in bytes per device. `peak` and `limit` come from the compiler."""

    name: str
    fits: bool
    compile_seconds: float
    peak: int
    """Largest use at any time of what the program is given, makes and returns."""
    limit: int | None
    """What the compiler allows; None where it did not say (the program fits)."""
    arguments: int = 0
    code: int = 0
    collectives: list[Collective] = field(default_factory=list)
    text: str = field(default="", repr=False)


def abstract(shapes: Shapes, mesh: Mesh) -> tuple[Arrays, dict[str, tuple[Callable, tuple]]]:
    """The arrays between programs, and the programs with their abstract arguments, in the order of a training step."""
    c, total = shapes.config, shapes.config.train.steps or 1000
    state, frozen, optimizer = abstract_run(c, shapes.cfg, shapes.teacher_cfgs, mesh, total)
    teachers = shapes.teacher_cfgs or (shapes.cfg,)
    batch = abstract_batch(mesh, shapes.rows, shapes.prompt, shapes.teacher_prompt, shapes.room)
    micro, shards = micro_batches(c), batch_shards(mesh)
    programs: dict[str, tuple[Callable, tuple]] = {}
    if c.rollout.writer != "file":
        tokens = SimpleNamespace(stop_ids=(0, 1), pad_id=0)  # which ids they are makes no difference
        prompts = (batch.student_prompt_SP, batch.student_mask_SP)
        if c.rollout.writer == "teacher":
            prompts = (batch.teacher_prompt_SQ, batch.teacher_mask_SQ)
        args = (state, frozen, *prompts, batch.route_S, batch.route_S, scalar(mesh), scalar(mesh, "uint32"))
        programs["rollout"] = make_sampler(c, shapes.cfg, teachers, tokens, mesh), args
    if needs_scores(c.objective):
        score = make_score(
            shapes.cfg, teachers, c.objective, passes=shapes.updates * micro, shards=shards, groups=c.train.prompts_per_rollout, total=total
        )
        programs["score"] = score, (state, frozen, batch)
        with jax.set_mesh(mesh):
            batch = with_scores(batch, score, state, frozen, mesh)
    update = make_update(
        shapes.cfg, teachers, c.objective, optimizer, learning_rate=optim.schedule(c.optim, total), updates=shapes.updates, micro=micro,
        shards=shards, ema_decay=c.teacher.ema_decay, shardings=jax.tree.map(lambda x: x.sharding, state),
    )  # fmt: skip
    programs["update"] = update, (state, frozen, batch, scalar(mesh))
    return Arrays(state, frozen, batch), programs


def compile_program(
    name: str, program: Callable, args: tuple[Any, ...], mesh: Mesh, unknown_trips: int = 1, keep_text: bool = False
) -> Program:
    """Lower and compile. A program that is too large is a result, not an error: the compiler says by how much.

    Args:
        unknown_trips: see `hlo.collectives`.
    """
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = program.lower(*args).compile()
    except jax.errors.JaxRuntimeError as e:
        if not (found := _TOO_LARGE.search(str(e))):
            raise
        need, limit = (int(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
        return Program(name, False, time.perf_counter() - start, need, limit)
    seconds, stats, text = time.perf_counter() - start, compiled.memory_analysis(), compiled.as_text()
    peak = getattr(stats, "peak_memory_in_bytes", 0)
    if not peak or mesh.devices.flat[0].platform == "cpu":  # the CPU's figure leaves temporaries out
        peak = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    return Program(
        name, True, seconds, peak=peak, limit=None,
        arguments=stats.argument_size_in_bytes, code=stats.generated_code_size_in_bytes, collectives=collectives(text, unknown_trips),
        text=text if keep_text else "",
    )  # fmt: skip


def resident(arrays: Arrays) -> dict[str, int]:
    """Bytes per device that lie there throughout, by what they are."""
    state, frozen = arrays.state, arrays.frozen
    teachers, reference = device_bytes(frozen.teachers), device_bytes(frozen.reference)
    if frozen.base is not None:  # adapters: teacher and reference are the base itself
        teachers = 0 if frozen.teachers and frozen.teachers[0] is frozen.base else teachers
        reference = 0 if frozen.reference is frozen.base else reference
    elif frozen.reference is not None and frozen.teachers and frozen.reference is frozen.teachers[0]:
        reference = 0
    return {
        "parameters": device_bytes((state.trainable, frozen.base)),
        "optimizer": device_bytes(state.opt_state),
        "teacher": teachers + device_bytes(state.ema),
        "reference": reference,
        "batch": device_bytes((arrays.batch, frozen.steer_LD, frozen.tokens_K)),
    }
