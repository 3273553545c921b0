"""Log-probabilities in chunks: value and gradient against torch in float64, any chunk size, any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from opsa_jax.config import MeshConfig
from opsa_jax.objectives.logp import chunked_logp
from opsa_jax.parallel.mesh import make_mesh

N, D, V = 13, 6, 29


def data(seed=0):
    rng = np.random.default_rng(seed)
    h_ND, head_DV = rng.normal(size=(N, D)), rng.normal(size=(D, V))
    use_N, ids_N, g_N = (rng.random(N) < 0.7) * 1.0, rng.integers(0, V, N), rng.normal(size=N)
    return tuple(jnp.asarray(x, jnp.int32 if x.dtype == np.int64 else jnp.float32) for x in (h_ND, head_DV, use_N, ids_N, g_N))


def reference(h_ND, head_DV, use_N, ids_N, g_N, temperature=1.0, vocabulary=V):
    """(logp, entropy, d hidden, d head) of sum(g * logp) from materialised float64 logits."""
    h, head = (torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (h_ND, head_DV))
    use, g = (torch.tensor(np.asarray(x, np.float64)) for x in (use_N, g_N))
    logp_NV = torch.log_softmax((h @ head)[:, :vocabulary] / temperature, -1)
    logp = use * logp_NV.gather(-1, torch.tensor(np.asarray(ids_N, np.int64))[:, None])[:, 0]
    (g * logp).sum().backward()
    entropy = use * -(logp_NV.exp() * logp_NV).sum(-1)
    return [x.detach().numpy() for x in (logp, entropy, h.grad, head.grad)]


def ours(h_ND, head_DV, use_N, ids_N, g_N, **options):
    def total(h, head):
        logp_N, entropy_N = chunked_logp(h, head, use_N, ids_N, **{"chunk": 4, "train_head": True} | options)
        return jnp.sum(g_N * logp_N), (logp_N, entropy_N)

    (d_hidden, d_head), (logp_N, entropy_N) = jax.grad(total, (0, 1), has_aux=True)(h_ND, head_DV)
    return logp_N, entropy_N, d_hidden, d_head


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"chunk": 64}, {"temperature": 0.6}, {"vocabulary": 23}])
def test_value_and_gradient(options):
    args = data()
    args = (*args[:3], args[3] % options.get("vocabulary", V), args[4])
    compare = {k: v for k, v in options.items() if k != "chunk"}
    for found, expected in zip(ours(*args, **options), reference(*args, **compare), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_unused_rows_do_not_matter():
    h_ND, head_DV, use_N, ids_N, g_N = data()
    broken_ND = jnp.where(use_N[:, None] > 0, h_ND, jnp.nan)
    for found, expected in zip(ours(broken_ND, head_DV, use_N, ids_N, g_N), ours(h_ND, head_DV, use_N, ids_N, g_N), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_frozen_head_gets_no_gradient():
    args = data()
    found = ours(*args, train_head=False)
    assert not np.any(found[3]) and np.any(found[2])


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_any_mesh(shape):
    args = data()
    expected = ours(*args)
    with jax.set_mesh(make_mesh(MeshConfig(*shape))):
        found = jax.jit(ours)(*args)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
