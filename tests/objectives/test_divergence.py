"""Formulas against NumPy and torch in float64, and what they promise: exact zeros, stationary points, no overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import DIVERGENCES, numpy_divergence, numpy_softmax, torch_divergence

from opsa_jax.config import ObjectiveConfig
from opsa_jax.objectives.divergence import divergence, forward_kl, jsd, mix, reverse_kl, subset_divergence


@pytest.fixture(autouse=True)
def no_silent_broadcast():
    with jax.numpy_rank_promotion("raise"):
        yield


def logits(scale: float, seed: int = 0, shape=(4, 9)):
    """Student's and teacher's, float32."""
    rng = np.random.default_rng(seed)
    return tuple(np.float32(scale * rng.normal(size=shape)) for _ in range(2))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_values(scale):
    s_NV, t_NV = logits(scale)
    logp_s, logp_t = jax.nn.log_softmax(s_NV), jax.nn.log_softmax(t_NV)
    found = {
        "forward": forward_kl(logp_s, logp_t),
        "reverse": reverse_kl(logp_s, logp_t),
        "mix": mix(logp_s, logp_t, 0.3),
        "jsd": jsd(logp_s, logp_t, 0.3),
    }
    for name, value_N in found.items():
        cfg = ObjectiveConfig(divergence=name, mix=0.3, beta=0.3)
        expected_N = [numpy_divergence(cfg, numpy_softmax(s), numpy_softmax(t)) for s, t in zip(np.float64(s_NV), np.float64(t_NV))]
        np.testing.assert_allclose(value_N, expected_N, rtol=3e-6, atol=3e-7)
        np.testing.assert_array_equal(value_N, divergence(cfg, logp_s, logp_t))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_gradient_in_logits(name, scale):
    cfg = ObjectiveConfig(divergence=name, mix=0.3, beta=0.3)
    s_NV, t_NV = logits(scale)
    found_NV = jax.grad(lambda s: divergence(cfg, jax.nn.log_softmax(s), jax.nn.log_softmax(t_NV)).sum())(jnp.asarray(s_NV))
    s = torch.tensor(np.float64(s_NV), requires_grad=True)
    torch_divergence(cfg, s, torch.tensor(np.float64(t_NV))).sum().backward()
    np.testing.assert_allclose(found_NV, s.grad.numpy(), rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_equal_distributions_give_exactly_nothing(name, scale):
    """Not 1e-9: Adam would make a full step of it."""
    cfg = ObjectiveConfig(divergence=name, mix=0.3, beta=0.3)
    s_NV = jnp.asarray(logits(scale)[0])
    value, gradient = jax.value_and_grad(lambda s: divergence(cfg, jax.nn.log_softmax(s), jax.nn.log_softmax(s_NV)).sum())(s_NV)
    assert value == 0 and not np.any(gradient)


@pytest.mark.parametrize("gap", [1e3, 1e5, 1e30])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_far_apart_is_finite(name, gap):
    """Student and teacher sure of different tokens; 1e30 is a token that is not there. JSD stays below its bound."""
    cfg = ObjectiveConfig(divergence=name, beta=0.5)
    s_V, t_V = jnp.array([0.0, -gap, -1.0]), jnp.array([-gap, 0.0, -1.0])
    value, gradient_V = jax.value_and_grad(lambda s: divergence(cfg, jax.nn.log_softmax(s), jax.nn.log_softmax(t_V)))(s_V)
    assert np.isfinite(value) and np.all(np.isfinite(gradient_V)) and value >= 0
    if name == "jsd":
        assert 0.3 < value < np.log(2)


def test_stationary_points_on_a_part_of_the_vocabulary():
    """SafeSteer's raw reverse sum is least at S = T / e; the generalised one, and renormalised ratios, at S = T."""
    logp_t_K = jnp.log(jnp.array([0.3, 0.2, 0.1]))

    def slope_K(subset, logp_s_K, divergence="reverse"):
        cfg = ObjectiveConfig(divergence=divergence, support="teacher_topk", subset=subset)
        return np.asarray(jax.grad(lambda s: subset_divergence(cfg, s, logp_t_K))(logp_s_K))

    np.testing.assert_allclose(slope_K("raw", logp_t_K - 1), 0, atol=1e-7)
    assert np.all(slope_K("raw", logp_t_K) > 0.05), "at S = T the raw sum pushes the student's mass away"
    assert np.all(slope_K("raw", logp_t_K, "forward") < -0.05), "and the raw forward sum pulls it in without end"
    for name in DIVERGENCES:
        assert not np.any(slope_K("generalised", logp_t_K, name))
        np.testing.assert_allclose(slope_K("renormalise", logp_t_K + 0.5, name), 0, atol=1e-7)
    assert np.all(slope_K("generalised", logp_t_K - 1) < -0.03)


def test_stationary_point_with_a_tail():
    """k tokens and a rest: least at S = T, and only there."""
    logp_t_K, rest = jnp.log(jnp.array([0.3, 0.2, 0.1])), jnp.log(jnp.float32(0.4))
    for name in DIVERGENCES:
        cfg = ObjectiveConfig(divergence=name, support="teacher_topk", subset="tail")
        slopes = jax.grad(lambda s, r: subset_divergence(cfg, s, logp_t_K, r, rest), argnums=(0, 1))  # noqa: B023
        assert not any(np.any(g) for g in slopes(logp_t_K, rest))
        assert all(np.all(np.abs(g) > 1e-3) for g in slopes(logp_t_K - 0.2, rest + 0.2))
