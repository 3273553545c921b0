"""Drift against NumPy: nothing moves for identical models, a planted shift is found along and across the components."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import wasserstein_distance

sys.path.insert(0, str(Path(__file__).parents[1] / "teachers"))

from decoder_numpy import CFG, decoder, random_params

from opsa_jax.analysis.drift import check_layer, drift, hidden_states, wasserstein
from opsa_jax.analysis.token_kl import View
from opsa_jax.errors import UserError

RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(0, 48, n).tolist() for n in (4, 9, 2, 6, 3)]
RESPONSES = [RNG.integers(0, 48, n).tolist() for n in (5, 1, 8, 2, 3)]


@pytest.mark.parametrize("layer", [-1, 0, 2])
@pytest.mark.parametrize("answered", [False, True])
def test_states_against_float64(layer, answered):
    params = random_params()
    found = hidden_states(View(params, CFG, PROMPTS), RESPONSES if answered else None, layer, batch=2)
    assert found.shape == (5, CFG.d_model)

    head = np.linalg.pinv(np.asarray(params.head_DV, np.float64))
    for i, prompt in enumerate(PROMPTS):
        inputs, logits = decoder(params, CFG, [*prompt, *(RESPONSES[i] if answered else [])])
        # The final states are what the head (of full rank) made the logits of.
        states = inputs[layer] if layer >= 0 else logits @ head
        expected = states[len(prompt) :].mean(0) if answered else states[-1]
        np.testing.assert_allclose(found[i], expected, rtol=2e-3, atol=2e-4)


def test_steering_moves_the_states():
    params = random_params()
    steer_LD = jnp.zeros((CFG.n_layers, CFG.d_model)).at[0].set(0.5)
    still, moved = (hidden_states(View(params, CFG, PROMPTS, s), None, 1) for s in (None, steer_LD))
    assert np.abs(still - moved).max() > 0.1


def test_identical_models_do_not_drift():
    x = np.random.default_rng(0).normal(size=(40, 6))
    found = drift({"base": x, "same": x.copy()})["models"]["same"]
    assert found["distance"] == found["displacement"] == 0 and found["wasserstein"] == [0, 0]
    params = random_params()
    a, b = (hidden_states(View(params, CFG, PROMPTS), RESPONSES) for _ in range(2))
    assert drift({"base": a, "same": b})["models"]["same"]["displacement"] == 0


def test_a_planted_shift_is_found_in_units_of_the_base():
    rng = np.random.default_rng(1)
    scales = np.array([5.0, 3.0, 0.1, 0.1])
    base = rng.normal(size=(2000, 4)) * scales
    shift = np.array([2.0, 0, 0, 0]) * base[:, 0].std()
    found = drift({"base": base, "moved": base + shift, "across": base + np.array([0, 0, 4.0, 0]), "wide": base * np.array([1, 2, 1, 1])})
    spread = np.sqrt((base - base.mean(0)).var(0).sum())
    moved, across, wide = (found["models"][name] for name in ("moved", "across", "wide"))
    assert moved["distance"] == pytest.approx(np.linalg.norm(shift) / spread) == pytest.approx(moved["displacement"])
    assert moved["wasserstein"][0] == pytest.approx(2.0, rel=0.01) and moved["wasserstein"][1] < 0.1
    # Out of the plane of the components: only the distance over all dimensions sees it.
    assert max(across["wasserstein"]) < 0.1 and across["distance"] == pytest.approx(4 / spread)
    # Same mean, other spread: only the distributions see it.
    assert wide["distance"] < 0.05 and wide["wasserstein"][1] > 0.5
    assert sum(found["explained"]) > 0.99 and found["explained"][0] > found["explained"][1]
    points = np.array(found["models"]["base"]["points"])
    np.testing.assert_allclose(points.std(0), 1, rtol=1e-9)


def test_wasserstein_is_scipys():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=30), rng.normal(1, 2, size=30)
    assert wasserstein(a, b) == pytest.approx(wasserstein_distance(a, b))


def test_bad_input():
    with pytest.raises(UserError, match="at least 3"):
        drift({"base": np.ones((2, 3))})
    with pytest.raises(UserError, match="same state for every prompt"):
        drift({"base": np.ones((5, 3))})
    with pytest.raises(UserError, match=r"--layer -2: allowed: 0 to 3"):
        check_layer(-2, 4)
