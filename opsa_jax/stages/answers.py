"""What `opsa_jax.answers` is made of: prompts sampled into resumable files, faults of responses, and the final file with its report.

Everything that was sampled is kept in the folder `OUT.parts`, one file per stage, so a stopped command loses nothing; OUT itself
is written whole at the end.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from opsa_jax.config import ModelConfig, SourceConfig
from opsa_jax.data.chat import Chat
from opsa_jax.data.loaders import load_source, write_jsonl
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals.judges import Answer, PhraseJudge, answer_words, explanation_list
from opsa_jax.evals.scorers import strip_thinking
from opsa_jax.models import hf
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.rollout.engine import Engine
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.rows import RowFile
from opsa_jax.rollout.sampler import id_numbers, row_keys
from opsa_jax.training.rundir import write_json
from opsa_jax.training.setup import open_checkpoint

if TYPE_CHECKING:
    from opsa_jax.answers import Command


@dataclass(frozen=True)
class Response:
    """One sampled or given response."""

    text: str
    finished: bool = True


@dataclass(frozen=True)
class Prompt:
    """One prompt to sample responses to, as the model's template renders it."""

    id: str
    text: str


class Shop:
    """The workplace of one command: its settings, records, mesh, and the one checkpoint that is loaded at a time.

    Raises:
        UserError: no records, an id twice, OUT there without --resume, no such checkpoint.
    """

    def __init__(self, cfg: "Command"):
        self.cfg, self.out = cfg, Path(cfg.out)
        self.parts = self.out.with_name(self.out.name + ".parts")
        if self.out.exists() and not cfg.resume:
            raise UserError(f"{self.out} exists; continue it with --resume, remove it, or choose another --out")
        self.sampling = Sampling(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
        self.records = load_records(cfg)
        self.mesh = make_mesh(cfg.mesh)
        self.console = Console(stderr=True)
        explanation_list(cfg.refusal_phrases)
        self._models = {cfg.model: self._open(cfg.model, cfg.revision)}
        self.chat = self._models[cfg.model][1]
        self.opened = opened(self.chat)
        self.judge = PhraseJudge(cfg.refusal_phrases, self.opened)
        self._loaded: tuple[str, Params] | None = None

    def _open(self, path: str, revision: str = "main") -> tuple[DecoderConfig, Chat, Path]:
        model = open_checkpoint(ModelConfig(path=path, revision=revision, compute_dtype=self.cfg.dtype), path)
        return model.cfg, Chat.load(str(model.folder), thinking=self.cfg.thinking), model.folder

    def open(self, path: str) -> Chat:
        """Check a further checkpoint without reading its weights; its chat template."""
        if path not in self._models:
            self._models[path] = self._open(path)
        return self._models[path][1]

    def with_label(self, label: str) -> list[Record]:
        return [r for r in self.records if r.label == label]

    def prompts(self, records: Sequence[Record], contexts: Sequence[str], chat: Chat | None = None) -> list[Prompt]:
        """Records under a context each."""
        chat = chat or self.chat
        return [Prompt(r.id, chat.render(r.prompt, c, self.cfg.placement, r.system)) for r, c in zip(records, contexts, strict=True)]

    def sample(self, stage: str, prompts: Sequence[Prompt], samples: int, path: str = "") -> dict[str, list[Response]]:
        """Responses by id. Those in the stage's file are not sampled again; new ones are added to it as they end.

        Args:
            stage: names the file and, with the seed, the random numbers.
            path: checkpoint; empty for the command's own.

        Raises:
            UserError: a file of other settings or prompts, or a prompt outside the model's vocabulary.
        """
        path = path or self.cfg.model
        cfg, chat, _ = self._models[path]
        ids = dict(zip((p.id for p in prompts), (i.tolist() for i in chat.encode_texts([p.text for p in prompts])), strict=True))
        if (largest := max(map(max, ids.values()), default=0)) >= cfg.vocab_size:
            raise UserError(f"the tokenizer of {path} gives id {largest}, but the model has only {cfg.vocab_size} embedding rows")
        settings = {"model": path, "stage": stage} | {k: getattr(self.cfg, k) for k in _SETTINGS}
        file = self.parts / f"{stage}.jsonl"
        marks = {p.id: hashlib.sha256(p.text.encode()).hexdigest()[:16] for p in prompts}
        rows = RowFile(file, settings, self.cfg.resume)
        try:
            _check_marks(file, marks)
            wanted = [(p.id, s) for p in prompts for s in range(samples) if (p.id, s) not in rows.done]
            if wanted:
                self._sample(stage, path, [(i, s, ids[i]) for i, s in wanted], rows, marks)
        finally:
            rows.close()
        found: dict[str, list[Response]] = {p.id: [] for p in prompts}
        for row in sorted(read_jsonl(file), key=lambda r: r["sample"]):
            if row["id"] in found and row["sample"] < samples:
                found[row["id"]].append(Response(row["response"], row["finished"]))
        return found

    def _sample(self, stage: str, path: str, wanted: list[tuple[str, int, list[int]]], rows: RowFile, marks: Mapping[str, str]) -> None:
        cfg, chat, _ = self._models[path]
        numbers_N = id_numbers(i for i, _, _ in wanted)
        keys_N = row_keys(jax.random.key(self.cfg.seed), f"answers {stage}", 0, numbers_N, np.array([s for _, s, _ in wanted], np.int32))
        with jax.set_mesh(self.mesh), self.bar(stage, len(wanted)) as progress:
            engine = Engine(self._params(path), cfg, self.sampling, chat.stop_ids, self.cfg.max_new_tokens, self.cfg.batch)
            for done, (n, r) in enumerate(engine.stream([ids for _, _, ids in wanted], keys_N), 1):
                i, s, _ = wanted[n]
                text = chat.decode_response(r.ids.tolist())
                rows.append({"id": i, "sample": s, "response": text, "finished": r.finished, "tokens": len(r.ids), "prompt": marks[i]})
                progress(done, len(wanted))

    def _params(self, path: str) -> Params:
        """Weights; those of the checkpoint before are dropped first."""
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None
            cfg, _, folder = self._models[path]
            self._loaded = path, hf.load_params(folder, cfg, cfg.compute_dtype, self.mesh)
        return self._loaded[1]

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int, int], None]]:
        """A progress bar with the time left, on a terminal."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(name, total=total)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def flaw(self, response: Response) -> str:
        """Why a response is no whole answer, whatever it says; empty if it is one."""
        answer, closed = strip_thinking(response.text, self.opened)
        if not response.finished:
            return "unfinished"
        return "thinking not closed" if not closed else "" if answer else "empty"

    def whole(self, response: Response) -> bool:
        """Ended by the model, with its thinking closed and something after it."""
        return not self.flaw(response)

    def fault(self, record: Record, response: Response) -> str:
        """Why a response is not kept; empty if it is."""
        if flaw := self.flaw(response):
            return flaw
        expect = str(record.extra.get("expect", ""))
        verdict = self.judge.judge([Answer(record.prompt, response.text, record.label, record.category, expect)])[0]
        return "" if verdict.acceptable else "not refused" if record.label == "harmful" else "refused"

    def tokens(self, texts: Sequence[str]) -> list[int]:
        """Length of responses in tokens of the command's model."""
        return [len(ids) for ids in self.chat.encode_texts(texts)]

    def finish(self, rows: Sequence[Mapping[str, Any]], counts: Mapping[str, Counter], more: Mapping[str, Any] | None = None) -> str:
        """Write OUT and OUT.report.json; print the table of what was kept. Returns a one-line summary.

        Args:
            counts: by label, how many responses or prompts were kept, and how many dropped for which reason.

        Raises:
            UserError: nothing is left to write.
        """
        total = sum(sum(c.values()) for c in counts.values())
        if not rows:
            reasons = sum(counts.values(), Counter())
            why = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
            raise UserError(
                f"nothing is left of {total} after filtering ({why}); look at {self.parts}, and try other contexts, --max-new-tokens, "
                f"--refusal-phrases or --samples"
            )
        words = {label: [answer_words(r["response"], self.opened) for r in rows if r["label"] == label] for label in counts}
        report = {
            label: {"kept": sum(r["label"] == label for r in rows), "counts": dict(c), "words": spread(words[label])}
            for label, c in counts.items()
        }
        write_jsonl(self.out, rows)
        write_json(self.out.with_name(self.out.name + ".report.json"), report | dict(more or {}))
        screen = Console(highlight=False)
        screen.print(_table(self.out, counts, words))
        for label, c in counts.items():
            if c and not c["kept"]:
                screen.print(f"warning: no {label} prompt is left")
        for name, value in (more or {}).items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
            screen.print(f"{name}: {text:.3f}" if isinstance(text, float) else f"{name}: {text}", soft_wrap=True)
        return f"{self.out}: {len(rows)} rows"


_SETTINGS = ("revision", "temperature", "top_k", "top_p", "max_new_tokens", "seed", "dtype")


def load_records(cfg: "Command") -> list[Record]:
    """All records of --prompts.

    Raises:
        UserError: a malformed record, or an id twice.
    """
    source = SourceConfig(
        path=cfg.prompts, split=cfg.split, where=cfg.where, label=cfg.label, prompt_field=cfg.prompt_field, label_field=cfg.label_field,
        category_field=cfg.category_field, id_field=cfg.id_field, limit=cfg.limit,
    )  # fmt: skip
    records = list(load_source(source)[0])
    twice = [i for i, n in Counter(r.id for r in records).items() if n > 1]
    if twice:
        raise UserError(f"{cfg.prompts}: id {twice[0]!r} occurs twice; make ids unique, or name another --id-field (none: ids are numbers)")
    return records


def opened(chat: Chat) -> bool:
    """The template ends prompts inside a think block, so responses begin in it."""
    return chat.opening().rstrip().endswith("<think>")


def fit(text: str, theirs: bool, ours: bool) -> str:
    """A response of another writer as it would stand after our template's opening.

    >>> fit("hm</think> Sure.", theirs=True, ours=False), fit("<think>hm</think> Sure.", theirs=False, ours=True)
    ('<think>hm</think> Sure.', 'hm</think> Sure.')
    >>> fit("Sure.", theirs=False, ours=True)
    '\\n</think>\\n\\nSure.'

    Args:
        theirs, ours: whether the prompt ended inside a think block, when it was written and where it will stand.
    """
    if ours:
        inside = text if theirs or "</think>" in text or "<think>" in text else f"\n</think>\n\n{text}"
        return inside.removeprefix("<think>")
    return f"<think>{text}" if "<think>" not in text and (theirs or "</think>" in text) else text


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and quantiles; empty for nothing."""
    if not len(values):
        return {}
    p10, p50, p90 = (float(np.quantile(values, q)) for q in (0.1, 0.5, 0.9))
    return {"mean": float(np.mean(values)), "p10": p10, "p50": p50, "p90": p90}


def _check_marks(file: Path, marks: Mapping[str, str]) -> None:
    """Rows of a stage must come from the prompts that would be sampled now: same text, context and template."""
    if any(row["id"] in marks and row.get("prompt") != marks[row["id"]] for row in read_jsonl(file)):
        raise UserError(f"{file} was made from other prompts or contexts; run with those again, remove it, or choose another --out")


def _table(out: Path, counts: Mapping[str, Counter], words: Mapping[str, list[int]]) -> Table:
    table = Table(title=str(out), title_justify="left")
    table.add_column("")
    for label in counts:
        table.add_column(label, justify="right")
    reasons = sorted({r for c in counts.values() for r in c} - {"kept"})
    totals = [sum(c.values()) for c in counts.values()]
    for reason in ("kept", *reasons):
        table.add_row(reason, *(f"{c[reason]} of {n}" + (f" ({c[reason] / n:.0%})" if n else "") for c, n in zip(counts.values(), totals)))
    for name in ("mean", "p10", "p50", "p90"):
        cells = [spread(w).get(name) for w in words.values()]
        table.add_row(f"words, {name}", *("" if x is None else f"{x:.1f}" for x in cells))
    return table
