"""Every array of a run as shape, dtype and sharding: the state, the frozen weights and a rollout batch, with nothing allocated.

It follows `training/setup.py` (`load_weights`, `Run.rollout`); a test holds the two against each other.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opsa_jax.config import RunConfig
from opsa_jax.models import lora
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params, abstract_params, declare, map_weights
from opsa_jax.objectives.objective import needs_reference, needs_teacher
from opsa_jax.parallel.rules import named
from opsa_jax.training import optim
from opsa_jax.training.state import Frozen, TrainState
from opsa_jax.training.views import RolloutBatch

ASSUMED_TOKENS = 100
"""Size of a fixed token set whose file is not here (SafeSteer's)."""


def abstract_run(config: RunConfig, cfg: DecoderConfig, teacher_cfgs: tuple[DecoderConfig, ...], mesh: Mesh, total: int):
    """(state, frozen, optimizer) as `setup.load_weights` gives them.

    Args:
        teacher_cfgs: of teachers with weights of their own; empty where the teacher is made of the student.
        total: updates of the run.
    """
    model, objective = config.model, config.objective
    adapters = model.lora.rank > 0
    params = abstract_params(cfg, cfg.compute_dtype if adapters else model.param_dtype, mesh)
    trainable = params
    if adapters:
        trainable = map_weights(lambda w: _array(mesh, w.shape, "float32", *w.axes), lora.declare_lora(cfg, model.lora))
    supervised = needs_teacher(objective) or config.rollout.writer == "teacher"
    from_student = supervised and not teacher_cfgs and config.teacher.weights == "frozen"
    initial = params if adapters else _frozen_copy(params, cfg)
    loaded = tuple(abstract_params(t, t.compute_dtype, mesh) for t in teacher_cfgs)
    steered = teacher_cfgs[0] if teacher_cfgs else cfg
    frozen = Frozen(
        base=params if adapters else None,
        teachers=loaded if supervised and loaded else ((initial,) if from_student else ()),
        reference=initial if needs_reference(objective) else None,
        steer_LD=_array(mesh, (steered.n_layers, steered.d_model), "float32") if config.teacher.steering else None,
        tokens_K=_array(mesh, (ASSUMED_TOKENS,), "int32") if objective.support == "tokens" else None,
    )
    optimizer = optim.make_optimizer(config.optim, total, optim.decay_mask(trainable, cfg))
    ema = trainable if supervised and not teacher_cfgs and config.teacher.weights == "ema" else None
    state = TrainState(_array(mesh, (), "int32"), trainable, _moments(optimizer, trainable, mesh), ema)
    return state, frozen, optimizer


def abstract_batch(mesh: Mesh, rows: int, prompt: int, teacher_prompt: int, room: int) -> RolloutBatch:
    """A rollout batch before it is scored."""

    def rows_of(width: int | None = None, dtype="int32"):
        return _array(mesh, (rows,) if width is None else (rows, width), dtype, "batch", *[None] * (width is not None))

    return RolloutBatch(
        student_prompt_SP=rows_of(prompt),
        student_mask_SP=rows_of(prompt),
        teacher_prompt_SQ=rows_of(teacher_prompt),
        teacher_mask_SQ=rows_of(teacher_prompt),
        response_SR=rows_of(room),
        response_mask_SR=rows_of(room),
        harmful_S=rows_of(dtype="float32"),
        route_S=rows_of(),
        group_S=rows_of(),
        outcome_S=rows_of(dtype="float32"),
    )


def with_scores(batch: RolloutBatch, score, state: TrainState, frozen: Frozen, mesh: Mesh) -> RolloutBatch:
    """The batch as it leaves `score`."""
    scores = jax.eval_shape(score, state, frozen, batch).scores
    return batch.replace(scores=jax.tree.map(lambda x: _array(mesh, x.shape, x.dtype, "batch", *[None] * (len(x.shape) - 1)), scores))


def scalar(mesh: Mesh, dtype="int32") -> jax.ShapeDtypeStruct:
    return _array(mesh, (), dtype)


def device_bytes(tree) -> int:
    """Bytes of a tree of sharded arrays, abstract or not, on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _array(mesh: Mesh, shape, dtype, *axes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=named(mesh, *axes))


def _frozen_copy(params: Params, cfg: DecoderConfig) -> Params:
    def one(w, x):
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(cfg.compute_dtype) if w.decays else x.dtype, sharding=x.sharding)

    return map_weights(one, declare(cfg), params)


def _moments(optimizer: optax.GradientTransformation, trainable, mesh: Mesh):
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(optimizer.init, trainable)
    shardings = jax.tree.map(lambda x: x.sharding, trainable)
    shardings = optax.tree_map_params(optimizer, lambda _, s: s, shapes, shardings, transform_non_params=lambda _: whole)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
