"""Which tokens and which responses count, and how much: pure functions of per-token statistics of a whole rollout batch.

They are computed once per rollout batch, from the student that wrote the responses, so nothing here depends on micro-batches or
devices. Arrays are [S, R] float32 over S responses; the mask is 1 on response tokens. No gradient flows through them.
"""

import jax
import jax.numpy as jnp

from opsa_jax.config import FilterConfig, WeightConfig

FLOOR = 1e-6


def masked_quantile(x: jax.Array, mask: jax.Array, q: float) -> jax.Array:
    """Quantile of the entries where mask is 1, interpolated linearly as NumPy's default does; 0 where nothing is chosen.

    >>> masked_quantile(jnp.array([3.0, 99.0, 1.0, 2.0]), jnp.array([1, 0, 1, 1]), 0.25).item()
    1.5
    """
    values = jnp.sort(jnp.where(mask > 0, x, jnp.inf).ravel())
    n = jnp.sum(mask > 0)
    place = q * jnp.maximum(n - 1, 0)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(n - 1, 0))
    share = place - low
    found = jnp.where(share > 0, (1 - share) * values[low] + share * values[high], values[low])
    return jnp.where(n > 0, found, 0.0)


def fire_weights(entropy_s_SR, entropy_t_SR, mask_SR, a: float = 1.0, b: float = 1.0) -> jax.Array:
    """Confident teacher and unsure student weigh more (FiRe-OPD, arXiv 2606.02684).

    c = clip(1 - H_T / max_t H_T, 0, 1), u = clip(H_S / max_t H_S, 0, 1), w = (1 + a c)(1 + b u), over its mean in the response; the
    maxima are those of the response's tokens, at least 1e-6. The mean over the tokens of every response is 1.
    """
    mask_SR = mask_SR.astype(jnp.float32)

    def relative(x_SR):
        return x_SR / jnp.maximum((x_SR * mask_SR).max(-1, keepdims=True), FLOOR)

    c_SR = jnp.clip(1 - relative(entropy_t_SR), 0, 1)
    u_SR = jnp.clip(relative(entropy_s_SR), 0, 1)
    w_SR = (1 + a * c_SR) * (1 + b * u_SR) * mask_SR
    mean_S1 = w_SR.sum(-1, keepdims=True) / jnp.maximum(mask_SR.sum(-1, keepdims=True), 1)
    return w_SR / jnp.maximum(mean_S1, FLOOR)


def top_share(score_SR, mask_SR, share: float) -> jax.Array:
    """Hard selection: the share of all tokens with the highest scores (ties at the threshold stay), with weights of mean 1 over all."""
    mask_SR = mask_SR.astype(jnp.float32)
    chosen_SR = mask_SR * (score_SR >= masked_quantile(score_SR, mask_SR, 1 - share))
    return chosen_SR * mask_SR.sum() / jnp.maximum(chosen_SR.sum(), 1)


def tip_scores(entropy_s_SR, divergence_SR, mask_SR) -> jax.Array:
    """h + g - h g, with student entropy h and teacher-student divergence g scaled to [0, 1] over the batch (TIP, arXiv 2604.14084)."""
    on = mask_SR > 0

    def scaled(x_SR):
        low, high = jnp.where(on, x_SR, jnp.inf).min(), jnp.where(on, x_SR, -jnp.inf).max()
        return jnp.where(on, (x_SR - low) / jnp.maximum(high - low, FLOOR), 0.0)

    h_SR, g_SR = scaled(entropy_s_SR), scaled(divergence_SR)
    return h_SR + g_SR - h_SR * g_SR


def window(R: int, first: int, decay: float) -> jax.Array:
    """[R]: decay^t on the first tokens of a response, 0 after them.

    >>> window(5, 3, 0.5).tolist()
    [1.0, 0.5, 0.25, 0.0, 0.0]
    """
    t = jnp.arange(R)
    return jnp.where(t < first, jnp.float32(decay) ** t, 0.0)


def token_factors(cfg: WeightConfig, statistics: dict[str, jax.Array], mask_SR: jax.Array, progress: jax.Array) -> jax.Array:
    """Factors [S, R] on the tokens' weights.

    Args:
        statistics: of the whole rollout batch: entropy_student, entropy_teacher, kl_reverse.
        progress: share of the run that is done; before `cfg.after` all factors are 1.
    """
    mask_SR = mask_SR.astype(jnp.float32)
    if cfg.kind == "uniform":
        return mask_SR
    if cfg.kind == "window":
        factors_SR = mask_SR * window(mask_SR.shape[1], cfg.first, cfg.decay)
    elif cfg.kind == "fire":
        entropies = statistics["entropy_student"], statistics["entropy_teacher"]
        factors_SR = fire_weights(*entropies, mask_SR, cfg.teacher_confidence, cfg.student_entropy)
    elif cfg.kind == "tip":
        factors_SR = top_share(tip_scores(statistics["entropy_student"], statistics["kl_reverse"], mask_SR), mask_SR, cfg.keep)
    else:
        factors_SR = top_share(statistics["entropy_student"], mask_SR, cfg.keep)
    return jax.lax.stop_gradient(jnp.where(progress >= cfg.after, factors_SR, mask_SR))


def kept_responses(cfg: FilterConfig, logp_teacher_SR: jax.Array, mask_SR: jax.Array) -> jax.Array:
    """1 for the responses that count [S].

    teacher_logp keeps those whose mean teacher log-probability is at least the given quantile of it over the GLOBAL rollout batch
    (FiRe-OPD, arXiv 2606.02684). Its published code takes the quantile in micro-batches of one, which keeps everything: kind=none.
    """
    length_S = mask_SR.sum(-1)
    any_S = (length_S > 0).astype(jnp.float32)
    if cfg.kind == "none":
        return any_S
    score_S = (logp_teacher_SR * mask_SR).sum(-1) / jnp.maximum(length_S, 1)
    return any_S * (score_S >= masked_quantile(score_S, any_S, cfg.quantile))
