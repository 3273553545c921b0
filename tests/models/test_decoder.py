"""What the forward pass promises beyond parity: every field matters, packing, padding, steering, capture, remat, sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_hf import batch, random_params

from opsa_jax.config import MeshConfig
from opsa_jax.models.cache import init_cache
from opsa_jax.models.config import EXECUTION, DecoderConfig, RopeScaling
from opsa_jax.models.params import abstract_params, count, declare, head_weight, init_params, map_weights
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.parallel.rules import named

LLAMA3 = RopeScaling("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
CFG = DecoderConfig(
    family="qwen3",
    vocab_size=64,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    d_ff=48,
    rope_theta=100.0,
    rope_scaling=LLAMA3,
    qk_norm=True,
    windows=(0, 4, 0),
)


@pytest.fixture(scope="module")
def params():
    return random_params(CFG)


@functools.partial(jax.jit, static_argnames="cfg")
def jitted(params, cfg, tokens, positions, segments, **kwargs):
    out = forward(params, cfg, tokens, positions, segments, **kwargs)
    return out.hidden_BTD @ head_weight(params).astype(out.hidden_BTD.dtype), out


def run(params, cfg, tokens, mask, **kwargs):
    """Logits and output of a [3, 12] batch. Most tests are made of such batches: they share one compiled program."""
    positions, segments = prompt_inputs(jnp.asarray(mask))
    return jitted(params, cfg, jnp.asarray(tokens), positions, segments, **kwargs)


def logits_of(params, tokens, mask, **kwargs) -> np.ndarray:
    return np.asarray(run(params, CFG, tokens, mask, **kwargs)[0])


# A changed value of each field that is maths, by whether it changes the declared weights or only what is computed with them.
WEIGHTS = {"vocab_size": 80, "d_model": 40, "n_layers": 2, "n_heads": 2, "n_kv_heads": 4, "head_dim": 8, "d_ff": 40}
WEIGHTS |= {"n_experts": 4}
VALUES = {
    "norm_eps": 1e-2,
    "rope_theta": 200.0,
    "tie_embeddings": True,
    "qk_norm": False,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "windows": (8,),
    "rope_scaling": None,
    "rope_scaling.kind": dataclasses.replace(LLAMA3, kind="linear"),
    "rope_scaling.factor": dataclasses.replace(LLAMA3, factor=5.0),
    "rope_scaling.low_freq_factor": dataclasses.replace(LLAMA3, low_freq_factor=2.0),
    "rope_scaling.high_freq_factor": dataclasses.replace(LLAMA3, high_freq_factor=5.0),
    "rope_scaling.original_max_position": dataclasses.replace(LLAMA3, original_max_position=48),
}


# Fields that mean something where there are experts only: changed from EXPERTS.
EXPERTS = {"n_experts": 4, "experts_per_token": 2, "normalize_router": False}
EXPERT_VALUES = {"experts_per_token": 3, "normalize_router": True}


def test_every_field_is_changed_below():
    fields = {f.name for f in dataclasses.fields(DecoderConfig)} - {"family", *EXECUTION}
    fields |= {f"rope_scaling.{f.name}" for f in dataclasses.fields(RopeScaling)}
    assert WEIGHTS.keys() | VALUES.keys() | EXPERT_VALUES.keys() == fields


@pytest.mark.parametrize("name", WEIGHTS)
def test_sizes_change_the_weights(name):
    cfg = dataclasses.replace(CFG, **{name: WEIGHTS[name]})
    assert count(declare(cfg)) == cfg.n_params != CFG.n_params


def test_every_other_field_moves_the_output():
    """Without jit, where these evaluations share their operations; weights keep their values, and new biases are not zero."""
    tokens, mask = batch()
    positions, segments = prompt_inputs(jnp.asarray(mask[:1]))
    one_layer = dataclasses.replace(CFG, n_layers=1, windows=(4,))

    def value(cfg):
        params = random_params(cfg)
        with jax.disable_jit():
            out = forward(params, cfg, jnp.asarray(tokens[:1]), positions, segments)
        return np.asarray(out.hidden_BTD) @ np.asarray(head_weight(params))

    before = value(one_layer)
    for name, changed in VALUES.items():
        after = value(dataclasses.replace(one_layer, **{name.partition(".")[0]: changed}))
        assert np.abs(after - before).max() > 1e-3, name
    some_experts = dataclasses.replace(one_layer, **EXPERTS)
    before = value(some_experts)
    for name, changed in EXPERT_VALUES.items():
        assert np.abs(value(dataclasses.replace(some_experts, **{name: changed})) - before).max() > 1e-3, name


def test_two_segments_in_a_row_equal_two_rows(params):
    a, b = batch()[0][0, :5], batch()[0][1, :7]
    tokens = np.array([[*a, *b], [*a, *[9] * 7], [*[9] * 5, *b]])
    segments = np.array([[1] * 5 + [2] * 7, [4] * 5 + [0] * 7, [0] * 5 + [1] * 7])
    positions = np.array([[*range(5), *range(7)]] * 3)
    logits = np.asarray(jitted(params, CFG, tokens, positions, segments)[0])
    np.testing.assert_allclose(logits[0, :5], logits[1, :5], atol=2e-5)
    np.testing.assert_allclose(logits[0, 5:], logits[2, 5:], atol=2e-5)


def test_pad_ids_and_place_in_the_batch_do_not_matter(params):
    tokens, mask = batch()
    logits = logits_of(params, tokens, mask)
    other = np.where(mask == 1, tokens, (tokens + 13) % 64)
    np.testing.assert_array_equal(logits_of(params, other, mask)[mask == 1], logits[mask == 1])
    order = [2, 0, 1]
    moved = logits_of(params, tokens[order], mask[order])
    np.testing.assert_allclose(moved[mask[order] == 1], logits[order][mask[order] == 1], atol=2e-5)


def test_amount_and_side_of_padding_do_not_matter(params):
    """Six tokens at the start, in the middle and at the end of a row; shifted positions give the same (rotary is relative)."""
    tokens, mask, starts = np.full((3, 12), 3), np.zeros((3, 12), int), (0, 2, 6)
    for row, start in enumerate(starts):
        tokens[row, start : start + 6], mask[row, start : start + 6] = batch()[0][0, :6], 1
    positions, segments = prompt_inputs(jnp.asarray(mask))
    for shift in (0, 40):
        logits = np.asarray(jitted(params, CFG, jnp.asarray(tokens), positions + shift, segments)[0])
        rows = [logits[row, start : start + 6] for row, start in enumerate(starts)]
        for row in rows:
            np.testing.assert_allclose(row, logits_of(params, tokens, mask)[0, :6], atol=1e-4 if shift else 2e-5)


def test_a_token_reaches_exactly_the_later_positions(params):
    """A changed token changes no bit before it, and everything after it (two of the three layers see all earlier columns)."""
    tokens = batch()[0][:1].repeat(3, 0)
    before = logits_of(params, tokens, np.ones((3, 12), int))[0]
    for t in (0, 3, 6, 9):
        changed = tokens.copy()
        changed[range(3), range(t, t + 3)] = (changed[range(3), range(t, t + 3)] + 1) % 64
        moved = (logits_of(params, changed, np.ones((3, 12), int)) != before).any(-1)
        np.testing.assert_array_equal(moved, np.arange(12)[None] >= np.arange(t, t + 3)[:, None])


# Steering and capture


def test_zero_steering_changes_no_bit(params):
    tokens, mask = batch()
    zero = jnp.zeros((CFG.n_layers, CFG.d_model))
    np.testing.assert_array_equal(logits_of(params, tokens, mask, steer_LD=zero), logits_of(params, tokens, mask))


def test_steering_reaches_every_position_in_prefill_and_decode(params):
    """The vector is added to the input of block 1: the captured input of block 1 is from before, that of block 2 moves everywhere."""
    tokens, mask = batch()
    steer = jnp.zeros((CFG.n_layers, CFG.d_model)).at[1].set(jnp.linspace(-1, 1, CFG.d_model))
    every = jnp.arange(12)
    (_, plain), (logits, steered) = (run(params, CFG, tokens, mask, capture_C=every, steer_LD=s) for s in (0 * steer, steer))
    np.testing.assert_array_equal(plain.captured_LBCD[:2], steered.captured_LBCD[:2])
    assert (np.abs(plain.captured_LBCD[2] - steered.captured_LBCD[2]).max(-1) > 1e-2).all()

    positions, segments = prompt_inputs(jnp.asarray(mask))
    cache = init_cache(CFG, 3, 12)
    for t in range(12):
        c = slice(t, t + 1)
        part, out = jitted(params, CFG, tokens[:, c], positions[:, c], segments[:, c], cache=cache, steer_LD=steer, capture_C=every[:1])
        cache, real = out.cache, mask[:, t] == 1
        np.testing.assert_allclose(part[real, 0], logits[real, t], atol=2e-5)
        np.testing.assert_allclose(out.captured_LBCD[:, real, 0], steered.captured_LBCD[:, real, t], atol=2e-5)


def test_capture_returns_the_asked_columns(params):
    tokens, mask = batch()
    zero = jnp.zeros((CFG.n_layers, CFG.d_model))
    every, some = (run(params, CFG, tokens, mask, steer_LD=zero, capture_C=jnp.array(c))[1] for c in (range(12), [11, 4]))
    assert some.captured_LBCD.shape == (CFG.n_layers, 3, 2, CFG.d_model)
    np.testing.assert_allclose(some.captured_LBCD, every.captured_LBCD[:, :, [11, 4]], atol=1e-6)
    np.testing.assert_array_equal(every.captured_LBCD[0], params.embed_VD[tokens])


# Execution settings


def test_remat_and_unroll_keep_values_and_gradients():
    """They do something: recomputation shows as more matrix products in the program, unrolling as fewer loops."""
    plain = dataclasses.replace(CFG, n_layers=2, windows=(), rope_scaling=None)
    params, (tokens, mask) = random_params(plain), batch()
    positions, segments = prompt_inputs(jnp.asarray(mask))

    def program(cfg):
        def loss(params):
            logits = forward(params, cfg, jnp.asarray(tokens), positions, segments).hidden_BTD @ params.head_DV
            return jnp.sum(jnp.where(segments[..., None] > 0, jnp.sin(logits), 0)) / 100

        lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
        return lowered.as_text(), lowered.compile(compiler_options={"xla_backend_optimization_level": 0})

    text, run_plain = program(plain)
    dots_text, run_dots = program(dataclasses.replace(plain, remat="dots", scan_unroll=2))
    full_text, run_full = program(dataclasses.replace(plain, remat="full"))
    assert full_text.count("dot_general") > text.count("dot_general")
    assert "optimization_barrier" in dots_text and "optimization_barrier" not in text
    assert "stablehlo.while" in text and "stablehlo.while" not in dots_text
    loss, grads = run_plain(params)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads))
    for run_other in (run_dots, run_full):
        again, other_grads = run_other(params)
        np.testing.assert_allclose(again, loss, rtol=1e-6)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), other_grads, grads)


def test_bfloat16_computes_near_float32(params):
    tokens, mask = batch()
    narrow, out = run(params, dataclasses.replace(CFG, compute_dtype="bfloat16"), tokens, mask)
    assert out.hidden_BTD.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(narrow, np.float32) - logits_of(params, tokens, mask))[mask == 1]
    assert 0 < difference.mean() < 0.05


def test_a_sharded_forward_equals_one_device(params):
    tokens, mask = batch()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    sharded = map_weights(lambda w, x: jax.device_put(x, named(mesh, *w.axes)), declare(CFG), params)
    with jax.set_mesh(mesh):
        logits, out = run(sharded, CFG, np.tile(tokens, (4, 1)), np.tile(mask, (4, 1)))
    assert out.hidden_BTD.sharding.spec[0] == ("data", "fsdp")
    expected = np.tile(logits_of(params, tokens, mask), (4, 1, 1))
    np.testing.assert_allclose(np.asarray(logits)[np.tile(mask, (4, 1)) == 1], expected[np.tile(mask, (4, 1)) == 1], atol=2e-5)


def test_initial_weights():
    assert jax.eval_shape(lambda key: init_params(CFG, key, "bfloat16"), jax.random.key(0)) == abstract_params(CFG, "bfloat16")

    @jax.jit
    def some(key):
        params = init_params(CFG, key)
        return params.layers.gate_LDF, params.layers.up_LDF, params.final_norm_D

    gate, up, norm = some(jax.random.key(0))
    assert abs(float(jnp.std(gate)) - 0.02) < 0.001 and (norm == 1).all()
    assert not np.array_equal(gate, up)
