"""Attention: one function, one mask rule, several backends. `attention_kernels.py` has those of accelerators."""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from opsa_jax.models import attention_kernels as kernels


@struct.dataclass
class Visibility:
    """Who may attend to whom, as data.

    Query column t of a row sees key column s of the same row iff both have the same non-zero segment, s <= t, and t - s < window.
    With left padding, for prompt columns `. . a b` (dots are padding) segments are `0 0 1 1`: b sees a and b, a sees only a.
    """

    q_segments_BT: jax.Array
    k_segments_BS: jax.Array
    q_columns_T: jax.Array
    """Column of each query among the keys: arange(T) without a cache, cache.length + arange(T) with one."""

    def mask_BTS(self, window: jax.Array | int = 0) -> jax.Array:
        """Boolean mask; `window` 0 is unlimited."""
        gap_TS = self.q_columns_T[:, None] - jnp.arange(self.k_segments_BS.shape[1])[None, :]
        near_TS = (gap_TS >= 0) & ((gap_TS < window) | (jnp.asarray(window) == 0))
        same_BTS = (self.q_segments_BT[:, :, None] == self.k_segments_BS[:, None, :]) & (self.k_segments_BS > 0)[:, None, :]
        return same_BTS & near_TS[None]


def attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visible: Visibility,
    window: jax.Array | int = 0,
    *,
    backend: str = "xla",
    windows: tuple[int, ...] = (),
) -> jax.Array:
    """Softmax attention with grouped heads, scores and softmax in float32.

    Query head n uses key-value head n // (N / K), as in Hugging Face. A query that sees nothing (padding) gets finite values
    that nobody reads.

    Args:
        window: of this layer, which may be data under a scan.
        backend: `auto`, `xla`, `splash` or `cudnn` (static), as in `ModelConfig.attention`. The kernels serve training and prefill, where
            the queries are the keys' own columns (T = S); one token against a cache is always XLA's.
        windows: the values that `window` can have (static); empty where it is not data. Kernels are built for one window each.

    Returns:
        [B, T, N, H] in the dtype of q.

    Raises:
        UserError: a backend asked for by name that cannot serve this device, dtype or shape.
    """
    chosen = kernels.choose(backend, kernels.Case.of(q_BTNH, k_BKSH))
    if chosen == "xla":
        return attention_xla(q_BTNH, k_BKSH, v_BKSH, visible, window)
    sizes = sorted(set(windows)) or [int(window)]
    one_window = [functools.partial(kernels.RUN[chosen], window=size) for size in sizes]
    args = q_BTNH, k_BKSH, v_BKSH, visible.q_segments_BT
    if len(sizes) == 1:
        return one_window[0](*args)
    return jax.lax.switch(jnp.searchsorted(jnp.asarray(sizes), window), one_window, *args)


def attention_xla(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible: Visibility, window: jax.Array | int = 0) -> jax.Array:
    """The reference: the scores of all pairs exist at the same time."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    G = N // K
    # [B, K, T*G, H]: two plain batched matrix products, no transposed copy of keys or values.
    q_BKQH = (q_BTNH * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    scores_BKQS = jnp.einsum("bkqh,bksh->bkqs", q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
    mask_BQS = jnp.repeat(visible.mask_BTS(window), G, axis=1)
    scores_BKQS = jnp.where(mask_BQS[:, None], scores_BKQS, jnp.finfo(jnp.float32).min)
    weights_BKQS = jax.nn.softmax(scores_BKQS, axis=-1).astype(q_BTNH.dtype)
    out_BKQH = jnp.einsum("bkqs,bksh->bkqh", weights_BKQS, v_BKSH)
    return out_BKQH.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
