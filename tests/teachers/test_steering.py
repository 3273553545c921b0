"""Difference of means, ablation, scores and selection against a float64 reference; a planted direction; mistakes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_numpy import CFG, decoder, random_params, softmax
from safetensors.numpy import save_file

from opsa_jax.analysis.steer_plot import plot_scores
from opsa_jax.data.chat import Chat
from opsa_jax.errors import UserError
from opsa_jax.models.cache import init_cache
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.teachers import steering
from opsa_jax.teachers.steering import Probe, Scores

RNG = np.random.default_rng(5)
LEFT = [RNG.integers(0, 48, n).tolist() for n in (5, 9, 4, 7, 6)]
RIGHT = [RNG.integers(0, 48, n).tolist() for n in (6, 3, 8)]


@pytest.fixture(scope="module")
def params():
    return random_params()


def run(params, ids, **options):
    ids_BT = jnp.asarray(ids, jnp.int32)
    return forward(params, CFG, ids_BT, *prompt_inputs(jnp.ones_like(ids_BT)), capture_C=jnp.arange(ids_BT.shape[1]), **options)


def unit(seed=1):
    v = np.random.default_rng(seed).normal(size=CFG.d_model)
    return v / np.linalg.norm(v)


def test_forward_with_steering_and_ablation_matches_the_reference(params):
    steer_LD = np.random.default_rng(2).normal(size=(3, 24)).astype(np.float32)
    for steer, ablated in ((None, None), (steer_LD, None), (None, unit()), (steer_LD, unit())):
        out = run(params, [LEFT[1]], steer_LD=steer, ablate_D=None if ablated is None else jnp.asarray(ablated, jnp.float32))
        inputs_LTD, logits_TV = decoder(params, CFG, LEFT[1], steer, ablated)
        np.testing.assert_allclose(out.captured_LBCD[:, 0], inputs_LTD, atol=2e-4)
        np.testing.assert_allclose(out.hidden_BTD[0] @ params.head_DV, logits_TV, atol=2e-3)


def test_ablation_leaves_nothing_along_the_direction_at_any_block_input(params):
    v_D = jnp.asarray(unit(), jnp.float32)
    plain, ablated = (jnp.abs(run(params, [LEFT[1]], ablate_D=a).captured_LBCD @ v_D).max(axis=(1, 2)) for a in (None, v_D))
    assert float(plain.min()) > 0.1 and float(ablated.max()) < 1e-5


def test_ablation_in_bfloat16_and_with_remat(params):
    cfg = dataclasses.replace(CFG, compute_dtype="bfloat16", remat="full")
    ids = jnp.asarray([LEFT[1]], jnp.int32)
    v_D = jnp.asarray(unit(), jnp.float32)
    out = forward(params, cfg, ids, *prompt_inputs(jnp.ones_like(ids)), capture_C=jnp.arange(9), ablate_D=v_D)
    along = jnp.abs(out.captured_LBCD.astype(jnp.float32) @ v_D).max()
    assert out.hidden_BTD.dtype == jnp.bfloat16 and float(along) < 0.05


@pytest.mark.parametrize("layer", [0, 1])
def test_steering_touches_every_position_of_one_layer_in_prefill_and_decode(params, layer):
    # Blocks that add nothing: what enters block l + 1 is what entered block l, plus what was added there.
    layers = params.layers.replace(wo_LNHD=0 * params.layers.wo_LNHD, down_LFD=0 * params.layers.down_LFD)
    silent = params.replace(layers=layers)
    v_D = unit()
    steer_LD = steering.steering_rows(3, layer, v_D, 1.7)

    def inputs(steer_LD):
        ids = jnp.asarray([LEFT[0], LEFT[3][:5]], jnp.int32)
        ones = jnp.ones_like(ids)
        positions, segments = prompt_inputs(ones)
        out = forward(silent, CFG, ids[:, :3], positions[:, :3], segments[:, :3], init_cache(CFG, 2, 5), steer_LD, jnp.arange(3))
        parts, cache = [out.captured_LBCD], out.cache
        for t in (3, 4):
            at = slice(t, t + 1)
            out = forward(silent, CFG, ids[:, at], positions[:, at], segments[:, at], cache, steer_LD, jnp.arange(1))
            parts, cache = [*parts, out.captured_LBCD], out.cache
        return np.concatenate(parts, axis=2)

    base, steered = inputs(None), inputs(steer_LD)
    np.testing.assert_array_equal(steered[: layer + 1], base[: layer + 1])
    expected = np.broadcast_to(1.7 * v_D, base[0].shape)
    for later in range(layer + 1, 3):
        np.testing.assert_allclose(steered[later] - base[later], expected, atol=1e-5)


def test_coefficient_zero_is_the_base(params, tmp_path):
    save_file({"steer": np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)}, tmp_path / "d.safetensors")
    zero_LD, two_LD = (steering.load_steering(tmp_path / "d.safetensors", CFG, c) for c in (0.0, 2.0))
    assert zero_LD.dtype == jnp.float32 and float(jnp.abs(two_LD).max()) > 1
    base, zero, two = (run(params, [LEFT[1]], steer_LD=s).hidden_BTD for s in (None, zero_LD, two_LD))
    np.testing.assert_array_equal(base, zero)
    assert float(jnp.abs(two - base).max()) > 0.01


def test_difference_of_means_matches_the_reference(params):
    probe = Probe(params, CFG, batch=2)
    got = probe.mean_inputs(LEFT, 3) - probe.mean_inputs(RIGHT, 3)
    means = [np.mean([decoder(params, CFG, ids)[0][:, -3:] for ids in rows], axis=0) for rows in (LEFT, RIGHT)]
    assert got.dtype == np.float64 and got.shape == (3, 3, 24)
    np.testing.assert_allclose(got, means[0] - means[1], atol=2e-4)


def test_scores_match_the_reference(params):
    probe, ids = Probe(params, CFG, batch=4), [3, 17]
    d_LCD = np.random.default_rng(3).normal(size=(3, 2, 24))
    d_LCD[0, 1] = 0
    scores = steering.score_candidates(probe, d_LCD, LEFT, RIGHT, RIGHT, ids, coefficient=1.5)

    def R(rows, **options):
        p = [softmax(decoder(params, CFG, row, **options)[1][-1])[ids].sum() for row in rows]
        return np.mean([np.log(x + 1e-8) - np.log(1 - x + 1e-8) for x in p])

    for layer, c in ((0, 0), (1, 1), (2, 0)):
        v = d_LCD[layer, c] / np.linalg.norm(d_LCD[layer, c])
        steer_LD = np.zeros((3, 24))
        steer_LD[layer] = 1.5 * d_LCD[layer, c]
        pairs = [[softmax(decoder(params, CFG, row, unit_D=u)[1][-1]) for u in (None, v)] for row in RIGHT]
        kl = np.mean([np.sum(p * (np.log(p + 1e-6) - np.log(q + 1e-6))) for p, q in pairs])
        got = scores.ablation_LC[layer, c], scores.induce_LC[layer, c], scores.kl_LC[layer, c]
        np.testing.assert_allclose(got, (R(LEFT, unit_D=v), R(RIGHT, steer_LD=steer_LD), kl), atol=2e-3)
    assert np.isnan([scores.ablation_LC[0, 1], scores.induce_LC[0, 1], scores.kl_LC[0, 1]]).all()


def test_a_planted_direction_is_found():
    """Tokens 24 to 47 are tokens 0 to 23 plus v, token 47 is the refusal and is read off v: v makes the model refuse."""
    params, v = random_params(scale=0.08), 3 * unit(9)
    unit_D = v / np.linalg.norm(v)
    embed = np.array(params.embed_VD) * 4
    embed -= np.outer(embed @ unit_D, unit_D)
    embed[24:] = embed[:24] + v
    head = np.array(params.head_DV)
    head[:, 47] = 2 * unit_D
    params = params.replace(embed_VD=jnp.asarray(embed, jnp.float32), head_DV=jnp.asarray(head, jnp.float32))
    rng = np.random.default_rng(0)
    plain = [rng.integers(0, 24, rng.integers(4, 10)).tolist() for _ in range(120)]
    marked = [[*row[:-2], row[-2] + 24, row[-1] + 24] for row in plain[60:]]
    probe = Probe(params, CFG, batch=20)
    R_marked, R_plain = (steering.refusal_score(probe.logits(rows), [47]) for rows in (marked, plain[:60]))
    assert (R_marked > 0).mean() > 0.9 and (R_plain < 0).mean() > 0.9
    d_LCD = probe.mean_inputs(marked[:40], 2) - probe.mean_inputs(plain[:40], 2)
    scores = steering.score_candidates(probe, d_LCD, marked[40:], plain[40:60], plain[40:60], [47])
    layer, column, fallback = steering.select(scores)
    d_D = d_LCD[layer, column]
    assert not fallback and d_D @ unit_D / np.linalg.norm(d_D) > 0.99
    assert scores.ablation_LC[layer, column] < 0 < scores.induce_LC[layer, column]
    # At the third-last token nothing was planted.
    assert np.linalg.norm(probe.mean_inputs(marked[:40], 3)[0, 0] - probe.mean_inputs(plain[:40], 3)[0, 0]) < 0.5 * np.linalg.norm(v)


def table(ablation, induce, kl) -> Scores:
    """Five layers, two columns."""
    return Scores(np.ones((5, 2, 4)), *(np.array(x, float).reshape(5, 2) for x in (ablation, induce, kl)))


NAN = float("nan")
SCORES = table(
    [-9, -1, -5, NAN, -3, -2, -6, -4, -9, -9], [1, 1, -1, 1, 1, 2, 3, -2, 9, 9], [0.2, 0.01, 0.01, 0.01, 0.05, 0.01, 0.3, 0.01, 0.01, 0.01]
)


def test_selection_rules():
    assert steering.discards(SCORES).tolist() == [["kl", ""], ["induce", "nan"], ["", ""], ["kl", "induce"], ["layer", "layer"]]
    assert steering.select(SCORES) == (2, 0, False)
    assert steering.select(SCORES, max_kl=0.02) == (2, 1, False)
    assert steering.select(SCORES, layer_share=1.0) == (4, 0, False)


def test_no_direction_survives():
    with pytest.raises(UserError, match=r"no direction survives of 10 .*: 1 nan, 2 layer, 6 kl, 1 induce.*.*layer 3 column -2: abl"):
        steering.select(_without_kl(), max_kl=0.001)
    assert steering.select(_without_kl(), max_kl=0.001, fallback="induce") == (3, 0, True)
    nothing = table(*[[NAN] * 10] * 3)
    with pytest.raises(UserError, match="none has finite scores"):
        steering.select(nothing, fallback="induce")


def _without_kl() -> Scores:
    """No candidate passes a limit of 0.001, but for one, whose induce score is negative."""
    kl = SCORES.kl_LC.copy()
    kl[3, 1] = 0.0
    return dataclasses.replace(SCORES, kl_LC=kl)


def test_refusal_words_must_be_tokens():
    chat = Chat.load("sandbox:base")
    ids = steering.refusal_ids(chat, (" must", " should", "must"))
    assert [chat.decode([i]) for i in ids] == ["must", "should"]
    for words, message in (((), "at least one"), (("must refuse",), "'must refuse' is not one token"), (("xyzzy",), "'xyzzy' is not one")):
        with pytest.raises(UserError, match=message):
            steering.refusal_ids(chat, words)


def test_places():
    chat = Chat.load("sandbox:base")
    answer = chat.encode_texts(["<think>\nthe user asks. i can"])[0].tolist()
    place = steering.Place.parse
    assert chat.decode(place("answer:.", "--position").cut(answer, chat)).endswith("asks.")
    assert len(place("answer:3", "--position").cut(answer, chat)) == 3
    assert place("answer:99", "--position").cut(answer, chat) is None
    assert place("answer:zzz", "--position").cut(answer, chat) is None
    assert place("template", "--position").cut(answer, chat) == []
    for wrong in ("prompt", "answer", "answer:", "answer:0"):
        with pytest.raises(UserError, match="--position"):
            place(wrong, "--position")


def test_steering_files_of_another_shape(tmp_path):
    file = tmp_path / "d.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        steering.load_steering(file, CFG, 1.0)
    for tensors in ({"a": np.ones((3, 23), np.float32)}, {"a": np.ones((3, 24), np.float32), "b": np.ones((3, 24), np.float32)}):
        save_file(tensors, file)
        with pytest.raises(UserError, match=r"one tensor of shape \(3, 24\)"):
            steering.load_steering(file, CFG, 1.0)
    file.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        steering.load_steering(file, CFG, 1.0)


def test_heat_map(tmp_path):
    reasons = steering.discards(SCORES)
    found = {"layers": 5, "positions": ["-2 <a>", "-1 b"], "discarded": reasons.tolist(), "chosen": {"layer": 2, "column": -2}}
    for name in ("ablation", "induce", "kl"):
        found[name] = [[None if np.isnan(v) else v for v in row] for row in getattr(SCORES, f"{name}_LC").tolist()]
    (tmp_path / "scores.json").write_text(json.dumps(found))
    assert plot_scores(tmp_path).stat().st_size > 10_000 and (tmp_path / "scores.svg").is_file()


def test_probe_pads_and_fills(params):
    """Batches of any size give the same logits."""
    a, b = (Probe(params, CFG, batch).logits(LEFT) for batch in (2, 5))
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert a.shape == (5, 48) and jax.tree.leaves(a)[0].dtype == np.float32
