"""Policy-gradient forms of distillation: an advantage per sampled token, and the clipped surrogate it enters.

p_old is the student that wrote the responses, q the teacher, p_ref the initial student. All arrays are [S, R] float32 over the S
responses of a whole rollout batch, mask 1 on response tokens; log-probabilities in nats. Advantages carry no gradient.
"""

import jax
import jax.numpy as jnp

from opsa_jax.config import PolicyConfig

EPS = 1e-6
CLAMP, SHIFT = (-3.0, 5.0), 0.02  # of the released COPSD code


def return_to_go(reward_SR: jax.Array, mask_SR: jax.Array, gamma: float) -> jax.Array:
    """R_t = sum_{k >= t} gamma^(k - t) r_k over the response's tokens.

    >>> return_to_go(jnp.array([[1.0, 2.0, 4.0, 9.0]]), jnp.array([[1, 1, 1, 0]]), 0.5).tolist()
    [[3.0, 4.0, 4.0, 0.0]]
    """
    mask_SR = mask_SR.astype(jnp.float32)

    def back(later_S, now):
        reward_S, on_S = now
        here_S = on_S * (reward_S + gamma * later_S)
        return here_S, here_S

    start_S = jnp.zeros(reward_SR.shape[0], jnp.float32)
    _, returns_RS = jax.lax.scan(back, start_S, ((reward_SR * mask_SR).T, mask_SR.T), reverse=True)
    return returns_RS.T


def normalise_per_step(x_SR: jax.Array, mask_SR: jax.Array, group_S: jax.Array, groups: int) -> jax.Array:
    """(x_t - mean_t) / std_t over the responses of the same prompt that have a token t; 0 where only one has (COPSD, arXiv 2606.03089)."""
    mask_SR = mask_SR.astype(jnp.float32)

    def over_group(v_SR):
        return jax.ops.segment_sum(v_SR * mask_SR, group_S, groups)[group_S]

    n_SR = jnp.maximum(over_group(jnp.ones_like(x_SR)), 1)
    centred_SR = x_SR - over_group(x_SR) / n_SR
    std_SR = jnp.sqrt(over_group(centred_SR**2) / n_SR)
    return jnp.where(n_SR > 1, mask_SR * centred_SR / (std_SR + EPS), 0.0)


def normalise_per_prompt(x_SR: jax.Array, mask_SR: jax.Array, group_S: jax.Array, groups: int) -> jax.Array:
    """(x - mean) / std over ALL tokens of the responses of the same prompt (the released COPSD code)."""
    mask_SR = mask_SR.astype(jnp.float32)

    def over_group(v_SR):
        return jax.ops.segment_sum((v_SR * mask_SR).sum(-1), group_S, groups)[group_S][:, None]

    n_S1 = jnp.maximum(over_group(jnp.ones_like(x_SR)), 1)
    centred_SR = x_SR - over_group(x_SR) / n_S1
    return mask_SR * centred_SR / (jnp.sqrt(over_group(centred_SR**2) / n_S1) + EPS)


def advantages(cfg: PolicyConfig, statistics: dict[str, jax.Array], mask_SR, group_S, groups: int, outcome_S) -> jax.Array:
    """The configured advantage [S, R].

    | cfg.advantage | A_t | source |
    |---|---|---|
    | teacher | log q - log p_old | FiRe-OPD, arXiv 2606.02684 |
    | return | return-to-go of that, normalised per prompt and step | COPSD, arXiv 2606.03089, paper |
    | token | that, clamped to [-3, 5], plus 0.02, normalised over all tokens of the prompt | COPSD, released code |
    | outcome | R_o (1 + m sgn(R_o) r), r the `token` form | COPSD, hybrid |
    | exopd | lambda (log q - log p_ref) - (log p_old - log p_ref) | ExOPD |
    | floor | max(log q - log p_old, log(lambda / (1 - lambda))) | REOPOLD, arXiv 2603.11137 |

    Args:
        statistics: logp_teacher, logp_student (p_old) and, for exopd, logp_reference.
        group_S: number of the response's prompt, below `groups`.
        outcome_S: outcome reward of each response, for `outcome`.
    """
    mask_SR = mask_SR.astype(jnp.float32)
    r_SR = (statistics["logp_teacher"] - statistics["logp_student"]) * mask_SR
    if cfg.advantage == "return":
        r_SR = normalise_per_step(return_to_go(r_SR, mask_SR, cfg.gamma), mask_SR, group_S, groups)
    elif cfg.advantage in ("token", "outcome"):
        r_SR = normalise_per_prompt(jnp.clip(r_SR, *CLAMP) + SHIFT, mask_SR, group_S, groups)
        if cfg.advantage == "outcome":
            outcome_S1 = outcome_S[:, None]
            r_SR = outcome_S1 * (1 + cfg.outcome_mix * jnp.sign(outcome_S1) * r_SR)
    elif cfg.advantage == "exopd":
        teacher_SR, student_SR = (statistics[name] - statistics["logp_reference"] for name in ("logp_teacher", "logp_student"))
        r_SR = cfg.exopd_lambda * teacher_SR - student_SR
    elif cfg.advantage == "floor":
        r_SR = jnp.maximum(r_SR, jnp.log(cfg.floor_lambda / (1 - cfg.floor_lambda)))
    return jax.lax.stop_gradient(r_SR * mask_SR)


def clipped_surrogate(logp: jax.Array, logp_old: jax.Array, advantage: jax.Array, clip: float) -> jax.Array:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) with ratio = p / p_old, per token (PPO, arXiv 1707.06347); clip 0 does not clip."""
    ratio = jnp.exp(logp - logp_old)
    if not clip:
        return -ratio * advantage
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def k3(logp: jax.Array, logp_reference: jax.Array) -> jax.Array:
    """p_ref / p - log(p_ref / p) - 1 at the sampled token: an estimate of KL(p, p_ref) that is never negative.

    >>> k3(jnp.log(0.5), jnp.log(0.5)).item()
    0.0
    """
    gap = logp_reference - logp
    return jnp.exp(gap) - gap - 1
