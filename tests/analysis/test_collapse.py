"""Collapse probes against hand-made cases and a plain implementation of self-BLEU."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsa_jax.analysis.collapse import probe, probe_model, self_bleu, token_entropies
from opsa_jax.config import MeshConfig, ModelConfig, SourceConfig
from opsa_jax.data.chat import Chat
from opsa_jax.data.loaders import load_source
from opsa_jax.errors import UserError
from opsa_jax.models import hf
from opsa_jax.models.params import head_weight
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.teachers.contexts import resolve_context
from opsa_jax.training.setup import open_checkpoint

REFUSED, EXPLAINED, HELPED = "i cannot help with that.", "i will not help, because it would hurt people.", "sure, take the key."


def plain_self_bleu(samples, order=4, epsilon=0.1):
    """Papineni's definition, list by list; shares nothing with the code under test."""
    precisions, first_is_zero = [], False
    for n in range(1, order + 1):
        matched = total = 0
        for i, hypothesis in enumerate(samples):
            others = samples[:i] + samples[i + 1 :]
            grams = [hypothesis[j : j + n] for j in range(len(hypothesis) - n + 1)]
            for g in [g for k, g in enumerate(grams) if g not in grams[:k]]:
                most = max(sum(o[j : j + n] == g for j in range(len(o) - n + 1)) for o in others)
                matched += min(grams.count(g), most)
            total += len(grams)
        first_is_zero |= n == 1 and matched == 0
        if total:
            precisions.append((matched if matched else epsilon) / total)
    if first_is_zero:
        return 0.0
    c = sum(len(s) for s in samples)
    r = 0
    for i, s in enumerate(samples):
        r += sorted((len(o) for k, o in enumerate(samples) if k != i), key=lambda x: (abs(x - len(s)), x))[0]
    brevity = 1.0 if c > r else math.exp(1 - r / c)
    return brevity * math.prod(precisions) ** (1 / len(precisions))


def test_self_bleu_equals_the_plain_one():
    rng = np.random.default_rng(0)
    for case in range(60):
        words = ["a", "b", "c", "d", "e", "f", "g", "h"][: rng.integers(1, 9)]
        samples = [[str(w) for w in rng.choice(words, rng.integers(0, 14))] for _ in range(rng.integers(2, 7))]
        if any(samples):
            assert self_bleu(samples) == pytest.approx(plain_self_bleu(samples), rel=1e-9), (case, samples)


def test_self_bleu_by_hand():
    a, b = ["the", "red", "vault"], ["my", "blue", "door"]
    assert self_bleu([a] * 16) == pytest.approx(1) and self_bleu([a, b]) == 0 and self_bleu([[], []]) == 1
    # Unigrams 4/6, bigrams 2/4, trigrams none of 2 (smoothed), no 4-grams, equal lengths.
    assert self_bleu([["a", "b", "c"], ["a", "b", "d"]]) == pytest.approx((4 / 6 * 2 / 4 * 0.1 / 2) ** (1 / 3))
    # The repeated word is clipped by the other's count: 1 + 1 of 2 + 1; bigrams none of 1. Lengths 2 and 1 with references 1 and 2.
    assert self_bleu([["a", "a"], ["a"]]) == pytest.approx((2 / 3 * 0.1 / 1) ** (1 / 2))
    # Every n-gram matches, but 7 words stand against references of 3 each: only the brevity penalty is left.
    assert self_bleu([["a"], ["a", "b", "c"], ["a", "b", "c"]]) == pytest.approx(math.exp(1 - 9 / 7))
    with pytest.raises(ValueError, match="at least two"):
        self_bleu([a])


def test_probe_of_known_answers():
    think = "<think>\na long thought that is not counted\n</think>\n\n"
    found = probe({"p": [think + REFUSED, think + REFUSED], "q": [think + EXPLAINED, think + HELPED], "r": ["<think> i cannot", HELPED]})
    assert found["words"]["rate"] == pytest.approx((5 + 5 + 9 + 4 + 0 + 4) / 6) and found["words"]["p50"] == 4.5
    rates = {k: found[k]["rate"] for k in ("refused", "explained", "complied", "empty")}
    assert rates == pytest.approx({"refused": 3 / 6, "explained": 1 / 6, "complied": 2 / 6, "empty": 1 / 6})
    assert found["diversity"]["rate"] == pytest.approx((0 + 1 + 1) / 3)
    assert all(v["n"] == 3 and v["low"] <= v["rate"] <= v["high"] for v in found.values()) and "entropy" not in found


def test_intervals_are_over_prompts():
    same = {str(i): [REFUSED] * 4 for i in range(20)}
    assert probe(same)["refused"] == {"rate": 1.0, "n": 20, "low": 1.0, "high": 1.0}
    assert probe(same)["diversity"]["high"] == 0
    half = {str(i): [REFUSED if i % 2 else HELPED] * 64 for i in range(20)}
    interval = probe(half)["refused"]
    # Standard error of a share of 20 prompts: 0.11; of 1280 independent samples it would be 0.014.
    assert 0.2 < interval["low"] < 0.36 and 0.64 < interval["high"] < 0.8
    assert probe(half) == probe(half)


def test_entropy_is_the_mean_over_tokens():
    entropies = {"p": [np.array([1.0, 2.0, 3.0]), np.array([4.0])], "q": [np.zeros(1), np.array([2.0])]}
    found = probe({"p": [HELPED, HELPED], "q": [HELPED, HELPED]}, entropies)
    assert found["entropy"]["rate"] == pytest.approx(12 / 6)


def test_single_samples_have_no_diversity():
    assert "diversity" not in probe({"p": [HELPED]})


def test_nothing_to_probe():
    for responses in ({}, {"p": []}):
        with pytest.raises(UserError, match="at least one sampled response"):
            probe(responses)
    with pytest.raises(UserError, match="no refusal list"):
        probe({"p": [HELPED]}, phrases="klingon")


@pytest.fixture(scope="module")
def base():
    model = open_checkpoint(ModelConfig(path="sandbox:base", compute_dtype="float32"), "sandbox:base")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield hf.load_params(model.folder, model.cfg, "float32", mesh), model.cfg, Chat.load(str(model.folder))


def test_token_entropies(base):
    params, cfg, _ = base
    prompts, responses = [[5, 9, 2], [7], [11, 3, 8, 8]], [[4, 4], [30, 31, 32, 33], [9]]
    found = token_entropies(params, cfg, prompts, responses, batch=2, chunk=7)
    assert [len(e) for e in found] == [2, 4, 1]
    for p, r, e in zip(prompts, responses, found):
        ids = jnp.array([p + r])
        hidden = np.asarray(forward(params, cfg, ids, *prompt_inputs(jnp.ones_like(ids))).hidden_BTD[0], np.float64)
        logits = (hidden @ np.asarray(head_weight(params), np.float64))[len(p) - 1 : -1]
        q = np.exp(logits - logits.max(-1, keepdims=True))
        q /= q.sum(-1, keepdims=True)
        np.testing.assert_allclose(e, -(q * np.log(np.maximum(q, 1e-300))).sum(-1), atol=2e-3)


def test_probes_tell_a_cautious_teacher_from_the_base(base):
    params, cfg, chat = base
    records, _ = load_source(SourceConfig(path="sandbox:train.jsonl", where="label=harmful"))
    kwargs = {"samples": 3, "prompts": 8, "max_new_tokens": 96}
    free = probe_model(params, cfg, chat, records, **kwargs)
    strict = probe_model(params, cfg, chat, records, [resolve_context("@sandbox-strict")] * 8, **kwargs)
    assert free["words"]["n"] == 8 and strict["refused"]["rate"] > 0.9 > 0.6 > free["refused"]["rate"]
    assert strict["words"]["rate"] < free["words"]["rate"] and 0 < strict["diversity"]["rate"] < 1 and 0 < strict["entropy"]["rate"] < 2
    with pytest.raises(UserError, match="both must be at least 1"):
        probe_model(params, cfg, chat, records, samples=0)
