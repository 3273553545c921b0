"""Weights, filters and selections against NumPy, one response at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsa_jax.config import FilterConfig, WeightConfig
from opsa_jax.objectives.weights import fire_weights, kept_responses, masked_quantile, tip_scores, token_factors, top_share


def batch(seed=0, S=6, R=9):
    rng = np.random.default_rng(seed)
    lengths_S = np.array([R, 1, 4, 0, 7, 2])[:S]
    mask_SR = (np.arange(R) < lengths_S[:, None]).astype(np.float32)
    # What is outside the mask is rubbish on purpose.
    statistics = {name: rng.gamma(1.0, 2.0, (S, R)).astype(np.float32) for name in ("entropy_student", "entropy_teacher", "kl_reverse")}
    statistics["logp_teacher"] = -rng.gamma(1.0, 2.0, (S, R)).astype(np.float32)
    return {k: jnp.asarray(v) for k, v in statistics.items()}, jnp.asarray(mask_SR)


def numpy_fire(h_s, h_t, a, b):
    """Weights of the tokens of one response, as the paper writes them, in float64."""
    c = np.clip(1 - h_t / max(h_t.max(), 1e-6), 0, 1)
    u = np.clip(h_s / max(h_s.max(), 1e-6), 0, 1)
    w = (1 + a * c) * (1 + b * u)
    return w / w.mean()


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.5, 2.0), (0.0, 0.0)])
def test_fire_weights(a, b):
    statistics, mask_SR = batch()
    found_SR = np.asarray(fire_weights(statistics["entropy_student"], statistics["entropy_teacher"], mask_SR, a, b))
    for s, length in enumerate(np.asarray(mask_SR).sum(1).astype(int)):
        assert not found_SR[s, length:].any()
        if length:
            h_s, h_t = (np.asarray(statistics[k][s, :length], np.float64) for k in ("entropy_student", "entropy_teacher"))
            np.testing.assert_allclose(found_SR[s, :length], numpy_fire(h_s, h_t, a, b), rtol=1e-5)
            assert found_SR[s, :length].mean() == pytest.approx(1, abs=1e-5)


def test_fire_weights_of_entropies_that_are_all_zero():
    mask_SR = jnp.ones((1, 3))
    np.testing.assert_allclose(fire_weights(jnp.zeros((1, 3)), jnp.zeros((1, 3)), mask_SR), 1.0)


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 1.0])
def test_quantile_is_numpys(q):
    x = np.random.default_rng(1).normal(size=40).astype(np.float32)
    mask = np.random.default_rng(2).random(40) < 0.6
    assert float(masked_quantile(jnp.asarray(x), jnp.asarray(mask), q)) == pytest.approx(np.quantile(x[mask], q), abs=1e-5)
    assert float(masked_quantile(jnp.asarray(x), jnp.zeros(40), q)) == 0


def test_filter_is_a_quantile_of_the_whole_batch():
    statistics, mask_SR = batch()
    mask, logp = np.asarray(mask_SR), np.asarray(statistics["logp_teacher"], np.float64)
    scores = {s: (logp[s] * mask[s]).sum() / mask[s].sum() for s in range(6) if mask[s].any()}
    threshold = np.quantile(list(scores.values()), 0.3)
    expected = [float(s in scores and scores[s] >= threshold) for s in range(6)]
    found = kept_responses(FilterConfig("teacher_logp", 0.3), statistics["logp_teacher"], mask_SR)
    assert found.tolist() == expected and 0 < sum(expected) < len(scores)
    assert kept_responses(FilterConfig(), statistics["logp_teacher"], mask_SR).tolist() == [1, 1, 1, 0, 1, 1]


def test_the_published_filter_in_micro_batches_of_one_keeps_everything():
    statistics, mask_SR = batch()
    cfg = FilterConfig("teacher_logp", 0.2)
    kept = [float(kept_responses(cfg, statistics["logp_teacher"][s : s + 1], mask_SR[s : s + 1])[0]) for s in range(6)]
    assert kept == [1, 1, 1, 0, 1, 1]


def test_tip_scores_and_selection():
    statistics, mask_SR = batch()
    on = np.asarray(mask_SR) > 0
    h, g = (np.asarray(statistics[k], np.float64) for k in ("entropy_student", "kl_reverse"))
    h, g = ((x - x[on].min()) / (x[on].max() - x[on].min()) for x in (h, g))
    expected = h + g - h * g
    found_SR = tip_scores(statistics["entropy_student"], statistics["kl_reverse"], mask_SR)
    np.testing.assert_allclose(np.asarray(found_SR)[on], expected[on], atol=1e-5)
    weights_SR = np.asarray(top_share(found_SR, mask_SR, 0.5))
    chosen = weights_SR > 0
    assert not chosen[~on].any()
    assert chosen.sum() == np.ceil(on.sum() / 2) or chosen.sum() == on.sum() // 2 + 1
    assert expected[chosen].min() >= expected[on & ~chosen].max()
    assert weights_SR[on].mean() == pytest.approx(1, abs=1e-5)


def test_weights_that_begin_later():
    statistics, mask_SR = batch()
    cfg = WeightConfig("entropy", keep=0.3, after=0.5)
    early, late = (token_factors(cfg, statistics, mask_SR, jnp.float32(p)) for p in (0.49, 0.5))
    np.testing.assert_array_equal(early, mask_SR)
    assert 0 < (np.asarray(late) > 0).sum() < np.asarray(mask_SR).sum()


def test_window_ends_and_decays():
    _, mask_SR = batch()
    found_SR = token_factors(WeightConfig("window", first=3, decay=0.5), {}, mask_SR, jnp.float32(0))
    np.testing.assert_allclose(found_SR[0], [1, 0.5, 0.25, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(found_SR[1], [1, 0, 0, 0, 0, 0, 0, 0, 0])


def test_weights_do_not_depend_on_the_batch_order():
    statistics, mask_SR = batch()
    order = np.random.default_rng(3).permutation(6)
    for kind in ("fire", "tip", "entropy"):
        cfg = WeightConfig(kind)
        found = token_factors(cfg, statistics, mask_SR, jnp.float32(1))
        moved = token_factors(cfg, jax.tree.map(lambda x: x[order], statistics), mask_SR[order], jnp.float32(1))
        np.testing.assert_allclose(moved, found[order], rtol=1e-5)
