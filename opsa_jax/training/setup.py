"""From a validated config to everything a run needs, in an order that finds mistakes before it spends time:

extras and mesh, checkpoint configs, tokenizer and contexts, data, and only then weights.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from opsa_jax.config import ModelConfig, RunConfig
from opsa_jax.data.chat import Chat, Preflight, left_pad, preflight
from opsa_jax.data.loaders import load_source
from opsa_jax.data.pipeline import Example, Stream, encode_all
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.models import hf, lora
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params
from opsa_jax.parallel.mesh import batch_shards, make_mesh
from opsa_jax.parallel.rules import named
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.sampler import Rollout, row_keys, sample
from opsa_jax.teachers.contexts import resolve_context
from opsa_jax.training import metrics, optim
from opsa_jax.training.state import Frozen, TrainState, frozen_copy, init_state, student_params
from opsa_jax.training.step import RolloutBatch, make_update, row_order


@dataclass(frozen=True)
class Checkpoint:
    """A model to read: where it is and what it is."""

    folder: Path
    cfg: DecoderConfig
    raw: dict[str, Any]
    """Its config.json."""


@dataclass(frozen=True)
class Prompts:
    """The data of a run, encoded and checked."""

    stream: Stream
    checked: Preflight
    bad_records: int
    """Malformed records skipped."""
    contexts: dict[str, str]
    """Label -> text that the teacher sees."""


@dataclass(frozen=True)
class Run:
    """A prepared run: what the loop in `loop.py` needs."""

    config: RunConfig
    mesh: Mesh
    chat: Chat
    student: Checkpoint
    prompts: Prompts
    total_updates: int
    updates_per_rollout: int
    frozen: Frozen
    update: Callable
    """The jitted update of step.py."""
    sample: Callable
    """The jitted `(state, frozen, prompt_SP, mask_SP, keys_S, sample_index_S, round) -> Rollout`."""

    def next_draws(self) -> list[tuple[Example, int]]:
        """This process's part of the next rollout batch: each prompt with each sample number, ordered as `step.select` expects."""
        draws = [(e, i) for e in next(self.prompts.stream) for i in range(self.config.rollout.samples_per_prompt)]
        return [draws[i] for i in row_order(len(draws), self.updates_per_rollout, micro_batches(self.config))]

    def rollout(self, state: TrainState, draws: Sequence[tuple[Example, int]], round_number: int) -> tuple[Rollout, RolloutBatch]:
        """Sample responses of the current student to this process's draws (launched, not waited for)."""
        examples, checked, pad = [e for e, _ in draws], self.prompts.checked, self.chat.pad_id
        prompt_SP, mask_SP = self.put(left_pad([e.prompt_ids for e in examples], checked.prompt_width, pad))
        teacher_SQ, teacher_mask_SQ = self.put(left_pad([e.teacher_ids for e in examples], checked.teacher_width, pad))
        keys_S, index_S, harmful_S = self.put((
            np.array([e.key for e in examples], np.int32),
            np.array([i for _, i in draws], np.int32),
            np.array([e.record.label == "harmful" for e in examples], np.float32),
        ))  # fmt: skip
        rollout = self.sample(state, self.frozen, prompt_SP, mask_SP, keys_S, index_S, np.int32(round_number))
        batch = RolloutBatch(
            student_prompt_SP=prompt_SP,
            student_mask_SP=mask_SP,
            teacher_prompt_SQ=teacher_SQ,
            teacher_mask_SQ=teacher_mask_SQ,
            response_SR=rollout.response_ids_BR,
            response_mask_SR=rollout.response_mask_BR,
            harmful_S=harmful_S,
        )
        return rollout, batch

    def put(self, arrays):
        """Host rows of this process -> global arrays split over the batch axes."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(named(self.mesh, "batch", *[None] * (x.ndim - 1)), x), arrays)

    def place(self) -> dict[str, Any]:
        """What a checkpoint holds besides the state: where the data is, and what the frozen parts are (they are not stored)."""
        contexts = {label: hashlib.sha256(text.encode()).hexdigest()[:16] for label, text in self.prompts.contexts.items()}
        teacher = self.config.teacher
        frozen = {"student": self.config.model.path, "teacher": teacher.weights, "teacher_path": teacher.path, "contexts": contexts}
        return {"stream": self.prompts.stream.state(), "frozen": frozen}


def micro_batches(config: RunConfig) -> int:
    """Forward/backward passes per update."""
    return config.train.update_batch // (config.train.micro_batch or config.train.update_batch)


def prepare(config: RunConfig, say: Callable[[str], None] = lambda line: None) -> tuple[Run, TrainState]:
    """Load and check everything. `say` gets a line about each finished part.

    Returns:
        The run, and the state before its first update (which donates it).

    Raises:
        UserError: anything about the input that training could trip over.
    """
    metrics.check_extras(config.log)
    mesh = make_mesh(config.mesh)
    check_batches(config, batch_shards(mesh))
    student = open_checkpoint(config.model, config.model.path)
    teacher = open_checkpoint(config.model, config.teacher.path) if config.teacher.weights == "checkpoint" else student
    chat = Chat.load(str(student.folder), thinking=config.model.thinking)
    prompts = load_prompts(config, chat, student, teacher)
    checked = prompts.checked
    for warning in checked.warnings:
        say(f"warning: {warning}")
    skipped = f", {prompts.bad_records} malformed and {checked.skipped} too long left out" if prompts.bad_records + checked.skipped else ""
    count = sum(map(len, checked.sources))
    say(f"data     {count} prompts{skipped}; up to {checked.prompt_width} tokens, {checked.teacher_width} with context")

    per_rollout = config.train.prompts_per_rollout * config.rollout.samples_per_prompt // config.train.update_batch
    total = config.train.steps or prompts.stream.batches(config.train.epochs) * per_rollout
    with jax.set_mesh(mesh):
        state, frozen, optimizer = load_weights(config, student, teacher, mesh, total)
        update = make_update(
            student.cfg, teacher.cfg, config.objective, optimizer, learning_rate=optim.schedule(config.optim, total),
            updates=per_rollout, micro=micro_batches(config), ema_decay=config.teacher.ema_decay,
            shardings=jax.tree.map(lambda x: x.sharding, state),
        )  # fmt: skip
    devices = f"{mesh.size} {jax.devices()[0].platform.upper()} device{'s' * (mesh.size > 1)}"
    size = sum(x.size for x in jax.tree.leaves(state.trainable))
    say(f"model    {config.model.path}: {student.cfg.family}, {student.cfg.n_params:,} weights, {size:,} trained, on {devices}")
    run = Run(
        config=config, mesh=mesh, chat=chat, student=student, prompts=prompts, total_updates=total, updates_per_rollout=per_rollout,
        frozen=frozen, update=update, sample=make_sampler(config, student.cfg, chat),
    )  # fmt: skip
    return run, state


def check_batches(config: RunConfig, shards: int) -> None:
    """Every micro-batch is split over the data and fsdp axes.

    Raises:
        UserError: a micro-batch that does not divide, with the nearest that does.
    """
    micro = config.train.micro_batch or config.train.update_batch
    if micro % shards:
        nearest = max(micro // shards, 1) * shards
        raise UserError(f"--train.micro-batch {micro} does not divide over {shards} shards (data * fsdp); nearest that does: {nearest}")


def open_checkpoint(model: ModelConfig, path: str) -> Checkpoint:
    """Architecture of a checkpoint with the execution settings of the run; weights are not read."""
    cfg, raw = hf.load_config(path, model.revision)
    compute = model.compute_dtype
    if compute == "auto":
        compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    cfg = dataclasses.replace(cfg, compute_dtype=compute, remat=model.remat, scan_unroll=model.scan_unroll)
    return Checkpoint(hf.fetch(path, model.revision), cfg, raw)


def load_prompts(config: RunConfig, chat: Chat, student: Checkpoint, teacher: Checkpoint) -> Prompts:
    """Records to checked prompts of student and teacher, and the stream that deals them out."""
    contexts = {"harmful": resolve_context(config.teacher.context_harmful), "benign": resolve_context(config.teacher.context_benign)}
    teacher_chat = chat if teacher is student else Chat.load(str(teacher.folder), thinking=config.model.thinking)
    def context(record: Record) -> str:
        return contexts[record.label]

    encoded, bad = [], 0
    for source in config.data.sources:
        records, skipped = load_source(source, config.data.bad_records)
        bad += skipped
        encoded.append(encode_all(records, chat, context, config.teacher.placement, teacher_chat))
    vocabulary = min(student.cfg.vocab_size, teacher.cfg.vocab_size)
    data = config.data
    rooms = (data.max_prompt_tokens, data.max_teacher_prompt_tokens)
    checked = preflight(chat, teacher_chat, encoded, vocabulary, *rooms, data.long_prompts)
    stream = Stream(
        checked.sources, [s.weight for s in data.sources], config.train.prompts_per_rollout, config.seed, data.shuffle,
        jax.process_index(), jax.process_count(),
    )  # fmt: skip
    return Prompts(stream, checked, bad, contexts)


def load_weights(config: RunConfig, student: Checkpoint, teacher: Checkpoint, mesh: Mesh, total: int):
    """Weights onto the mesh -> (state, frozen, optimizer)."""
    model = config.model
    adapters = model.lora.rank > 0
    dtype = student.cfg.compute_dtype if adapters else model.param_dtype
    params: Params = hf.load_params(student.folder, student.cfg, dtype, mesh)
    trainable = lora.init_lora(student.cfg, model.lora, jax.random.key(config.seed), mesh) if adapters else params
    weights = config.teacher.weights
    if weights == "checkpoint":
        frozen_teacher = hf.load_params(teacher.folder, teacher.cfg, teacher.cfg.compute_dtype, mesh)
    elif weights == "frozen":
        frozen_teacher = params if adapters else frozen_copy(params, student.cfg)
    else:
        frozen_teacher = None
    optimizer = optim.make_optimizer(config.optim, total, optim.decay_mask(trainable, student.cfg))
    state = init_state(trainable, optimizer, mesh, ema=weights == "ema")
    return state, Frozen(base=params if adapters else None, teacher=frozen_teacher), optimizer


def make_sampler(config: RunConfig, cfg: DecoderConfig, chat: Chat) -> Callable:
    """The jitted rollout of the current student; a response depends on seed, round, example and sample number only."""
    sampling, room, seed = Sampling.of(config.rollout), config.rollout.max_new_tokens, config.seed

    def rollout(state: TrainState, frozen: Frozen, prompt_SP, mask_SP, ids_S, index_S, round_number):
        keys_S = row_keys(jax.random.key(seed), "rollout", round_number, ids_S, index_S)
        return sample(student_params(state, frozen), cfg, sampling, chat.stop_ids, room, prompt_SP, mask_SP, keys_S, pad_id=chat.pad_id)

    return jax.jit(rollout)
