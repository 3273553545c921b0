"""The loss of an update: divergence x support x weights x reduction.

    loss = sum_i keep_i sum_t w_it D(student, teacher at token t of response i) / normaliser
"""

import jax
import jax.numpy as jnp

from opsa_jax.config import ObjectiveConfig
from opsa_jax.objectives.chunked import chunked_divergence


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
    cfg: ObjectiveConfig, hs_BRD, head_s_DV, ht_BRD, head_t_DV, w_BR, ids_BR, *, train_head: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted divergence of a (micro-)batch of responses; see `chunked_divergence`.

    Args:
        hs_BRD, ht_BRD: hidden states of student and teacher at the columns that predict each response token.
        w_BR: from `token_weights`, over the whole update batch.

    Returns:
        The loss, and statistics [B, R].
    """
    B, R = w_BR.shape
    flat = (x.reshape(B * R, -1) for x in (hs_BRD, ht_BRD))
    hs_ND, ht_ND = flat
    loss, statistics = chunked_divergence(
        cfg, hs_ND, head_s_DV, ht_ND, head_t_DV, w_BR.reshape(-1), ids_BR.reshape(-1), train_head=train_head
    )
    return loss, {name: x.reshape(B, R) for name, x in statistics.items()}
