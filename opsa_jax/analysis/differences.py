"""95 % intervals for the difference between two models on the same suite.

Rates with transcripts are compared record by record: Newcombe's score interval for paired proportions (1998, Stat. Med. 17:2635,
method 10). Rates without transcripts, or over different records, as independent: Newcombe 1998 (Stat. Med. 17:873, method 10). Means
that are no rates (words, diversity): the half-widths of both, as independent, added in squares. Paired where it can be, since both
models answer the same prompts; treating them as independent is wider where they agree.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from opsa_jax.evals.scorers import wilson


def newcombe(p1: float, n1: int, p2: float, n2: int) -> tuple[float, float]:
    """Interval of p2 - p1 for independent proportions.

    >>> [round(x, 4) for x in newcombe(48 / 80, 80, 56 / 70, 70)]
    [0.0524, 0.3339]
    """
    l1, u1 = wilson(p1 * n1, n1)
    l2, u2 = wilson(p2 * n2, n2)
    d = p2 - p1
    return d - math.hypot(p2 - l2, u1 - p1), d + math.hypot(u2 - p2, p1 - l1)


def newcombe_paired(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """Interval of p2 - p1 over the same records, from counts of successes: of both, of the first only, of the second only, of neither.

    >>> [round(x, 4) for x in newcombe_paired(0, 0, 20, 0)]
    [0.7721, 1.0]
    """
    n = both + first + second + neither
    p1, p2 = (both + first) / n, (both + second) / n
    (l1, u1), (l2, u2) = wilson(both + first, n), wilson(both + second, n)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    cross = both * neither - first * second
    corrected = cross - n / 2 if cross > n / 2 else min(cross, 0)
    phi = corrected / math.sqrt(margins) if margins else 0.0

    def half(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    d = p2 - p1
    return max(d - half(p2 - l2, u1 - p1), -1.0), min(d + half(u2 - p2, p1 - l1), 1.0)


def success(metric: str, outcome: str) -> bool:
    """Whether a transcript's outcome counts for its metric: complied, refused (over-refusal) or right (tasks).

    >>> success("asr_seen", "complied"), success("over_refusal", "complied"), success("gsm8k", "right")
    (True, False, True)
    """
    if metric.startswith("asr_"):
        return outcome in ("complied", "unsafe")
    return outcome == ("refused" if metric.startswith("over_refusal") else "right")


def difference(
    metric: str, before: Mapping[str, Any], after: Mapping[str, Any], pairs: Sequence[tuple[bool, bool]] = ()
) -> dict[str, Any]:
    """after - before of one metric.

    Args:
        before, after: {"rate", "n", "low", "high"}.
        pairs: successes of both models record by record; used when they are complete and give the rates of the results.

    Returns:
        {"difference", "low", "high", "method"}, method one of paired, independent, mean.
    """
    d = after["rate"] - before["rate"]
    if metric.endswith(("_words", "_diversity", "_score")) or metric.startswith("safety_score"):
        halves = [(x["high"] - x["low"]) / 2 for x in (before, after)]
        return {"difference": d, "low": d - math.hypot(*halves), "high": d + math.hypot(*halves), "method": "mean"}
    n = len(pairs)
    counts = [sum(1 for p in pairs if p == wanted) for wanted in ((True, True), (True, False), (False, True), (False, False))]
    fits = n and n == before["n"] == after["n"]
    if fits and round(before["rate"] * n) == counts[0] + counts[1] and round(after["rate"] * n) == counts[0] + counts[2]:
        low, high = newcombe_paired(*counts)
        return {"difference": d, "low": low, "high": high, "method": "paired"}
    low, high = newcombe(before["rate"], before["n"], after["rate"], after["n"])
    return {"difference": d, "low": low, "high": high, "method": "independent"}


def mean_rate(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of several independent rates, with the limits of each combined in squares (MOVER; Zou and Donner 2008).

    >>> mean_rate([{"rate": 0.5, "low": 0.2, "high": 0.8}])
    {'rate': 0.5, 'low': 0.2, 'high': 0.8}
    """
    k = len(cells)
    mean = sum(c["rate"] for c in cells) / k
    down = math.sqrt(sum((c["rate"] - c["low"]) ** 2 for c in cells)) / k
    up = math.sqrt(sum((c["high"] - c["rate"]) ** 2 for c in cells)) / k
    return {"rate": mean, "low": mean - down, "high": mean + up}
