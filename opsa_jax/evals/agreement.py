"""How far several judges agree on the same responses."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def cohens_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Cohen's kappa of two binary judges: agreement beyond what their rates alone would give (Cohen 1960).

    None where it is not defined: no items, or both judges always say the same one thing.

    >>> cohens_kappa([True, True, False, False], [True, False, False, False])
    0.5
    """
    n = len(first)
    if n == 0 or n != len(second):
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    p, q = sum(first) / n, sum(second) / n
    expected = p * q + (1 - p) * (1 - q)
    return None if expected == 1 else (observed - expected) / (1 - expected)


def agreement(verdicts: Mapping[str, Mapping[Any, bool | None]]) -> list[dict[str, Any]]:
    """Every pair of judges over the items that both could judge.

    Args:
        verdicts: judge -> item -> its yes or no; None where it gave none (unparsed).

    Returns:
        Rows with first, second, n, unjudged (items only one or neither gave a verdict on), agree (share), kappa (or None).
    """
    rows = []
    for a, b in combinations(verdicts, 2):
        shared = [i for i in verdicts[a] if i in verdicts[b]]
        both = [(verdicts[a][i], verdicts[b][i]) for i in shared]
        both = [(x, y) for x, y in both if x is not None and y is not None]
        agree = sum(x == y for x, y in both) / len(both) if both else None
        kappa = cohens_kappa([x for x, _ in both], [y for _, y in both])
        rows.append({"first": a, "second": b, "n": len(both), "unjudged": len(shared) - len(both), "agree": agree, "kappa": kappa})
    return rows
