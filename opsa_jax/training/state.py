"""What a run carries from update to update, and what it never touches."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.lora import attach
from opsa_jax.models.params import Lora, Params, declare, map_weights


@struct.dataclass
class TrainState:
    """Everything the optimizer changes. Donated to every update and saved in every checkpoint."""

    step: jax.Array
    """int32 scalar: updates done."""
    trainable: Params | dict[str, Lora]
    """All weights, or the adapters of a LoRA run."""
    opt_state: Any
    ema: Params | dict[str, Lora] | None = None
    """Moving average of `trainable`, when it is the teacher."""


@struct.dataclass
class Frozen:
    """Weights that no update changes: a separate argument, never donated, never checkpointed (the config identifies them)."""

    base: Params | None = None
    """Weights under the adapters of a LoRA run."""
    teachers: tuple[Params, ...] = ()
    """The teachers, in the order of their routes; empty when the teacher is the moving average, or there is none."""
    reference: Params | None = None
    """The initial student, for losses that compare with it."""
    steer_LD: jax.Array | None = None
    """Added to the teacher's block inputs at every position (SafeSteer)."""
    tokens_K: jax.Array | None = None
    """Fixed token set of the objective (SafeSteer)."""


def with_adapters(base: Params | None, trainable: Params | dict[str, Lora]) -> Params:
    """The full weights of a full or a LoRA run."""
    return trainable if isinstance(trainable, Params) else attach(base, trainable)


def student_params(state: TrainState, frozen: Frozen) -> Params:
    return with_adapters(frozen.base, state.trainable)


def teacher_params(state: TrainState, frozen: Frozen) -> tuple[Params, ...]:
    return frozen.teachers if state.ema is None else (with_adapters(frozen.base, state.ema),)


def frozen_copy(params: Params, cfg: DecoderConfig) -> Params:
    """A copy for a teacher: matrices in the compute dtype, in which the student's are used as well, norm scales and biases as they are.

    So a frozen copy of the student computes bit for bit what the student computes.
    """
    return map_weights(lambda w, x: jnp.array(x, cfg.compute_dtype if w.decays else x.dtype, copy=True), declare(cfg), params)


def init_state(trainable: Params | dict[str, Lora], optimizer: optax.GradientTransformation, mesh: Mesh, ema: bool) -> TrainState:
    """The state before the first update; moments are sharded like the weights they belong to."""
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda x: x.sharding, trainable)
    moments = optax.tree_map_params(
        optimizer, lambda _, s: s, jax.eval_shape(optimizer.init, trainable), shardings, transform_non_params=lambda _: whole
    )
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), whole),
        trainable=trainable,
        opt_state=jax.jit(optimizer.init, out_shardings=moments)(trainable),
        ema=jax.tree.map(lambda x: jnp.array(x, copy=True), trainable) if ema else None,
    )
