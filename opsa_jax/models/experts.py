"""Mixture-of-experts feed-forward (Qwen3-MoE): every token goes through its k best experts, and none is dropped.

The rows of a batch are sorted by expert, those of an expert fill whole blocks of m rows, and a loop runs over the blocks that are in
use. So FLOPs follow k and not the number of experts, and the largest array has a row for each choice and each empty slot of a block.
(`jax.lax.ragged_dot` is written for this, but off TPUs jax 0.10 copies every row once per expert: BUILD_NOTES.md.) Devices of one
`tensor` group split the width of every expert, as they split a dense feed-forward; tokens stay where they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.layers import project
from opsa_jax.models.params import Layers
from opsa_jax.parallel.rules import mesh_shape, spec


def experts_forward(h_BTD: jax.Array, layer: Layers, cfg: DecoderConfig) -> jax.Array:
    """sum_k weight_k * expert_k(h) of each token [B, T, D], in the dtype of h.

    The router's probabilities are a float32 softmax over all experts; those of the k best are used as they are, or divided by their
    sum (`cfg.normalize_router`).
    """
    probs_BTE = jax.nn.softmax(project(h_BTD, layer.router_LDE, 1).astype(jnp.float32), axis=-1)
    weights_BTk, experts_BTk = jax.lax.top_k(probs_BTE, cfg.experts_per_token)
    if cfg.normalize_router:
        weights_BTk = weights_BTk / jnp.sum(weights_BTk, axis=-1, keepdims=True)
    arrays = (h_BTD, experts_BTk, weights_BTk.astype(h_BTD.dtype), layer.gate_LEDF, layer.up_LEDF, layer.down_LEFD)
    if not mesh_shape():
        return _device(*arrays)
    rows, split = P(*spec("batch"), None, None), *spec("ffn")
    in_specs = (rows, rows, rows, P(None, None, split), P(None, None, split), P(None, split, None))
    local = jax.shard_map(lambda *a: jax.lax.psum(_device(*a), split), in_specs=in_specs, out_specs=rows, check_vma=False)
    return local(*arrays)


def _device(h_BTD, experts_BTk, weights_BTk, *weights):
    """The tokens and the slice of every expert of one device."""
    k, D, n_experts = experts_BTk.shape[-1], h_BTD.shape[-1], weights[0].shape[0]
    blocks = assign(experts_BTk.reshape(-1, k), n_experts, block_rows(experts_BTk.size, n_experts))
    y_SD = _blockwise(h_BTD.reshape(-1, D), *(w.astype(h_BTD.dtype) for w in weights), blocks)
    weights_Nk = weights_BTk.reshape(-1, k)
    out_ND = jnp.einsum("nkd,nk->nd", y_SD[blocks.slot_Nk], weights_Nk, preferred_element_type=jnp.float32)
    return out_ND.astype(h_BTD.dtype).reshape(h_BTD.shape)


class Blocks(NamedTuple):
    """Which rows an expert works on: b blocks of m slots, each block of one expert."""

    row_bm: jax.Array
    """Row in each slot; N, which is no row, in slots that stay empty."""
    expert_b: jax.Array
    """Expert of each block."""
    used: jax.Array
    """Number of blocks that hold a row; they come first."""
    slot_Nk: jax.Array
    """Where the result of each expert of each row is, slots counted through all blocks."""


def block_rows(choices: int, n_experts: int) -> int:
    """Rows of a block: the power of two below an even share of all choices, 8 to 512. Smaller reads weights oftener, larger pads more.

    >>> block_rows(8 * 16_384, 128), block_rows(8 * 1_000, 128), block_rows(8, 128)
    (512, 32, 8)
    """
    share = min(max(choices // n_experts, 8), 512)
    return 1 << share.bit_length() - 1


def assign(experts_Nk: jax.Array, n_experts: int, m: int) -> Blocks:
    """Blocks for the experts that each row has chosen; how many there is room for follows from the shapes.

    Three rows with two of four experts each, in blocks of two: expert 2 fills one block and half of another, expert 1 has none.

    >>> blocks = assign(jnp.array([[2, 0], [3, 2], [2, 0]]), 4, m=2)
    >>> blocks.expert_b[: blocks.used].tolist(), blocks.row_bm[: blocks.used].tolist()
    ([0, 2, 2, 3], [[0, 2], [0, 1], [2, 3], [1, 3]])
    >>> blocks.slot_Nk.tolist()  # row 0: its expert 2 in the first slot of block 1, its expert 0 in the first slot of block 0
    [[2, 0], [6, 3], [4, 1]]
    """
    N, k = experts_Nk.shape
    M = N * k
    room = min(M, (M + n_experts * (m - 1)) // m)
    expert_M = experts_Nk.reshape(M)
    count_E = jnp.bincount(expert_M, length=n_experts)
    blocks_E = (count_E + m - 1) // m
    end_E = jnp.cumsum(blocks_E)  # first block behind each expert's
    order_M = jnp.argsort(expert_M, stable=True)
    sorted_M = expert_M[order_M]
    place_M = jnp.arange(M) - (jnp.cumsum(count_E) - count_E)[sorted_M]  # among the rows of its expert
    slot_M = jnp.zeros(M, jnp.int32).at[order_M].set((end_E - blocks_E)[sorted_M] * m + place_M)
    row_S = jnp.full(room * m, N, jnp.int32).at[slot_M].set(jnp.arange(M, dtype=jnp.int32) // k)
    expert_b = jnp.minimum(jnp.searchsorted(end_E, jnp.arange(room), side="right"), n_experts - 1)
    return Blocks(row_S.reshape(room, m), expert_b, end_E[-1], slot_M.reshape(N, k))


@jax.custom_vjp
def _blockwise(h_ND, gate_EDF, up_EDF, down_EFD, blocks: Blocks):
    """What every expert makes of its rows, [slots, D]; zero in blocks that are not in use."""

    def body(b, y_bmD):
        e = blocks.expert_b[b]
        return y_bmD.at[b].set(_expert(_rows(h_ND, blocks, b), gate_EDF[e], up_EDF[e], down_EFD[e]))

    D = h_ND.shape[1]
    return jax.lax.fori_loop(0, blocks.used, body, jnp.zeros((*blocks.row_bm.shape, D), h_ND.dtype)).reshape(-1, D)


def _expert(x_mD, gate_DF, up_DF, down_FD):
    return (jax.nn.silu(x_mD @ gate_DF) * (x_mD @ up_DF)) @ down_FD


def _rows(h_ND, blocks: Blocks, b):
    return h_ND.at[blocks.row_bm[b]].get(mode="fill", fill_value=0)


def _blockwise_backward(saved, dy_SD):
    """Recomputes each block; gradients of an expert's weights are summed over its blocks in float32."""
    h_ND, weights, blocks = saved
    dy_bmD = dy_SD.reshape(*blocks.row_bm.shape, -1)

    def body(b, carry):
        dx_bmD, grads = carry
        e = blocks.expert_b[b]
        _, pull = jax.vjp(_expert, _rows(h_ND, blocks, b), *(w[e] for w in weights))
        dx_mD, *new = pull(dy_bmD[b])
        return dx_bmD.at[b].set(dx_mD), tuple(g.at[e].add(n.astype(g.dtype)) for g, n in zip(grads, new))

    start = jnp.zeros_like(dy_bmD), tuple(jnp.zeros(w.shape, jnp.float32) for w in weights)
    dx_bmD, grads = jax.lax.fori_loop(0, blocks.used, body, start)
    dx_NkD = dx_bmD.reshape(dy_SD.shape)[blocks.slot_Nk]
    dh_ND = jnp.sum(dx_NkD, axis=1, dtype=jnp.float32).astype(h_ND.dtype)
    return dh_ND, *(g.astype(w.dtype) for g, w in zip(grads, weights)), None


_blockwise.defvjp(lambda h_ND, *rest: (_blockwise(h_ND, *rest), (h_ND, rest[:3], rest[3])), _blockwise_backward)
