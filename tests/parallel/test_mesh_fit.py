"""Meshes that do not fit are refused with the nearest one that does; rules do not collide."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from opsa_jax.config import MeshConfig
from opsa_jax.errors import UserError
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import axis_sizes, declare, map_weights
from opsa_jax.parallel import rules
from opsa_jax.parallel.mesh import check_mesh, local_rows, make_mesh, nearest_mesh, own_rows, rows_to_devices

QWEN3_06B = DecoderConfig("qwen3", 151936, 1024, 28, 16, 8, 128, 3072, qk_norm=True, tie_embeddings=True)


def suggestion(message: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.search(r"--mesh\.data (\d+) --mesh\.fsdp (\d+) --mesh\.tensor (\d+)", message).groups())


@pytest.mark.parametrize(("shape", "heads"), [((1, 1, 8), 4), ((1, 2, 4), 2), ((2, 1, 4), 1)])
def test_uneven_heads_suggest_a_mesh_that_works(shape, heads):
    cfg = dataclasses.replace(QWEN3_06B, n_kv_heads=heads)
    with pytest.raises(UserError, match=rf"kv_heads={heads} over tensor={shape[2]}") as e:
        check_mesh(make_mesh(MeshConfig(*shape)), axis_sizes(cfg), 32, "--train.micro-batch")
    other = suggestion(str(e.value))
    assert math.prod(other) == 8 and other[2] == heads
    check_mesh(make_mesh(MeshConfig(*other)), axis_sizes(cfg), 32, "--train.micro-batch")


def test_every_uneven_dimension_is_named():
    cfg = dataclasses.replace(QWEN3_06B, vocab_size=1001, d_model=12)
    with pytest.raises(UserError, match=r"embed=12 over fsdp=8; nearest that does: --mesh.data 2 --mesh.fsdp 4 --mesh.tensor 1"):
        check_mesh(make_mesh(MeshConfig(1, 8, 1)), axis_sizes(cfg), 8, "--train.micro-batch")
    with pytest.raises(UserError, match=r"embed=12 over fsdp=8|vocab=1001 over tensor=2"):
        check_mesh(make_mesh(MeshConfig(1, 4, 2)), axis_sizes(cfg), 8, "--train.micro-batch")


def test_an_uneven_batch_suggests_batch_and_mesh():
    says = r"--train.micro-batch 12 does not divide over 8 shards .*nearest that does: 16, or another mesh"
    with pytest.raises(UserError, match=says) as e:
        check_mesh(make_mesh(MeshConfig(1, 8, 1)), axis_sizes(QWEN3_06B), 12, "--train.micro-batch")
    assert suggestion(str(e.value)) == (1, 4, 2)


def test_a_batch_that_no_mesh_divides():
    cfg = dataclasses.replace(QWEN3_06B, n_kv_heads=1)
    with pytest.raises(UserError, match=r"tensor=8.*nearest that does: .* with --train.micro-batch 8"):
        check_mesh(make_mesh(MeshConfig(1, 1, 8)), axis_sizes(cfg), 7, "--train.micro-batch")


def test_axes_that_do_not_multiply_to_the_devices():
    with pytest.raises(UserError, match="does not fit 8 devices") as e:
        make_mesh(MeshConfig(3, 2, 1))
    assert math.prod(suggestion(str(e.value))) == 8
    with pytest.raises(UserError, match="at most one"):
        make_mesh(MeshConfig(-1, -1, 1))


def test_nearest_by_exhaustion():
    """The choice against a plain search over all factorisations."""
    sizes = [("embed", 48), ("heads", 12), ("kv_heads", 6), ("ffn", 96), ("vocab", 1000)]
    for wanted in ((1, 16, 1), (4, 4, 1), (1, 1, 16), (2, 2, 4)):
        every = [(d, f, 16 // d // f) for d in (1, 2, 4, 8, 16) for f in (1, 2, 4, 8, 16) if d * f <= 16]
        fits = [m for m in every if 48 % m[1] == 0 and all(n % m[2] == 0 for n in (12, 6, 96, 1000)) and 24 % (m[0] * m[1]) == 0]
        distance = {m: sum(abs(math.log2(a / b)) for a, b in zip(m, wanted, strict=True)) for m in fits}
        found = nearest_mesh(wanted, 16, sizes, 24)
        assert (found is None) == (not fits)
        if fits:
            assert distance[found] == pytest.approx(min(distance.values()))


def test_rules_collide_for_no_weight():
    cfg = dataclasses.replace(QWEN3_06B, qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=False)
    map_weights(lambda w: rules.spec(*w.axes), declare(cfg))
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        rules.spec("heads", "ffn")
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        rules.spec("batch", "embed")


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_rows_to_devices_and_back(shape):
    mesh = make_mesh(MeshConfig(*shape))
    rows = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    assert own_rows(mesh, 16) == list(range(16))
    x = rows_to_devices(mesh, rows, 16)
    assert x.addressable_shards[0].data.shape == (16 // (shape[0] * shape[1]), 3)
    np.testing.assert_array_equal(x, rows)
    np.testing.assert_array_equal(local_rows(x), rows)
    assert isinstance(x, jax.Array)
