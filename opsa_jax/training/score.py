"""Scoring a rollout batch before its updates: which responses and tokens count, how much, and their advantages.

Filters, weights and advantages are functions of the whole rollout batch under the student that wrote it, so they are computed once,
here, and do not depend on micro-batches, updates or devices. Losses that need none of them skip this.
"""

import jax
import jax.numpy as jnp

from opsa_jax.config import ObjectiveConfig
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import head_weight
from opsa_jax.objectives.advantage import advantages
from opsa_jax.objectives.objective import distill_loss, needs_reference, response_logp, scores_need_teacher
from opsa_jax.objectives.weights import kept_responses, token_factors
from opsa_jax.training.state import Frozen, TrainState, student_params, teacher_params
from opsa_jax.training.views import RolloutBatch, Scores, by_teacher, parts, student_hidden, teacher_hidden, whole


def make_score(
    cfg: DecoderConfig, teacher_cfgs: tuple[DecoderConfig, ...], objective: ObjectiveConfig, *,
    passes: int, shards: int, groups: int, total: int,
):  # fmt: skip
    """The jitted `(state, frozen, batch) -> batch with scores`.

    Args:
        passes: forward passes that the batch is cut into (as many as its micro-batches).
        shards: parts that rows are split into over devices.
        groups: prompts in the global rollout batch.
        total: updates of the run, for weights that begin later.
    """

    def statistics(state: TrainState, frozen: Frozen, rows: RolloutBatch) -> dict[str, jax.Array]:
        """[b, R] of one part."""
        undo = None
        if len(teacher_cfgs) > 1:
            rows, undo = by_teacher(rows.route_S, rows)
        student, mask_BR, ids_BR = student_params(state, frozen), rows.response_mask_SR.astype(jnp.float32), rows.response_SR
        hidden_BRD, head_DV = student_hidden(student, cfg, rows), head_weight(student)
        if scores_need_teacher(objective):
            teachers = teacher_params(state, frozen)
            theirs_BRD = teacher_hidden(teachers, teacher_cfgs, rows, frozen.steer_LD, shards)
            theirs = list(zip(theirs_BRD, map(head_weight, teachers), strict=True))
            args = objective, hidden_BRD, head_DV, theirs, mask_BR, ids_BR, frozen.tokens_K, rows.route_S
            found = distill_loss(*args, train_head=False)[1]
        else:
            logp_BR, entropy_BR = response_logp(objective, hidden_BRD, head_DV, mask_BR, ids_BR, train_head=False)
            found = {"logp_student": logp_BR, "entropy_student": entropy_BR}
        if needs_reference(objective):
            reference_BRD = student_hidden(frozen.reference, cfg, rows)
            logp_BR, _ = response_logp(objective, reference_BRD, head_weight(frozen.reference), mask_BR, ids_BR, train_head=False)
            found["logp_reference"] = logp_BR
        return found if undo is None else jax.tree.map(lambda x: x[undo], found)

    def score(state: TrainState, frozen: Frozen, batch: RolloutBatch) -> RolloutBatch:
        found = whole(jax.lax.map(lambda rows: statistics(state, frozen, rows), parts(batch, passes)))
        found = jax.lax.stop_gradient(found)
        mask_SR = batch.response_mask_SR.astype(jnp.float32)
        scores = Scores(
            keep_S=kept_responses(objective.filter, found.get("logp_teacher", mask_SR), mask_SR),
            factors_SR=token_factors(objective.weights, found, mask_SR, state.step / total),
            statistics=found,
        )
        if objective.loss == "policy":
            given = objective.policy, found, mask_SR, batch.group_S, groups, batch.outcome_S
            scores = scores.replace(advantage_SR=advantages(*given))
        return batch.replace(scores=scores)

    return jax.jit(score)
