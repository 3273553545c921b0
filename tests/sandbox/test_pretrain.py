"""Packing loses nothing and does not change the loss; the check counts what it says."""

import dataclasses

import jax
import numpy as np
import pytest

from opsa_jax.models.params import init_params
from opsa_jax.sandbox import pretrain
from opsa_jax.sandbox.pretrain import Packed, architecture, loss, pack


def drawn(n, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 40, n)
    return [(rng.integers(10, 60, k).astype(np.int32), int(rng.integers(1, k - 1))) for k in lengths]


def unpack(packed: Packed):
    found = []
    for row in range(len(packed.tokens_BT)):
        for segment in range(1, packed.segments_BT[row].max() + 1):
            at = np.flatnonzero(packed.segments_BT[row] == segment)
            assert (np.diff(at) == 1).all() and (packed.positions_BT[row, at] == np.arange(len(at))).all()
            trained = packed.trained_BT[row, at]
            given = int((trained == 0).sum())
            assert (trained == (np.arange(len(at)) >= given)).all()
            found.append((tuple(packed.tokens_BT[row, at]), given))
    return sorted(found)


def test_every_example_is_packed_once_or_returned():
    encoded = drawn(60)
    packed, left = pack(encoded, rows=8, length=64)
    assert left
    assert sorted(unpack(packed) + [(tuple(ids), given) for ids, given in left]) == sorted((tuple(ids), given) for ids, given in encoded)
    assert (packed.trained_BT[packed.segments_BT == 0] == 0).all()


@pytest.fixture(scope="module")
def tiny():
    cfg = dataclasses.replace(architecture(64), d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32)
    return cfg, jax.tree.map(lambda x: x * 5, init_params(cfg, jax.random.key(0)))


def test_loss_of_packed_rows_is_that_of_separate_rows(tiny):
    cfg, params = tiny
    encoded = drawn(12)
    packed, left = pack(encoded, rows=6, length=64)
    alone, none = pack(encoded[:0], rows=12, length=64)
    alone = Packed(*(np.stack([pack([e], 1, 64)[0].__dict__[f.name][0] for e in encoded]) for f in dataclasses.fields(Packed)))
    assert not left and not none
    np.testing.assert_allclose(loss(params, cfg, packed), loss(params, cfg, alone), rtol=1e-5)


def test_loss_counts_trained_tokens_only(tiny):
    """Against float64 log-likelihoods computed outside jax from the hidden states."""
    from opsa_jax.models.transformer import forward

    cfg, params = tiny
    (ids, given), *_ = drawn(1)
    rows = pack([(ids, given)], 1, 64)[0]
    hidden = np.asarray(forward(params, cfg, rows.tokens_BT, rows.positions_BT, rows.segments_BT).hidden_BTD[0], np.float64)
    logits = hidden @ np.asarray(params.embed_VD, np.float64).T
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean([logp[t - 1, ids[t]] for t in range(given, len(ids))])
    np.testing.assert_allclose(loss(params, cfg, rows), expected, rtol=1e-5)


def test_optimizer_moves_every_weight_and_orthogonalises_matrices(tiny):
    """Muon's update of a matrix has singular values near one (times its scale); every weight gets some rule."""
    cfg, params = tiny
    rule = pretrain.optimizer(cfg, steps=100)
    state = rule.init(params)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    for _ in range(2):  # the first update of the warm-up has rate 0
        updates, state = rule.update(grads, state, params)
    assert all(np.abs(u).max() > 0 for u in jax.tree.leaves(updates))
    decayed = updates.layers.wo_LNHD + pretrain.PEAK_LR / 25 * pretrain.WEIGHT_DECAY * params.layers.wo_LNHD
    singular = np.linalg.svd(np.asarray(decayed[0]).reshape(-1, cfg.d_model), compute_uv=False)
    assert singular.max() / singular.min() < 2.5


def test_default_architecture_is_the_shipped_size():
    assert 0.7e6 < architecture(500).n_params < 1.0e6
