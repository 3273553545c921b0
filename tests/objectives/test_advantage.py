"""Advantages and surrogates against loops in float64 NumPy, and gradients against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from opsa_jax.config import ObjectiveConfig, PolicyConfig
from opsa_jax.objectives.advantage import advantages, clipped_surrogate, k3, return_to_go
from opsa_jax.objectives.objective import policy_loss
from opsa_jax.objectives.preference import dpo

GROUP = np.array([0, 1, 0, 1, 0, 2])  # prompt 2 has one response only


def batch(seed=0, R=7):
    rng = np.random.default_rng(seed)
    lengths_S = np.array([R, 3, 5, 1, 2, 4])
    mask_SR = (np.arange(R) < lengths_S[:, None]).astype(np.float32)
    statistics = {k: -rng.gamma(2.0, 2.0, (6, R)).astype(np.float32) for k in ("logp_teacher", "logp_student", "logp_reference")}
    return statistics, mask_SR, rng.choice([-1.0, 1.0], 6).astype(np.float32)


def found(cfg, statistics, mask_SR, outcome_S):
    arrays = {k: jnp.asarray(v) for k, v in statistics.items()}
    return np.asarray(advantages(cfg, arrays, jnp.asarray(mask_SR), jnp.asarray(GROUP), 3, jnp.asarray(outcome_S)))


def differences(statistics, mask_SR):
    return (statistics["logp_teacher"].astype(np.float64) - statistics["logp_student"]) * mask_SR


def per_token_normalised(statistics, mask_SR):
    """The released COPSD form."""
    x = np.clip(differences(statistics, mask_SR), -3, 5) + 0.02
    out = np.zeros_like(x)
    for g in set(GROUP):
        chosen = (g == GROUP)[:, None] & (mask_SR > 0)
        out[chosen] = (x[chosen] - x[chosen].mean()) / (x[chosen].std() + 1e-6)
    return out


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_copsd_paper_form(gamma):
    statistics, mask_SR, outcome_S = batch()
    r = differences(statistics, mask_SR)
    R = r.shape[1]
    returns = np.array([[sum(gamma ** (k - t) * r[s, k] for k in range(t, R)) for t in range(R)] for s in range(6)])
    expected = np.zeros_like(r)
    for g in set(GROUP):
        for t in range(R):
            rows = [s for s in range(6) if GROUP[s] == g and mask_SR[s, t]]
            if len(rows) > 1:
                x = returns[rows, t]
                expected[rows, t] = (x - x.mean()) / (x.std() + 1e-6)
    np.testing.assert_allclose(found(PolicyConfig("return", gamma=gamma), statistics, mask_SR, outcome_S), expected, rtol=1e-4, atol=1e-4)
    assert not expected[5].any(), "a prompt with one response has no advantage"


def test_copsd_released_form():
    statistics, mask_SR, outcome_S = batch()
    expected = per_token_normalised(statistics, mask_SR)
    np.testing.assert_allclose(found(PolicyConfig("token"), statistics, mask_SR, outcome_S), expected, rtol=1e-4, atol=1e-4)


def test_copsd_hybrid_form():
    statistics, mask_SR, outcome_S = batch()
    r = per_token_normalised(statistics, mask_SR)
    expected = outcome_S[:, None] * (1 + 0.3 * np.sign(outcome_S)[:, None] * r) * mask_SR
    np.testing.assert_allclose(found(PolicyConfig("outcome"), statistics, mask_SR, outcome_S), expected, rtol=1e-4, atol=1e-4)


def test_fire_exopd_and_reopold_forms():
    statistics, mask_SR, outcome_S = batch()
    q, p, ref = (statistics[k].astype(np.float64) for k in ("logp_teacher", "logp_student", "logp_reference"))
    expected = {
        "teacher": q - p,
        "exopd": 1.25 * (q - ref) - (p - ref),
        "floor": np.maximum(q - p, np.log(0.2 / 0.8)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found(PolicyConfig(name), statistics, mask_SR, outcome_S), value * mask_SR, rtol=1e-5, atol=1e-5)
    assert (expected["floor"] > expected["teacher"]).any()


def test_return_to_go_ends_with_the_response():
    r = jnp.array([[1.0, 1.0, 100.0]])
    assert return_to_go(r, jnp.array([[1, 1, 0]]), 1.0).tolist() == [[2.0, 1.0, 0.0]]


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_surrogate_value_and_gradient(clip):
    rng = np.random.default_rng(0)
    logp, old, advantage = rng.normal(size=50) * 0.3, rng.normal(size=50) * 0.3, rng.normal(size=50)
    x = torch.tensor(logp, requires_grad=True)
    ratio, a = torch.exp(x - torch.tensor(old)), torch.tensor(advantage)
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip) if clip else ratio
    expected = -torch.minimum(ratio * a, clipped * a)
    expected.sum().backward()
    args = [jnp.asarray(v, jnp.float32) for v in (logp, old, advantage)]
    value, pull = jax.vjp(lambda v: clipped_surrogate(v, *args[1:], clip), args[0])
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pull(jnp.ones(50))[0], x.grad.numpy(), rtol=1e-4, atol=1e-5)
    assert not clip or (np.abs(x.grad.numpy()) < 1e-12).any(), "some tokens are clipped"


def test_surrogate_has_the_gradient_of_the_reverse_kl_in_expectation():
    """Sum over all tokens v of p(v) * gradient of the sampled form at v = gradient of KL(p, q), at p = p_old."""
    rng = np.random.default_rng(1)
    logits, logq = jnp.asarray(rng.normal(size=8)), jax.nn.log_softmax(jnp.asarray(rng.normal(size=8)))

    def sampled(z):
        logp, old = jax.nn.log_softmax(z), jax.lax.stop_gradient(jax.nn.log_softmax(z))
        return jnp.sum(jnp.exp(old) * clipped_surrogate(logp, old, logq - old, 0.2))

    def exact(z):
        logp = jax.nn.log_softmax(z)
        return jnp.sum(jnp.exp(logp) * (logp - logq))

    np.testing.assert_allclose(jax.grad(sampled)(logits), jax.grad(exact)(logits), atol=1e-5)


def test_policy_loss_with_the_reference():
    statistics, mask_SR, _ = batch()
    rng = np.random.default_rng(2)
    logp = (statistics["logp_student"] + 0.05 * rng.normal(size=mask_SR.shape)).astype(np.float32)
    advantage, w = rng.normal(size=mask_SR.shape).astype(np.float32), (mask_SR / mask_SR.sum()).astype(np.float32)
    cfg = ObjectiveConfig(loss="policy", policy=PolicyConfig(reference_kl=0.5))
    x = torch.tensor(logp.astype(np.float64), requires_grad=True)
    old, ref, a = (torch.tensor(v.astype(np.float64)) for v in (statistics["logp_student"], statistics["logp_reference"], advantage))
    ratio = torch.exp(x - old)
    value = -torch.minimum(ratio * a, torch.clamp(ratio, 0.8, 1.2) * a) + 0.5 * (torch.exp(ref - x) - (ref - x) - 1)
    expected = (torch.tensor(w.astype(np.float64)) * value).sum()
    expected.backward()

    def ours(v):
        return policy_loss(cfg, v, w, advantage, statistics["logp_student"], statistics["logp_reference"])[0]

    loss, gradient = jax.value_and_grad(ours)(jnp.asarray(logp))
    assert float(loss) == pytest.approx(expected.item(), rel=1e-4)
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-3, atol=1e-4)


def test_k3_is_least_at_the_reference():
    x = jnp.linspace(-3, 0, 31)
    value = np.asarray(k3(x, jnp.float32(-1.0)))
    assert value.argmin() == 20 and value.min() == pytest.approx(0, abs=1e-5) and (value >= 0).all()


def test_dpo_value_and_gradient():
    rng = np.random.default_rng(3)
    logp, reference = -rng.gamma(5, 3, 8), -rng.gamma(5, 3, 8)
    x = torch.tensor(logp, requires_grad=True)
    gain = (x - torch.tensor(reference)).reshape(4, 2)
    expected = -torch.nn.functional.logsigmoid(0.3 * (gain[:, 0] - gain[:, 1]))
    expected.sum().backward()
    value, pull, margin = jax.vjp(lambda v: dpo(v, jnp.asarray(reference, jnp.float32), 0.3), jnp.asarray(logp, jnp.float32), has_aux=True)
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-4)
    np.testing.assert_allclose(pull(jnp.ones(4))[0], x.grad.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(margin, 0.3 * (gain[:, 0] - gain[:, 1]).detach().numpy(), rtol=1e-4)
