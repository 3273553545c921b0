"""Lengths of responses: how far two distributions are apart, and choosing among variants so that they come together."""

from collections.abc import Sequence

import numpy as np


def ks_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sample Kolmogorov-Smirnov distance: the largest difference of the two empirical distribution functions, in [0, 1].

    >>> ks_distance([1, 2], [3, 4]), ks_distance([1, 2, 3, 4], [2, 4]), ks_distance([5, 5], [5])
    (1.0, 0.25, 0.0)

    Raises:
        ValueError: one of them is empty.
    """
    if not len(a) or not len(b):
        raise ValueError("the distance of an empty sample is not defined")
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    return float(np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max())


def match_lengths(variants: Sequence[Sequence[int]], target: Sequence[int]) -> list[int]:
    """One variant for each prompt, so that the lengths of the chosen ones are distributed like `target` (quantile matching).

    Prompts are sorted by the median length of their variants; the i-th of N gets the (i + 1/2)/N quantile of the target, and of its
    variants the one nearest to that. Where this would leave the distribution further off than taking every first variant (by
    `ks_distance`), the first variants are taken.

    >>> match_lengths([[10, 30], [12, 20]], [30, 11])
    [1, 0]

    Args:
        variants: lengths of each prompt's variants, at least one each.
        target: lengths to match, in any number above 0.

    Returns:
        The number of the chosen variant of each prompt.
    """
    if not variants:
        return []
    order = sorted(range(len(variants)), key=lambda i: float(np.median(variants[i])))
    wanted = np.quantile(np.asarray(target, np.float64), (np.arange(len(order)) + 0.5) / len(order), method="inverted_cdf")
    chosen = [0] * len(variants)
    for i, length in zip(order, wanted):
        chosen[i] = int(np.argmin([abs(v - length) for v in variants[i]]))
    lengths = [v[k] for v, k in zip(variants, chosen)]
    first = [v[0] for v in variants]
    return chosen if ks_distance(lengths, target) <= ks_distance(first, target) else [0] * len(variants)
