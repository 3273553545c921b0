"""Runs attacks on one model: all attempts of a round through one engine, every row on disk before it is used."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from opsa_jax.data.chat import Chat
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals.attacks.base import Attack, Attempt, Result, overall, summarise
from opsa_jax.evals.attacks.frames import opening_kind
from opsa_jax.evals.judges import Answer, Judge
from opsa_jax.evals.verdicts import hit
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params
from opsa_jax.rollout.engine import Engine
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.rows import RowFile
from opsa_jax.rollout.sampler import id_numbers, row_keys


@dataclass(frozen=True)
class Target:
    """The attacked model, on its mesh."""

    params: Params
    cfg: DecoderConfig
    chat: Chat

    @property
    def kind(self) -> str:
        """Where its answers start (`frames.opening_kind`)."""
        return opening_kind(self.chat.opening(), "<think>" in self.chat.tokenizer.get_vocab())

    @property
    def opened(self) -> bool:
        """Whether a prompt ends inside a think block."""
        return self.kind == "inside"

    def prompt_ids(self, attempt: Attempt) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and of the prefill that follows it.

        Raises:
            UserError: ids beyond the embedding, so the tokenizer is of another model.
        """
        prompt = self.chat.encode(attempt.prompt, system=attempt.system)
        prefill = self.chat.encode_texts([attempt.prefill])[0].tolist() if attempt.prefill else []
        if (largest := max(prompt + prefill)) >= self.cfg.vocab_size:
            raise UserError(f"the tokenizer of {self.chat.path} gives id {largest}, but the model has {self.cfg.vocab_size} embedding rows")
        return prompt, prefill


@dataclass(frozen=True)
class Asking:
    """How attempts are answered."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    batch: int = 64
    seed: int = 0


class Runner:
    """One model, one judge, one folder: NAME.responses.jsonl and NAME.verdicts.jsonl per attack (rows.RowFile).

    Args:
        judge: of `evals.judges`; sees the record's own prompt and the whole response, prefill included.
        settings: what determines the rows besides the attack's own settings (model, prompts); checked when resuming.
        judge_name: what determines the verdicts.
        out: the folder; None keeps everything in memory.
        resume: continue the files there.
        say: gets a line now and then.
    """

    def __init__(
        self,
        target: Target,
        judge: Judge,
        asking: Asking,
        settings: dict[str, Any],
        judge_name: str = "",
        out: Path | None = None,
        resume: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.target, self._judge, self._asking, self._say = target, judge, asking, say
        self._settings = settings | {"max_new_tokens": asking.max_new_tokens, "temperature": asking.temperature, "seed": asking.seed}
        self._judge_name, self._out, self._resume = judge_name, out, resume
        sampling = Sampling(temperature=asking.temperature)
        self.engine = Engine(target.params, target.cfg, sampling, target.chat.stop_ids, asking.max_new_tokens, asking.batch)
        self.judged = 0
        """Answers judged since this runner was made; those on file are not judged again."""

    def run(self, attack: Attack, records: Sequence[Record]) -> list[Result]:
        """All results of an attack, in the order of its attempts.

        Raises:
            UserError: a file of another run; whatever attack and judge raise. Finished rows are kept.
        """
        by_id = {r.id: r for r in records}
        settings = self._settings | json.loads(json.dumps(attack.settings()))
        responses = self._rows(f"{attack.name}.responses.jsonl", settings)
        verdicts = self._rows(f"{attack.name}.verdicts.jsonl", settings | {"judge": self._judge_name})
        results: list[Result] = []
        try:
            rounds = attack.rounds(records)
            attempts = next(rounds, None)
            while attempts is not None:
                found = self._answer(attack.name, attempts, by_id, responses, verdicts)
                results += found
                try:
                    attempts = rounds.send(found)
                except StopIteration:
                    attempts = None
        finally:
            responses.close()
            verdicts.close()
        return results

    def _answer(self, name: str, attempts: list[Attempt], by_id: dict[str, Record], responses, verdicts) -> list[Result]:
        if len({(a.id, a.sample) for a in attempts}) != len(attempts):
            raise ValueError(f"attack {name} numbers two attempts on a record alike")
        self._respond(name, [a for a in attempts if (a.id, a.sample) not in responses.done], responses)
        rows = [responses.found[(a.id, a.sample)] for a in attempts]
        # What is on file is what was asked; an attacker that would now write something else does not rewrite history.
        asked = [Attempt(r["id"], r["sample"], r["prompt"], r["system"], r["prefill"], r["variant"]) for r in rows]
        missing = [i for i, a in enumerate(asked) if (a.id, a.sample) not in verdicts.done]
        if missing:
            answers = [_to_judge(by_id[asked[i].id], rows[i]["response"]) for i in missing]
            for i, verdict in zip(missing, self._judge.judge(answers), strict=True):
                row = {"id": asked[i].id, "sample": asked[i].sample, "outcome": verdict.outcome}
                row["success"] = hit("harmful", verdict.outcome) is True  # what could not be judged is no success
                verdicts.append(row)
            self.judged += len(missing)
        judged = [verdicts.found[(a.id, a.sample)] for a in asked]
        return [Result(a, r["response"], v["outcome"], v["success"]) for a, r, v in zip(asked, rows, judged, strict=True)]

    def _respond(self, name: str, attempts: list[Attempt], rows) -> None:
        if not attempts:
            return
        chat = self.target.chat
        ids = [self.target.prompt_ids(a) for a in attempts]
        numbers_N = id_numbers(a.id for a in attempts)
        samples_N = np.array([a.sample for a in attempts], np.int32)
        keys_N = row_keys(jax.random.key(self._asking.seed), f"attack {name}", 0, numbers_N, samples_N)
        for n, (i, response) in enumerate(self.engine.stream([[*p, *f] for p, f in ids], keys_N), 1):
            a = attempts[i]
            row = {"id": a.id, "sample": a.sample, "variant": a.variant, "prompt": a.prompt, "system": a.system, "prefill": a.prefill}
            text = chat.decode_response([*ids[i][1], *response.ids.tolist()])
            rows.append(row | {"response": text, "finished": response.finished, "tokens": len(response.ids)})
            if n % 200 == 0 or n == len(attempts):
                self._say(f"{name:10s} {n}/{len(attempts)} answers, {self.engine.stats.tokens_per_second:.0f} tokens/s")

    def _rows(self, name: str, settings: dict[str, Any]):
        return _Memory() if self._out is None else _Kept(self._out / name, settings, self._resume)


class _Kept:
    """A RowFile whose rows are also here."""

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool):
        self._file = RowFile(path, settings, resume)
        self.found = {(r["id"], r["sample"]): r for r in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        self.done = self._file.done

    def append(self, row: dict[str, Any]) -> None:
        self._file.append(row)
        self.found[(row["id"], row["sample"])] = row

    def close(self) -> None:
        self._file.close()


class _Memory:
    def __init__(self):
        self.found: dict[tuple[str, int], dict[str, Any]] = {}
        self.done = self.found

    def append(self, row: dict[str, Any]) -> None:
        self.found[(row["id"], row["sample"])] = row

    def close(self) -> None:
        pass


def _to_judge(record: Record, response: str) -> Answer:
    return Answer(record.prompt, response, "harmful", record.category, record.extra.get("expect", ""))


def run_all(runner: Runner, attacks: Sequence[Attack], records: Sequence[Record]) -> tuple[dict[str, Any], list[dict]]:
    """Results by attack and `overall`, and one transcript row per attempt."""
    found = {attack.name: runner.run(attack, records) for attack in attacks}
    results = {name: summarise(r) for name, r in found.items()}
    if len([n for n in found if n != "direct"]) > 1:
        results["overall"] = overall(found)
    return results, [transcript(name, r) for name, rs in found.items() for r in rs]


def transcript(name: str, r: Result) -> dict[str, Any]:
    a = r.attempt
    row = {"attack": name, "id": a.id, "sample": a.sample, "variant": a.variant, "prompt": a.prompt, "system": a.system}
    return row | {"prefill": a.prefill, "response": r.response, "outcome": r.outcome, "success": r.success}


def table(results: dict[str, Any], title: str) -> Table:
    """One row per attack: mean attack success and any of N attempts, with 95 % intervals over the n prompts."""
    made = Table(title=title, title_justify="left")
    for name in ("attack", "n", "N", "mean ASR", "any of N"):
        made.add_column(name, justify="left" if name == "attack" else "right", no_wrap=True)
    for name, r in results.items():
        cells = [f"{r[k]['rate']:.2f} [{r[k]['low']:.2f}, {r[k]['high']:.2f}]" for k in ("asr", "any")]
        made.add_row(name, str(r["asr"]["n"]), str(r["most_attempts"]), *cells)
    return made
