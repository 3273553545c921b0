"""Log-probabilities of given tokens, differentiable, a chunk of tokens at a time: what every loss on sampled or given tokens is made of.

Policy gradients, negative log-likelihood and DPO are formulas on these [N] numbers, and autodiff takes them from there. The forward
pass keeps no logits; the backward pass makes them once more, chunk by chunk (four matrix products with the head in all).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from opsa_jax.objectives.vocabulary import (
    ROWS,
    VOCAB,
    head_gradient_spec,
    local_vocabulary,
    reduce_gradients,
    rows_with_weight,
)
from opsa_jax.parallel.rules import mesh_shape


class _Spec(NamedTuple):
    """What is static."""

    chunk: int
    temperature: float
    vocabulary: int
    train_head: bool


def _forward_device(spec: _Spec, shape: dict[str, int], h_ND, head_DV, use_N, ids_N):
    N, C = use_N.shape[0], min(spec.chunk, use_N.shape[0])
    vocab = local_vocabulary(shape, head_DV.shape[1], spec.vocabulary)
    order, chunks = rows_with_weight(use_N, C, shape)

    def step(i, carry):
        at = lax.dynamic_slice(order, (i * C,), (C,))
        h_CD, ids_C = (x.at[at].get(mode="fill", fill_value=0) for x in (h_ND, ids_N))
        logp_CV = vocab.log_softmax(jnp.dot(h_CD, head_DV, preferred_element_type=jnp.float32) / spec.temperature)
        now = vocab.pick(logp_CV, ids_C[:, None])[:, 0], -vocab.sum(jnp.exp(logp_CV) * logp_CV)
        return tuple(x.at[at].set(new, mode="drop") for x, new in zip(carry, now, strict=True))

    return lax.fori_loop(0, chunks, step, (jnp.zeros(N, jnp.float32),) * 2)


def _backward_device(spec: _Spec, shape: dict[str, int], h_ND, head_DV, use_N, ids_N, g_N):
    (D, width), C = head_DV.shape, min(spec.chunk, use_N.shape[0])
    vocab = local_vocabulary(shape, width, spec.vocabulary)
    order, chunks = rows_with_weight(use_N, C, shape)

    def step(i, carry):
        d_hidden, d_head = carry
        at = lax.dynamic_slice(order, (i * C,), (C,))
        h_CD, ids_C, g_C = (x.at[at].get(mode="fill", fill_value=0) for x in (h_ND, ids_N, g_N))
        logp_CV = vocab.log_softmax(jnp.dot(h_CD, head_DV, preferred_element_type=jnp.float32) / spec.temperature)
        slope_CV = vocab.place(g_C[:, None], ids_C[:, None]) - g_C[:, None] * jnp.exp(logp_CV)
        gradient_CV = (slope_CV / spec.temperature).astype(h_ND.dtype)
        d_CD = jnp.dot(gradient_CV, head_DV.T, preferred_element_type=jnp.float32)
        d_hidden = d_hidden.at[at].set(d_CD.astype(h_ND.dtype), mode="drop")
        if d_head is not None:
            d_head += jnp.dot(h_CD.T, gradient_CV, preferred_element_type=jnp.float32)
        return d_hidden, d_head

    nothing = jnp.zeros_like(h_ND), jnp.zeros((D, width), jnp.float32) if spec.train_head else None
    return reduce_gradients(*lax.fori_loop(0, chunks, step, nothing), shape)


def _sharded(device, spec: _Spec, out_specs, rows: int, h_ND, head_DV, *per_row):
    """`device` on one device, or on all of the mesh with rows split over data and fsdp and the vocabulary over tensor."""
    shape = mesh_shape()
    local = functools.partial(device, spec, shape)
    arrays = (h_ND, head_DV.astype(h_ND.dtype), *per_row)
    if not shape:
        return local(*arrays)
    in_specs = (P(ROWS, None), P(None, VOCAB), *[P(ROWS)] * rows)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs(shape), check_vma=False)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logp(spec: _Spec, h_ND, head_DV, use_N, ids_N):
    return _sharded(_forward_device, spec, lambda shape: (P(ROWS), P(ROWS)), 2, h_ND, head_DV, use_N, ids_N)


def _logp_forward(spec: _Spec, *arrays):
    return _logp(spec, *arrays), arrays


def _logp_backward(spec: _Spec, arrays, cotangents):
    h_ND, head_DV, use_N, ids_N = arrays

    def out_specs(shape):
        return P(ROWS, None), head_gradient_spec(head_DV.shape[0], shape) if spec.train_head else None

    d_hidden, d_head = _sharded(_backward_device, spec, out_specs, 3, h_ND, head_DV, use_N, ids_N, cotangents[0])
    return d_hidden, jnp.zeros_like(head_DV) if d_head is None else d_head.astype(head_DV.dtype), None, None


_logp.defvjp(_logp_forward, _logp_backward)


def chunked_logp(h_ND, head_DV, use_N, ids_N, *, chunk: int, train_head: bool, temperature: float = 1.0, vocabulary: int = 0):
    """Log-probabilities of tokens from the hidden states that predict them; no array has N * V elements.

    Args:
        h_ND: hidden states.
        head_DV: output head.
        use_N: 0 where a row is not wanted; such rows cost nothing and are 0 in the results.
        ids_N: int32 tokens.
        chunk: tokens whose logits exist at the same time, per device (static).
        train_head: whether the gradient of the head is wanted (static); it is zero otherwise.
        temperature: divides the logits (static).
        vocabulary: columns of the head that are tokens (static); 0 is all.

    Returns:
        logp_N and entropy_N, float32, nats. logp_N is differentiable (once, in reverse mode) in h_ND and head_DV; entropy_N is a
        statistic without a gradient.
    """
    shape = mesh_shape()
    N, V = use_N.shape[0], vocabulary or head_DV.shape[1]
    more_rows, more_columns = -N % math.prod(shape.get(a, 1) for a in ROWS), -V % shape.get(VOCAB, 1)
    h_ND, use_N, ids_N = (jnp.pad(x, [(0, more_rows)] + [(0, 0)] * (x.ndim - 1)) for x in (h_ND, use_N, ids_N))
    head_DV = jnp.pad(head_DV[:, :V], ((0, 0), (0, more_columns)))
    spec = _Spec(chunk, temperature, V, train_head)
    logp_N, entropy_N = _logp(spec, h_ND, head_DV, use_N.astype(jnp.float32), ids_N)
    return logp_N[:N], lax.stop_gradient(entropy_N[:N])
