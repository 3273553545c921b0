"""Keys and values of the columns seen so far."""

import jax
import jax.numpy as jnp
from flax import struct

from opsa_jax.models.config import DecoderConfig
from opsa_jax.parallel.rules import constrain


@struct.dataclass
class KVCache:
    """Static-size cache: `length` columns are filled, later ones are never attended to.

    The head axis comes before the column axis, so that attention is one batched product over (batch, head) and no step transposes
    the whole cache.
    """

    k_LBKSH: jax.Array
    """Keys after norm and rotation, compute dtype."""
    v_LBKSH: jax.Array
    """Values, compute dtype."""
    segments_BS: jax.Array
    """int32 segment of each column, 0 for padding and for columns not yet filled."""
    length: jax.Array
    """int32 scalar: filled columns, the same for every row (prompts are left-padded)."""


def init_cache(cfg: DecoderConfig, batch: int, length: int, dtype: str | None = None) -> KVCache:
    """An empty cache for `length` columns."""
    shape = (cfg.n_layers, batch, cfg.n_kv_heads, length, cfg.head_dim)
    kv = constrain(jnp.zeros(shape, dtype or cfg.compute_dtype), "layers", "batch", "kv_heads", None, "head_dim")
    return KVCache(k_LBKSH=kv, v_LBKSH=kv, segments_BS=jnp.zeros((batch, length), jnp.int32), length=jnp.zeros((), jnp.int32))
