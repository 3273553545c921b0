"""Divergence between two models at every token of given responses (OPSA, arXiv 2605.15239, App. C).

Both models score the same response ids; each sees its own prompt (a teacher's may carry a context). Position 0 is the first response
token. Full vocabulary, raw logits (temperature 1), nats; the logits of at most `chunk` tokens exist at the same time.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opsa_jax.config import ObjectiveConfig
from opsa_jax.data.chat import left_pad
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params, head_weight
from opsa_jax.objectives.chunked import chunked_divergence
from opsa_jax.parallel.mesh import current_shards, round_up
from opsa_jax.training.views import response_hidden

SMALLEST_BUCKET = 32


@dataclass(frozen=True)
class View:
    """A model and what it is shown before each response."""

    params: Params
    cfg: DecoderConfig
    prompts: Sequence[Sequence[int]]
    """Ids of the templated prompt of each response."""
    steer_LD: jax.Array | None = None
    """Added to every block input."""


def bucket(n: int) -> int:
    """The width that n columns are padded to: few widths, few compiled programs.

    >>> bucket(1), bucket(32), bucket(33), bucket(200)
    (32, 32, 64, 256)
    """
    return max(SMALLEST_BUCKET, 1 << (max(n, 1) - 1).bit_length())


def token_divergence(
    teacher: View, student: View, responses: Sequence[Sequence[int]], batch: int = 16, chunk: int = 1024
) -> dict[str, list[np.ndarray]]:
    """KL between two models at every response token.

    Args:
        teacher, student: T and S; row i of their prompts belongs to response i.
        responses: ids, at least one each.
        batch: rows at a time; rounded up to what the mesh divides.

    Returns:
        `forward` = KL(T, S), `reverse` = KL(S, T) and `symmetric` = (forward + reverse) / 2: for each response a float32 array of its
        length; also `logp_teacher` and `logp_student` of the response tokens. Exactly 0 where both views are the same.
    """
    batch = round_up(batch, current_shards())
    # One width for both prompts, so that equal views are computed in the same way.
    width = bucket(max((len(p) for view in (teacher, student) for p in view.prompts), default=1))
    order = sorted(range(len(responses)), key=lambda i: len(responses[i]))
    found: dict[str, list[Any]] = {name: [None] * len(responses) for name in _NAMES}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        room = bucket(len(responses[rows[-1]]))
        ids_BR, mask_BR = (x[:, ::-1] for x in left_pad([list(responses[i])[::-1] for i in rows] + [[]] * (batch - len(rows)), room, 0))
        views = [
            (v.params, *left_pad([list(v.prompts[i]) for i in rows] + [[0]] * (batch - len(rows)), width, 0), v.steer_LD)
            for v in (teacher, student)
        ]
        statistics = _statistics(*views, ids_BR, mask_BR, teacher.cfg, student.cfg, min(chunk, batch * room))
        for name, x_BR in zip(_NAMES, map(np.asarray, statistics), strict=True):
            for b, i in enumerate(rows):
                found[name][i] = x_BR[b, : len(responses[i])]
    return found


_NAMES = ("symmetric", "forward", "reverse", "logp_teacher", "logp_student")


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _statistics(teacher, student, ids_BR, mask_BR, teacher_cfg, student_cfg, chunk):
    B, R = ids_BR.shape

    def rows(view, cfg):
        params, prompt_BP, prompt_mask_BP, steer_LD = view
        hidden_BRD = response_hidden(params, cfg, prompt_BP, prompt_mask_BP, ids_BR, mask_BR, steer_LD)
        return hidden_BRD.reshape(B * R, -1), head_weight(params)

    (ht_ND, head_t_DV), (hs_ND, head_s_DV) = rows(teacher, teacher_cfg), rows(student, student_cfg)
    cfg = ObjectiveConfig(divergence="mix", mix=0.5, support="full", temperature=1.0, chunk=chunk)
    w_N, ids_N = mask_BR.reshape(-1).astype(jnp.float32), ids_BR.reshape(-1)
    _, found = chunked_divergence(cfg, hs_ND, head_s_DV, ht_ND, head_t_DV, w_N, ids_N, train_head=False)
    names = ("divergence", "kl_forward", "kl_reverse", "logp_teacher", "logp_student")
    return tuple(found[name].reshape(B, R) for name in names)


def by_position(values: Sequence[np.ndarray], room: int = 512) -> dict[str, list[float]]:
    """Mean over the responses that are long enough, at each of the first `room` positions.

    >>> by_position([np.array([1.0, 2.0]), np.array([3.0])])["mean"]
    [2.0, 2.0]

    Returns:
        mean, its 95 % normal interval `low` and `high` (equal to the mean where one response is left), and the number of responses `n`.
    """
    columns: dict[str, list[float]] = {"mean": [], "low": [], "high": [], "n": []}
    for position in range(min(room, max(map(len, values), default=0))):
        x = np.array([v[position] for v in values if len(v) > position], np.float64)
        half = 1.96 * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else 0.0
        mean = float(x.mean())
        row = {"mean": mean, "low": max(mean - half, 0.0), "high": mean + half, "n": len(x)}
        for name, value in row.items():
            columns[name].append(value)
    return columns


def by_type(values: Sequence[np.ndarray], responses: Sequence[Sequence[int]], minimum: int = 15) -> list[dict[str, Any]]:
    """Mean by token id, and how much of it the position does not explain.

    The residual of a token is its value minus the mean over all responses at its position (the position baseline); a type's residual is
    the mean over its occurrences. Types with fewer than `minimum` occurrences are left out.

    >>> by_type([np.array([4.0, 0.0]), np.array([2.0, 0.0])], [[7, 9], [8, 9]], minimum=1)[0]
    {'id': 7, 'count': 1, 'mean': 4.0, 'residual': 1.0}

    Returns:
        id, count, mean and residual of each type, the largest mean first.
    """
    baseline = by_position(values, max(map(len, values), default=0))["mean"]
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row, ids in zip(values, responses, strict=True):
        for position, (value, token) in enumerate(zip(row, ids, strict=True)):
            found[int(token)].append((float(value), float(value) - baseline[position]))
    types = [
        {"id": token, "count": len(x), "mean": float(np.mean([v for v, _ in x])), "residual": float(np.mean([r for _, r in x]))}
        for token, x in found.items()
        if len(x) >= minimum
    ]
    return sorted(types, key=lambda t: (-t["mean"], t["id"]))


def concentration(values: Sequence[np.ndarray], share: float = 0.5) -> float:
    """The share of tokens that together hold `share` of the sum: near 0 when few tokens carry all of it, `share` when all carry the same.

    >>> concentration([np.array([0.0, 9.0, 1.0, 0.0])]), concentration([np.ones(8)])
    (0.25, 0.5)
    """
    x = np.sort(np.concatenate([np.asarray(v, np.float64) for v in values]))[::-1] if len(values) else np.zeros(0)
    if x.sum() <= 0:
        return share
    return float((np.searchsorted(np.cumsum(x), share * x.sum() * (1 - 1e-12)) + 1) / len(x))
