"""Runs a suite on a model with the engine that `generate` uses: the same tokens as the sampler of training, slots refilled."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from opsa_jax.config import EvalConfig
from opsa_jax.data.chat import Chat, Placement
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals.attacks.build import suite_attacks
from opsa_jax.evals.benchmarks import is_plain, load
from opsa_jax.evals.generation import SANDBOX_ROOM, Memory, Subject, generate, in_order
from opsa_jax.evals.suite import judge, load_suite, summarise
from opsa_jax.evals.summary import summarise_rows
from opsa_jax.evals.verdicts import phrases_for
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params
from opsa_jax.rollout.engine import Engine
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.sampler import id_numbers, row_keys


def evaluate(
    params: Params, cfg: DecoderConfig, chat: Chat, evals: EvalConfig, seed: int = 0, context: str = "", placement: Placement = "system",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], list[dict]]:  # fmt: skip
    """Score a model on a suite; deterministic given the seed. With a `context` before every prompt it scores a teacher.

    With several processes all call it with the same arguments. `progress` is called with (responses done, prompts), equally often on
    each.

    Returns:
        Results by metric, and one transcript per prompt: id, metric, prompt, prefill, response, outcome.
    """
    subject = Subject(params, cfg, chat, context, placement)
    if not is_plain(evals.suite) or evals.samples > 1:
        return _evaluate_sets(subject, evals, seed, progress)
    records = load_suite(evals.suite, limit=evals.limit)
    prompts = [chat.encode(r.prompt, context, placement, r.system) for r in records]
    responses = respond(params, cfg, chat, records, prompts, evals, seed, progress)
    phrases = phrases_for(evals.suite, evals.refusal_phrases)
    outcomes = [judge(r, text, phrases, subject.opened) for r, text in zip(records, responses, strict=True)]
    transcripts = [
        {"id": r.id, "metric": r.extra["metric"], "prompt": r.prompt, "prefill": r.extra.get("prefill", ""), "response": text, "outcome": o}
        for r, text, o in zip(records, responses, outcomes, strict=True)
    ]
    return summarise(records, responses, outcomes), transcripts


def _evaluate_sets(
    subject: Subject, evals: EvalConfig, seed: int, progress: Callable[[int, int], None]
) -> tuple[dict[str, Any], list[dict]]:
    """The same for any suite: groups, benchmarks, several responses. Rule outcomes only; `python -m opsa_jax.evaluate` also has judges."""
    records = load(evals.suite, evals.data_dir, evals.limit, attacks=suite_attacks(evals.suite, subject.chat))
    if coded := next((r for r in records if r.extra["scorer"] == "code"), None):
        raise UserError(f"{coded.extra['benchmark']} runs code that a model wrote: use python -m opsa_jax.evaluate --allow-code-execution")
    sink = Memory()
    generate(subject, records, evals, seed, sink, lambda done, total, what: progress(done, total))
    rows = in_order(records, sink.rows, evals.suite)
    return summarise_rows({r.id: r for r in records}, rows, opened=subject.opened), rows


def respond(
    params: Params, cfg: DecoderConfig, chat: Chat, records: Sequence[Record], prompts: list[list[int]], evals: EvalConfig, seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:  # fmt: skip
    """One response per record; where the record has a `prefill`, the response starts with it."""
    prefills = [chat.encode_texts([r.extra.get("prefill", "")])[0] for r in records]
    prompts = [[*prompt, *prefill] for prompt, prefill in zip(prompts, prefills, strict=True)]
    numbers_N = id_numbers(r.id for r in records)
    keys_N = row_keys(jax.random.key(seed), "evaluate", 0, numbers_N, np.zeros(len(records), np.int32))
    sampling = Sampling(temperature=evals.temperature, top_k=evals.top_k, top_p=evals.top_p)
    engine = Engine(params, cfg, sampling, chat.stop_ids, evals.max_new_tokens or SANDBOX_ROOM, evals.batch)
    responses = engine.run(prompts, keys_N, progress)
    return [chat.decode_response([*prefill, *r.ids]) for prefill, r in zip(prefills, responses, strict=True)]


def results_table(results: dict[str, dict[str, Any]]) -> Table:
    """Models side by side, one row per metric, rates with 95 % intervals."""
    table = Table(title="results (rate and 95 % interval)", title_justify="left")
    table.add_column("metric")
    table.add_column("n", justify="right")
    for name in results:
        table.add_column(name, justify="right")
    first = next(iter(results.values()))
    for metric in first:
        cells = [_cell(metric, r[metric]) if metric in r else "" for r in results.values()]
        table.add_row(metric, str(first[metric]["n"]), *cells)
    return table


def _cell(metric: str, value: dict[str, Any]) -> str:
    digits = 1 if metric.endswith("_words") else 3
    return f"{value['rate']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
