"""What every chunked loss shares: the vocabulary as one device sees it, the rows with weight, and how gradients of the head are reduced."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

ROWS, VOCAB = ("data", "fsdp"), "tensor"
NOWHERE = -1e30  # log-probability of what is not there: finite, so that 0 * logp is 0


class Vocabulary(NamedTuple):
    """The vocabulary as one device sees it: columns [offset, offset + width) of `size` tokens. Ids are global."""

    axis: tuple[str, ...]
    """Mesh axis it is split over, or nothing."""
    offset: jax.Array | int
    width: int
    size: int

    def sum(self, x_CV):
        return lax.psum(x_CV.sum(-1), self.axis)

    def logsumexp(self, x_CV):
        top_C = lax.pmax(x_CV.max(-1), self.axis)
        return top_C + jnp.log(self.sum(jnp.exp(x_CV - top_C[:, None])))

    def log_softmax(self, logits_CV):
        is_token_V = self.offset + jnp.arange(self.width) < self.size
        logits_CV = jnp.where(is_token_V[None], logits_CV, NOWHERE)
        return logits_CV - self.logsumexp(logits_CV)[:, None]

    def top(self, x_CV, k: int):
        """Ids [C, k] of the k largest; of equals, the smaller id first."""
        value_CK, id_CK = lax.top_k(x_CV, min(k, self.width))
        id_CK = id_CK + self.offset
        if self.axis:
            value_CK, id_CK = (lax.all_gather(a, self.axis, axis=1, tiled=True) for a in (value_CK, id_CK))
            id_CK = jnp.take_along_axis(id_CK, lax.top_k(value_CK, k)[1], axis=-1)
        return id_CK

    def pick(self, x_CV, ids_CK):
        """x [C, K] at ids, from the device that has them."""
        column_CK = self._columns(ids_CK)
        mine_CK = jnp.take_along_axis(x_CV, column_CK, axis=-1, mode="fill", fill_value=0.0)
        return lax.psum(mine_CK, self.axis)

    def place(self, x_CK, ids_CK):
        """The transpose of `pick`: zeros [C, width] with x at ids, as far as they are here."""
        rows_C1 = jnp.arange(x_CK.shape[0])[:, None]
        return jnp.zeros((x_CK.shape[0], self.width), x_CK.dtype).at[rows_C1, self._columns(ids_CK)].set(x_CK, mode="drop")

    def _columns(self, ids_CK):
        """Columns here; out of range (not negative, which would count from the end) for ids of other devices."""
        column_CK = ids_CK - self.offset
        return jnp.where(column_CK < 0, self.width, column_CK)


def local_vocabulary(shape: dict[str, int], width: int, size: int) -> Vocabulary:
    """The columns of this device, inside shard_map (`shape`: axis sizes) or on one device (empty)."""
    return Vocabulary((VOCAB,), lax.axis_index(VOCAB) * width, width, size) if shape else Vocabulary((), 0, width, size)


def rows_with_weight(w_N: jax.Array, C: int, shape: dict[str, int]) -> tuple[jax.Array, jax.Array]:
    """Indices of the rows with weight, in order, filled up to whole chunks of C with N (which is no row); and how many chunks they fill.

    Every device runs the chunks of the fullest one: collectives in a loop need the same trip count everywhere.
    """
    N = w_N.shape[0]
    order = jnp.nonzero(w_N, size=math.ceil(N / C) * C, fill_value=N)[0]
    return order, lax.pmax((jnp.count_nonzero(w_N) + C - 1) // C, ROWS if shape else ())


def reduce_gradients(d_hidden, d_head, shape: dict[str, int]):
    """Sums over devices, once, after the loop: the hidden gradient over the vocabulary's shards, the head gradient over rows'."""
    if not shape:
        return d_hidden, d_head
    if d_hidden is not None:
        d_hidden = lax.psum(d_hidden, VOCAB)
    if d_head is not None:
        d_head = lax.psum(d_head, "data")
        scatters = head_gradient_spec(d_head.shape[0], shape)[0] == "fsdp"
        d_head = lax.psum_scatter(d_head, "fsdp", tiled=True) if scatters else lax.psum(d_head, "fsdp")
    return d_hidden, d_head


def head_gradient_spec(D: int, shape: dict[str, int]) -> P:
    """Layout of the head gradient: that of the head (parallel/rules.py), whole along D where fsdp does not divide it."""
    return P("fsdp" if D % shape["fsdp"] == 0 else None, VOCAB)
