"""One update: teacher forward, student forward and backward, divergence in chunks, optax. One jitted function, compiled once."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import struct

from opsa_jax.config import ObjectiveConfig
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Lora, Params, head_weight
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.objectives.objective import distill_loss, token_weights
from opsa_jax.parallel.rules import constrain
from opsa_jax.training.state import Frozen, TrainState, teacher_params, with_adapters


@struct.dataclass
class RolloutBatch:
    """S sequences of one rollout, scored by student and teacher. Prompts are left-padded; both views end in the same response ids.

    For response ids `r s` after the prompt `a b`, with the teacher seeing a context `c d` first:

        student   pad a b | r s
        teacher   c d a b | r s      the response starts at one column in each view; token j is predicted by column P - 1 + j
    """

    student_prompt_SP: jax.Array
    student_mask_SP: jax.Array
    teacher_prompt_SQ: jax.Array
    teacher_mask_SQ: jax.Array
    response_SR: jax.Array
    response_mask_SR: jax.Array
    """1 up to and including the stop token."""
    harmful_S: jax.Array
    """1 for prompts labelled harmful, for metrics by label."""


def row_order(sequences: int, updates: int, micro: int) -> list[int]:
    """Where sequence i of the data order is put in a rollout batch, so that `select` gives each update its contiguous share.

    Row b*U*M + u*M + m holds sequence (u, m, b): every device keeps rows of every update and micro-batch, and no update moves rows
    between devices. For 4 sequences, 2 updates, 1 micro-batch: sequences 0, 1 belong to update 0, and the order is

    >>> row_order(4, 2, 1)
    [0, 2, 1, 3]
    """
    b = sequences // (updates * micro)
    return [u * micro * b + m * b + i for i in range(b) for u in range(updates) for m in range(micro)]


def select(batch: RolloutBatch, update: jax.Array, updates: int, micro: int) -> RolloutBatch:
    """The rows of one update as [M, b, ...]: micro-batches first."""

    def pick(x):
        b = x.shape[0] // (updates * micro)
        x = x.reshape(b, updates, micro, *x.shape[1:])
        x = jax.lax.dynamic_index_in_dim(x, update, axis=1, keepdims=False)
        return constrain(x.swapaxes(0, 1), None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(pick, batch)


def response_hidden(params: Params, cfg: DecoderConfig, prompt_BP, mask_BP, response_BR, response_mask_BR) -> jax.Array:
    """Final hidden states [B, R, D] at the columns that predict each response token."""
    tokens_BT = jnp.concatenate([prompt_BP, response_BR], axis=1)[:, :-1]
    positions_BT, segments_BT = prompt_inputs(jnp.concatenate([mask_BP, response_mask_BR], axis=1)[:, :-1])
    first = prompt_BP.shape[1] - 1
    return forward(params, cfg, tokens_BT, positions_BT, segments_BT).hidden_BTD[:, first:]


def make_update(
    cfg: DecoderConfig, teacher_cfg: DecoderConfig, objective: ObjectiveConfig, optimizer: optax.GradientTransformation, *,
    learning_rate: optax.Schedule, updates: int, micro: int, ema_decay: float, shardings: TrainState,
):  # fmt: skip
    """The jitted update `(state, frozen, batch, u) -> (state, metrics)`; state is donated.

    Args:
        learning_rate: the schedule inside the optimizer, for the metrics.
        updates: updates per rollout batch; `u` says which one this is.
        micro: micro-batches per update. Gradients are summed over them with weights normalised over the whole update, so the
            result does not depend on their number.
        shardings: of the state, which leaves every update as it came in; otherwise the next call would be another program.

    Returns:
        metrics: name -> (sum, weight) pairs of float32 scalars.
    """

    def loss_fn(trainable: Params | dict[str, Lora], frozen: Frozen, teacher: Params, rows: RolloutBatch, weights_BR):
        student = with_adapters(frozen.base, trainable)
        shared = (rows.response_SR, rows.response_mask_SR)
        with jax.named_scope("teacher"):
            teacher_BRD = response_hidden(teacher, teacher_cfg, rows.teacher_prompt_SQ, rows.teacher_mask_SQ, *shared)
        with jax.named_scope("student"):
            student_BRD = response_hidden(student, cfg, rows.student_prompt_SP, rows.student_mask_SP, *shared)
        with jax.named_scope("divergence"):
            ours = (student_BRD, head_weight(student))
            theirs = jax.lax.stop_gradient((teacher_BRD, head_weight(teacher)))
            train_head = isinstance(trainable, Params)
            return distill_loss(objective, *ours, *theirs, weights_BR, rows.response_SR, train_head=train_head)

    def gradients(state: TrainState, frozen: Frozen, teacher: Params, rows: RolloutBatch, weights_BR):
        """Loss and metrics as sums, and float32 gradients, of one micro-batch."""
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trainable, frozen, teacher, rows, weights_BR)
        # Without the barrier the TPU compiler fails on bf16 gradients that are cast before they are added (RET_CHECK in
        # while_loop_all_reduce_code_motion).
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), jax.lax.optimization_barrier(grads))
        return loss, _metric_sums(stats, rows), grads

    def update(state: TrainState, frozen: Frozen, batch: RolloutBatch, u: jax.Array):
        teacher = teacher_params(state, frozen)
        rows = select(batch, u, updates, micro)
        mask_MBR = rows.response_mask_SR
        weights_MBR = token_weights(objective, mask_MBR.reshape(-1, mask_MBR.shape[-1])).reshape(mask_MBR.shape)
        one = functools.partial(gradients, state, frozen, teacher)
        parts = (rows, weights_MBR)
        first = jax.tree.map(lambda x: x[0], parts)
        if micro == 1:
            total = one(*first)
        else:
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, *first))
            total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, one(*part)), None), zero, parts)
        loss, metrics, grads = total
        changes, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, changes)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: (ema_decay * e + (1 - ema_decay) * p).astype(e.dtype), ema, trainable)
        unit = jnp.float32(1)
        metrics |= {"loss": (loss, unit), "grad_norm": (optax.global_norm(grads), unit), "lr": (learning_rate(state.step), unit)}
        return TrainState(step=state.step + 1, trainable=trainable, opt_state=opt_state, ema=ema), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def _metric_sums(stats, rows: RolloutBatch) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(sum, weight) pairs over response tokens; KL also by label."""
    mask_BR = rows.response_mask_SR.astype(jnp.float32)
    tokens = mask_BR.sum()
    sums = {name: ((values_BR * mask_BR).sum(), tokens) for name, values_BR in stats.items()}
    harmful_BR = mask_BR * rows.harmful_S[:, None]
    for label, chosen_BR in (("harmful", harmful_BR), ("benign", mask_BR - harmful_BR)):
        sums[f"kl_forward_{label}"] = ((stats["kl_forward"] * chosen_BR).sum(), chosen_BR.sum())
    return sums
