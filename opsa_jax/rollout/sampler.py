"""Responses from a decoder: one prefill of the prompts, then a token at a time until every row has stopped."""

import functools
import zlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from opsa_jax.models.cache import KVCache
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params
from opsa_jax.rollout import decode
from opsa_jax.rollout.filters import Sampling


@struct.dataclass
class Rollout:
    """Sampled responses. For the prompt `. a b` (one column of padding) answered by `c <stop>` in a room of three:

        prompt_ids     pad  a   b        response_ids   c  stop  pad
        prompt_mask     0   1   1        response_mask  1   1     0
    """

    prompt_ids_BP: jax.Array
    prompt_mask_BP: jax.Array
    response_ids_BR: jax.Array
    """int32; pad after the stop token."""
    response_mask_BR: jax.Array
    """int32: 1 up to and including the stop token."""
    logp_BR: jax.Array
    """float32 log-probability of each response token under the model itself: temperature 1, nothing filtered, as a re-scoring pass
    gives it. 0 where the mask is 0."""
    finished_B: jax.Array
    """True where a stop token was sampled before the room ran out."""


@struct.dataclass
class _State:
    """Decoding between two tokens."""

    count: jax.Array
    """Tokens drawn so far, the same for all rows."""
    hidden_BD: jax.Array
    """Predicts the next token."""
    cache: KVCache
    done_B: jax.Array
    ids_BR: jax.Array
    mask_BR: jax.Array
    logp_BR: jax.Array


def id_numbers(ids: Iterable[str]) -> np.ndarray:
    """Stable 31-bit numbers of texts, int32: what `row_keys` takes for examples that are known by their ids.

    >>> id_numbers(["a", "b"]).tolist()
    [1756872259, 1908338681]
    """
    return np.array([zlib.crc32(i.encode()) & 0x7FFFFFFF for i in ids], np.int32)


def row_keys(base: jax.Array, purpose: str, step, example_ids_B: jax.Array, sample_B: jax.Array) -> jax.Array:
    """One key per row, from what the row is and not from where it stands: purpose, then step, then example, then sample number.

    Args:
        base: a typed key (`jax.random.key`).
        purpose: what the numbers are for, such as "rollout".
        step: int32 scalar.
        example_ids_B: int32, stable numbers of the examples.
        sample_B: int32, number of the sample of the same prompt.
    """
    key = jax.random.fold_in(jax.random.fold_in(base, zlib.crc32(purpose.encode())), step)
    return jax.vmap(lambda i, n: jax.random.fold_in(jax.random.fold_in(key, i), n))(example_ids_B, sample_B)


@functools.partial(jax.jit, static_argnames=("cfg", "sampling", "stop_ids", "max_new_tokens"))
def sample(
    params: Params,
    cfg: DecoderConfig,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    prompt_ids_BP: jax.Array,
    prompt_mask_BP: jax.Array,
    keys_B: jax.Array,
    pad_id: jax.Array | int = 0,
    steer_LD: jax.Array | None = None,
) -> Rollout:
    """Sample one response per row. Compiled once per shapes and static arguments.

    Args:
        sampling: how tokens are drawn (static).
        stop_ids: ids that end a response (static); the one drawn is part of the response.
        max_new_tokens: room for the response, R (static).
        prompt_ids_BP, prompt_mask_BP: left-padded prompts, int32. A row without any token is a filler: it gets no response and
            delays nobody. To force the opening of an answer, append its ids to the prompt.
        keys_B: typed keys. Token j of a row is drawn with fold_in(its key, j), so a response depends on nothing but its own prompt
            and key: not on the batch, the padding, or the other rows.
        pad_id: written after the stop token; its value does not matter.
        steer_LD: added to every block input at every position.

    Under a mesh (`jax.set_mesh`), rows are split over data and fsdp, whose product must divide B.
    """
    params = decode.decode_weights(params, cfg)
    B, P = prompt_ids_BP.shape
    R = max_new_tokens
    prompt_length_B = jnp.sum(prompt_mask_BP, axis=-1, dtype=jnp.int32)

    def step(s: _State) -> _State:
        token_B, logp_B = decode.next_token(params, sampling, s.hidden_BD, keys_B, jnp.full(B, s.count))
        live_B, at = ~s.done_B, (0, s.count)
        hidden_BD, cache = decode.step(params, cfg, s.cache, token_B, prompt_length_B + s.count, live_B, steer_LD)
        return _State(
            count=s.count + 1,
            hidden_BD=hidden_BD,
            cache=cache,
            done_B=s.done_B | decode.is_stop(token_B, stop_ids),
            ids_BR=jax.lax.dynamic_update_slice(s.ids_BR, jnp.where(live_B, token_B, pad_id)[:, None], at),
            mask_BR=jax.lax.dynamic_update_slice(s.mask_BR, live_B.astype(jnp.int32)[:, None], at),
            logp_BR=jax.lax.dynamic_update_slice(s.logp_BR, jnp.where(live_B, logp_B, 0.0)[:, None], at),
        )

    with jax.named_scope("prefill"):
        hidden_BD, cache = decode.prefill(params, cfg, prompt_ids_BP, prompt_mask_BP, steer_LD)
    with jax.named_scope("decode"):
        s = _State(
            count=jnp.zeros((), jnp.int32),
            hidden_BD=hidden_BD,
            cache=cache,
            done_B=prompt_length_B == 0,
            ids_BR=jnp.full((B, R), pad_id, jnp.int32),
            mask_BR=jnp.zeros((B, R), jnp.int32),
            logp_BR=jnp.zeros((B, R), jnp.float32),
        )
        for columns in cache_sizes(P, R):
            s = s.replace(cache=decode.resize(s.cache, columns))
            s = jax.lax.while_loop(lambda s, columns=columns: (s.count < columns - P) & ~jnp.all(s.done_B), step, s)
    finished_B = s.done_B & (prompt_length_B > 0)
    return Rollout(prompt_ids_BP, prompt_mask_BP, s.ids_BR, s.mask_BR, s.logp_BR, finished_B)


def cache_sizes(P: int, R: int) -> list[int]:
    """Columns of the cache, stage by stage: doubling, so that early tokens do not attend over the room of late ones.

    >>> cache_sizes(40, 56), cache_sizes(64, 1024)
    ([96], [136, 272, 544, 1088])
    """
    sizes = [P + R]
    while sizes[0] // 2 >= max(128, P + P // 4):
        sizes.insert(0, sizes[0] // 2)
    return sizes
