"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

import jax


def dpo(logp_S: jax.Array, logp_reference_S: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """-log sigmoid(beta ((log p - log p_ref)(chosen) - (log p - log p_ref)(rejected))) of each pair.

    >>> import jax.numpy as jnp
    >>> loss, margin = dpo(jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0]), beta=0.5)
    >>> round(loss.item(), 4), margin.tolist()
    (0.3133, [1.0])

    Args:
        logp_S: log-probability of each whole response under the student; rows 2i and 2i + 1 are chosen and rejected of pair i.
        logp_reference_S: the same under the frozen reference.

    Returns:
        loss and margin (the argument of the sigmoid), each [S / 2].
    """
    gain_P2 = (logp_S - logp_reference_S).reshape(-1, 2)
    margin_P = beta * (gain_P2[:, 0] - gain_P2[:, 1])
    return -jax.nn.log_sigmoid(margin_P), margin_P
