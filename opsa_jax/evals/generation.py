"""Responses to evaluation records, written one by one as they end, so that a stopped evaluation goes on where it was."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from opsa_jax.config import EvalConfig
from opsa_jax.data.chat import Chat, Placement
from opsa_jax.data.loaders import write_jsonl
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals.execution import run_answers
from opsa_jax.evals.likelihood import best_option, choice_pairs, score_continuations
from opsa_jax.evals.verdicts import rule_outcome
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params
from opsa_jax.rollout.engine import Engine
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.sampler import id_numbers, row_keys

SANDBOX_ROOM = 64
Progress = Callable[[int, int, str], None]
"""(responses done, all, what is going on)"""


class Sink(Protocol):
    """Where rows go: `rollout.rows.RowFile`, or `Memory`."""

    done: set[tuple[str, int]]

    def append(self, row: dict[str, Any]) -> None: ...


@dataclass
class Memory:
    """Rows that are not kept on disk."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    done: set[tuple[str, int]] = field(default_factory=set)

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.done.add((row["id"], row["sample"]))


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, and what is put before every prompt."""

    params: Params
    cfg: DecoderConfig
    chat: Chat
    context: str = ""
    placement: Placement = "system"

    @property
    def opened(self) -> bool:
        """Prompts end inside a think block."""
        return self.chat.opening().rstrip().endswith("<think>")


@dataclass
class Speed:
    """What the engines of an evaluation did together."""

    tokens: int = 0
    seconds: float = 0.0
    responses: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def room_of(record: Record, evals: EvalConfig) -> int:
    """Tokens for the response."""
    return evals.max_new_tokens or record.extra.get("room", SANDBOX_ROOM)


def generate(
    subject: Subject, records: Sequence[Record], evals: EvalConfig, seed: int, sink: Sink,
    progress: Progress = lambda done, total, what: None, verifier: str = "auto",
) -> Speed:  # fmt: skip
    """The responses that the sink does not have yet. A response depends on model, prompt, settings, seed, id and sample number only.

    Raises:
        UserError: a sampling setting out of its range.
    """
    sampling = Sampling(temperature=evals.temperature, top_k=evals.top_k, top_p=evals.top_p)
    if evals.samples < 1:
        raise UserError(f"--samples {evals.samples}: must be at least 1")
    asked = [r for r in records if r.extra.get("scorer") != "likelihood"]
    chosen = [r for r in records if r.extra.get("scorer") == "likelihood"]
    total = len(asked) * evals.samples + len(chosen)
    wanted: dict[int, list[tuple[Record, int]]] = defaultdict(list)
    for record in asked:
        for sample in range(evals.samples):
            if (record.id, sample) not in sink.done:
                wanted[room_of(record, evals)].append((record, sample))
    chosen = [r for r in chosen if (r.id, 0) not in sink.done]
    speed = Speed()
    done = total - sum(map(len, wanted.values())) - len(chosen)
    for room, items in sorted(wanted.items()):
        engine = Engine(subject.params, subject.cfg, sampling, subject.chat.stop_ids, room, evals.batch)
        for row in _responses(subject, engine, items, seed, evals.refusal_phrases, verifier):
            sink.append(row)
            done += 1
            progress(done, total, f"{engine.stats.tokens_per_second:.0f} tokens/s")
        speed.tokens, speed.seconds = speed.tokens + engine.stats.tokens, speed.seconds + engine.stats.seconds
        speed.responses += engine.stats.prompts
    for start in range(0, len(chosen), 4 * evals.batch):
        for row in _choices(subject, chosen[start : start + 4 * evals.batch], evals):
            sink.append(row)
            done += 1
        progress(done, total, "likelihood of options")
    return speed


def _prompts(subject: Subject, records: Sequence[Record]) -> list[list[int]]:
    texts = [subject.chat.render(r.prompt, subject.context, subject.placement, r.system) for r in records]
    return [ids.tolist() for ids in subject.chat.encode_texts(texts)]


def _row(record: Record, sample: int, response: str, outcome: str) -> dict[str, Any]:
    extra = record.extra
    row = {"id": record.id, "sample": sample, "metric": extra["metric"], "label": record.label, "prompt": record.prompt}
    attack = {"attack": extra["attack"]} if extra.get("attack") else {}
    return row | attack | {"prefill": extra.get("prefill", ""), "response": response, "outcome": outcome}


def _responses(subject: Subject, engine: Engine, items: Sequence[tuple[Record, int]], seed: int, phrases: str, verifier: str):
    chat, opened = subject.chat, subject.opened
    prefills = chat.encode_texts([r.extra.get("prefill", "") for r, _ in items])
    prompts = [[*p, *f.tolist()] for p, f in zip(_prompts(subject, [r for r, _ in items]), prefills, strict=True)]
    numbers_N = id_numbers(r.id for r, _ in items)
    keys_N = row_keys(jax.random.key(seed), "evaluate", 0, numbers_N, np.array([s for _, s in items], np.int32))
    for n, response in engine.stream(prompts, keys_N):
        record, sample = items[n]
        text = chat.decode_response([*prefills[n].tolist(), *response.ids.tolist()])
        row = _row(record, sample, text, rule_outcome(record, text, phrases, opened, verifier))
        yield row | {"finished": response.finished, "tokens": len(response.ids)}


def _choices(subject: Subject, records: Sequence[Record], evals: EvalConfig):
    pairs = [choice_pairs(subject.chat, r, p, subject.opened) for r, p in zip(records, _prompts(subject, records), strict=True)]
    scored = iter(score_continuations(subject.params, subject.cfg, [x for p in pairs for x in p], evals.batch))
    for record, options in zip(records, pairs, strict=True):
        letter, totals = best_option([next(scored) for _ in options])
        yield _row(record, 0, letter, rule_outcome(record, letter)) | {"finished": True, "logp": [round(t, 6) for t in totals]}


def run_code(
    records: Mapping[str, Record], rows: Sequence[Mapping[str, Any]], sink: Sink, opened: bool, progress: Progress, **limits
) -> None:
    """Runs the code of responses to code benchmarks whose outcome the sink does not have yet."""
    todo = [r for r in rows if records[r["id"]].extra.get("scorer") == "code" and (r["id"], r["sample"]) not in sink.done]
    items = [
        (r["response"], {"prompt": e["code_prompt"], "entry_point": e["entry_point"], "tests": e["tests"]}, opened)
        for r, e in ((r, records[r["id"]].extra) for r in todo)
    ]
    for n, (row, outcome) in enumerate(zip(todo, run_answers(items, **limits), strict=True), 1):
        sink.append({"id": row["id"], "sample": row["sample"], "outcome": outcome})
        progress(n, len(todo), "running code")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `RowFile`."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def in_order(records: Sequence[Record], rows: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """The rows of these records, in the records' order and by sample.

    Raises:
        UserError: a row answers another prompt than the record of its id: the data changed since.
    """
    place = {r.id: n for n, r in enumerate(records)}
    prompts = {r.id: r.prompt for r in records}
    mine = [dict(r) for r in rows if r["id"] in place]
    for r in mine:
        if r["prompt"] != prompts[r["id"]]:
            raise UserError(f"{where}: row {r['id']!r} answers another prompt than the set has now; choose another --out")
    return sorted(mine, key=lambda r: (place[r["id"]], r["sample"]))


def rewrite(path: Path, mine: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    """The file in order, what other suites left in it at the end; it is replaced whole."""
    known = {(r["id"], r["sample"]) for r in mine}
    write_jsonl(path, [*mine, *(r for r in rows if (r["id"], r["sample"]) not in known)])
