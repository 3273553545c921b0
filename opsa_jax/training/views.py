"""One rollout batch as student and teachers see it, how it is dealt out to updates, and its hidden states."""

import math

import jax
import jax.numpy as jnp
from flax import struct

from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.parallel.rules import constrain


@struct.dataclass
class Scores:
    """What is known of a rollout batch before its updates; a function of the whole batch (score.py)."""

    keep_S: jax.Array
    """1 for responses that count."""
    factors_SR: jax.Array
    """Factors on the tokens' weights."""
    statistics: dict[str, jax.Array]
    """[S, R] of the student that wrote the responses: logp_student, entropy_student and, where needed, those of teacher and reference."""
    advantage_SR: jax.Array | None = None


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
    route_S: jax.Array
    """Index of the teacher."""
    group_S: jax.Array
    """Number of the prompt in the global rollout batch; responses to one prompt share it."""
    outcome_S: jax.Array
    """Outcome reward, where the advantage uses one."""
    scores: Scores | None = None


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


def parts(batch, count: int):
    """All rows as [count, b, ...], each part spread over all devices; `whole` puts results of that shape back into the rows' order."""

    def split(x):
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(split, batch)


def whole(results):
    """The inverse of `parts` on results [count, b, ...]."""
    return jax.tree.map(lambda x: constrain(x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), "batch", *[None] * (x.ndim - 2)), results)


def by_teacher(route_B: jax.Array, tree):
    """Arrays [B, ...] with rows sorted by teacher, so that `teacher_hidden` finds each teacher's together; and the order that undoes it."""
    order_B = jnp.argsort(route_B, stable=True)
    return jax.tree.map(lambda x: constrain(x[order_B], "batch", *[None] * (x.ndim - 1)), tree), jnp.argsort(order_B, stable=True)


def response_hidden(
    params: Params, cfg: DecoderConfig, prompt_BP, mask_BP, response_BR, response_mask_BR, steer_LD: jax.Array | None = None
) -> jax.Array:
    """Final hidden states [B, R, D] at the columns that predict each response token."""
    tokens_BT = jnp.concatenate([prompt_BP, response_BR], axis=1)[:, :-1]
    positions_BT, segments_BT = prompt_inputs(jnp.concatenate([mask_BP, response_mask_BR], axis=1)[:, :-1])
    first = prompt_BP.shape[1] - 1
    return forward(params, cfg, tokens_BT, positions_BT, segments_BT, steer_LD=steer_LD).hidden_BTD[:, first:]


def student_hidden(params: Params, cfg: DecoderConfig, rows: RolloutBatch) -> jax.Array:
    return response_hidden(params, cfg, rows.student_prompt_SP, rows.student_mask_SP, rows.response_SR, rows.response_mask_SR)


def teacher_hidden(teachers: tuple[Params, ...], cfgs: tuple[DecoderConfig, ...], rows: RolloutBatch, steer_LD, shards: int) -> list:
    """Final hidden states [B, R, D] of each teacher.

    With several, rows come sorted by teacher (`by_teacher`) and go through in groups: a teacher runs on the groups that hold rows of
    its own and is skipped for the others, so all of them together cost one forward pass and at most a group more per teacher.
    A response's states are right in its own teacher's array only.

    Args:
        shards: parts that the batch is split into over devices.
    """

    def run(k, part):
        args = part.teacher_prompt_SQ, part.teacher_mask_SQ, part.response_SR, part.response_mask_SR
        return response_hidden(teachers[k], cfgs[k], *args, steer_LD)

    if len(teachers) == 1:
        return [run(0, rows)]
    B = rows.route_S.shape[0]
    groups = max(g for g in range(1, 9) if B % (g * shards) == 0)
    # Contiguous groups of the sorted rows (unlike `parts`, which deals rows out).
    grouped = jax.tree.map(lambda x: constrain(x.reshape(groups, B // groups, *x.shape[1:]), None, "batch", *[None] * (x.ndim - 1)), rows)

    def of_teacher(k):
        def one(part):
            shape = jax.eval_shape(lambda p: run(k, p), part)
            return jax.lax.cond(jnp.any(part.route_S == k), lambda p: run(k, p), lambda p: jnp.zeros(shape.shape, shape.dtype), part)

        hidden = jax.lax.map(one, grouped)
        return hidden.reshape(math.prod(hidden.shape[:2]), *hidden.shape[2:])

    return [of_teacher(k) for k in range(len(teachers))]
