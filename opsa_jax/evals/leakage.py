"""Whether evaluation prompts are in the training prompts, word for word or nearly.

Three signs, each on texts in lower case without punctuation:

    exact    the same words
    ngram    13 words in a row in common (Brown et al. 2020, arXiv 2005.14165, App. C), for texts that long
    similar  Jaccard similarity of the sets of word trigrams (words themselves below four words) of at least 0.8, for shorter texts
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from opsa_jax.data.records import Record
from opsa_jax.evals.scorers import normalise

Sign = Literal["exact", "ngram", "similar"]


@dataclass(frozen=True)
class Leak:
    """An evaluation prompt and the training prompt it resembles."""

    sign: Sign
    evaluation: Record
    training: Record
    value: float
    """1 for exact; share of the evaluation prompt's n-grams found anywhere in training; similarity."""


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation.

    >>> words("I can\u2019t -- open  it!")
    ['i', 'can', 't', 'open', 'it']
    """
    return re.findall(r"\w+", normalise(text))


def grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def find_leaks(training: Iterable[Record], evaluation: Sequence[Record], n: int = 13, similarity: float = 0.8) -> list[Leak]:
    """The strongest sign for each evaluation prompt that has one.

    Linear in both: training is read once; pairs are compared only where they share a rare shingle.

    Args:
        n: words in a row.
        similarity: least Jaccard similarity of short prompts, in (0, 1].
    """
    tokens = [words(_asked(r)) for r in evaluation]
    exact: dict[tuple[str, ...], list[int]] = defaultdict(list)
    long: dict[tuple[str, ...], list[int]] = defaultdict(list)
    short: dict[tuple[str, ...], list[int]] = defaultdict(list)
    shingles = [_shingles(t) if 0 < len(t) < 3 * n else frozenset() for t in tokens]
    for i, t in enumerate(tokens):
        if t:
            exact[tuple(t)].append(i)
        for gram in set(grams(t, n)):
            long[gram].append(i)
        for s in _prefix(shingles[i], similarity):
            short[s].append(i)
    best: dict[int, Leak] = {}
    overlap: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    witness: dict[int, Record] = {}

    def offer(i: int, leak: Leak) -> None:
        if i not in best or (best[i].sign != "exact" and (leak.sign == "exact" or leak.value > best[i].value)):
            best[i] = leak

    for record in training:
        t = words(_asked(record))
        for i in exact.get(tuple(t), ()):
            offer(i, Leak("exact", evaluation[i], record, 1.0))
        for gram in set(grams(t, n)):
            for i in long.get(gram, ()):
                overlap[i].add(gram)
                witness.setdefault(i, record)
        if len(t) < 4 * n:
            mine = _shingles(t)
            for i in {i for s in mine for i in short.get(s, ())}:
                value = len(mine & shingles[i]) / len(mine | shingles[i])
                if value >= similarity:
                    offer(i, Leak("similar", evaluation[i], record, value))
    for i, shared in overlap.items():
        offer(i, Leak("ngram", evaluation[i], witness[i], len(shared) / len(set(grams(tokens[i], n)))))
    return [best[i] for i in sorted(best)]


def _asked(record: Record) -> str:
    """The question itself: instructions around it are the same for all."""
    return str(record.extra.get("question") or record.extra.get("behavior") or record.prompt)


def _shingles(tokens: Sequence[str]) -> frozenset[tuple[str, ...]]:
    return frozenset(grams(tokens, 3) if len(tokens) > 3 else grams(tokens, 1))


def _prefix(shingles: frozenset, similarity: float) -> list[tuple[str, ...]]:
    """Enough shingles that any set with this similarity shares one of them: all but the ceil(s * n) - 1 last (Chaudhuri et al. 2006)."""
    keep = len(shingles) - math.ceil(similarity * len(shingles) - 1e-9) + 1
    return sorted(shingles)[: max(keep, 1)]


def summary(leaks: Sequence[Leak], evaluation: Sequence[Record]) -> list[dict]:
    """Counts by metric of the evaluation: prompts, exact, ngram, similar."""
    rows: dict[str, dict] = {}
    for r in evaluation:
        rows.setdefault(r.extra["metric"], {"metric": r.extra["metric"], "n": 0, "exact": 0, "ngram": 0, "similar": 0})["n"] += 1
    for leak in leaks:
        rows[leak.evaluation.extra["metric"]][leak.sign] += 1
    return list(rows.values())
