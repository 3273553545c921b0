"""The sampler: against transformers, against a re-scoring pass, and against itself in other company and on other meshes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, PROMPTS, padded, rescored, tiny

from opsa_jax.config import MeshConfig
from opsa_jax.models import hf
from opsa_jax.models.params import declare, map_weights
from opsa_jax.parallel.mesh import batch_shards, make_mesh
from opsa_jax.parallel.rules import named
from opsa_jax.rollout import decode, sampler
from opsa_jax.rollout.filters import Sampling, filter_logits
from opsa_jax.rollout.sampler import cache_sizes, row_keys, sample

GREEDY, HOT, NARROW = Sampling(0.0), Sampling(1.3), Sampling(0.8, top_k=8, top_p=0.9)
STOPS = (13, 40, 52, 57)
R = 12


def keys(n: int = len(PROMPTS), sample_index: int = 0) -> jax.Array:
    return row_keys(jax.random.key(3), "test", 0, jnp.arange(n), jnp.full(n, sample_index))


def run(model, sampling: Sampling, prompts=PROMPTS, row_keys=None, width: int = 8, room: int = R, pad: int = 0, steer_LD=None):
    """`sample` with every argument given, so that equal shapes share one program."""
    row_keys = keys(len(prompts)) if row_keys is None else row_keys
    return sample(*model, sampling, STOPS, room, *padded(prompts, width, pad), row_keys, pad, steer_LD)


def responses(rollout) -> list[list[int]]:
    ids, mask = np.asarray(rollout.response_ids_BR), np.asarray(rollout.response_mask_BR)
    return [row[m > 0].tolist() for row, m in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers(name, tmp_path):
    """Rows of several lengths, left-padded on both sides; generation stops at eos, and the window slides."""
    import torch
    from transformers import AutoModelForCausalLM

    params, cfg = tiny(name)
    hf.save_params(params, cfg, tmp_path / "m", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager", dtype=torch.float32)
    ids, mask = padded(PROMPTS, 8)
    options = {"max_new_tokens": R, "do_sample": False, "eos_token_id": list(STOPS), "pad_token_id": 0}
    expected = model.generate(torch.tensor(np.asarray(ids)), attention_mask=torch.tensor(np.asarray(mask)), **options)[:, 8:].numpy()
    rollout = run((params, cfg), GREEDY)
    got = np.asarray(rollout.response_ids_BR)
    np.testing.assert_array_equal(got[:, : expected.shape[1]], expected)
    assert len(set(map(tuple, got.tolist()))) > 4 and len({len(r) for r in responses(rollout)}) > 1


def test_logp_is_that_of_the_model_unfiltered_at_temperature_one():
    params, cfg = tiny()
    rollout = run((params, cfg), NARROW)
    logp, mask = np.asarray(rollout.logp_BR), np.asarray(rollout.response_mask_BR)
    for b, response in enumerate(responses(rollout)):
        expected = rescored(params, cfg, PROMPTS[b], response)[np.arange(len(response)), response]
        np.testing.assert_allclose(logp[b, : len(response)], expected, atol=1e-4, rtol=0)
    assert (logp[mask == 0] == 0).all() and (logp[mask > 0] < 0).all()


def test_steering_is_applied_to_prompt_and_response():
    """Steering the input of block 0 everywhere is moving every embedding (the head of this model is not tied to it)."""
    params, cfg = tiny("llama")
    steer_LD = jax.random.normal(jax.random.key(0), (cfg.n_layers, cfg.d_model)).at[1].set(0)
    moved = params.replace(embed_VD=params.embed_VD + steer_LD[0])
    plain, expected = (run((p, cfg), GREEDY) for p in (params, moved))
    steered = run((params, cfg), GREEDY, steer_LD=steer_LD)
    assert responses(steered) == responses(expected) != responses(plain)


@pytest.fixture(scope="module")
def alone():
    """The responses of each prompt by itself, to which those in company are compared."""
    one = [run(tiny(), HOT, [p], keys()[b : b + 1]) for b, p in enumerate(PROMPTS)]
    found = [responses(r)[0] for r in one]
    lengths = {len(r) for r in found}
    assert R in lengths and len(lengths) > 2  # some stop early, some fill the room
    return found


@pytest.mark.parametrize(("width", "filler"), [(8, 0), (19, 63)])
def test_a_response_does_not_depend_on_batch_position_padding_or_bucket(alone, width, filler):
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    rollout = run(tiny(), HOT, [PROMPTS[b] for b in order], keys()[order], width, pad=filler)
    assert responses(rollout) == [alone[b] for b in order]


def test_a_response_does_not_depend_on_the_other_rows_or_fillers(alone):
    """Repeated rows with other keys, and rows without tokens, change nothing; fillers get nothing."""
    n = len(PROMPTS)
    rollout = run(tiny(), HOT, [*PROMPTS, [], *PROMPTS], jnp.concatenate([keys(), keys(1, 9), keys(sample_index=1)]), pad=21)
    found = responses(rollout)
    assert found[:n] == alone and found[n] == []
    assert not rollout.finished_B[n]
    assert sum(a != b for a, b in zip(alone, found[n + 1 :], strict=True)) > 5  # another sample number, another response


def test_room_only_cuts(alone):
    rollout = run(tiny(), HOT, room=5)
    assert responses(rollout) == [r[:5] for r in alone]


def test_stages_of_the_cache_do_not_show(alone, monkeypatch):
    assert cache_sizes(64, 1024) == [136, 272, 544, 1088]
    monkeypatch.setattr(sampler, "cache_sizes", lambda P, R: [P + 2, P + 7, P + R])
    staged = jax.jit(lambda params, *a: sample.__wrapped__(params, tiny()[1], HOT, STOPS, R, *a))
    assert responses(staged(tiny()[0], *padded(PROMPTS, 8), keys())) == alone


def test_stop_tokens_end_a_response_and_are_part_of_it(alone):
    rollout = run(tiny(), HOT, pad=62)
    for ids, mask, finished in zip(*map(np.asarray, (rollout.response_ids_BR, rollout.response_mask_BR, rollout.finished_B)), strict=True):
        n = mask.sum()
        assert mask.tolist() == [1] * n + [0] * (R - n)
        assert (ids[n:] == 62).all() and not np.isin(ids[: n - 1], STOPS).any()
        assert finished == np.isin(ids[n - 1], STOPS)
    assert 0 < np.asarray(rollout.finished_B).sum() < len(PROMPTS)


def test_decoding_ends_with_the_last_row(monkeypatch):
    """Steps are counted on the host through a callback in the step."""
    params, cfg = tiny()
    steps, step, rows = [], decode.step, np.array([0, 2, 3])

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return step(*args)

    monkeypatch.setattr(decode, "step", counted)
    counting = jax.jit(lambda *a: sample.__wrapped__(params, cfg, HOT, STOPS, 40, *a, 62))
    rollout = counting(*padded([PROMPTS[b] for b in rows], 8), keys()[rows])
    jax.effects_barrier()
    assert len(steps) == max(len(r) for r in responses(rollout)) < 40
    assert (np.asarray(rollout.response_ids_BR)[np.asarray(rollout.response_mask_BR) == 0] == 62).all()


def test_frequencies_follow_the_distribution():
    """Chi-square of first tokens against the exact filtered probabilities, 4,000 draws."""
    params, cfg = tiny(scale=0.12)
    n, prompt = 4_000, PROMPTS[2]
    exact = rescored(params, cfg, prompt, [0], NARROW.temperature)[0]
    kept = np.isfinite(np.asarray(filter_logits(jnp.asarray(exact[None], jnp.float32), Sampling(1.0, NARROW.top_k, NARROW.top_p)))[0])
    p = np.where(kept, np.exp(exact), 0) / np.exp(exact)[kept].sum()
    rollout = run((params, cfg), NARROW, [prompt] * n, room=1)
    counts = np.bincount(np.asarray(rollout.response_ids_BR)[:, 0], minlength=64)
    assert (counts[~kept] == 0).all() and 3 < kept.sum() <= 8
    assert chi_square_excess(counts[kept], p[kept]) < 5


@pytest.mark.parametrize("V", [35, 64, 768])
def test_two_stage_draw_is_exact(V):
    """Odd vocabularies are one block; 768 has 256 blocks of three. Half of the tokens are dropped."""
    logits = np.random.default_rng(V).normal(0, 1.5, V).astype(np.float32)
    logits[::2] = -np.inf
    n = 40_000
    tokens = jax.jit(decode.draw)(jnp.broadcast_to(jnp.asarray(logits), (n, V)), jax.random.split(jax.random.key(1), n))
    counts, p = np.bincount(np.asarray(tokens), minlength=V), np.exp(logits) / np.exp(logits).sum()
    assert (counts[::2] == 0).all()
    assert chi_square_excess(counts[1::2], p[1::2]) < 5


def test_greedy_takes_the_smallest_of_equal_ids():
    x = jnp.array([[0.0, 3.0, 1.0, 3.0], [-jnp.inf, -5.0, -jnp.inf, -5.0]])
    assert decode._argmax(x).tolist() == jnp.argmax(x, axis=-1).tolist() == [1, 1]


def chi_square_excess(counts: np.ndarray, p: np.ndarray) -> float:
    """Standard deviations by which the statistic exceeds its mean."""
    expected = counts.sum() * p
    return (((counts - expected) ** 2 / expected).sum() - (len(p) - 1)) / np.sqrt(2 * (len(p) - 1))


def test_keys_differ_by_purpose_step_example_and_sample():
    base, ids = jax.random.key(0), jnp.arange(3)
    rows = [
        row_keys(base, purpose, step, ids, jnp.full(3, index))
        for purpose, step, index in (("rollout", 0, 0), ("eval", 0, 0), ("rollout", 1, 0), ("rollout", 0, 1))
    ]
    data = {tuple(k) for keys in rows for k in np.asarray(jax.random.key_data(keys)).tolist()}
    assert len(data) == 12
    again = row_keys(base, "rollout", 0, ids[::-1], jnp.zeros(3, jnp.int32))
    assert (jax.random.key_data(again[::-1]) == jax.random.key_data(rows[0])).all()


def test_compiled_once_per_shape_and_setting():
    params, cfg = tiny()
    run((params, cfg), HOT)
    before = sample._cache_size()
    run((jax.tree.map(lambda x: x * 2, params), cfg), Sampling(1.3), PROMPTS[::-1], keys(sample_index=4), pad=5)
    assert sample._cache_size() == before


def on_mesh(params, cfg, shape: tuple[int, int, int]):
    mesh = make_mesh(MeshConfig(*shape))
    return mesh, map_weights(lambda w, x: jax.device_put(x, named(mesh, *w.axes)), declare(cfg), params)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_same_tokens_on_every_mesh(alone, shape):
    params, cfg = tiny()
    mesh, params = on_mesh(params, cfg, shape)
    with jax.set_mesh(mesh):
        rollout = run((params, cfg), HOT)
    assert responses(rollout) == alone
    assert rollout.response_ids_BR.sharding.shard_shape((8, R))[0] == 8 // batch_shards(mesh)


@pytest.mark.parametrize("shape", [(2, 2, 2)], ids=str)
def test_same_greedy_tokens_on_a_mesh(shape):
    params, cfg = tiny("llama")
    expected = responses(run((params, cfg), GREEDY))
    mesh, params = on_mesh(params, cfg, shape)
    with jax.set_mesh(mesh):
        assert responses(run((params, cfg), GREEDY)) == expected


def test_logits_and_weights_are_not_gathered_in_the_loop():
    """Vocabulary-sharded logits (4 local rows of 512) stay where they are, and weights are made whole over fsdp before the loop."""
    params, cfg = tiny(vocab_size=512, n_kv_heads=4)
    mesh, params = on_mesh(params, cfg, (1, 2, 4))
    with jax.set_mesh(mesh):
        program = sample.lower(params, cfg, NARROW, STOPS, R, *padded(PROMPTS, 8), keys()).compile().as_text()
    shapes = {True: [], False: []}
    for computation in program.split("\n\n"):
        found = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)\(", computation)
        shapes[computation.startswith("ENTRY")] += [[int(n) for n in shape.split(",") if n] for shape in found]
    assert [128, 32] in shapes[True]  # the embedding becomes whole over fsdp once, before the loops
    assert [4] in shapes[False]  # within loops: one number per row, but nothing as long as the (local) vocabulary
    assert not [s for s in shapes[False] if 128 in s or 512 in s]
