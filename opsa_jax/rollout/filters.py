"""What may be sampled: temperature, top-k, top-p and min-p as pure functions on logits.

Order and meaning are those of the logits processors of `transformers`: temperature, then top-k, then top-p, then min-p, each
seeing what the one before left. Dropped tokens get -inf; at least one token is always kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from opsa_jax.config import RolloutConfig
from opsa_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Frozen and hashable: a static argument of the jitted samplers.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy, and the other fields then change nothing."""
    top_k: int = 0
    """Keep the k largest logits, and all that equal the k-th; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this (Holtzman et al. 2019, arXiv 1904.09751)."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one (arXiv 2407.01082)."""

    def __post_init__(self):
        for name, ok, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (off) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
        ):
            if not ok:
                raise UserError(f"{name}={getattr(self, name)}: must be {allowed}")

    @classmethod
    def of(cls, cfg: RolloutConfig) -> "Sampling":
        return cls(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, min_p=cfg.min_p)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The distribution that is sampled from, as logits [B, V] float32 with -inf for dropped tokens.

    Greedy decoding leaves the logits as they are. Nothing is sorted: thresholds are found by bisection, about 32 sums over the
    vocabulary each, so logits that are sharded over the vocabulary stay where they are.
    """
    if sampling.greedy:
        return logits_BV
    x_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < x_BV.shape[-1]:
        x_BV = keep_top_k(x_BV, sampling.top_k)
    if sampling.top_p < 1:
        x_BV = keep_top_p(x_BV, sampling.top_p)
    if sampling.min_p > 0:
        x_BV = keep_min_p(x_BV, sampling.min_p)
    return x_BV


def keep_top_k(x_BV: jax.Array, k: int) -> jax.Array:
    """Drop what is below the k-th largest logit. Ties with it are kept, so more than k tokens can remain.

    >>> keep_top_k(jnp.array([[3.0, 1.0, 2.0, 2.0]]), 2).tolist()
    [[3.0, -inf, 2.0, 2.0]]
    """
    rank_BV = _ranks(x_BV)
    kth_B = _smallest(lambda t_B: jnp.sum(rank_BV > t_B[:, None], axis=-1) < k, jnp.min(rank_BV, -1), jnp.max(rank_BV, -1))
    return jnp.where(rank_BV < kth_B[:, None], -jnp.inf, x_BV)


def keep_top_p(x_BV: jax.Array, p: float) -> jax.Array:
    """Keep a token iff the tokens ahead of it have less than p together; of equal logits the one with the smaller id is ahead.

    So p -> 0 is greedy decoding. (`transformers` keeps the same number of equal logits, but which is up to an unstable sort.)

    >>> x = jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.1]]))
    >>> jnp.isfinite(keep_top_p(x, 0.6)).tolist()
    [[True, True, False, False]]
    """
    rank_BV, p_BV = _ranks(x_BV), jax.nn.softmax(x_BV, axis=-1)

    def above(t_B):
        return jnp.sum(jnp.where(rank_BV > t_B[:, None], p_BV, 0), axis=-1)

    cut_B = _smallest(lambda t_B: above(t_B) < p, jnp.min(rank_BV, -1), jnp.max(rank_BV, -1))
    equal_BV = rank_BV == cut_B[:, None]
    each_B = jnp.max(jnp.where(equal_BV, p_BV, 0), axis=-1)
    room_B = jnp.ceil((p - above(cut_B)) / each_B)
    ids_V, first_B = jnp.arange(x_BV.shape[-1]), jnp.zeros_like(cut_B)
    enough = lambda i_B: jnp.sum(equal_BV & (ids_V <= i_B[:, None]), axis=-1) >= room_B  # noqa: E731
    last_B = _smallest(enough, first_B, first_B + x_BV.shape[-1] - 1, halvings=x_BV.shape[-1].bit_length())
    return jnp.where((rank_BV > cut_B[:, None]) | (equal_BV & (ids_V <= last_B[:, None])), x_BV, -jnp.inf)


def keep_min_p(x_BV: jax.Array, min_p: float) -> jax.Array:
    """Drop tokens whose probability is below min_p times the largest one.

    >>> keep_min_p(jnp.log(jnp.array([[0.6, 0.3, 0.1]])), 0.4).tolist()[0][2]
    -inf
    """
    return jnp.where(x_BV < jnp.max(x_BV, axis=-1, keepdims=True) + math.log(min_p), -jnp.inf, x_BV)


def _ranks(x: jax.Array) -> jax.Array:
    """int32 numbers in the order of the float32 numbers (their bits, with the negative ones turned round)."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0.0 is 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _smallest(holds: Callable[[jax.Array], jax.Array], low_B: jax.Array, high_B: jax.Array, halvings: int = 32) -> jax.Array:
    """Per row the smallest integer from low to high for which `holds`; high if none.

    `holds` maps [B] to [B] and turns from false to true once as its argument rises. The number of halvings is fixed (enough for any
    int32, or log2 of the range), because a loop that asks the device whether to go on is slow on GPUs.
    """

    def halve(_, bounds):
        low_B, high_B = bounds
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # the mean, rounded down, without overflow
        found_B = holds(middle_B)
        return jnp.where(found_B, low_B, jnp.minimum(middle_B + 1, high_B)), jnp.where(found_B, middle_B, high_B)

    return jax.lax.fori_loop(0, halvings, halve, (low_B, high_B))[1]
