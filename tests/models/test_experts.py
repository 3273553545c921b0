"""Mixture-of-experts feed-forward against a dense float64 reference, in value and gradient, whatever the blocks, the load and the mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsa_jax.config import MeshConfig
from opsa_jax.models import experts
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.experts import assign, block_rows, experts_forward
from opsa_jax.models.params import Layers, declare, map_weights
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.parallel.rules import named

CFG = DecoderConfig(
    family="qwen3_moe", vocab_size=64, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=12, qk_norm=True,
    n_experts=8, experts_per_token=3, normalize_router=True,
)  # fmt: skip
NAMES = ("router_LDE", "gate_LEDF", "up_LEDF", "down_LEFD")


def weights(cfg=CFG, seed=0) -> dict[str, np.ndarray]:
    """Of one layer, float64."""
    rng, layers = np.random.default_rng(seed), declare(cfg).layers
    return {name: rng.standard_normal(getattr(layers, name).shape[1:]) * 0.5 for name in NAMES}


def layer_of(w) -> Layers:
    return Layers(*[None] * 6, **{name: jnp.asarray(x, jnp.float32) for name, x in w.items()})


def tokens(rows=4, columns=8, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns, CFG.d_model))


def reference(h_BTD, router_LDE, gate_LEDF, up_LEDF, down_LEFD, cfg=CFG):
    """Every expert on every token, and a matrix of weights that is zero but for the chosen ones."""
    probs = jax.nn.softmax(h_BTD @ router_LDE, axis=-1)
    kth = jnp.sort(probs, axis=-1)[..., -cfg.experts_per_token, None]
    chosen = jnp.where(probs >= kth, probs, 0)
    if cfg.normalize_router:
        chosen = chosen / chosen.sum(-1, keepdims=True)
    gate, up = (jnp.einsum("btd,edf->btef", h_BTD, w) for w in (gate_LEDF, up_LEDF))
    return jnp.einsum("btef,efd,bte->btd", jax.nn.silu(gate) * up, down_LEFD, chosen)


def value_and_gradients(forward, h, w):
    """A weighted sum of the outputs, so that every output counts differently."""
    c = np.cos(np.arange(h.size)).reshape(h.shape)

    def loss(h, w):
        out = forward(h, w)
        return jnp.sum(out * c.astype(out.dtype)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(h, w)
    return [np.asarray(x) for x in jax.tree.leaves((out, grads))]


def ours(h, w, cfg=CFG):
    return experts_forward(h, Layers(*[None] * 6, **w), cfg)


def expected(h, w, cfg=CFG):
    with jax.enable_x64(True):
        return value_and_gradients(lambda h, w: reference(h, **w, cfg=cfg), jnp.asarray(h), {k: jnp.asarray(x) for k, x in w.items()})


def single(h, w):
    return jnp.asarray(h, jnp.float32), {k: jnp.asarray(x, jnp.float32) for k, x in w.items()}


def close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("normalize", [True, False])
def test_values_and_gradients(normalize):
    cfg = dataclasses.replace(CFG, normalize_router=normalize)
    h, w = tokens(), weights()
    close(value_and_gradients(functools.partial(ours, cfg=cfg), *single(h, w)), expected(h, w, cfg))


@pytest.mark.parametrize("m", [1, 4, 64])
def test_the_size_of_blocks_does_not_matter(monkeypatch, m):
    h, w = tokens(), weights()
    monkeypatch.setattr(experts, "block_rows", lambda choices, n: m)
    close(value_and_gradients(ours, *single(h, w)), expected(h, w))


def test_one_expert_may_take_every_token():
    """Experts 0, 1 and 2 are chosen by all, the others by none: their weights get gradients of exactly zero."""
    h, w = np.abs(tokens()), weights()
    w["router_LDE"] = np.zeros_like(w["router_LDE"]) + np.array([3.0, 2.0, 1.0, 0, 0, 0, 0, 0])
    got = value_and_gradients(ours, *single(h, w))
    want = expected(h, w)
    close(got, want)
    gate = got[3]  # leaves: out, dh, then the weights by name: down, gate, ...
    assert np.abs(gate[:3]).max() > 0 and not gate[3:].any()


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 4), (1, 8, 1)])
def test_on_a_mesh(shape):
    """Tokens over data and fsdp, every expert's width over tensor; gradients come back complete."""
    h, w = tokens(rows=8), weights()
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
    declared = declare(CFG).layers
    h32, w32 = single(h, w)
    w32 = {name: jax.device_put(x, named(mesh, *getattr(declared, name).axes[1:])) for name, x in w32.items()}
    with jax.set_mesh(mesh):
        got = value_and_gradients(ours, jax.device_put(h32, named(mesh, "batch", None, None)), w32)
    close(got, expected(h, w))


def test_a_token_does_not_depend_on_the_others():
    h, layer = jnp.asarray(tokens(), jnp.float32), layer_of(weights())
    alone = jnp.stack([experts_forward(h[b : b + 1, t : t + 1], layer, CFG)[0, 0] for b in range(2) for t in range(3)])
    together = experts_forward(h, layer, CFG)[:2, :3].reshape(6, -1)
    np.testing.assert_allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize("choices", ["even", "one", "random", "few"])
def test_every_choice_has_its_own_slot(choices):
    rng, N, k, E, m = np.random.default_rng(0), 40, 3, 10, 4
    chosen = {
        "even": (np.arange(N)[:, None] * k + np.arange(k)) % E,
        "one": np.tile([7, 2, 9], (N, 1)),
        "random": np.stack([rng.permutation(E)[:k] for _ in range(N)]),
        "few": np.stack([rng.permutation(E)[:k] for _ in range(2)]),
    }[choices]
    blocks = jax.tree.map(np.asarray, assign(jnp.asarray(chosen), E, m))
    slots = blocks.slot_Nk.reshape(-1)
    assert len(set(slots)) == slots.size
    for row, picks in enumerate(chosen):
        for j, expert in enumerate(picks):
            b, place = divmod(blocks.slot_Nk[row, j], m)
            assert b < blocks.used and blocks.expert_b[b] == expert and blocks.row_bm[b, place] == row
    assert (blocks.row_bm == len(chosen)).sum() == blocks.row_bm.size - slots.size  # all others are empty
    assert blocks.used == sum(-(-(chosen == e).sum() // m) for e in range(E))  # and none is computed that has no row


def test_work_and_memory_follow_the_experts_of_a_token_not_their_number():
    """1,024 tokens, 2 experts each: with 4 or with 64 experts, the buffers of a pass differ by less than the rows that fill up blocks."""

    def peak(n_experts):
        cfg = dataclasses.replace(CFG, d_model=64, d_ff=32, n_experts=n_experts, experts_per_token=2)
        layer = Layers(*[None] * 6, **{n: jax.ShapeDtypeStruct(getattr(declare(cfg).layers, n).shape[1:], jnp.float32) for n in NAMES})
        h = jax.ShapeDtypeStruct((4, 256, 64), jnp.float32)
        program = jax.jit(lambda h, layer: experts_forward(h, layer, cfg)).lower(h, layer).compile()
        return program.memory_analysis().temp_size_in_bytes

    copies = 4 * 1024 * 2 * 64  # bytes of every row once for each of its experts
    assert block_rows(2048, 4) == 512 and block_rows(2048, 64) == 32
    assert peak(64) < 6 * copies  # a copy of every row for each of 64 experts would be 32 of these
    assert peak(64) < 1.5 * peak(4)


def test_declared_weights_are_sharded_as_said():
    declared = declare(CFG).layers
    assert declared.gate_LDF is None and declared.gate_LEDF.stack == (1, 8)
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    shards = map_weights(lambda w: named(mesh, *w.axes).shard_shape(w.shape), {n: getattr(declared, n) for n in NAMES})
    assert shards == {"router_LDE": (1, 8, 8), "gate_LEDF": (1, 8, 8, 6), "up_LEDF": (1, 8, 8, 6), "down_LEFD": (1, 8, 6, 8)}
