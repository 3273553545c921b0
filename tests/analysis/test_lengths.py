"""Quantile matching of lengths, and the distance that it is measured by."""

import numpy as np
import pytest

from opsa_jax.analysis.lengths import ks_distance, match_lengths


def plain_ks(a, b):
    at = sorted({*a, *b})
    return max(abs(sum(x <= t for x in a) / len(a) - sum(x <= t for x in b) / len(b)) for t in at)


def test_distance_equals_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (rng.integers(0, 12, rng.integers(1, 30)).tolist() for _ in range(2))
        assert ks_distance(a, b) == pytest.approx(plain_ks(a, b)) == pytest.approx(ks_distance(b, a))
    with pytest.raises(ValueError, match="empty"):
        ks_distance([], [1])


def test_matching_brings_the_distributions_together():
    rng = np.random.default_rng(1)
    variants = [rng.normal(60, 20, 6).astype(int).tolist() for _ in range(300)]
    target = rng.normal(75, 12, 500).astype(int).tolist()
    chosen = match_lengths(variants, target)
    before = ks_distance([v[0] for v in variants], target)
    after = ks_distance([v[k] for v, k in zip(variants, chosen)], target)
    assert before > 0.4 and after < 0.25


def test_a_target_that_is_met_exactly():
    variants = [[10, 30], [30, 10], [10, 30], [30, 10]]
    chosen = match_lengths(variants, [10, 10, 30, 30])
    assert sorted(v[k] for v, k in zip(variants, chosen)) == [10, 10, 30, 30]


def test_never_further_than_the_first_variants():
    rng = np.random.default_rng(2)
    for _ in range(200):
        variants = [rng.integers(1, 9, rng.integers(1, 4)).tolist() for _ in range(rng.integers(1, 6))]
        target = rng.integers(1, 9, rng.integers(1, 6)).tolist()
        chosen = match_lengths(variants, target)
        assert ks_distance([v[k] for v, k in zip(variants, chosen)], target) <= ks_distance([v[0] for v in variants], target)
    assert match_lengths([], [1]) == []
