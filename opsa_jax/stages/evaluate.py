"""What `python -m opsa_jax.evaluate` does: load, respond, judge, sum up. Rows are on disk before anything is made of them."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from opsa_jax.config import ModelConfig, SourceConfig
from opsa_jax.data.chat import Chat
from opsa_jax.data.loaders import load_source, write_jsonl
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals import execution, generation, leakage
from opsa_jax.evals.attacks.build import suite_attacks
from opsa_jax.evals.benchmark_table import BENCHMARKS
from opsa_jax.evals.benchmarks import load
from opsa_jax.evals.capability import verifier_name
from opsa_jax.evals.endpoint import Endpoint
from opsa_jax.evals.generation import Memory, Subject
from opsa_jax.evals.guards import load_guard
from opsa_jax.evals.rubric import EndpointJudge
from opsa_jax.evals.runner import results_table
from opsa_jax.evals.scorers import refusal_list, wilson
from opsa_jax.evals.summary import summarise_rows
from opsa_jax.evals.verdicts import JudgeSpec, agreements, judge_rows, parse_judges, phrase_judge
from opsa_jax.models import hf
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.rollout.rows import RowFile
from opsa_jax.teachers.contexts import resolve_context
from opsa_jax.training.rundir import write_json
from opsa_jax.training.setup import open_checkpoint


def evaluate(config) -> dict[str, Any]:
    """See `opsa_jax.evaluate.run`."""
    out, console = Path(config.out), Console(highlight=False)
    if config.out and not config.resume and (out / "results.json").exists():
        raise UserError(f"{out / 'results.json'} exists; continue with --resume, or choose another folder with --out")
    chat = Chat.load(config.model, config.revision, config.thinking)
    specs, records = _plan(config, chat, console)
    tasks = None
    if config.lm_eval:
        from opsa_jax.evals.harness import find_tasks

        tasks = find_tasks(config.lm_eval)
    context, mesh = resolve_context(config.context), make_mesh(config.mesh)
    model = open_checkpoint(ModelConfig(path=config.model, revision=config.revision, compute_dtype=config.dtype), config.model)
    stage = _Stage(config, records, specs, out if config.out else None, console)
    rows = stage.sink("transcripts", _settings(config, context))
    info: dict[str, Any] = {"model": config.model, "settings": _settings(config, context)}
    with jax.set_mesh(mesh):
        params = hf.load_params(model.folder, model.cfg, model.cfg.compute_dtype, mesh)
        subject = Subject(params, model.cfg, chat, context, config.placement)
        with _meter(console, "responses") as progress:
            speed = generation.generate(subject, records, config.evals, config.seed, rows, progress, config.maths)
        if speed.responses:
            console.print(f"{speed.responses} responses, {speed.tokens} tokens, {speed.tokens_per_second:.0f} tokens/s with compilation")
        info["tokens_per_second"], info["tokens"] = speed.tokens_per_second, speed.tokens
        harness = _lm_eval(config, subject, tasks, console) if tasks else {}
        opened = subject.opened
        del params, subject  # room for the judges' weights
        mine = generation.in_order(records, stage.read("transcripts", rows), config.out)
        if any(r.extra["scorer"] == "code" for r in records):
            info["code"] = stage.run_code(mine, opened)
        judged = {spec.title: stage.judge(spec, mine, opened, mesh, model.cfg.compute_dtype) for spec in specs}
    for row in mine:
        key = row["id"], row["sample"]
        if found := {title: theirs[key]["outcome"] for title, theirs in judged.items() if key in theirs}:
            row["judges"] = found
    by_id = {r.id: r for r in records}
    results = summarise_rows(by_id, mine, judged, opened) | harness
    info |= {"maths": verifier_name(config.maths), "agreement": agreements(by_id, mine, judged) if judged else []}
    if config.out:
        generation.rewrite(out / "transcripts.jsonl", mine, generation.read_rows(out / "transcripts.jsonl"))
        write_json(out / "evaluation.json", info)
        write_json(out / "results.json", results)
    console.print(results_table({config.model: results}))
    if info["agreement"]:
        console.print(agreement_table(info["agreement"]))
    return results


def _plan(config, chat: Chat, console: Console) -> tuple[list[JudgeSpec], list[Record]]:
    """Everything that can be known wrong before a model is loaded."""
    specs = parse_judges(config.judge)
    if config.evals.refusal_phrases != "auto":
        refusal_list(config.evals.refusal_phrases)
    if config.evals.batch < 1 or config.evals.samples < 1:
        raise UserError(f"--batch {config.evals.batch} and --samples {config.evals.samples} must be at least 1")
    if config.maths == "math-verify" and verifier_name() != "math-verify":
        raise UserError("--maths math-verify: the package is not installed; pip install 'opsa_jax[eval]', or --maths plain")
    evals = config.evals
    attacks = suite_attacks(evals.suite, chat)
    records = load(evals.suite, evals.data_dir, evals.limit, config.missing, config.choice, _teller(console), attacks)
    coded = sorted({r.extra["benchmark"] for r in records if r.extra["scorer"] == "code"})
    if coded and not config.allow_code_execution:
        how = f"{', '.join(coded)}: runs code that the model wrote; allow it with --allow-code-execution"
        if config.missing == "error":
            raise UserError(f"{how}, or leave it out of --suite")
        _teller(console)(f"left out: {how}")
        records = [r for r in records if r.extra["scorer"] != "code"]
    if coded and config.allow_code_execution:
        execution.check_supported()
    for spec in specs:
        if spec.kind == "guard":
            hf.fetch(spec.path, "main")
        if spec.kind == "endpoint":
            Endpoint(config.endpoint)
    return specs, records


def _teller(console: Console):
    """Prints a line as one line, however long."""
    return lambda line: console.print(line, soft_wrap=True, markup=False)


def _settings(config, context: str) -> dict[str, Any]:
    """What determines a row; which rows there are (--suite, --limit, --samples) does not."""
    evals = {k: getattr(config.evals, k) for k in ("max_new_tokens", "temperature", "top_k", "top_p", "refusal_phrases")}
    mine = {k: getattr(config, k) for k in ("model", "revision", "dtype", "thinking", "placement", "seed", "choice")}
    return mine | evals | {"context": context, "maths": verifier_name(config.maths)}


@dataclasses.dataclass
class _Stage:
    """The files of an evaluation and the steps after the responses."""

    config: Any
    records: Sequence[Record]
    specs: Sequence[JudgeSpec]
    out: Path | None
    console: Console

    def __post_init__(self):
        self.by_id = {r.id: r for r in self.records}

    def sink(self, name: str, settings: dict[str, Any]) -> Any:
        return Memory() if self.out is None else RowFile(self.out / f"{name}.jsonl", settings, self.config.resume)

    def read(self, name: str, sink: Any) -> list[dict[str, Any]]:
        if self.out is None:
            return sink.rows
        sink.close()
        return generation.read_rows(self.out / f"{name}.jsonl")

    def run_code(self, rows: list[dict[str, Any]], opened: bool) -> dict[str, Any]:
        """Outcomes of code into the rows."""
        limits = {"seconds": self.config.code_seconds, "megabytes": self.config.code_megabytes}
        sink = self.sink("execution", limits)
        with _meter(self.console, "running code") as progress:
            generation.run_code(self.by_id, rows, sink, opened, progress, **limits)
        found = {(r["id"], r["sample"]): r["outcome"] for r in self.read("execution", sink)}
        for row in rows:
            row["outcome"] = found.get((row["id"], row["sample"]), row["outcome"])
        return limits | {"isolation": execution.isolation()}

    def judge(self, spec: JudgeSpec, rows: list[dict[str, Any]], opened: bool, mesh: Any, dtype: str) -> dict[tuple[str, int], dict]:
        """One judge's rows by (id, sample); its weights are loaded only if something is left to judge."""
        where = {"endpoint": f"{self.config.endpoint.url} {self.config.endpoint.model}"}.get(spec.kind, spec.path)
        sink = self.sink(f"judge-{spec.title}", {"judge": f"{spec.kind}:{spec.name}", "where": where})
        try:
            with _meter(self.console, f"judge {spec.title}") as progress:
                made = _Lazy(lambda: self._make(spec, opened, mesh, dtype))
                judge_rows(made, self.by_id, rows, spec, sink, lambda done, total: progress(done, total, ""))
        except BaseException:
            if self.out is not None:
                sink.close()
            raise
        return {(r["id"], r["sample"]): r for r in self.read(f"judge-{spec.title}", sink)}

    def _make(self, spec: JudgeSpec, opened: bool, mesh: Any, dtype: str) -> Any:
        if spec.kind == "phrases":
            return phrase_judge(spec, opened)
        if spec.kind == "endpoint":
            cache = self.out / "endpoint-cache.jsonl" if self.out else None
            return EndpointJudge(Endpoint(self.config.endpoint, cache), spec.name, opened)
        return load_guard(spec.name, spec.path, mesh, dtype, self.config.evals.batch, opened)


class _Lazy:
    """A judge that is made when it is first asked."""

    def __init__(self, make):
        self._make, self._judge = make, None

    def judge(self, answers, progress=lambda done, total: None):
        self._judge = self._judge or self._make()
        return self._judge.judge(answers, progress)


# lm-eval's means of zeros and ones.
_SHARES = ("acc", "acc_norm", "exact_match", "prompt_level_strict_acc", "prompt_level_loose_acc")


def _lm_eval(config, subject: Subject, tasks: Any, console: Console) -> dict[str, Any]:
    """Cells of lm-eval's tasks: Wilson intervals of shares, and 1.96 of lm-eval's standard errors where it gives any otherwise."""
    from opsa_jax.evals.harness import make_lm, run_tasks

    room = config.evals.max_new_tokens or 1024
    lm = make_lm(subject.params, subject.cfg, subject.chat, config.evals.batch, room, seed=config.seed)
    console.print(f"lm-eval: {config.lm_eval}")
    found = run_tasks(lm, tasks, config.evals.limit, seed=config.seed)
    cells = {}
    for task, values in found["results"].items():
        n = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or metric == "sample_len":
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            spread = 1.96 * error if isinstance(error, int | float) else 0.0
            low, high = wilson(value * n, n) if metric in _SHARES and 0 <= value <= 1 else (value - spread, value + spread)
            cells[f"lm_eval:{task}:{key}"] = {"rate": float(value), "n": n, "low": low, "high": high}
    return cells


@contextmanager
def _meter(console: Console, title: str) -> Iterator[Any]:
    """A progress bar with the time left on a terminal; elsewhere a line on stderr every half minute."""
    if console.is_terminal:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total, what: bar.update(task, completed=done, total=total, description=f"{title} {what}".strip())
        return
    first: tuple[float, int] | None = None
    last = 0.0

    def line(done: int, total: int, what: str) -> None:
        nonlocal first, last
        now = time.monotonic()
        if first is None:  # compilation is over: from here on speed means something
            first, last = (now, done), now
        if now - last < 30 or done == first[1]:
            return
        last = now
        left = (now - first[0]) / (done - first[1]) * (total - done)
        print(f"{title}: {done} of {total}, {what}, about {left:.0f} s left".replace(", ,", ","), file=sys.stderr, flush=True)

    yield line


def agreement_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Judges pair by pair: share of equal verdicts and Cohen's kappa."""
    table = Table(title="agreement of judges", title_justify="left")
    for name in ("prompts", "first", "second"):
        table.add_column(name)
    for name in ("n", "no verdict", "agree", "kappa"):
        table.add_column(name, justify="right")
    for r in rows:
        agree, kappa = ("-" if r[k] is None else f"{r[k]:.3f}" for k in ("agree", "kappa"))
        table.add_row(r["label"], r["first"], r["second"], str(r["n"]), str(r["unjudged"]), agree, kappa)
    return table


def show_benchmarks() -> None:
    """The registry, one benchmark a row."""
    table = Table(title="benchmarks (--suite NAME, NAME:SUBSET, NAME=FILE or a group)", title_justify="left")
    for name in ("name", "group", "prompts", "license"):
        table.add_column(name, overflow="fold")
    for b in BENCHMARKS.values():
        table.add_row(b.name, b.group or "-", str(b.size or "?"), b.license)
    table.add_row("sandbox", "-", "", "Apache-2.0 (embedded)")
    console = Console(highlight=False)
    console.print(table)
    for b in BENCHMARKS.values():
        gated = ", gated" if b.gated else ""
        note = f" ({b.note})" if b.note else ""
        console.print(f"{b.name}: {b.title}{note}\n  metric {b.metric}; {b.url}", soft_wrap=True)
        console.print(f"  hub: {b.hub}, split {b.split}{gated}; file: {' + '.join(b.files[0])}", soft_wrap=True)
    console.print("IFEval and all other tasks of lm-eval: --lm-eval ifeval", soft_wrap=True)


def check_leakage(config) -> dict[str, Any]:
    """Training prompts that are also evaluation prompts: counts on screen, pairs in OUT/leakage.jsonl."""
    console = Console(highlight=False)
    out = Path(config.out) / "leakage.jsonl"
    if config.out and out.exists():
        raise UserError(f"{out} exists; choose another folder with --out")
    records = load(config.evals.suite, config.evals.data_dir, config.evals.limit, config.missing, config.choice, _teller(console))
    sources = [SourceConfig(path=path, label="benign", prompt_field=config.leakage_field) for path in config.leakage]
    training = [r for source in sources for r in load_source(source)[0]]
    leaks = leakage.find_leaks(training, records)
    rows = leakage.summary(leaks, records)
    table = Table(title=f"evaluation prompts found in {len(training)} training prompts", title_justify="left")
    table.add_column("metric")
    for name in ("n", "exact", "ngram", "similar"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    if config.out:
        places = [f"{k.training.source}:{k.training.line}" for k in leaks]
        found = [{"sign": k.sign, "value": k.value, "evaluation": k.evaluation.id} for k in leaks]
        write_jsonl(out, [row | {"training": place} for row, place in zip(found, places, strict=True)])
    return {row["metric"]: row for row in rows}
