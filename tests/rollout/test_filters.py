"""Filters against the logits processors of transformers, in the order in which its `generate` applies them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from opsa_jax.config import RolloutConfig
from opsa_jax.errors import UserError
from opsa_jax.rollout.filters import Sampling, filter_logits

ours = functools.partial(jax.jit, static_argnames="sampling")(filter_logits)


def theirs(logits: np.ndarray, s: Sampling) -> np.ndarray:
    scores = TemperatureLogitsWarper(float(s.temperature))(None, torch.tensor(logits))
    for wanted, warper, value in (
        (s.top_k > 0, TopKLogitsWarper, s.top_k),
        (s.top_p < 1, TopPLogitsWarper, s.top_p),
        (s.min_p > 0, MinPLogitsWarper, s.min_p),
    ):
        scores = warper(value)(None, scores) if wanted else scores
    return scores.numpy()


def logits(kind: str, V: int) -> np.ndarray:
    x = np.random.default_rng(0).normal(0, 3, (64, V)).astype(np.float32)
    # Ties, among them -0.0 with 0.0; and rows in which all but one, or nothing, differs.
    return {"random": x, "ties": np.round(x * 2) / 2, "flat": np.where(np.eye(64, V) > 0, x, np.float32(-1.5))}[kind]


SETTINGS = [
    Sampling(0.7),
    Sampling(1.3, top_k=1),
    Sampling(1.3, top_k=20),
    Sampling(1.0, top_k=1000),
    Sampling(0.5, top_p=0.9),
    Sampling(1.0, top_p=0.33),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, top_p=0.999),
    Sampling(1.0, min_p=0.05),
    Sampling(1.0, min_p=1.0),
    Sampling(0.6, top_k=20, top_p=0.95),
    Sampling(2.0, top_k=7, top_p=0.8, min_p=0.2),
]


@pytest.mark.parametrize("kind", ["random", "ties", "flat"])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_equal_to_transformers(kind, sampling):
    x = logits(kind, 50)
    got, expected = np.asarray(ours(x, sampling=sampling)), theirs(x, sampling)
    # Which of several equal logits top-p keeps is up to the sort in transformers: compare what is kept, not where.
    got_sorted, expected_sorted = np.sort(got, -1), np.sort(expected, -1)
    np.testing.assert_array_equal(np.isinf(got_sorted), np.isinf(expected_sorted))
    np.testing.assert_allclose(got_sorted, expected_sorted, rtol=1e-6)
    if kind == "random":
        np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
    assert np.isfinite(got).any(-1).all()


def test_order_is_that_of_generate():
    """Read from transformers itself, so that a new order there is noticed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", vocab_size=8, **sizes))
    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1)
    processors = model._get_logits_processor(config)
    assert [type(p) for p in processors] == [TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper]


def test_smaller_id_first_among_equals_and_nothing_left_is_greedy():
    x = jnp.array([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert np.isfinite(ours(x, sampling=Sampling(top_p=0.5))).tolist() == [[False, True, True, False, False]]
    assert np.isfinite(ours(x, sampling=Sampling(top_p=1e-9))).tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0, top_k=3, top_p=0.5), Sampling(0.7, min_p=0.1)], ids=str)
def test_no_search_or_sort_when_not_needed(sampling):
    program = str(jax.make_jaxpr(lambda x: filter_logits(x, sampling))(jnp.zeros((2, 16))))
    assert not [name for name in ("while", "scan", "sort", "top_k") if name in program]


def test_sampling_follows_the_config_and_refuses_bad_values():
    cfg = RolloutConfig(temperature=0.6, top_k=20, top_p=0.95, min_p=0.01)
    assert Sampling.of(cfg) == Sampling(0.6, 20, 0.95, 0.01)
    assert hash(Sampling.of(cfg)) == hash(Sampling(0.6, 20, 0.95, 0.01))
    for bad in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2.0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            Sampling(**bad)
