"""What the sampler and the engine share: weights laid out for decoding, the prefill, one step, and the draw of a token."""

import math

import jax
import jax.numpy as jnp

from opsa_jax.models.cache import KVCache, init_cache
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params, declare, head_weight, map_weights
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.parallel.rules import constrain
from opsa_jax.rollout.filters import Sampling, filter_logits


def decode_weights(params: Params, cfg: DecoderConfig) -> Params:
    """The weights as decoding wants them: matrices in the compute dtype, whole over fsdp, still split over tensor.

    Training gathers a block's weights for thousands of tokens; decoding would gather and cast them anew for every token. So it is
    done once, at the cost of (compute bytes per weight) / tensor on every device while sampling.
    """

    def gather(w, x):
        return constrain(x.astype(cfg.compute_dtype) if w.decays else x, *(None if a == "embed" else a for a in w.axes))

    plain = params.replace(layers=params.layers.replace(lora=None))
    plain = map_weights(gather, declare(cfg), plain)
    return plain.replace(layers=plain.layers.replace(lora=params.layers.lora))


def prefill(params: Params, cfg: DecoderConfig, ids_BP: jax.Array, mask_BP: jax.Array, steer_LD=None) -> tuple[jax.Array, KVCache]:
    """Hidden states [B, D] of the last column, which predict the first response token, and a cache of exactly P columns."""
    ids_BP, mask_BP = constrain(ids_BP, "batch", None), constrain(mask_BP, "batch", None)
    positions_BP, segments_BP = prompt_inputs(mask_BP)
    out = forward(params, cfg, ids_BP, positions_BP, segments_BP, init_cache(cfg, *ids_BP.shape), steer_LD)
    return out.hidden_BTD[:, -1], out.cache


def step(
    params: Params, cfg: DecoderConfig, cache: KVCache, token_B: jax.Array, position_B: jax.Array, live_B: jax.Array, steer_LD=None
) -> tuple[jax.Array, KVCache]:
    """Put one token per row into the next column; hidden states [B, D] that predict the one after. Rows not live get a dead column."""
    segments_B1 = live_B.astype(jnp.int32)[:, None]
    out = forward(params, cfg, token_B[:, None], position_B[:, None], segments_B1, cache, steer_LD)
    return out.hidden_BTD[:, 0], out.cache


def next_token(params: Params, sampling: Sampling, hidden_BD: jax.Array, keys_B: jax.Array, index_B: jax.Array) -> tuple:
    """Draw response token `index_B` of each row with fold_in(row key, index).

    Returns:
        token_B int32, and logp_B float32: its log-probability under the model itself (temperature 1, nothing filtered).
    """
    head_DV = head_weight(params).astype(hidden_BD.dtype)
    logits_BV = constrain(jnp.einsum("bd,dv->bv", hidden_BD, head_DV, preferred_element_type=jnp.float32), "batch", "vocab")
    if sampling.greedy:
        token_B = _argmax(logits_BV)
    else:
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, index_B)
        token_B = draw(filter_logits(logits_BV, sampling), keys_B)
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, logit_B - jax.nn.logsumexp(logits_BV, axis=-1)


def draw(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """One token per row from softmax(logits), in two exact stages: a block of the vocabulary, then a token of the block.

    Each stage adds Gumbel noise and takes the largest, so a token with -inf is never drawn and logits that are sharded over the
    vocabulary are never gathered; two stages need 1/100 of the random numbers of one (V = 151,936: 128 blocks of 1,187).
    """
    B, V = logits_BV.shape
    blocks = math.gcd(V, 256)  # divides over any power of two that the vocabulary is sharded by
    blocks_BNC = logits_BV.reshape(B, blocks, V // blocks)
    mass_BN = jax.nn.logsumexp(blocks_BNC, axis=-1)
    # The barriers keep XLA from computing the noise twice, once for the maximum and once for where it is.
    noise_BM = jax.vmap(lambda key: jax.random.gumbel(key, (blocks + V // blocks,)))(keys_B)
    block_B = _argmax(jax.lax.optimization_barrier(mass_BN + noise_BM[:, :blocks]))
    within_BC = jnp.take_along_axis(blocks_BNC, block_B[:, None, None], axis=1)[:, 0]
    return block_B * (V // blocks) + _argmax(jax.lax.optimization_barrier(within_BC + noise_BM[:, blocks:]))


def _argmax(x_BV: jax.Array) -> jax.Array:
    """The smallest id with the largest value. Two plain reductions: many times faster than XLA's argmax on CPU."""
    V = x_BV.shape[-1]
    largest_B1 = jnp.max(x_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(x_BV == largest_B1, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)


def is_stop(token_B: jax.Array, stop_ids: tuple[int, ...]) -> jax.Array:
    """True where the token ends the response."""
    return jnp.isin(token_B, jnp.asarray(stop_ids, jnp.int32))


def resize(cache: KVCache, columns: int) -> KVCache:
    """The same cache with room for more columns."""

    def pad(x, axis):
        widths = [(0, columns - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
        return jnp.pad(x, widths)

    kv = (constrain(pad(x, 3), "layers", "batch", "kv_heads", None, "head_dim") for x in (cache.k_LBKSH, cache.v_LBKSH))
    return KVCache(*kv, pad(cache.segments_BS, 1), cache.length)
