"""Divergences between student and teacher as pure formulas on log-probabilities.

S is the student, T the teacher. Every function takes float32 log-probabilities [..., V] (finite: use a large negative number, not
-inf) and sums over the last axis; it reduces over nothing else and knows no masks. All of them are plain sums over tokens of the
vocabulary, so a vocabulary split over devices needs one sum over the devices. Differentiate them in the student's log-probabilities.
"""

import jax
import jax.numpy as jnp

from opsa_jax.config import ObjectiveConfig


@jax.custom_jvp
def _summands(logp_a, logp_b):
    """a log(a / b) - a + b: at least 0, and 0 only at a = b."""
    a, b = jnp.exp(logp_a), jnp.exp(logp_b)
    return a * (logp_a - logp_b) - a + b


# The derivatives in log a and log b, written so that each is exactly zero at a = b. Left to differentiation of the formula they are
# differences of equal products, which a compiler that fuses multiply and add does not round alike.
_summands.defjvps(
    lambda d_logp_a, _, logp_a, logp_b: jnp.exp(logp_a) * (logp_a - logp_b) * d_logp_a,
    lambda d_logp_b, _, logp_a, logp_b: (jnp.exp(logp_b) - jnp.exp(logp_a)) * d_logp_b,
)


def kl(logp_a: jax.Array, logp_b: jax.Array, raw: bool = False) -> jax.Array:
    """KL(a, b) = sum_v a_v (log a_v - log b_v) - a_v + b_v, the generalised (unnormalised) Kullback-Leibler divergence.

    Where a and b sum to one, -a + b sums to zero and this is the usual KL. The two terms are kept all the same: with them each
    summand is least at a_v = b_v, so equal distributions have a value and a gradient of exactly zero in floating point (Adam would
    make a full step of 1e-9), and on a part of the vocabulary the sum is still a divergence.

    Args:
        raw: leave -a + b out. On a part of the vocabulary the sum is then no divergence: it is least at a = b / e.

    >>> float(kl(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75])))).__round__(4)
    0.1438
    """
    summands = jnp.exp(logp_a) * (logp_a - logp_b) if raw else _summands(logp_a, logp_b)
    return summands.sum(-1)


def forward_kl(logp_s: jax.Array, logp_t: jax.Array, raw: bool = False) -> jax.Array:
    """KL(T, S)."""
    return kl(logp_t, logp_s, raw)


def reverse_kl(logp_s: jax.Array, logp_t: jax.Array, raw: bool = False) -> jax.Array:
    """KL(S, T)."""
    return kl(logp_s, logp_t, raw)


def mix(logp_s: jax.Array, logp_t: jax.Array, a: float, raw: bool = False) -> jax.Array:
    """a KL(T, S) + (1 - a) KL(S, T) (OPSA, arXiv 2605.15239, App. F, with a = 0.5). Compiled, the two sums are one pass."""
    return a * forward_kl(logp_s, logp_t, raw) + (1 - a) * reverse_kl(logp_s, logp_t, raw)


def jsd(logp_s: jax.Array, logp_t: jax.Array, b: float) -> jax.Array:
    """b KL(T, M) + (1 - b) KL(S, M) with M = b T + (1 - b) S (generalised Jensen-Shannon divergence; GKD, arXiv 2306.13649).

    It has no raw form: what `kl` adds to the two parts cancels, token by token.
    """
    # log M, written so that it is exactly log S where S = T, and never overflows.
    larger = logp_t > logp_s
    gap = -jnp.abs(logp_t - logp_s)
    log_m = jnp.where(larger, logp_t, logp_s) + jnp.log1p(jnp.where(larger, 1 - b, b) * jnp.expm1(gap))
    # M minimises the sum at every token, so it counts as a constant in the derivative.
    log_m = jax.lax.stop_gradient(log_m)
    return b * kl(logp_t, log_m) + (1 - b) * kl(logp_s, log_m)


def divergence(cfg: ObjectiveConfig, logp_s: jax.Array, logp_t: jax.Array, raw: bool = False) -> jax.Array:
    """The configured divergence [...] of log-probabilities [..., V]."""
    if cfg.divergence == "jsd":
        return jsd(logp_s, logp_t, cfg.beta)
    return mix(logp_s, logp_t, {"forward": 1.0, "reverse": 0.0, "mix": cfg.mix}[cfg.divergence], raw)


def subset_divergence(
    cfg: ObjectiveConfig, logp_s_K: jax.Array, logp_t_K: jax.Array, rest_s: jax.Array | None = None, rest_t: jax.Array | None = None
) -> jax.Array:
    """The configured divergence [...] on K tokens of the vocabulary.

    raw: the partial sum with full-vocabulary probabilities (SafeSteer, arXiv 2606.02530). Reverse is least at S = T / e.
    generalised: the partial sum of the generalised divergence, least at S = T.
    renormalise: both sides scaled to sum to one over the K tokens.
    tail: the K tokens and one bucket with the rest of each side.

    Args:
        logp_s_K, logp_t_K: full-vocabulary log-probabilities [..., K] of the K tokens.
        rest_s, rest_t: log-probabilities [...] of all other tokens together, for tail. To be summed over these tokens: log(1 - sum
            over the K) has no correct digit left in float32 where the K tokens hold nearly all mass, which is the usual case.
    """
    if cfg.subset == "renormalise":
        logp_s_K, logp_t_K = jax.nn.log_softmax(logp_s_K), jax.nn.log_softmax(logp_t_K)
    elif cfg.subset == "tail":
        logp_s_K = jnp.concatenate([logp_s_K, rest_s[..., None]], axis=-1)
        logp_t_K = jnp.concatenate([logp_t_K, rest_t[..., None]], axis=-1)
    return divergence(cfg, logp_s_K, logp_t_K, raw=cfg.subset == "raw")
