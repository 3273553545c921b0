"""From a validated config to everything a run needs, in an order that finds mistakes before it spends time:

extras and mesh, checkpoint configs, tokenizer and contexts, data, and only then weights.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
from opsa_jax.models.params import Params, axis_sizes
from opsa_jax.objectives.objective import needs_reference, needs_scores, needs_teacher
from opsa_jax.parallel.mesh import batch_shards, check_mesh, local_rows, make_mesh, own_rows, rows_to_devices
from opsa_jax.parallel.rules import named
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.sampler import Rollout, row_keys, sample
from opsa_jax.training import metrics, optim, supervision
from opsa_jax.training.reward import Reward, load_reward
from opsa_jax.training.score import make_score
from opsa_jax.training.state import Frozen, TrainState, frozen_copy, init_state, student_params, teacher_params
from opsa_jax.training.step import make_update
from opsa_jax.training.supervision import Artifacts, Contexts
from opsa_jax.training.views import RolloutBatch, parts, row_order, whole

T = TypeVar("T")


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
    route: Callable[[Record], int]
    """Record -> index of its teacher."""


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
    """The jitted `(state, frozen, prompt_SP, mask_SP, keys_S, sample_index_S, round, seed) -> Rollout`."""
    score: Callable | None
    """The jitted `(state, frozen, batch) -> batch with scores` of score.py, for objectives that need it."""
    reward: Reward | None
    """Outcome reward, for advantages that use one."""
    identity: dict[str, Any]
    """What the frozen parts are."""

    def next_draws(self) -> list[tuple[Example, int]]:
        """The next rollout batch, all of it: each prompt with each sample number, ordered as `views.select` expects."""
        draws = [(e, i) for e in next(self.prompts.stream) for i in range(self.config.rollout.samples_per_prompt)]
        return [draws[i] for i in row_order(len(draws), self.updates_per_rollout, micro_batches(self.config))]

    def own(self, draws: Sequence[T]) -> list[T]:
        """Those whose rows are on this process's devices."""
        return [draws[row] for row in own_rows(self.mesh, len(draws))]

    def rollout(self, state: TrainState, draws: Sequence[tuple[Example, int]], round_number: int) -> tuple[Rollout, RolloutBatch]:
        """Responses to the draws, by whoever writes them, and what updates need of them (launched, not waited for).

        Every process passes all draws and works on its own rows of them.
        """
        groups_S, draws = self.own(_groups(draws)), self.own(draws)
        examples, checked, pad = [e for e, _ in draws], self.prompts.checked, self.chat.pad_id
        prompt_SP, mask_SP = self.put(left_pad([e.prompt_ids for e in examples], checked.prompt_width, pad))
        teacher_SQ, teacher_mask_SQ = self.put(left_pad([e.teacher_ids for e in examples], checked.teacher_width, pad))
        keys_S, index_S, harmful_S, route_S, group_S = self.put((
            np.array([e.key for e in examples], np.int32),
            np.array([i for _, i in draws], np.int32),
            np.array([e.record.label == "harmful" for e in examples], np.float32),
            np.array([self.prompts.route(e.record) for e in examples], np.int32),
            np.array(groups_S, np.int32),
        ))  # fmt: skip
        writer = self.config.rollout.writer
        if writer == "file":
            rollout = self._given(draws, prompt_SP, mask_SP)
        else:
            prompts = (prompt_SP, mask_SP) if writer == "student" else (teacher_SQ, teacher_mask_SQ)
            seed = np.uint32(self.config.seed % 2**32)
            rollout = self.sample(state, self.frozen, *prompts, keys_S, index_S, np.int32(round_number), seed)
        batch = RolloutBatch(
            student_prompt_SP=prompt_SP,
            student_mask_SP=mask_SP,
            teacher_prompt_SQ=teacher_SQ,
            teacher_mask_SQ=teacher_mask_SQ,
            response_SR=rollout.response_ids_BR,
            response_mask_SR=rollout.response_mask_BR,
            harmful_S=harmful_S,
            route_S=route_S,
            group_S=group_S,
            outcome_S=self.put(self._outcomes(examples, rollout)),
        )
        return rollout, batch if self.score is None else self.score(state, self.frozen, batch)

    def texts(self, rollout: Rollout) -> list[str]:
        """This process's responses, decoded (waits for them)."""
        ids_SR, mask_SR = local_rows(rollout.response_ids_BR), local_rows(rollout.response_mask_BR)
        return [self.chat.decode_response(ids[: int(m.sum())]) for ids, m in zip(ids_SR, mask_SR, strict=True)]

    def _outcomes(self, examples: Sequence[Example], rollout: Rollout) -> np.ndarray:
        """Outcome reward of each response; the one place where the loop waits for a rollout, and only for losses that use it."""
        if self.reward is None:
            return np.zeros(len(examples), np.float32)
        return np.array([self.reward(e.record, text) for e, text in zip(examples, self.texts(rollout), strict=True)], np.float32)

    def _given(self, draws: Sequence[tuple[Example, int]], prompt_SP, mask_SP) -> Rollout:
        """The responses of the records (of a pair: sample 0 is the chosen, 1 the rejected one) as a rollout."""
        room, answers = self.config.rollout.max_new_tokens, [e.answers[i] for e, i in draws]
        mask_SR = np.array([[j < len(ids) for j in range(room)] for ids in answers], np.int32)
        ids_SR = np.array([np.pad(ids, (0, room - len(ids)), constant_values=self.chat.pad_id) for ids in answers], np.int32)
        logp_SR = np.zeros(mask_SR.shape, np.float32)
        return Rollout(prompt_SP, mask_SP, *self.put((ids_SR, mask_SR, logp_SR, np.ones(len(draws), bool))))

    def put(self, arrays):
        """Host rows of this process -> global arrays split over the batch axes."""
        return jax.tree.map(lambda x: rows_to_devices(self.mesh, x, sequences(self.config)), arrays)

    def place(self) -> dict[str, Any]:
        """What a checkpoint holds besides the state: where the data is, and what the frozen parts are (they are not stored)."""
        return {"stream": self.prompts.stream.state(), "frozen": self.identity}


def _groups(draws: Sequence[tuple[Example, int]]) -> list[int]:
    """Number of each row's prompt in the rollout batch."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(id(e), len(numbers)) for e, _ in draws]


def sequences(config: RunConfig) -> int:
    """Rows of a rollout batch, over all processes."""
    return config.train.prompts_per_rollout * config.rollout.samples_per_prompt


def rollout_parts(config: RunConfig) -> int:
    """Parts in which a rollout batch is sampled, one after another."""
    return sequences(config) // (config.rollout.micro_batch or sequences(config))


def check_batches(mesh: Mesh, cfgs: Sequence[DecoderConfig], config: RunConfig) -> None:
    """Weights of all models, rows of a pass and rows sampled at a time divide over the mesh.

    Raises:
        UserError: naming what does not.
    """
    sizes = [pair for cfg in cfgs for pair in axis_sizes(cfg)]
    check_mesh(mesh, sizes, config.train.update_batch // micro_batches(config), "--train.micro-batch")
    if config.rollout.micro_batch:
        check_mesh(mesh, sizes, config.rollout.micro_batch, "--rollout.micro-batch")


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
    reward = load_reward(config) if config.objective.policy.advantage == "outcome" and config.objective.loss == "policy" else None
    student = open_checkpoint(config.model, config.model.path)
    others = tuple(open_checkpoint(config.model, path) for path in supervision.teacher_paths(config))
    check_batches(mesh, [c.cfg for c in (student, *others)], config)
    contexts, artifacts = supervision.load_contexts(config), supervision.load_artifacts(config, student.cfg)
    chat = Chat.load(str(student.folder), thinking=config.model.thinking)
    prompts = load_prompts(config, chat, student, others, contexts)
    checked = prompts.checked
    for warning in checked.warnings:
        say(f"warning: {warning}")
    skipped = f", {prompts.bad_records} malformed and {checked.skipped} too long left out" if prompts.bad_records + checked.skipped else ""
    count = sum(map(len, checked.sources))
    say(f"data     {count} prompts{skipped}; up to {checked.prompt_width} tokens, {checked.teacher_width} with context")

    per_rollout = sequences(config) // config.train.update_batch
    total = config.train.steps or prompts.stream.batches(config.train.epochs) * per_rollout
    micro, shards = micro_batches(config), batch_shards(mesh)
    teacher_cfgs = tuple(t.cfg for t in others) or (student.cfg,)
    with jax.set_mesh(mesh):
        state, frozen, optimizer = load_weights(config, student, others, artifacts, mesh, total)
        update = make_update(
            student.cfg, teacher_cfgs, config.objective, optimizer, learning_rate=optim.schedule(config.optim, total),
            updates=per_rollout, micro=micro, shards=shards, ema_decay=config.teacher.ema_decay,
            shardings=jax.tree.map(lambda x: x.sharding, state),
        )  # fmt: skip
        score = make_score(
            student.cfg, teacher_cfgs, config.objective, passes=per_rollout * micro, shards=shards,
            groups=config.train.prompts_per_rollout, total=total,
        )  # fmt: skip
    devices = f"{mesh.size} {jax.devices()[0].platform.upper()} device{'s' * (mesh.size > 1)}"
    size = sum(x.size for x in jax.tree.leaves(state.trainable))
    say(f"model    {config.model.path}: {student.cfg.family}, {student.cfg.n_params:,} weights, {size:,} trained, on {devices}")
    run = Run(
        config=config, mesh=mesh, chat=chat, student=student, prompts=prompts, total_updates=total, updates_per_rollout=per_rollout,
        frozen=frozen, update=update, sample=make_sampler(config, student.cfg, teacher_cfgs, chat, mesh),
        score=score if needs_scores(config.objective) else None, reward=reward, identity=_identity(config, contexts, artifacts),
    )  # fmt: skip
    return run, state


def _identity(config: RunConfig, contexts: Contexts, artifacts: Artifacts) -> dict[str, Any]:
    teacher = config.teacher
    return {
        "student": config.model.path,
        "teacher": teacher.weights if needs_teacher(config.objective) else "none",
        "teacher_paths": list(supervision.teacher_paths(config)),
        "contexts": contexts.identity,
        **artifacts.identity,
    }


def open_checkpoint(model: ModelConfig, path: str) -> Checkpoint:
    """Architecture of a checkpoint with the execution settings of the run; weights are not read."""
    cfg, raw = hf.load_config(path, model.revision)
    compute = model.compute_dtype
    if compute == "auto":
        compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    cfg = dataclasses.replace(cfg, compute_dtype=compute, remat=model.remat, scan_unroll=model.scan_unroll, attention=model.attention)
    return Checkpoint(hf.fetch(path, model.revision), cfg, raw)


def load_prompts(
    config: RunConfig, chat: Chat, student: Checkpoint, teachers: tuple[Checkpoint, ...] = (), contexts: Contexts | None = None
) -> Prompts:
    """Records to checked prompts of student and teacher, and the stream that deals them out.

    A single teacher of another checkpoint reads its own chat template; several (which share the tokenizer) read the student's.
    """
    data, contexts = config.data, contexts or supervision.load_contexts(config)

    def load(path: str) -> Chat:
        return Chat.load(path, thinking=config.model.thinking)

    teacher_chat = load(str(teachers[0].folder)) if len(teachers) == 1 else chat
    if len(teachers) > 1:
        supervision.check_routes(chat, tuple(str(t.folder) for t in teachers), load)
    route, answers = supervision.route_of(config), _answers_of(config)
    encoded, bad = [], 0
    for source in data.sources:
        records, skipped = load_source(source, data.bad_records)
        bad += skipped
        for record in records:
            route(record)
        examples = encode_all(records, chat, contexts.of, config.teacher.placement, teacher_chat, answers)
        encoded.append([e for e in examples if _answers_fit(e, config)])
    vocabulary = min(c.cfg.vocab_size for c in (student, *teachers))
    rooms = (data.max_prompt_tokens, data.max_teacher_prompt_tokens)
    checked = preflight(chat, teacher_chat, encoded, vocabulary, *rooms, data.long_prompts)
    # Every process takes the whole batch (the examples are in memory) and then its rows of it, so that the batch, and which update a
    # row belongs to, are the same for any number of processes.
    weights = [s.weight for s in data.sources]
    stream = Stream(checked.sources, weights, config.train.prompts_per_rollout, config.seed, data.shuffle)
    return Prompts(stream, checked, bad, route)


def _answers_of(config: RunConfig) -> Callable[[Record], tuple[str, ...]]:
    """Record -> the responses given for it: none where they are sampled, a pair for DPO."""

    def answers(record: Record) -> tuple[str, ...]:
        names = ("response", "rejected") if config.objective.loss == "dpo" else ("response",)
        texts = tuple(getattr(record, name) for name in names)
        if not all(text.strip() for text in texts):
            missing = next(name for name, text in zip(names, texts, strict=True) if not text.strip())
            raise UserError(
                f"record {record.id!r} of {record.source}, line {record.line}, has no {missing}; --rollout.writer file trains on given "
                f"responses, so make them first (opsa answers), or name their field with --data.sources.0.{missing}-field"
            )
        return texts

    return answers if config.rollout.writer == "file" else lambda record: ()


def _answers_fit(example: Example, config: RunConfig) -> bool:
    room, longest = config.rollout.max_new_tokens, max(map(len, example.answers), default=0)
    if longest <= room or config.data.long_prompts == "skip":
        return longest <= room
    raise UserError(
        f"a response of record {example.id!r} of {example.record.source} has {longest} tokens, more than --rollout.max-new-tokens {room}; "
        "raise it, or leave such records out with --data.long-prompts skip"
    )


def load_weights(config: RunConfig, student: Checkpoint, teachers: tuple[Checkpoint, ...], artifacts: Artifacts, mesh: Mesh, total: int):
    """Weights onto the mesh -> (state, frozen, optimizer)."""
    model, objective = config.model, config.objective
    adapters = model.lora.rank > 0
    dtype = student.cfg.compute_dtype if adapters else model.param_dtype
    params: Params = hf.load_params(student.folder, student.cfg, dtype, mesh)
    trainable = lora.init_lora(student.cfg, model.lora, jax.random.key(config.seed), mesh) if adapters else params
    supervised = needs_teacher(objective) or config.rollout.writer == "teacher"
    from_student = supervised and not teachers and config.teacher.weights == "frozen"
    initial = None
    if from_student or needs_reference(objective):
        initial = params if adapters else frozen_copy(params, student.cfg)
    loaded = tuple(hf.load_params(t.folder, t.cfg, t.cfg.compute_dtype, mesh) for t in teachers)
    frozen = Frozen(
        base=params if adapters else None,
        teachers=loaded or ((initial,) if from_student else ()),
        reference=initial if needs_reference(objective) else None,
        steer_LD=artifacts.steer_LD,
        tokens_K=artifacts.tokens_K,
    )
    optimizer = optim.make_optimizer(config.optim, total, optim.decay_mask(trainable, student.cfg))
    state = init_state(trainable, optimizer, mesh, ema=supervised and not teachers and config.teacher.weights == "ema")
    return state, frozen, optimizer


def make_sampler(config: RunConfig, cfg: DecoderConfig, teacher_cfgs: tuple[DecoderConfig, ...], chat: Chat, mesh: Mesh) -> Callable:
    """The jitted rollout of the current student, or of the teacher where that writes the responses.

    A response depends on seed, round, example and sample number only. The seed is data, so runs that differ in it share a program.
    """
    sampling, room, count = Sampling.of(config.rollout), config.rollout.max_new_tokens, rollout_parts(config)
    from_teacher = config.rollout.writer == "teacher"

    def rollout(state: TrainState, frozen: Frozen, prompt_SP, mask_SP, ids_S, index_S, round_number, seed):
        keys_S = row_keys(jax.random.key(seed), "rollout", round_number, ids_S, index_S)
        params, arch = (teacher_params(state, frozen)[0], teacher_cfgs[0]) if from_teacher else (student_params(state, frozen), cfg)
        steer_LD = frozen.steer_LD if from_teacher else None

        def some(rows):
            return sample(params, arch, sampling, chat.stop_ids, room, *rows, chat.pad_id, steer_LD)

        rows = prompt_SP, mask_SP, keys_S
        return some(rows) if count == 1 else whole(jax.lax.map(some, parts(rows, count)))

    return jax.jit(rollout, out_shardings=named(mesh, "batch"))
