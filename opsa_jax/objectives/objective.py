"""The loss of an update: divergence x support x weights x filter x reduction, or a loss on the tokens' log-probabilities.

    loss = sum_i keep_i sum_t w_it D(student, teacher at token t of response i) / normaliser
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from opsa_jax.config import ObjectiveConfig
from opsa_jax.objectives.advantage import clipped_surrogate, k3
from opsa_jax.objectives.chunked import chunked_divergence
from opsa_jax.objectives.logp import chunked_logp


def updates_need_teacher(cfg: ObjectiveConfig) -> bool:
    """Whether the update itself compares distributions; otherwise what it needs of the teacher is in the scores."""
    return cfg.loss == "divergence" or (cfg.loss == "policy" and cfg.policy.divergence > 0)


def scores_need_teacher(cfg: ObjectiveConfig) -> bool:
    return cfg.loss == "policy" or cfg.filter.kind != "none" or cfg.weights.kind in ("fire", "tip")


def needs_teacher(cfg: ObjectiveConfig) -> bool:
    return updates_need_teacher(cfg) or scores_need_teacher(cfg)


def needs_reference(cfg: ObjectiveConfig) -> bool:
    """Whether log-probabilities of the initial student are needed."""
    return cfg.loss == "dpo" or (cfg.loss == "policy" and (cfg.policy.reference_kl > 0 or cfg.policy.advantage == "exopd"))


def needs_scores(cfg: ObjectiveConfig) -> bool:
    """Whether a rollout batch is scored before its updates: filters, weights and advantages are functions of the whole batch."""
    return cfg.loss in ("policy", "dpo") or scores_need_teacher(cfg) or cfg.weights.kind != "uniform"


def token_weights(
    cfg: ObjectiveConfig, mask_BR: jax.Array, keep_B: jax.Array | None = None, extra_BR: jax.Array | None = None
) -> jax.Array:
    """Weights [B, R] float32 with which sum(w * D) over the WHOLE update batch is the loss; micro-batches take slices of them.

    token_mean divides by the kept tokens of the batch, so long responses weigh more; sequence_mean gives every kept, non-empty
    response the same weight. For response lengths 1 and 3 the weights are 1/4 each, or 1/2 and 1/6:

    >>> mask = jnp.array([[1, 0, 0], [1, 1, 1]])
    >>> token_weights(ObjectiveConfig(reduction="token_mean"), mask)[:, 0].tolist()
    [0.25, 0.25]
    >>> [round(float(w), 4) for w in token_weights(ObjectiveConfig(reduction="sequence_mean"), mask)[:, 0]]
    [0.5, 0.1667]

    Args:
        mask_BR: 1 on response tokens.
        keep_B: 1 for sequences that count (None: all).
        extra_BR: factors on tokens (None: 1); they do not enter the normaliser.
    """
    kept_BR = mask_BR.astype(jnp.float32) * (1.0 if keep_B is None else keep_B.astype(jnp.float32)[:, None])
    if cfg.reduction == "token_mean":
        w_BR = kept_BR / jnp.maximum(kept_BR.sum(), 1.0)
    else:
        length_B1 = kept_BR.sum(-1, keepdims=True)
        w_BR = kept_BR / jnp.maximum(length_B1, 1.0) / jnp.maximum((length_B1 > 0).sum(), 1)
    return w_BR if extra_BR is None else w_BR * extra_BR


def distill_loss(
    cfg: ObjectiveConfig, hs_BRD, head_s_DV, teachers: Sequence[tuple], w_BR, ids_BR, tokens_K=None, route_B=None, *, train_head: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted divergence of a (micro-)batch of responses; see `chunked_divergence`.

    Args:
        hs_BRD: hidden states of the student at the columns that predict each response token.
        teachers: (hidden states likewise, head) of each teacher.
        w_BR: from `token_weights`, over the whole update batch.
        tokens_K: ids of support=tokens.
        route_B: index of each response's teacher, where there are several; a response costs head products with its own only.

    Returns:
        The loss, and statistics [B, R].
    """
    B, R = w_BR.shape
    loss, statistics = 0.0, None
    for k, (ht_BRD, head_t_DV) in enumerate(teachers):
        w_N = (w_BR if len(teachers) == 1 else w_BR * (route_B == k)[:, None]).reshape(-1)
        flat = (x.reshape(B * R, -1) for x in (hs_BRD, ht_BRD))
        hs_ND, ht_ND = flat
        part, stats = chunked_divergence(cfg, hs_ND, head_s_DV, ht_ND, head_t_DV, w_N, ids_BR.reshape(-1), tokens_K, train_head=train_head)
        # Statistics are 0 where a teacher has no say, so those of all teachers add up.
        loss, statistics = loss + part, stats if statistics is None else jax.tree.map(jnp.add, statistics, stats)
    return loss, {name: x.reshape(B, R) for name, x in statistics.items()}


def response_logp(cfg: ObjectiveConfig, hidden_BRD, head_DV, use_BR, ids_BR, *, train_head: bool) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy [B, R] of the response tokens, 0 where use is 0; see `chunked_logp`."""
    B, R = use_BR.shape
    logp_N, entropy_N = chunked_logp(
        hidden_BRD.reshape(B * R, -1), head_DV, use_BR.reshape(-1), ids_BR.reshape(-1),
        chunk=cfg.chunk, train_head=train_head, temperature=cfg.temperature,
    )  # fmt: skip
    return logp_N.reshape(B, R), entropy_N.reshape(B, R)


def policy_loss(cfg: ObjectiveConfig, logp_BR, w_BR, advantage_BR, logp_old_BR, logp_reference_BR=None) -> tuple[jax.Array, dict]:
    """Weighted clipped surrogate, plus the KL to the reference where it is asked for. Returns the loss and statistics [B, R]."""
    value_BR = clipped_surrogate(logp_BR, logp_old_BR, advantage_BR, cfg.policy.clip)
    ratio_BR = jnp.exp(logp_BR - logp_old_BR)
    statistics = {"advantage": advantage_BR, "clipped": (jnp.abs(ratio_BR - 1) > (cfg.policy.clip or jnp.inf)).astype(jnp.float32)}
    if cfg.policy.reference_kl > 0:
        kl_BR = k3(logp_BR, logp_reference_BR)
        value_BR += cfg.policy.reference_kl * kl_BR
        statistics["kl_reference"] = kl_BR
    return jnp.sum(w_BR * value_BR), jax.lax.stop_gradient(statistics)
