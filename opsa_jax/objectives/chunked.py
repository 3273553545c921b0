"""Hidden states in, divergence and gradients out: the only place where logits of training exist, a chunk of tokens at a time.

Positions without weight are dropped before the head: the indices of those with weight are brought to the front, and a loop over as
many chunks as they fill gathers their rows. Its trip count is data: one compiled program serves every count, the cost follows the
count, and nothing is dropped silently.

Nothing differentiates through that loop. Each chunk computes its gradients beside its value (four matrix products: two heads, two
gradients), and a `custom_vjp` hands them out and only scales them.

Under a mesh the rows are split over data and fsdp and the vocabulary over tensor, by hand: the head is gathered once before the loop
and its gradient reduced once after it; inside the loop only numbers per token cross the tensor axis.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from opsa_jax.config import ObjectiveConfig
from opsa_jax.objectives.divergence import divergence, forward_kl, reverse_kl, subset_divergence
from opsa_jax.objectives.vocabulary import (
    NOWHERE,
    ROWS,
    VOCAB,
    Vocabulary,
    head_gradient_spec,
    local_vocabulary,
    reduce_gradients,
    rows_with_weight,
)
from opsa_jax.parallel.rules import mesh_shape

STATISTICS = ("divergence", "kl_forward", "kl_reverse", "entropy_student", "entropy_teacher", "logp_student", "logp_teacher")


class _Spec(NamedTuple):
    """What is static."""

    cfg: ObjectiveConfig
    vocabulary: int
    """Columns of the heads that are tokens; the rest is padding."""
    train_head: bool


def _value_and_slope(cfg: ObjectiveConfig, vocab: Vocabulary, logp_s_CV, logp_t_CV, w_C, tokens_K):
    """Divergence [C] and w * dD/dlogp_s [C, V]. The tokens of a support are constants in the derivative."""
    if cfg.support == "full":
        local_C, pull = jax.vjp(lambda logp_s: divergence(cfg, logp_s, logp_t_CV), logp_s_CV)
        return lax.psum(local_C, vocab.axis), pull(w_C)[0]
    if cfg.support == "tokens":
        ids_CK = jnp.broadcast_to(tokens_K, (w_C.shape[0], tokens_K.shape[0]))
    else:
        ids_CK = vocab.top(logp_t_CV if cfg.support == "teacher_topk" else logp_s_CV, min(cfg.k, vocab.size))
    return _on_tokens(cfg, vocab, ids_CK, logp_s_CV, logp_t_CV, w_C)


def _on_tokens(cfg: ObjectiveConfig, vocab: Vocabulary, ids_CK, logp_s_CV, logp_t_CV, w_C):
    """`_value_and_slope` on the tokens ids [C, K]."""
    logp_s_CK, logp_t_CK = vocab.pick(logp_s_CV, ids_CK), vocab.pick(logp_t_CV, ids_CK)
    if cfg.subset != "tail":
        value_C, pull = jax.vjp(lambda s: subset_divergence(cfg, s, logp_t_CK), logp_s_CK)
        return value_C, vocab.place(pull(w_C)[0], ids_CK)
    outside_CV = ~vocab.place(jnp.ones(ids_CK.shape, bool), ids_CK)
    rest_s_C, rest_t_C = (vocab.logsumexp(jnp.where(outside_CV, x, NOWHERE)) for x in (logp_s_CV, logp_t_CV))
    value_C, pull = jax.vjp(lambda s, rest: subset_divergence(cfg, s, logp_t_CK, rest, rest_t_C), logp_s_CK, rest_s_C)
    slope_CK, slope_rest_C = pull(w_C)
    share_CV = jnp.where(outside_CV, jnp.exp(logp_s_CV - rest_s_C[:, None]), 0.0)  # d rest / d logp
    return value_C, vocab.place(slope_CK, ids_CK) + slope_rest_C[:, None] * share_CV


def _chunk(cfg: ObjectiveConfig, vocab: Vocabulary, logits_s_CV, logits_t_CV, w_C, ids_C, tokens_K):
    """Statistics of one chunk, each [C], and the gradient [C, V] of sum(w * D) in the student's logits."""
    logp_s_CV, logp_t_CV = vocab.log_softmax(logits_s_CV / cfg.temperature), vocab.log_softmax(logits_t_CV / cfg.temperature)
    p_s_CV, p_t_CV = jnp.exp(logp_s_CV), jnp.exp(logp_t_CV)
    entropy_t_C = -vocab.sum(p_t_CV * logp_t_CV)
    unsure_C = (entropy_t_C >= cfg.entropy_floor) if cfg.entropy_floor > 0 else jnp.ones_like(w_C)
    value_C, slope_CV = _value_and_slope(cfg, vocab, logp_s_CV, logp_t_CV, w_C * unsure_C, tokens_K)
    gradient_CV = (slope_CV - p_s_CV * vocab.sum(slope_CV)[:, None]) / cfg.temperature
    statistics = {
        "divergence": value_C * unsure_C,
        "kl_forward": lax.psum(forward_kl(logp_s_CV, logp_t_CV), vocab.axis),
        "kl_reverse": lax.psum(reverse_kl(logp_s_CV, logp_t_CV), vocab.axis),
        "entropy_student": -vocab.sum(p_s_CV * logp_s_CV),
        "entropy_teacher": entropy_t_C,
        "logp_student": vocab.pick(logp_s_CV, ids_C[:, None])[:, 0],
        "logp_teacher": vocab.pick(logp_t_CV, ids_C[:, None])[:, 0],
    }
    return statistics, gradient_CV


def _device(spec: _Spec, gradients: bool, shape: dict[str, int], hs_ND, head_s_DV, ht_ND, head_t_DV, w_N, ids_N, tokens_K):
    """The rows and columns of one device -> (loss, statistics [N], (hidden gradient, head gradient) or None where not asked for)."""
    N, (D, width) = w_N.shape[0], head_s_DV.shape
    C = min(spec.cfg.chunk, N)
    vocab = local_vocabulary(shape, width, spec.vocabulary)
    order, chunks = rows_with_weight(w_N, C, shape)

    def step(i, carry):
        statistics, d_hidden, d_head = carry
        at = lax.dynamic_slice(order, (i * C,), (C,))
        hs_CD, ht_CD, w_C, ids_C = (x.at[at].get(mode="fill", fill_value=0) for x in (hs_ND, ht_ND, w_N, ids_N))
        logits_s_CV = jnp.dot(hs_CD, head_s_DV, preferred_element_type=jnp.float32)
        logits_t_CV = jnp.dot(ht_CD, head_t_DV, preferred_element_type=jnp.float32)
        now, gradient_CV = _chunk(spec.cfg, vocab, logits_s_CV, logits_t_CV, w_C, ids_C, tokens_K)
        statistics = {name: statistics[name].at[at].set(now[name], mode="drop") for name in STATISTICS}
        gradient_CV = gradient_CV.astype(hs_ND.dtype)
        if d_hidden is not None:
            d_CD = jnp.dot(gradient_CV, head_s_DV.T, preferred_element_type=jnp.float32)
            d_hidden = d_hidden.at[at].set(d_CD.astype(hs_ND.dtype), mode="drop")
        if d_head is not None:
            d_head += jnp.dot(hs_CD.T, gradient_CV, preferred_element_type=jnp.float32)
        return statistics, d_hidden, d_head

    nothing = (
        dict.fromkeys(STATISTICS, jnp.zeros(N, jnp.float32)),
        jnp.zeros_like(hs_ND) if gradients else None,
        jnp.zeros((D, width), jnp.float32) if gradients and spec.train_head else None,
    )
    statistics, d_hidden, d_head = lax.fori_loop(0, chunks, step, nothing)
    loss = lax.psum(jnp.sum(w_N * statistics["divergence"]), ROWS if shape else ())
    return loss, statistics, reduce_gradients(d_hidden, d_head, shape)


def _run(spec: _Spec, gradients: bool, hs_ND, head_s_DV, ht_ND, head_t_DV, w_N, ids_N, tokens_K):
    """`_device` on one device or on all devices of the mesh."""
    # Cast before they are gathered: half the traffic with bfloat16.
    arrays = (hs_ND, head_s_DV.astype(hs_ND.dtype), ht_ND, head_t_DV.astype(ht_ND.dtype), w_N, ids_N, tokens_K)
    shape = mesh_shape()
    local = functools.partial(_device, spec, gradients, shape)
    if not shape:
        return local(*arrays)
    d_hidden = P(ROWS, None) if gradients else None
    d_head = head_gradient_spec(head_s_DV.shape[0], shape) if gradients and spec.train_head else None
    sharded = jax.shard_map(
        local,
        in_specs=(P(ROWS, None), P(None, VOCAB), P(ROWS, None), P(None, VOCAB), P(ROWS), P(ROWS), P()),
        out_specs=(P(), dict.fromkeys(STATISTICS, P(ROWS)), (d_hidden, d_head)),
        check_vma=False,
    )
    return sharded(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(spec: _Spec, *arrays):
    return _run(spec, False, *arrays)[:2]


def _loss_forward(spec: _Spec, *arrays):
    loss, statistics, (d_hidden, d_head) = _run(spec, True, *arrays)
    if d_head is not None:
        # With a bfloat16 head, TPU's compiler moves this cast before the reduction over devices, past any barrier.
        d_head = d_head.astype(arrays[1].dtype)
    return (loss, statistics), (d_hidden, d_head)


def _loss_backward(spec: _Spec, gradients, cotangents):
    d_hidden, d_head = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
    return d_hidden, d_head, None, None, None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def chunked_divergence(cfg: ObjectiveConfig, hs_ND, head_s_DV, ht_ND, head_t_DV, w_N, ids_N, tokens_K=None, *, train_head: bool):
    """sum_n w_n D_n between the distributions that student and teacher hidden states give; no array has N * V elements.

    Logits are products in the dtype of the hidden states with float32 accumulation; everything after them is float32.

    Args:
        cfg: divergence, support, subset, temperature and chunk (static).
        hs_ND, ht_ND: hidden states of student and teacher at the positions that predict the tokens; their widths may differ.
        head_s_DV, head_t_DV: output heads. Vocabularies padded to different widths are reconciled by their common prefix.
        w_N: float32 weights. Rows of weight 0 cost nothing, and what is in them does not matter.
        ids_N: int32 tokens whose log-probabilities are reported.
        tokens_K: int32, different ids: the support with support=tokens.
        train_head: whether the gradient of the student's head is wanted (static). Without it no [D, V] buffer is made and the
            head's gradient is zero. It is summed in float32 over chunks, and over devices too if the head itself is float32.

    Returns:
        The loss, a float32 scalar, differentiable (once, in reverse mode) in hs_ND and head_s_DV. And `STATISTICS` without a gradient,
        each [N] float32, zero where the weight is zero: the divergence, the full-vocabulary KL both ways, the entropies, and the
        log-probabilities of ids_N, all in nats and at the loss temperature.
    """
    shape = mesh_shape()
    N, V = w_N.shape[0], min(head_s_DV.shape[1], head_t_DV.shape[1])
    more_rows, more_columns = -N % math.prod(shape.get(a, 1) for a in ROWS), -V % shape.get(VOCAB, 1)
    hs_ND, ht_ND, w_N, ids_N = (jnp.pad(x, [(0, more_rows)] + [(0, 0)] * (x.ndim - 1)) for x in (hs_ND, ht_ND, w_N, ids_N))
    head_s_DV, head_t_DV = (jnp.pad(head[:, :V], ((0, 0), (0, more_columns))) for head in (head_s_DV, head_t_DV))
    ht_ND, head_t_DV, w_N = lax.stop_gradient((ht_ND, head_t_DV, w_N))
    loss, statistics = _loss(_Spec(cfg, V, train_head), hs_ND, head_s_DV, ht_ND, head_t_DV, w_N, ids_N, tokens_K)
    return loss, {name: x[:N] for name, x in statistics.items()}
