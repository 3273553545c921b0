"""The chunked loss against a materialised float64 reference, and everything that must not change its result."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import DIVERGENCES, SUPPORTS, numpy_token, torch_loss

from opsa_jax.config import MeshConfig, ObjectiveConfig
from opsa_jax.objectives import chunked
from opsa_jax.objectives.chunked import STATISTICS, chunked_divergence
from opsa_jax.parallel.mesh import make_mesh


@pytest.fixture(autouse=True)
def no_silent_broadcast():
    with jax.numpy_rank_promotion("raise"):
        yield


def inputs(N=13, D=5, V=23, V_t=None, D_t=4, seed=0, scale=1.0):
    """(hs_ND, head_s_DV, ht_ND, head_t_DV, w_N, ids_N); about a third of the weights is zero, and one is negative."""
    rng = np.random.default_rng(seed)
    shapes = ((N, D), (D, V), (N, D_t), (D_t, V_t or V))
    arrays = [jnp.asarray(scale * rng.normal(size=s), jnp.float32) for s in shapes]
    w_N = np.where(rng.random(N) < 0.35, 0, rng.random(N) + 0.1)
    w_N[N // 2] = -0.3
    return (*arrays, jnp.asarray(w_N, jnp.float32), jnp.asarray(rng.integers(0, min(V, V_t or V), N), jnp.int32))


@functools.partial(jax.value_and_grad, argnums=(1, 2), has_aux=True)
def value_and_gradients(cfg, *data):
    return chunked_divergence(cfg, *data, train_head=True)


step = jax.jit(value_and_gradients, static_argnums=0)
# With the optimisations that tests leave out (tests/conftest.py): exact zeros must survive fused multiply-add.
optimised = jax.jit(value_and_gradients, static_argnums=0, compiler_options={"xla_backend_optimization_level": 3})


def compute(cfg, *data):
    """((loss, statistics), (hidden gradient, head gradient)), on the host."""
    return jax.device_get(step(cfg, *data))


@pytest.fixture
def eager():
    """For many configurations of the same shapes: operation by operation they take a tenth of the time that compiling takes."""
    with jax.disable_jit():
        yield


def assert_close(found, expected, rtol=2e-6, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


@pytest.mark.parametrize(("support", "subset"), SUPPORTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_objective(divergence, support, subset, eager):
    """Value and gradients in hidden states and head, at a temperature, three chunks of which the last is part full."""
    cfg = ObjectiveConfig(divergence=divergence, mix=0.3, beta=0.3, support=support, subset=subset, k=6, temperature=1.4, chunk=4)
    data = inputs()
    (loss, statistics), gradients = compute(cfg, *data)
    *arrays, w_N, _ = (np.float64(x) for x in data)
    expected_N = [numpy_token(cfg, h @ arrays[1], t @ arrays[3]) if w else 0.0 for h, t, w in zip(arrays[0], arrays[2], w_N)]
    np.testing.assert_allclose(statistics["divergence"], expected_N, rtol=2e-5, atol=1e-6)
    expected_loss, *expected_gradients = torch_loss(cfg, *arrays, w_N)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(loss, np.dot(w_N, expected_N), rtol=1e-5)
    assert_close(gradients, tuple(expected_gradients), rtol=2e-5, atol=3e-6)


def test_statistics():
    cfg = ObjectiveConfig(support="teacher_topk", k=3, temperature=1.4, chunk=4)
    data = inputs()
    (_, found), _ = compute(cfg, *data)
    assert set(found) == set(STATISTICS)
    *arrays, w_N, ids_N = (np.asarray(x) for x in data)
    for n in range(len(w_N)):
        s_V, t_V = (np.float64(h[n]) @ np.float64(head) / 1.4 for h, head in (arrays[:2], arrays[2:]))
        logp_V, logq_V = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (s_V, t_V))
        p_V, q_V = np.exp(logp_V), np.exp(logq_V)
        expected = {
            "kl_forward": q_V @ (logq_V - logp_V),
            "kl_reverse": p_V @ (logp_V - logq_V),
            "entropy_student": -p_V @ logp_V,
            "entropy_teacher": -q_V @ logq_V,
            "logp_student": logp_V[ids_N[n]],
            "logp_teacher": logq_V[ids_N[n]],
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][n], value if w_N[n] else 0, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("subset", ["raw", "generalised", "renormalise", "tail"])
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_fixed_token_set(divergence, subset, eager):
    """SafeSteer's support: the same tokens at every position, value and gradients against torch."""
    cfg = ObjectiveConfig(divergence=divergence, support="tokens", subset=subset, chunk=4)
    tokens_K, data = np.array([17, 2, 9, 5]), inputs()
    (loss, _), gradients = compute(cfg, *data, jnp.asarray(tokens_K, jnp.int32))
    *arrays, w_N, _ = (np.float64(x) for x in data)
    expected_loss, *expected = torch_loss(cfg, *arrays, w_N, tokens_K=tokens_K)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_close(gradients, tuple(expected), rtol=1e-4, atol=1e-5)


def test_an_entropy_floor_drops_tokens_of_a_sure_teacher(eager):
    """EOPD: forward KL on the teacher's top k, only where its entropy reaches the floor."""
    data = inputs(scale=0.8)
    *arrays, w_N, _ = (np.float64(x) for x in data)
    logq_NV = torch.log_softmax(torch.tensor(arrays[2] @ arrays[3]), -1)
    entropy_N = -(logq_NV.exp() * logq_NV).sum(-1).numpy()
    floor = float(np.median(entropy_N))
    cfg = ObjectiveConfig(divergence="forward", support="teacher_topk", k=6, entropy_floor=floor, chunk=4)
    (loss, statistics), gradients = compute(cfg, *data)
    unsure_N = entropy_N >= floor
    expected_loss, *expected = torch_loss(cfg, *arrays, w_N * unsure_N)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_close(gradients, tuple(expected), rtol=1e-4, atol=1e-5)
    assert 0 < unsure_N.sum() < len(unsure_N) and not np.any(statistics["divergence"][~unsure_N])


@pytest.mark.parametrize("chunk", [1, 64])
def test_chunk_size_does_not_matter(chunk):
    assert_close(compute(ObjectiveConfig(chunk=chunk), *inputs()), compute(ObjectiveConfig(chunk=4), *inputs()))


def test_rows_without_weight_do_not_matter():
    """Whatever is in them, NaN included, and wherever they are; and rows may come in any order."""
    cfg = ObjectiveConfig(chunk=4)
    hs, head_s, ht, head_t, w, ids = inputs()
    (loss, statistics), (d_hidden, d_head) = compute(cfg, hs, head_s, ht, head_t, w, ids)
    order = np.random.default_rng(1).permutation(len(w))
    poisoned = [jnp.where(w[:, None] == 0, jnp.nan, x)[order] for x in (hs, ht)]
    bad_ids = jnp.where(w == 0, 10**6, ids)[order]
    expected = (loss, {name: x[order] for name, x in statistics.items()}), (d_hidden[order], d_head)
    assert_close(compute(cfg, poisoned[0], head_s, poisoned[1], head_t, w[order], bad_ids), expected)
    assert np.any(np.asarray(w) == 0) and not np.any(d_hidden[np.asarray(w) == 0])


def test_no_weight_at_all():
    hs, head_s, ht, head_t, w, ids = inputs()
    result = compute(ObjectiveConfig(chunk=4), hs * jnp.nan, head_s, ht, head_t, w * 0, ids)
    assert not any(np.any(x) for x in jax.tree.leaves(result)), "zero everywhere, and no NaN"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_teacher_that_is_the_student(name):
    """Loss, both KL and both gradients are exactly zero, also with sharp distributions."""
    hs, head_s, _, _, w, ids = inputs(scale=3.0)
    cfg = ObjectiveConfig(divergence=name, mix=0.3, beta=0.3, temperature=1.4, chunk=4)
    (loss, statistics), gradients = optimised(cfg, hs, head_s, hs, head_s, w, ids)
    assert loss == 0 and not any(np.any(statistics[k]) for k in ("divergence", "kl_forward", "kl_reverse"))
    assert not np.any(gradients[0]) and not np.any(gradients[1])
    assert np.any(statistics["entropy_student"])


@pytest.mark.parametrize(("V", "V_t"), [(23, 27), (27, 23)])
def test_padded_vocabularies(V, V_t):
    """Only the common prefix counts, and the head's gradient has the head's shape."""
    data = inputs(V=V, V_t=V_t)
    (loss, _), gradients = compute(ObjectiveConfig(chunk=4), *data)
    expected_loss, *expected = torch_loss(ObjectiveConfig(), *data[:5])
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_close(gradients, tuple(expected), rtol=2e-5)
    assert gradients[1].shape == (5, V) and not np.any(gradients[1][:, 23:])


def test_top_k_wider_than_the_vocabulary_is_the_full_vocabulary(eager):
    full = compute(ObjectiveConfig(chunk=4), *inputs())
    for subset in ("raw", "tail"):
        assert_close(compute(ObjectiveConfig(support="teacher_topk", subset=subset, k=99, chunk=4), *inputs()), full, rtol=1e-5)


@pytest.mark.parametrize("support", ["teacher_topk", "student_topk"])
def test_a_tail_of_tiny_mass(support):
    """The k tokens of one side hold 1 - 1e-9 of its mass, the other side puts nearly all elsewhere: value and gradient stay right.

    With the rest taken as 1 - sum in float32 the loss would be off by a quarter and the gradient would vanish.
    """
    sure_V, other_V = np.array([0.0, -1, -22, -23, -24, -25]), np.array([-9.0, -8, 0, 1, -1, 0.5])
    s_V, t_V = (sure_V, other_V) if support == "student_topk" else (other_V, sure_V)
    one = jnp.ones((1, 1), jnp.float32)
    data = (one, jnp.float32(s_V[None]), one, jnp.float32(t_V[None]), one[0], jnp.zeros(1, jnp.int32))
    cfg = ObjectiveConfig(support=support, subset="tail", k=2)
    (loss, _), gradients = compute(cfg, *data)
    expected_loss, *expected = torch_loss(cfg, *data[:5])
    assert expected_loss > 5
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_close(gradients, tuple(expected), rtol=2e-5, atol=1e-5)


def test_only_the_student_gets_a_gradient(eager):
    hs, head_s, ht, head_t, w, ids = inputs()

    def loss(ht, head_t, w, head_s):
        return chunked_divergence(ObjectiveConfig(chunk=4), hs, head_s, ht, head_t, w, ids, train_head=False)[0]

    assert not any(np.any(g) for g in jax.grad(loss, argnums=(0, 1, 2, 3))(ht, head_t, w, head_s))


def test_incoming_gradient_scales(eager):
    data = inputs()
    once = compute(ObjectiveConfig(chunk=4), *data)[1]
    thrice = jax.grad(lambda h: 3 * chunked_divergence(ObjectiveConfig(chunk=4), h, *data[1:], train_head=True)[0])(data[0])
    assert_close(thrice, 3 * once[0])


def test_bfloat16_accumulates_the_head_gradient_in_float32():
    """1024 equal rows in as many chunks: a bfloat16 sum would stop growing at 256 of them."""
    N = 1024
    hs, head_s, ht, head_t, _, _ = inputs(N=1)
    rows = [jnp.repeat(x.astype(jnp.bfloat16), N, axis=0) for x in (hs, ht)]
    w, ids = jnp.full(N, 1 / N, jnp.float32), jnp.zeros(N, jnp.int32)
    for dtype in (jnp.float32, jnp.bfloat16):
        head = head_s.astype(jnp.bfloat16).astype(dtype)
        head_teacher = head_t.astype(jnp.bfloat16)
        (loss, _), (d_hidden, d_head) = compute(ObjectiveConfig(chunk=1), rows[0], head, rows[1], head_teacher, w, ids)
        expected_loss, _, expected_d_head = torch_loss(
            ObjectiveConfig(), *(np.asarray(x, np.float32) for x in (rows[0][:1], head, rows[1][:1], head_teacher)), np.ones(1)
        )
        assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, dtype)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)
        np.testing.assert_allclose(np.float64(d_head), expected_d_head, rtol=1e-2, atol=1e-2 * np.abs(expected_d_head).max())


def test_cost_follows_the_number_of_weighted_rows(monkeypatch):
    """One compiled program; it runs ceil(count / chunk) chunks."""
    calls = []
    chunk = chunked._chunk

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return chunk(*args)

    monkeypatch.setattr(chunked, "_chunk", counted)
    hs, head_s, ht, head_t, _, ids = inputs(N=40)
    loss = jax.jit(jax.grad(lambda h, w: chunked_divergence(ObjectiveConfig(chunk=8), h, head_s, ht, head_t, w, ids, train_head=True)[0]))
    for count, expected in ((0, 0), (1, 1), (8, 1), (9, 2), (40, 5)):
        calls.clear()
        jax.block_until_ready(loss(hs, jnp.float32(np.random.default_rng(0).permutation(40) < count)))
        jax.effects_barrier()
        assert len(calls) == expected
    assert loss._cache_size() == 1


def sizes(hlo: str) -> set[int]:
    """Numbers of elements of the arrays in compiled text."""
    return {int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"[a-z]+\d+\[([\d,]+)\]", hlo)}


@pytest.mark.parametrize("support", ["full", "teacher_topk"])
def test_no_array_of_tokens_by_vocabulary(support):
    N, D, V, C = 307, 7, 5003, 11
    cfg = ObjectiveConfig(support=support, subset="tail", k=5, chunk=C)
    hs, head_s, ht, head_t, w, ids = inputs(N, D, V)

    def ours(h, head):
        return chunked_divergence(cfg, h, head, ht, head_t, w, ids, train_head=True)[0]

    def materialised(h, head):
        logp_s, logp_t = jax.nn.log_softmax(h @ head), jax.nn.log_softmax(ht @ head_t)
        return jnp.sum(w * jnp.sum(jnp.exp(logp_t) * (logp_t - logp_s), axis=-1))

    def compiled(f):
        return jax.jit(jax.grad(f, argnums=(0, 1))).lower(hs, head_s).compile()

    mine, theirs = compiled(ours), compiled(materialised)
    assert max(sizes(mine.as_text())) < N * V and C * V in sizes(mine.as_text())
    assert max(sizes(theirs.as_text())) >= N * V, "the reader of the compiled text sees the materialised version"
    assert mine.memory_analysis().temp_size_in_bytes < 10 * 4 * C * V < theirs.memory_analysis().temp_size_in_bytes


def test_frozen_head_has_no_gradient_buffer():
    D, V = 64, 2000
    data = inputs(D=D, V=V)

    def temp(train_head):
        step = jax.jit(jax.grad(lambda h: chunked_divergence(ObjectiveConfig(chunk=2), h, *data[1:], train_head=train_head)[0]))
        return step.lower(data[0]).compile().memory_analysis().temp_size_in_bytes

    def temp_with_head():
        step = jax.jit(jax.grad(lambda h, w: chunked_divergence(ObjectiveConfig(chunk=2), h, w, *data[2:], train_head=True)[0], (0, 1)))
        memory = step.lower(*data[:2]).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    assert temp(False) < 4 * D * V < temp_with_head()


SPECS = {
    "full": ObjectiveConfig(chunk=3),
    "teacher tail": ObjectiveConfig(divergence="jsd", support="teacher_topk", subset="tail", k=5, temperature=1.4, chunk=3),
    "student raw": ObjectiveConfig(divergence="reverse", support="student_topk", subset="raw", k=5, chunk=3),
}


@pytest.mark.parametrize(
    ("mesh", "spec"),
    [((8, 1, 1), "full"), ((1, 8, 1), "full"), ((1, 1, 8), "teacher tail"), ((2, 2, 2), "full"), ((2, 2, 2), "student raw")],
)
def test_meshes_agree_with_one_device(mesh, spec):
    """Shards of very different counts (one without any row), a vocabulary and rows that do not divide, k wider than a shard."""
    data = list(inputs(N=61, D=8, V=29, V_t=31))
    data[4] = data[4].at[:16].set(0.0).at[16:32].set(0.5)
    expected = compute(SPECS[spec], *data)
    with jax.set_mesh(make_mesh(MeshConfig(*mesh))):
        found = compute(SPECS[spec], *data)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert np.ptp([(np.asarray(data[4])[i : i + 8] != 0).sum() for i in range(0, 61, 8)]) == 8


def test_value_alone_and_frozen_head_on_a_mesh():
    """The paths without all gradients give the same numbers."""
    data = inputs(N=61, D=8, V=29)
    (loss, statistics), (d_hidden, _) = compute(SPECS["full"], *data)

    def frozen(h):
        return chunked_divergence(SPECS["full"], h, *data[1:], train_head=False)

    tokens_K = jnp.array([28, 3, 14, 7, 15], jnp.int32)  # in several shards of the vocabulary
    cfg = ObjectiveConfig(divergence="reverse", support="tokens", subset="tail", chunk=3)
    expected = compute(cfg, *data, tokens_K)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        assert_close(compute(cfg, *data, tokens_K), expected, rtol=1e-5, atol=1e-5)
        assert_close(jax.jit(frozen)(data[0]), (loss, statistics), rtol=1e-5)
        assert_close(jax.jit(jax.grad(frozen, has_aux=True))(data[0])[0], d_hidden, rtol=1e-5, atol=1e-5)


def test_reductions_over_devices():
    """The head's gradient leaves in the head's layout by one float32 reduce-scatter; inside the loop only numbers per token move."""
    hs, head_s, ht, head_t, w, ids = inputs(N=64, D=8, V=32)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):

        def step(h, head):
            return chunked_divergence(ObjectiveConfig(chunk=3), h, head, ht, head_t, w, ids, train_head=True)[0]

        text = jax.jit(jax.grad(step, argnums=(0, 1))).lower(hs.astype(jnp.bfloat16), head_s).compile().as_text()
    assert re.findall(r"= (\S+?)\{\S* reduce-scatter\(", text) == ["f32[4,16]"]
    body = re.search(r" while\(.*body=(%[\w.]+)", text).group(1)
    loop = next(part for part in text.split("\n\n") if part.strip().startswith(body + " "))
    moved = re.findall(r"= (.+?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", loop)
    assert moved and max(n for shapes in moved for n in sizes(shapes)) == 3


def test_equal_teacher_is_exact_on_a_mesh():
    hs, head_s, _, _, w, ids = inputs(N=16, D=8, V=32)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        (loss, _), gradients = optimised(ObjectiveConfig(mix=0.3, chunk=3), hs, head_s, hs, head_s, w, ids)
    assert loss == 0 and not np.any(gradients[0]) and not np.any(gradients[1])
