"""One update, compiled once: teacher forward, student forward and backward, the loss in chunks, AdamW."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from opsa_jax.config import ObjectiveConfig
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Lora, Params, head_weight
from opsa_jax.objectives.objective import distill_loss, policy_loss, response_logp, token_weights, updates_need_teacher
from opsa_jax.objectives.preference import dpo
from opsa_jax.training.state import Frozen, TrainState, teacher_params, with_adapters
from opsa_jax.training.views import RolloutBatch, by_teacher, select, student_hidden, teacher_hidden


def make_update(
    cfg: DecoderConfig, teacher_cfgs: tuple[DecoderConfig, ...], objective: ObjectiveConfig, optimizer: optax.GradientTransformation, *,
    learning_rate: optax.Schedule, updates: int, micro: int, shards: int, ema_decay: float, shardings: TrainState,
):  # fmt: skip
    """The jitted update `(state, frozen, batch, u) -> (state, metrics)`; state is donated.

    Args:
        learning_rate: the schedule inside the optimizer, for the metrics.
        updates: updates per rollout batch; `u` says which one this is.
        micro: micro-batches per update. Gradients are summed over them with weights normalised over the whole update, so the
            result does not depend on their number.
        shards: parts that rows are split into over devices.
        shardings: of the state, which leaves every update as it came in; otherwise the next call would be another program.

    Returns:
        metrics: name -> (sum, weight) pairs of float32 scalars.
    """

    def loss_fn(trainable: Params | dict[str, Lora], frozen: Frozen, teachers: tuple[Params, ...], rows: RolloutBatch, weights_BR):
        if len(teachers) > 1:
            (rows, weights_BR), _ = by_teacher(rows.route_S, (rows, weights_BR))
        student, train_head = with_adapters(frozen.base, trainable), isinstance(trainable, Params)
        theirs = []
        if updates_need_teacher(objective):
            with jax.named_scope("teacher"):
                hidden = teacher_hidden(teachers, teacher_cfgs, rows, frozen.steer_LD, shards)
                theirs = jax.lax.stop_gradient(list(zip(hidden, map(head_weight, teachers), strict=True)))
        with jax.named_scope("student"):
            ours = student_hidden(student, cfg, rows), head_weight(student)
        with jax.named_scope("loss"):
            return _loss(objective, ours, theirs, rows, weights_BR, frozen.tokens_K, train_head)

    def gradients(state: TrainState, frozen: Frozen, teachers: tuple[Params, ...], rows: RolloutBatch, weights_BR):
        """Loss and metrics as sums, and float32 gradients, of one micro-batch."""
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trainable, frozen, teachers, rows, weights_BR)
        # Without the barrier the TPU compiler fails on bf16 gradients that are cast before they are added (RET_CHECK in
        # while_loop_all_reduce_code_motion).
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), jax.lax.optimization_barrier(grads))
        return loss, metrics, grads

    def update(state: TrainState, frozen: Frozen, batch: RolloutBatch, u: jax.Array):
        rows = select(batch, u, updates, micro)
        one = functools.partial(gradients, state, frozen, teacher_params(state, frozen))
        parts = (rows, _weights(objective, rows))
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

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, shardings.step))  # metrics, like the step, whole on every device


def _weights(objective: ObjectiveConfig, rows: RolloutBatch) -> jax.Array:
    """Token weights [M, b, R], normalised over the whole update."""
    mask_MBR = rows.response_mask_SR
    flat = mask_MBR.reshape(-1, mask_MBR.shape[-1])
    if objective.loss == "dpo":  # pairs weigh the same, however long their responses are
        objective = dataclasses.replace(objective, reduction="sequence_mean")
    if rows.scores is None:
        return token_weights(objective, flat).reshape(mask_MBR.shape)
    keep_B, factors_BR = rows.scores.keep_S.reshape(-1), rows.scores.factors_SR.reshape(flat.shape)
    return token_weights(objective, flat, keep_B, factors_BR).reshape(mask_MBR.shape)


def _loss(objective: ObjectiveConfig, ours, theirs, rows: RolloutBatch, weights_BR, tokens_K, train_head: bool):
    """The loss of a micro-batch, and its metrics as (sum, weight) pairs."""
    ids_BR, mask_BR = rows.response_SR, rows.response_mask_SR.astype(jnp.float32)
    counted_BR = mask_BR * (weights_BR != 0)
    loss, stats, sums = 0.0, {}, {}
    if objective.loss != "divergence":
        counted_BR = mask_BR if objective.loss == "dpo" else counted_BR
        logp_BR, stats["entropy_student"] = response_logp(objective, *ours, counted_BR, ids_BR, train_head=train_head)
        stats["logp_student"] = jax.lax.stop_gradient(logp_BR)
    if objective.loss == "nll":
        loss = -jnp.sum(weights_BR * logp_BR)
    elif objective.loss == "dpo":
        reference_B = (rows.scores.statistics["logp_reference"] * mask_BR).sum(-1)
        loss_P, margin_P = dpo((logp_BR * mask_BR).sum(-1), reference_B, objective.dpo_beta)
        loss = jnp.sum(loss_P * _pair_weights(weights_BR))
        pairs = jnp.float32(loss_P.size)
        sums = {"margin": (margin_P.sum(), pairs), "chosen_wins": ((margin_P > 0).sum().astype(jnp.float32), pairs)}
    elif objective.loss == "policy":
        s = rows.scores
        stats |= {name: x for name, x in s.statistics.items() if name.startswith("kl_")}
        given = s.advantage_SR, s.statistics["logp_student"], s.statistics.get("logp_reference")
        loss, more = policy_loss(objective, logp_BR, weights_BR, *given)
        stats |= more
    if theirs:
        scale = 1.0 if objective.loss == "divergence" else objective.policy.divergence
        part, more = distill_loss(objective, *ours, theirs, weights_BR, ids_BR, tokens_K, rows.route_S, train_head=train_head)
        loss, stats = loss + scale * part, stats | more
    return loss, sums | _metric_sums(stats, counted_BR, rows.harmful_S)


def _pair_weights(weights_BR: jax.Array) -> jax.Array:
    """Weight of each pair [b / 2]: the weights of its two sequences added up."""
    return weights_BR.sum(-1).reshape(-1, 2).sum(-1)


def _metric_sums(stats, counted_BR, harmful_S) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(sum, weight) pairs over the tokens that count; KL also by label."""
    tokens = counted_BR.sum()
    sums = {name: ((values_BR * counted_BR).sum(), tokens) for name, values_BR in stats.items()}
    if "kl_forward" in stats:
        harmful_BR = counted_BR * harmful_S[:, None]
        for label, chosen_BR in (("harmful", harmful_BR), ("benign", counted_BR - harmful_BR)):
            sums[f"kl_forward_{label}"] = ((stats["kl_forward"] * chosen_BR).sum(), chosen_BR.sum())
    return sums
