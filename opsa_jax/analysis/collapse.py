"""Collapse probes: has a model become short, uniform or over-cautious? (COPSD, arXiv 2606.03089: length, diversity, token entropy.)

All statistics are of the answer part, after the think block, except the token entropy, which is of all sampled tokens. Intervals are
95 % percentile bootstraps over prompts: samples of one prompt are not independent of each other.

The words `refused`, `explained`, `complied` and `empty` are those of `opsa_jax.evals.judges.manner`, by the named phrase lists. Shares of
refused, complied and empty answers add up to one; explained ones are part of the refused.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from opsa_jax.errors import UserError
from opsa_jax.evals.judges import manner
from opsa_jax.evals.scorers import normalise, strip_thinking

if TYPE_CHECKING:
    from opsa_jax.data.chat import Chat, Placement
    from opsa_jax.data.records import Record
    from opsa_jax.models.config import DecoderConfig
    from opsa_jax.models.params import Params

SMOOTHING = 0.1
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


def self_bleu(samples: Sequence[Sequence[str]], order: int = 4) -> float:
    """Corpus BLEU of every sample against all others of its prompt: 1 when all are the same, 0 when they share no word.

    n-gram matches are clipped by the largest count in any one other sample and summed over the samples before the precisions are formed
    (Papineni et al. 2002); orders that no sample is long enough for are left out; the brevity penalty takes for each sample the length of
    the other one nearest to it (the shorter of two). Smoothing: a precision without any match counts SMOOTHING = 0.1 matches (method 1 of
    Chen & Cherry 2014), unless not even a word matches: that is 0.

    >>> self_bleu([["a", "b"], ["a", "b"]]), self_bleu([["a", "b"], ["c", "d"]])
    (1.0, 0.0)

    Args:
        samples: words of each sample, at least two samples.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError("self-BLEU compares samples: at least two are needed")
    lengths = [len(s) for s in samples]
    if not any(lengths):
        return 1.0
    logs = []
    for n in range(1, order + 1):
        matched, total = _matches([Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1)) for s in samples])
        if n == 1 and matched == 0:
            return 0.0
        if total:
            logs.append(math.log((matched or SMOOTHING) / total))
    references = sum(min(lengths[:i] + lengths[i + 1 :], key=lambda r: (abs(r - n), r)) for i, n in enumerate(lengths))
    brevity = min(0.0, 1 - references / sum(lengths))
    return math.exp(brevity + sum(logs) / len(logs))


def _matches(counts: list[Counter]) -> tuple[int, int]:
    """(matched, all) n-grams: of each sample's, those that another sample has as often."""
    # The largest and second largest count of each n-gram: for its own holder, the largest of the others is the second.
    first: dict[tuple, int] = {}
    second: dict[tuple, int] = {}
    for c in counts:
        for gram, k in c.items():
            if k > first.get(gram, 0):
                first[gram], second[gram] = k, first.get(gram, 0)
            elif k > second.get(gram, 0):
                second[gram] = k
    matched = sum(min(k, second[g] if k == first[g] else first[g]) for c in counts for g, k in c.items())
    return matched, sum(sum(c.values()) for c in counts)


def probe(
    responses: Mapping[str, Sequence[str]],
    entropies: Mapping[str, Sequence[np.ndarray]] | None = None,
    phrases: str = "sandbox-v1",
    opened: bool = False,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """All probes of sampled responses.

    Args:
        responses: samples by prompt (or its id); as many as there are, at least one each. The paper takes 16 samples of 50 prompts.
        entropies: by the same keys, the entropy (nats) of every sampled token, one array per sample (`token_entropies`); None leaves
            `entropy` out.
        phrases: lists that tell refusals and explanations.
        opened: the prompts already ended inside a think block.
        draws: bootstrap draws.

    Returns:
        Name -> {"rate", "n", "low", "high"} as in evaluation results, n the number of prompts: `words` (also p10, p50, p90 over all
        samples), `diversity` (1 - self-BLEU; without it where no prompt has two samples), `refused`, `explained`, `complied`, `empty`,
        and `entropy` (mean over all tokens).

    Raises:
        UserError: nothing to probe, a prompt without samples, an unknown list.
    """
    if not responses or not all(responses.values()):
        raise UserError("collapse probes need prompts with at least one sampled response each; sample some first")
    texts = [[normalise(strip_thinking(r, opened)[0]).split() for r in rs] for rs in responses.values()]
    manners = [[manner(r, phrases, opened) for r in rs] for rs in responses.values()]
    boot = _Bootstrap(len(texts), draws, seed)
    lengths = [np.array([len(t) for t in ts], np.float64) for ts in texts]
    results = {"words": boot.ratio([x.sum() for x in lengths], [len(x) for x in lengths])}
    results["words"] |= {name: float(np.quantile(np.concatenate(lengths), q)) for name, q in QUANTILES.items()}
    several = [ts for ts in texts if len(ts) > 1]
    if several:
        diversity = [1 - self_bleu(ts) for ts in several]
        results["diversity"] = _Bootstrap(len(several), draws, seed).ratio(diversity, [1] * len(several))
    for name in ("refused", "explained", "complied", "empty"):
        wanted = ("refused", "explained") if name == "refused" else (name,)
        results[name] = boot.ratio([sum(m in wanted for m in ms) for ms in manners], [len(ms) for ms in manners])
    if entropies is not None:
        of_prompt = [np.concatenate([np.asarray(e, np.float64) for e in entropies[key]]) for key in responses]
        results["entropy"] = boot.ratio([e.sum() for e in of_prompt], [len(e) for e in of_prompt])
    return results


class _Bootstrap:
    def __init__(self, n: int, draws: int, seed: int):
        self._index_DN = np.random.default_rng(seed).integers(0, n, (draws, n))

    def ratio(self, sums: Sequence[float], counts: Sequence[int]) -> dict[str, Any]:
        """Mean over everything that was counted, from sums and counts by prompt."""
        sums_N, counts_N = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
        drawn_D = sums_N[self._index_DN].sum(1) / np.maximum(counts_N[self._index_DN].sum(1), 1)
        low, high = np.quantile(drawn_D, (0.025, 0.975))
        return {"rate": float(sums_N.sum() / max(counts_N.sum(), 1)), "n": len(sums_N), "low": float(low), "high": float(high)}


def token_entropies(
    params: "Params",
    cfg: "DecoderConfig",
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    batch: int = 16,
    chunk: int = 256,
) -> list[np.ndarray]:
    """Entropy, in nats, of the model's own distribution (temperature 1) at every response token.

    Args:
        prompts, responses: ids; row i of one belongs to row i of the other.
        batch: rows at a time; rounded up to what the mesh divides.
        chunk: tokens whose logits over the vocabulary are held at the same time.

    Returns:
        For each response a float32 array of its length.
    """
    from opsa_jax.data.chat import left_pad
    from opsa_jax.parallel.mesh import current_shards, round_up

    batch = round_up(batch, current_shards())
    width = round_up(max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=1), 64)
    found = []
    for start in range(0, len(prompts), batch):
        rows = [[*p, *r] for p, r in zip(prompts[start : start + batch], responses[start : start + batch], strict=True)]
        ids_BT, mask_BT = left_pad(rows + rows[:1] * (batch - len(rows)), width, 0)
        entropy_BT = np.asarray(_entropies()(params, cfg, ids_BT, mask_BT, min(chunk, batch * width)))
        for b, response in enumerate(responses[start : start + batch]):
            # Column t predicts the token at t + 1.
            found.append(entropy_BT[b, width - len(response) - 1 : width - 1])
    return found


@functools.cache
def _entropies() -> Callable:
    import jax
    import jax.numpy as jnp

    from opsa_jax.models.params import head_weight
    from opsa_jax.models.transformer import forward, prompt_inputs

    @functools.partial(jax.jit, static_argnums=(1, 4))
    def run(params, cfg, ids_BT, mask_BT, chunk):
        hidden_BTD = forward(params, cfg, ids_BT, *prompt_inputs(mask_BT)).hidden_BTD
        weight = head_weight(params)

        def of_token(hidden_D):
            logp_V = jax.nn.log_softmax((hidden_D @ weight.astype(hidden_D.dtype)).astype(jnp.float32))
            return -jnp.sum(jnp.exp(logp_V) * logp_V)

        return jax.lax.map(of_token, hidden_BTD.reshape(-1, cfg.d_model), batch_size=chunk).reshape(ids_BT.shape)

    return run


def probe_model(
    params: "Params",
    cfg: "DecoderConfig",
    chat: "Chat",
    records: Sequence["Record"],
    contexts: Sequence[str] = (),
    *,
    samples: int = 16,
    prompts: int = 50,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    batch: int = 64,
    placement: "Placement" = "system",
    phrases: str = "sandbox-v1",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """Sample and probe a model, or a teacher: the model under a context for each record (none: without).

    Only the first `prompts` records are used. Same seed, same prompts: the same random numbers for every model and context.

    Raises:
        UserError: samples or prompts below 1.
    """
    import jax

    from opsa_jax.rollout.engine import Engine
    from opsa_jax.rollout.filters import Sampling
    from opsa_jax.rollout.sampler import id_numbers, row_keys

    if samples < 1 or prompts < 1:
        raise UserError(f"collapse probes with {samples} samples of {prompts} prompts: both must be at least 1")
    records = records[:prompts]
    contexts = list(contexts)[:prompts] or [""] * len(records)
    encoded = [chat.encode(r.prompt, c, placement, r.system) for r, c in zip(records, contexts, strict=True)]
    rows = [(i, s) for i in range(len(records)) for s in range(samples)]
    numbers_N = id_numbers(records[i].id for i, _ in rows)
    keys_N = row_keys(jax.random.key(seed), "collapse", 0, numbers_N, np.array([s for _, s in rows], np.int32))
    engine = Engine(params, cfg, Sampling(temperature=temperature), chat.stop_ids, max_new_tokens, batch)
    drawn = engine.run([encoded[i] for i, _ in rows], keys_N, progress)
    entropy = token_entropies(params, cfg, [encoded[i] for i, _ in rows], [d.ids.tolist() for d in drawn])
    texts: dict[str, list[str]] = {}
    entropies: dict[str, list[np.ndarray]] = {}
    for (i, _), response, values in zip(rows, drawn, entropy, strict=True):
        texts.setdefault(f"{i}", []).append(chat.decode_response(response.ids.tolist()))
        entropies.setdefault(f"{i}", []).append(values)
    return probe(texts, entropies, phrases, chat.opening().rstrip().endswith("<think>"), seed=seed)
