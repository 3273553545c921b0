"""Refusal direction by difference of means (Arditi et al. 2024, arXiv 2406.11717; as SafeSteer uses it, arXiv 2606.02530).

A candidate is a layer l and a column of the prompt counted from its end:

    d[l, c] = mean over positive rows of h - mean over negative rows of h,    h = input of block l at that column

Rows are left-padded, so column -1 is the last token of every row. What positive and negative rows are (harmful and harmless prompts,
or harmful prompts with and without a context) is the caller's choice. Means and scores are float64 on the host.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from opsa_jax.data.chat import Chat, left_pad
from opsa_jax.errors import UserError
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params, head_weight
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.parallel.mesh import round_up

Row = Sequence[int]
_KL_EPS, _R_EPS = 1e-6, 1e-8


@dataclass(frozen=True)
class Place:
    """A place in a conversation: the end of the prompt, or somewhere in the model's own greedy answer."""

    tokens: int = 0
    """Tokens of the answer, 0 for none."""
    text: str = ""
    """Or: up to and including the first occurrence of this text."""

    @classmethod
    def parse(cls, value: str, flag: str) -> "Place":
        """`template`, `answer:K` or `answer:TEXT`.

        >>> Place.parse("answer:11", "--position"), Place.parse("answer:<think>", "--position").text
        (Place(tokens=11, text=''), '<think>')
        """
        kind, colon, rest = value.partition(":")
        if value == "template":
            return cls()
        if kind != "answer" or not colon or not rest or rest == "0":
            raise UserError(f"{flag} {value!r}: allowed: template, answer:K (K tokens of the answer), answer:TEXT (up to TEXT)")
        return cls(tokens=int(rest)) if rest.isdigit() else cls(text=rest)

    @property
    def in_answer(self) -> bool:
        return bool(self.tokens or self.text)

    def cut(self, answer: Sequence[int], chat: Chat) -> list[int] | None:
        """The opening of the answer up to this place; None if it does not come that far."""
        if self.text:
            return next((list(answer[:n]) for n in range(1, len(answer) + 1) if self.text in chat.decode(answer[:n])), None)
        return list(answer[: self.tokens]) if len(answer) >= self.tokens else None


@dataclass(frozen=True)
class Probe:
    """Forward passes over rows of different lengths, a batch at a time, each batch padded to a few widths."""

    params: Params
    cfg: DecoderConfig
    batch: int = 32
    """Rows per pass. Under a mesh, a multiple of data * fsdp."""

    def mean_inputs(self, rows: Sequence[Row], columns: int) -> np.ndarray:
        """Mean over rows of the block inputs at the last `columns` columns, [L, C, D] float64."""
        total = 0.0
        for ids_BT, mask_BT, n in self._batches(rows):
            inputs_LBCD = np.asarray(_block_inputs(self.params, self.cfg, ids_BT, mask_BT, columns)[:, :n], np.float64)
            total = total + inputs_LBCD.sum(1)
        return total / len(rows)

    def logits(self, rows: Sequence[Row], steer_LD: jax.Array | None = None, ablate_D: jax.Array | None = None) -> np.ndarray:
        """Logits of the token after each row, [N, V] float32."""
        parts = [
            np.asarray(_last_logits(self.params, self.cfg, ids_BT, mask_BT, steer_LD, ablate_D)[:n])
            for ids_BT, mask_BT, n in self._batches(rows)
        ]
        return np.concatenate(parts)

    def _batches(self, rows: Sequence[Row]):
        width = round_up(max(map(len, rows)), 32)
        for at in range(0, len(rows), self.batch):
            some = rows[at : at + self.batch]
            # Filler rows keep one shape, so one compiled program.
            ids_BT, mask_BT = left_pad([*some, *[[]] * (self.batch - len(some))], width, 0)
            yield ids_BT, mask_BT, len(some)


@functools.partial(jax.jit, static_argnames=("cfg", "columns"))
def _block_inputs(params, cfg, ids_BT, mask_BT, columns):
    T = ids_BT.shape[1]
    return forward(params, cfg, ids_BT, *prompt_inputs(mask_BT), capture_C=jnp.arange(T - columns, T)).captured_LBCD


@functools.partial(jax.jit, static_argnames="cfg")
def _last_logits(params, cfg, ids_BT, mask_BT, steer_LD, ablate_D):
    hidden_BD = forward(params, cfg, ids_BT, *prompt_inputs(mask_BT), steer_LD=steer_LD, ablate_D=ablate_D).hidden_BTD[:, -1]
    return jnp.dot(hidden_BD, head_weight(params).astype(hidden_BD.dtype), preferred_element_type=jnp.float32)


def refusal_ids(chat: Chat, texts: Sequence[str]) -> tuple[int, ...]:
    """Ids of the refusal tokens, one per text.

    Raises:
        UserError: none given; a text that is not one token of this tokenizer, or whose token decodes to something else.
    """
    if not texts:
        raise UserError("--refusal-tokens: give at least one token that refusals begin with")
    found = []
    for text in texts:
        ids = chat.encode_texts([text])[0].tolist()
        if len(ids) != 1 or chat.decode(ids).strip() != text.strip():
            pieces = [chat.decode([i]) for i in ids]
            raise UserError(f"--refusal-tokens {text!r} is not one token of {chat.path!r} but {pieces}; use words that are one token")
        found.append(ids[0])
    return tuple(dict.fromkeys(found))


def refusal_score(logits_NV: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """R = log(P + 1e-8) - log(1 - P + 1e-8), P the probability of the refusal tokens; [N] float64.

    >>> refusal_score(np.log([[0.25, 0.25, 0.5], [0.1, 0.1, 0.8]]), [0, 1]).round(3).tolist()
    [0.0, -1.386]
    """
    p_N = np.exp(log_softmax(logits_NV)[:, list(ids)]).sum(-1)
    # Rounding may bring a sum of probabilities above one.
    return np.log(p_N + _R_EPS) - np.log(np.maximum(1 - p_N, 0) + _R_EPS)


def kl_of_logits(base_NV: np.ndarray, other_NV: np.ndarray) -> np.ndarray:
    """KL(base, other) per row with log(p + 1e-6), [N] float64, nats."""
    p_NV, q_NV = np.exp(log_softmax(base_NV)), np.exp(log_softmax(other_NV))
    return np.sum(p_NV * (np.log(p_NV + _KL_EPS) - np.log(q_NV + _KL_EPS)), axis=-1)


def log_softmax(logits_NV: np.ndarray) -> np.ndarray:
    """float64."""
    x = np.asarray(logits_NV, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@dataclass(frozen=True)
class Scores:
    """Candidates [L layers, C columns] and what they do; all float64. A direction of length zero has NaN scores."""

    direction_LCD: np.ndarray
    """Not normalised."""
    ablation_LC: np.ndarray
    """Mean refusal score of positive rows with the direction ablated: low means the direction is needed to refuse."""
    induce_LC: np.ndarray
    """Mean refusal score of negative rows with the direction added: high means it is enough to refuse."""
    kl_LC: np.ndarray
    """Mean KL(base, ablated) on harmless rows: low means it does little else."""

    @property
    def layers(self) -> int:
        return self.ablation_LC.shape[0]

    @property
    def columns(self) -> int:
        return self.ablation_LC.shape[1]


def steering_rows(layers: int, layer: int, vector_D: np.ndarray, coefficient: float = 1.0) -> jax.Array:
    """float32 [L, D]: coefficient * vector at one layer, zero at the others."""
    rows_LD = np.zeros((layers, len(vector_D)), np.float32)
    rows_LD[layer] = coefficient * vector_D
    return jnp.asarray(rows_LD)


def score_candidates(
    probe: Probe,
    direction_LCD: np.ndarray,
    positive: Sequence[Row],
    negative: Sequence[Row],
    harmless: Sequence[Row],
    ids: Sequence[int],
    coefficient: float = 1.0,
) -> Scores:
    """Ablation, induction and KL of every candidate, measured at the last token of the rows (three passes per candidate).

    Args:
        positive, negative, harmless: validation rows.
        ids: refusal tokens.
        coefficient: factor of the direction that is added for `induce_LC`.
    """
    L, C, _ = direction_LCD.shape
    base_NV = probe.logits(harmless)
    ablation_LC, induce_LC, kl_LC = (np.full((L, C), np.nan) for _ in range(3))
    for layer, c in np.ndindex(L, C):
        d_D = direction_LCD[layer, c]
        norm = np.linalg.norm(d_D)
        if not norm > 0:
            continue
        unit_D = jnp.asarray(d_D / norm, jnp.float32)
        steer_LD = steering_rows(L, layer, d_D, coefficient)
        ablation_LC[layer, c] = refusal_score(probe.logits(positive, ablate_D=unit_D), ids).mean()
        induce_LC[layer, c] = refusal_score(probe.logits(negative, steer_LD=steer_LD), ids).mean()
        kl_LC[layer, c] = kl_of_logits(base_NV, probe.logits(harmless, ablate_D=unit_D)).mean()
    return Scores(direction_LCD, ablation_LC, induce_LC, kl_LC)


def discards(scores: Scores, max_kl: float = 0.1, layer_share: float = 0.8) -> np.ndarray:
    """Why candidates are discarded, [L, C] of text: "nan", "layer" (l >= int(share * L)), "kl", "induce" (below 0), "" if they are not."""
    reasons = np.full(scores.ablation_LC.shape, "", dtype=object)
    last = int(layer_share * scores.layers)
    reasons[scores.induce_LC < 0] = "induce"
    reasons[scores.kl_LC > max_kl] = "kl"
    reasons[last:] = "layer"
    reasons[~np.isfinite(scores.ablation_LC + scores.induce_LC + scores.kl_LC)] = "nan"
    return reasons


def select(
    scores: Scores, max_kl: float = 0.1, layer_share: float = 0.8, fallback: Literal["none", "induce"] = "none"
) -> tuple[int, int, bool]:
    """(layer, column, whether the fallback chose it): the lowest ablation score among the candidates that are not discarded.

    With `fallback` "induce" and none left: the highest induce score among those discarded for their KL or their induce score.

    Raises:
        UserError: none left; the line has the scores of the best.
    """
    reasons = discards(scores, max_kl, layer_share)
    left = reasons == ""
    if left.any():
        layer, c = np.unravel_index(np.argmin(np.where(left, scores.ablation_LC, np.inf)), left.shape)
        return int(layer), int(c), False
    near = (reasons == "kl") | (reasons == "induce")
    if fallback == "induce" and near.any():
        layer, c = np.unravel_index(np.argmax(np.where(near, scores.induce_LC, -np.inf)), near.shape)
        return int(layer), int(c), True
    counts = ", ".join(f"{(reasons == r).sum()} {r}" for r in ("nan", "layer", "kl", "induce") if (reasons == r).any())
    order = np.argsort(np.where(near, -scores.induce_LC, np.inf), axis=None)[: min(3, int(near.sum()))]
    best = "; ".join(_describe(scores, *np.unravel_index(i, near.shape)) for i in order) or "none has finite scores in an allowed layer"
    raise UserError(
        f"no direction survives of {left.size} candidates (discarded for: {counts}); best by induced refusal: {best}. "
        "Try another --position or --contrast, a larger --max-kl, or --fallback induce"
    )


def _describe(scores: Scores, layer: int, c: int) -> str:
    ablation, induce, kl = (x[layer, c] for x in (scores.ablation_LC, scores.induce_LC, scores.kl_LC))
    return f"layer {layer} column {c - scores.columns}: ablation {ablation:.2f}, induce {induce:.2f}, kl {kl:.3f}"


def load_steering(path: str | Path, cfg: DecoderConfig, coefficient: float = 1.0) -> jax.Array:
    """coefficient * the vectors [L, D] of a steering file, float32: what `forward` adds to the block inputs.

    Raises:
        UserError: no such file, not safetensors, or not one tensor of the model's shape.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"steering file {path} cannot be read as safetensors: {e}; make one with `opsa steer`") from None
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    shape = (cfg.n_layers, cfg.d_model)
    if list(shapes.values()) != [shape]:
        raise UserError(f"steering file {path} holds {shapes}; it must hold one tensor of shape {shape}, [layers, width] of the model")
    return coefficient * jnp.asarray(next(iter(tensors.values())), jnp.float32)
