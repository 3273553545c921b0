"""The engine gives, row by row, what the sampler gives; and its bookkeeping adds up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import HOT, STOPS, on_mesh, responses
from tiny_models import padded, tiny

from opsa_jax.rollout import engine as engine_module
from opsa_jax.rollout.engine import Engine
from opsa_jax.rollout.sampler import row_keys, sample

R, N = 20, 37


def prompts() -> list[list[int]]:
    """Lengths 1 to 60: buckets 32, 48 and 64."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 64, 1 + (17 * i) % 60).tolist() for i in range(N)]


def keys() -> jax.Array:
    return row_keys(jax.random.key(3), "test", 0, jnp.arange(N), jnp.zeros(N, jnp.int32))


@pytest.fixture(scope="module")
def expected():
    params, cfg = tiny()
    rollout = sample(params, cfg, HOT, STOPS, R, *padded(prompts(), 60), keys())
    found = responses(rollout)
    assert len({len(r) for r in found}) > 5
    return found, np.asarray(rollout.logp_BR), np.asarray(rollout.finished_B).tolist()


def check(found, expected):
    ids, logp, finished = expected
    assert [r.ids.tolist() for r in found] == ids
    assert [r.finished for r in found] == finished
    for r, row in zip(found, logp, strict=True):
        np.testing.assert_allclose(r.logp, row[: len(r.ids)], atol=1e-4)


@pytest.mark.parametrize("slots", [8, 64])
def test_same_as_the_sampler_row_by_row(expected, monkeypatch, slots):
    """With 8 slots they are refilled again and again, rows move, and the cache grows; with 64 nothing of that happens."""
    monkeypatch.setattr(engine_module, "_SMALLEST_CACHE", 64)
    monkeypatch.setattr(engine_module, "_SLACK", 5)
    params, cfg = tiny()
    engine = Engine(params, cfg, HOT, STOPS, R, slots=slots)
    seen = []
    check(engine.run(prompts(), keys(), progress=lambda done, total: seen.append((done, total))), expected)
    assert seen == [(i + 1, N) for i in range(N)]
    s, tokens = engine.stats, sum(map(len, expected[0]))
    assert (s.prompts, s.tokens, s.finished) == (N, tokens, sum(expected[2]))
    assert s.slot_steps % slots == 0 and s.slot_steps >= tokens and s.wasted == 1 - tokens / s.slot_steps
    kinds = {p[0] for p in s.programs}
    assert kinds == {"prefill", "insert", "decode", "move"}
    if slots == 8:
        assert {p[2] for p in s.programs if p[0] == "decode"} == {64, 89}  # grown once, to 64 + R + slack
        assert s.slot_steps < 0.75 * 5 * 8 * R  # five batches that each wait for their longest row


def test_same_on_a_mesh_and_split_over_it(expected):
    """Four shards of the batch and two of the heads; a prompt alone fills up to four slots."""
    params, cfg = tiny()
    mesh, params = on_mesh(params, cfg, (2, 2, 2))
    with jax.set_mesh(mesh):
        engine = Engine(params, cfg, HOT, STOPS, R, slots=7)
        batch = engine_module._Batch(engine, prompts(), np.asarray(jax.random.key_data(keys())))
        found = {}
        while batch.busy:
            batch.refill()
            batch.decode()
            found |= dict(batch.collect())
        assert batch.B == 8 and batch.group == 4
        k = batch.slots.cache.k_LBKSH
        print(k.sharding)
        assert k.sharding.shard_shape(k.shape) == (2, 2, 1, *k.shape[3:])
    check([found[i] for i in range(N)], expected)
