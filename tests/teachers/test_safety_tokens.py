"""The vote against NumPy on random log-probabilities with ties, and on a tiny model; token files; mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_numpy import CFG, decoder, random_params, softmax

from opsa_jax.data.chat import Chat, left_pad
from opsa_jax.errors import UserError
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.sampler import row_keys, sample
from opsa_jax.teachers import safety_tokens as st
from opsa_jax.teachers.steering import steering_rows

V = 40


def random_chunks(seed=0, chunks=3, n=11):
    """Half-integer deltas, so that many are equal, exactly."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(chunks):
        base = -rng.integers(2, 8, (n, V)) / 2
        teacher = base + rng.integers(-3, 4, (n, V)) / 2
        found.append((teacher.astype(np.float32), base.astype(np.float32), rng.random(n) < 0.8))
    return found


def reference(chunks, banned, min_prob, top, size):
    teacher, base, keep = (np.concatenate(x) for x in zip(*chunks, strict=True))
    teacher, base = teacher[keep].astype(np.float64), base[keep].astype(np.float64)
    delta = teacher - base
    banned = banned | (np.exp(teacher).mean(0) < min_prob)
    votes = np.zeros(V, int)
    for row in delta:
        allowed = [i for i in np.argsort(-row, kind="stable") if not banned[i]]
        votes[allowed[:top]] += 1
    order = sorted(range(V), key=lambda i: (-votes[i], -delta.mean(0)[i], i))
    return votes, delta.mean(0), banned, [i for i in order if votes[i]][:size]


@pytest.mark.parametrize(("top", "min_prob"), [(5, 0.0), (1, 0.2), (30, 0.2), (100, 0.22)])
def test_vote_matches_numpy(top, min_prob):
    chunks, banned = random_chunks(), np.arange(V) % 7 == 0
    votes, delta, all_banned, order = reference(chunks, banned, min_prob, top, 12)
    found = st.tally(lambda: chunks, banned, min_prob, top)
    assert found.positions == sum(keep.sum() for *_, keep in chunks) < 33
    assert (all_banned.sum() > banned.sum()) == (min_prob > 0)
    np.testing.assert_array_equal(found.votes_V, votes)
    np.testing.assert_array_equal(found.banned_V, all_banned)
    np.testing.assert_allclose(found.mean_delta_V, delta, atol=1e-5)
    assert st.choose(found, 12).tolist() == order


def test_ties_go_to_mean_delta_and_then_to_the_smaller_id():
    found = st.Tally(np.array([3, 4, 3, 3, 0, 9]), np.array([0.5, 0.0, 0.7, 0.5, 2.0, 1.0]), np.arange(6) == 5, 9)
    assert st.choose(found, 10).tolist() == [1, 2, 0, 3]
    assert st.choose(found, 3, "mean-delta").tolist() == [4, 2, 0]
    assert st.choose(found, 1).dtype == np.int32


def test_nothing_to_vote():
    chunks = [(t, b, np.zeros(len(t), bool)) for t, b, _ in random_chunks()]
    with pytest.raises(UserError, match="empty token set: the base ends"):
        st.tally(lambda: chunks, np.zeros(V, bool), 0.0, 5)
    with pytest.raises(UserError, match="empty token set: every token"):
        st.tally(random_chunks, np.zeros(V, bool), 100.0, 5)
    with pytest.raises(UserError, match="empty token set"):
        st.choose(st.Tally(np.zeros(V, int), np.zeros(V), np.zeros(V, bool), 1), 5)


PROMPTS = [[3, 9, 30, 2], [7, 8], [11, 3, 8, 8, 1]]


def test_comparison_matches_the_reference_and_drops_what_follows_an_end():
    params, T, D = random_params(), 4, CFG.d_model
    steer_LD = steering_rows(3, 1, np.random.default_rng(4).normal(size=D))
    contexts = [[20, 21, *row] for row in PROMPTS]
    responses_NT = np.random.default_rng(1).integers(0, 48, (3, T)).astype(np.int32)
    logs = [
        [np.log(softmax(decoder(params, CFG, [*row, *answer], steer)[1][-T - 1 :])) for row, answer in zip(rows, responses_NT, strict=True)]
        for rows, steer in ((contexts, steer_LD), (PROMPTS, None))
    ]
    # The base's favourite after the second token of the first response is made an end.
    end = int(logs[1][0][2].argmax())
    keep = np.array([np.cumsum(row.argmax(-1) == end) == 0 for row in logs[1]])
    assert not keep[0, 2:].any() and keep.any()
    pair = st.Comparison(params, CFG, contexts, PROMPTS, responses_NT, (end,), steer_LD, batch=2)
    chunks = list(pair.chunks())
    assert [c[0].shape for c in chunks] == [(2 * (T + 1), 48)] * 2  # one row of the second is a filler
    teacher, base, kept = (np.concatenate([np.asarray(c[i]) for c in chunks]) for i in range(3))
    np.testing.assert_array_equal(kept[:15], keep.ravel())
    assert not kept[15:].any()
    np.testing.assert_allclose(teacher[:15], np.concatenate(logs[0]), atol=5e-3)
    np.testing.assert_allclose(base[:15], np.concatenate(logs[1]), atol=5e-3)


def test_samples_are_open_ended_steered_and_those_of_the_sampler():
    params, (ids_BP, mask_BP) = random_params(), left_pad(PROMPTS, 8, 0)
    keys_B = row_keys(jax.random.key(0), "x", 0, np.arange(3), np.zeros(3, np.int32))
    steer_LD = steering_rows(3, 0, 30 * np.asarray(params.embed_VD)[5])
    plain = st.sample_open(params, CFG, ids_BP, mask_BP, keys_B, (), 6)
    expected = sample(params, CFG, Sampling(), (999,), 6, ids_BP, mask_BP, keys_B).response_ids_BR
    np.testing.assert_array_equal(plain, expected)
    ends = tuple(set(np.asarray(plain).ravel().tolist()))
    without = np.asarray(st.sample_open(params, CFG, ids_BP, mask_BP, keys_B, ends, 6))
    assert not set(without.ravel().tolist()) & set(ends)
    steered = st.sample_open(params, CFG, ids_BP, mask_BP, keys_B, (), 6, steer_LD)
    expected = sample(params, CFG, Sampling(), (999,), 6, ids_BP, mask_BP, keys_B, steer_LD=steer_LD).response_ids_BR
    np.testing.assert_array_equal(steered, expected)
    assert (np.asarray(steered) != np.asarray(plain)).any()


def test_special_tokens_and_rows_beyond_the_tokenizer_are_banned():
    chat = Chat.load("sandbox:base")
    banned_V = st.banned_tokens(chat, 520)
    names = {chat.tokenizer.convert_ids_to_tokens(int(i)) for i in np.flatnonzero(banned_V[:517])}
    assert names == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<think>", "</think>"}
    assert banned_V[517:].all()


def test_token_files(tmp_path):
    file = tmp_path / "tokens.json"

    def write(ids, **more):
        file.write_text(json.dumps({"tokens": [{"id": i, "text": "x"} for i in ids], "vocab_size": 48} | more))

    write([7, 3, 47])
    ids_K = st.load_tokens(file, 48)
    assert ids_K.tolist() == [7, 3, 47] and ids_K.dtype == np.int32
    for ids, more, size, message in (
        ([], {}, 48, "empty token set"),
        ([1], {}, 50, "vocabulary of 48, but the model has 50"),
        ([1, 48], {}, 48, "ids must be"),
        ([1, 1], {}, 48, "ids must be"),
        ([True], {}, 48, "ids must be"),
        ([1], {"tokens": [5]}, 48, "not a tokens.json"),
        ([1], {"tokens": None}, 48, "not a tokens.json"),
    ):
        write(ids, **more)
        with pytest.raises(UserError, match=message):
            st.load_tokens(file, size)
    file.write_text("{")
    with pytest.raises(UserError, match="is not a tokens"):
        st.load_tokens(file, 48)
    with pytest.raises(UserError, match="cannot be read"):
        st.load_tokens(tmp_path / "nothing.json", 48)


def test_ids_are_usable_in_jax(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"tokens": [{"id": 2}], "vocab_size": 48}))
    assert jnp.asarray(st.load_tokens(tmp_path / "t.json", 48)).dtype == jnp.int32
