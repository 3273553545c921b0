"""Flip rates and the Pareto front against hand-made counts and plain loops."""

import numpy as np
import pytest

from opsa_jax.teachers.flip_rate import (
    Flips,
    benign_flip_rate,
    benign_flip_rate_of_answered,
    objective,
    pareto_front,
    teacher_flip_rate,
    teacher_flip_rate_of_unsafe,
)


def test_denominators():
    # prompt:    flipped  stays unsafe  was safe, stays  was safe, becomes unsafe  flipped
    unsafe, safe = [True, True, False, False, True], [True, False, True, False, True]
    assert teacher_flip_rate(unsafe, safe) == Flips(2, 5)
    assert teacher_flip_rate_of_unsafe(unsafe, safe) == Flips(2, 3)
    assert benign_flip_rate(unsafe, safe).rate == 0.4
    assert benign_flip_rate_of_answered(unsafe, safe) == Flips(2, 3)


def test_random_outcomes_against_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, then = rng.random((2, 37)) < 0.6
        flips = sum(1 for a, b in zip(first, then, strict=True) if a and b)
        assert teacher_flip_rate(first, then).rate == pytest.approx(flips / 37)
        assert benign_flip_rate(first, then).rate == pytest.approx(flips / 37)
        assert teacher_flip_rate_of_unsafe(first, then).rate == pytest.approx(flips / first.sum())
        assert benign_flip_rate_of_answered(first, then).rate == pytest.approx(flips / first.sum())


def test_nothing_to_divide_by():
    assert teacher_flip_rate([False, False], [True, True]) == Flips(0, 2)
    assert teacher_flip_rate_of_unsafe([False, False], [True, True]).rate is None


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="without the context"):
        teacher_flip_rate([True], [True, False])


def test_objective_weighs_over_refusal():
    assert objective(0.9, 1.0, 0.0) == 0.9
    assert objective(0.9, 1.0, 1.0) < objective(0.6, 0.0, 1.0)


def test_pareto_front_against_a_loop():
    rng = np.random.default_rng(1)
    tfr, benign = rng.integers(0, 8, (2, 60)) / 8  # with ties

    def beaten(i):
        return any(
            tfr[j] >= tfr[i] and benign[j] <= benign[i] and (tfr[j], benign[j]) != (tfr[i], benign[i]) for j in range(len(tfr)) if j != i
        )

    assert pareto_front(tfr, benign).tolist() == [not beaten(i) for i in range(len(tfr))]
    assert pareto_front([0.5, 0.5], [0.1, 0.1]).all()
