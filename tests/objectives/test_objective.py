"""Weights by hand, micro-batches that add up, and the parts of `distill_loss` in their places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import torch_loss

from opsa_jax.config import ObjectiveConfig
from opsa_jax.objectives.objective import distill_loss, token_weights

MASK_BR = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("reduction", "keep_B", "expected_B"),
    [
        ("token_mean", None, [1 / 7, 1 / 7, 0, 1 / 7]),
        ("token_mean", [0, 1, 1, 1], [0, 1 / 3, 0, 1 / 3]),
        ("sequence_mean", None, [1 / 12, 1 / 3, 0, 1 / 6]),
        ("sequence_mean", [0, 1, 1, 1], [0, 1 / 2, 0, 1 / 4]),
    ],
)
def test_weights_by_hand(reduction, keep_B, expected_B):
    keep_B = None if keep_B is None else jnp.array(keep_B, bool)
    extra_BR = jnp.full(MASK_BR.shape, 2.0).at[0, 1].set(0.0)
    cfg = ObjectiveConfig(reduction=reduction)
    expected_BR = np.array(expected_B)[:, None] * np.asarray(MASK_BR)
    np.testing.assert_allclose(token_weights(cfg, MASK_BR, keep_B), expected_BR, rtol=1e-6)
    np.testing.assert_allclose(token_weights(cfg, MASK_BR, keep_B, extra_BR), expected_BR * extra_BR, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_nothing_to_train_on(reduction):
    assert not np.any(token_weights(ObjectiveConfig(reduction=reduction), MASK_BR * 0))
    assert not np.any(token_weights(ObjectiveConfig(reduction=reduction), MASK_BR, jnp.zeros(4)))


def batch(seed=0, B=4, R=4, D=5, V=11):
    rng = np.random.default_rng(seed)
    shapes = ((B, R, D), (D, V), (B, R, D), (D, V))
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes), jnp.asarray(rng.integers(0, V, (B, R)), jnp.int32)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_loss_is_the_mean_it_is_called(reduction):
    """Against per-token divergences that the reference gives one at a time."""
    (hs_BRD, head_s, ht_BRD, head_t), ids_BR = batch()
    cfg = ObjectiveConfig(reduction=reduction, chunk=3)
    w_BR = token_weights(cfg, MASK_BR)
    step = jax.jit(distill_loss, static_argnums=0, static_argnames="train_head")
    loss, statistics = step(cfg, hs_BRD, head_s, [(ht_BRD, head_t)], w_BR, ids_BR, train_head=True)
    one, valid = np.ones(1), np.argwhere(np.asarray(MASK_BR))
    tokens = {(b, r): torch_loss(cfg, hs_BRD[b, r : r + 1], head_s, ht_BRD[b, r : r + 1], head_t, one)[0] for b, r in valid}
    if reduction == "token_mean":
        expected = np.mean(list(tokens.values()))
    else:
        expected = np.mean([np.mean([v for (b, _), v in tokens.items() if b == i]) for i in (0, 1, 3)])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for (b, r), value in tokens.items():
        np.testing.assert_allclose(statistics["divergence"][b, r], value, rtol=1e-5)
    assert not np.any(np.where(np.asarray(MASK_BR), 0, statistics["divergence"]))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_micro_batches_add_up_to_the_whole(reduction):
    """Loss and gradients, with responses of different lengths and one empty one."""
    (hs_BRD, head_s, ht_BRD, head_t), ids_BR = batch()
    cfg = ObjectiveConfig(reduction=reduction, chunk=3)
    w_BR = token_weights(cfg, MASK_BR)

    @jax.jit
    def step(hs, ht, w, ids):
        def loss(h, head):
            return distill_loss(cfg, h, head, [(ht, head_t)], w, ids, train_head=True)[0]

        return jax.value_and_grad(loss, (0, 1))(hs, head_s)

    loss, (d_hidden, d_head) = step(hs_BRD, ht_BRD, w_BR, ids_BR)
    parts = [step(*(x[i : i + 2] for x in (hs_BRD, ht_BRD, w_BR, ids_BR))) for i in (0, 2)]
    np.testing.assert_allclose(sum(p[0] for p in parts), loss, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([p[1][0] for p in parts]), d_hidden, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sum(p[1][1] for p in parts), d_head, rtol=1e-5, atol=1e-7)
