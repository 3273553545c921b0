"""Backends of attention give what the reference gives, on every mask we use; and the choice among them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsa_jax.config import MeshConfig
from opsa_jax.errors import UserError
from opsa_jax.models import attention_kernels as kernels
from opsa_jax.models.attention import Visibility, attention, attention_xla
from opsa_jax.models.attention_kernels import Case, choose
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import init_params
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.parallel.mesh import make_mesh

B, T, N, K, H = 4, 140, 4, 2, 16


@pytest.fixture(scope="module")
def case():
    """Random heads, and rows with padding left, right, on both sides and nowhere."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, H), (B, K, T, H), (B, K, T, H)))
    segments = np.ones((B, T), np.int32)
    segments[0, :60], segments[1, 100:], segments[2, :7], segments[2, -9:] = 0, 0, 0, 0
    return q, k, v, jnp.asarray(segments)


def reference_float64(q, k, v, segments, window):
    """Loops over rows and heads, in float64."""
    q, k, v, segments = (np.asarray(x, np.float64) for x in (q, k, v, segments))
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            kv = n // (q.shape[2] // k.shape[1])
            for t in np.flatnonzero(segments[b]):
                seen = [s for s in range(t + 1) if segments[b, s] and (not window or t - s < window)]
                score = k[b, kv, seen] @ q[b, t, n] / np.sqrt(q.shape[3])
                weight = np.exp(score - score.max())
                out[b, t, n] = weight / weight.sum() @ v[b, kv, seen]
    return out


def through(kernel, segments, window):
    """sum(out * out of tokens), as a function of q, k, v."""
    return lambda q, k, v: jnp.sum(jnp.square(kernel(q, k, v, segments, window)) * (segments > 0)[:, :, None, None])


def reference(q, k, v, segments, window):
    return attention_xla(q, k, v, Visibility(segments, segments, jnp.arange(q.shape[1])), window)


KERNELS = {"splash": kernels.splash, "cudnn": functools.partial(kernels.cudnn, implementation="xla")}


@pytest.mark.parametrize("window", [0, 40])
def test_reference(case, window):
    out = reference(*case, window)
    mine = np.asarray(case[3] > 0)[:, :, None, None]
    np.testing.assert_allclose(np.where(mine, out, 0), reference_float64(*case, window), atol=2e-5)
    assert np.isfinite(out).all(), "padding that nobody reads is finite"


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_give_values_and_gradients_of_the_reference(case, name, window):
    """cuDNN's path is run with XLA's implementation of the same call: what is tested is how rows are rolled and what is asked for."""
    q, k, v, segments = case
    mine = np.asarray(segments > 0)[:, :, None, None]
    out = KERNELS[name](q, k, v, segments, window)
    np.testing.assert_allclose(np.where(mine, out, 0), np.where(mine, reference(*case, window), 0), atol=2e-5)
    found = jax.grad(through(KERNELS[name], segments, window), argnums=(0, 1, 2))(q, k, v)
    expected = jax.grad(through(reference, segments, window), argnums=(0, 1, 2))(q, k, v)
    for x, y in zip(found, expected, strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_on_a_mesh(case, name):
    """Rows over data and fsdp, heads over tensor: values of one device."""
    q, k, v, segments = case
    alone = KERNELS[name](q, k, v, segments, 0)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        meshed = jax.jit(functools.partial(KERNELS[name], window=0))(q, k, v, segments)
    np.testing.assert_allclose(meshed, alone, atol=2e-5)


@pytest.mark.parametrize("windows", [(), (6, 6), (0, 6)])
def test_decoder_with_splash(windows):
    """A whole decoder, with its layer scan: windows that are data choose among kernels. Prefill and decode with a cache as well."""
    from opsa_jax.models.cache import init_cache

    cfg = DecoderConfig("qwen3", 64, 16, 2, 4, 2, 8, 32, qk_norm=True, windows=windows, tie_embeddings=True)
    params = init_params(cfg, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, 64)
    positions, segments = prompt_inputs(jnp.arange(20)[None] >= jnp.array([[5], [0]]))

    def run(attention, params):
        return forward(params, dataclasses.replace(cfg, attention=attention, remat="full"), tokens, positions, segments).hidden_BTD

    loss = [jax.value_and_grad(lambda p, a=a: jnp.sum((run(a, p) * segments[..., None]) ** 2))(params) for a in ("xla", "splash")]
    assert float(loss[1][0]) == pytest.approx(float(loss[0][0]), rel=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-2, rtol=1e-2), loss[1][1], loss[0][1])
    with_cache = dataclasses.replace(cfg, attention="splash")
    out = forward(params, with_cache, tokens, positions, segments, init_cache(cfg, 2, 20))
    np.testing.assert_allclose(out.hidden_BTD * segments[..., None], run("xla", params) * segments[..., None], atol=1e-3)


def test_choice():
    """By the devices, with XLA where a kernel cannot be used; a kernel asked for by name says why it cannot."""
    tpu = Case("tpu", 4096, 4096, 8, 32, 8, 128, "bfloat16")
    gpu = dataclasses.replace(tpu, platform="gpu")
    assert [choose("auto", x) for x in (tpu, gpu)] == ["splash", "cudnn"]
    assert [choose("auto", dataclasses.replace(tpu, platform=p)) for p in ("cpu", "rocm")] == ["xla", "xla"]
    assert choose("auto", dataclasses.replace(tpu, dtype="float32")) == "splash"
    uneven = {"kv_heads": 2, "tensor": 4}
    for change in ({"dtype": "float32"}, {"head_dim": 256}, {"head_dim": 12}, uneven, {"batch": 3, "batch_shards": 2}):
        assert choose("auto", dataclasses.replace(gpu, **change)) == "xla"
        with pytest.raises(UserError, match="attention cudnn"):
            choose("cudnn", dataclasses.replace(gpu, **change))
    for change in ({"head_dim": 48}, {"queries": 64, "keys": 64}, {"queries": 1}, uneven):
        assert choose("auto", dataclasses.replace(tpu, **change)) == "xla"
    assert choose("cudnn", dataclasses.replace(gpu, queries=1)) == "xla", "one token against a cache"
    with pytest.raises(UserError, match="NVIDIA"):
        choose("cudnn", tpu)
    with pytest.raises(UserError, match="TPU kernel"):
        choose("splash", gpu)


def test_platform_of_the_mesh_decides():
    assert kernels.mesh_platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert kernels.mesh_platform() == "tpu"


def test_auto_on_cpu_is_the_reference(case):
    q, k, v, segments = case
    visible = Visibility(segments, segments, jnp.arange(T))
    np.testing.assert_array_equal(attention(q, k, v, visible, backend="auto"), attention(q, k, v, visible))
