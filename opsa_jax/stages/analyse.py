"""What `python -m opsa_jax.analyse` does: models, prompts and the base's responses first, then one analysis after another."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from opsa_jax.analyse import AnalyseConfig
from opsa_jax.analysis import analysis_plots, collapse, plots, tables
from opsa_jax.analysis.drift import check_layer, drift, hidden_states
from opsa_jax.analysis.token_kl import View, by_position, by_type, concentration, token_divergence
from opsa_jax.config import RunConfig, TeacherConfig
from opsa_jax.data.chat import Chat, check_same_tokens
from opsa_jax.data.loaders import write_jsonl
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals import benchmarks
from opsa_jax.evals.benchmarks import is_plain
from opsa_jax.evals.scorers import refused
from opsa_jax.evals.suite import judge, load_suite, summarise
from opsa_jax.models import hf
from opsa_jax.models.params import Params
from opsa_jax.objectives.objective import needs_teacher
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.rollout.engine import Engine
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.sampler import id_numbers, row_keys
from opsa_jax.teachers.steering import load_steering
from opsa_jax.training import rundir, supervision
from opsa_jax.training.setup import Checkpoint, open_checkpoint

_LEAST = dict.fromkeys(("room", "minimum", "batch", "chunk", "samples", "collapse_prompts"), 1)
_LEAST |= dict.fromkeys(("prompts_per_kind", "shown", "seed"), 0)
KINDS = ("harmful", "benign", "capability")
Ids = list[int]


@dataclass(frozen=True)
class Rollout:
    """One response of the base."""

    kind: str
    record: Record
    context: str
    """What the teacher sees besides the prompt."""
    plain: Ids
    """Prompt without the context, with the prefill where the record has one."""
    guided: Ids
    """Prompt with the context, likewise."""
    ids: Ids = field(default_factory=list)
    text: str = ""


@dataclass
class Bench:
    """Everything the analyses share."""

    config: AnalyseConfig
    run: RunConfig
    out: Path
    console: Console
    chat: Chat
    models: dict[str, Checkpoint]
    """base first, then the models to analyse; teacher where it is another checkpoint."""
    records: dict[str, list[Record]]
    mesh: Mesh
    steer_LD: Any = None
    base: Params | None = None
    rollouts: dict[str, list[Rollout]] = field(default_factory=dict)

    @property
    def students(self) -> list[str]:
        """Models to analyse, without base and teacher."""
        return [name for name in self.models if name not in ("base", "teacher")]

    def cfg(self, name: str):
        return self.models[name if name in self.models else "base"].cfg

    def load(self, name: str) -> Params:
        """Weights of a model; the teacher's are the base's where it has none of its own."""
        if name == "base" or name not in self.models:
            return self.base
        checkpoint = self.models[name]
        return hf.load_params(checkpoint.folder, checkpoint.cfg, checkpoint.cfg.compute_dtype, self.mesh)

    def view(self, name: str, params: Params, rollouts: Sequence[Rollout]) -> View:
        """A model before each rollout: the teacher with context and steering, any other without."""
        if name == "teacher":
            return View(params, self.cfg(name), [r.guided for r in rollouts], self.steer_LD)
        return View(params, self.cfg(name), [r.plain for r in rollouts])


def analyse(config: AnalyseConfig) -> Path:
    """Do it; returns the output folder.

    Raises:
        UserError: bad input, before anything is written.
    """
    for name, least in _LEAST.items():
        if (value := getattr(config, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    bench = prepare(config)
    with jax.set_mesh(bench.mesh):
        checkpoint = bench.models["base"]
        bench.base = hf.load_params(checkpoint.folder, checkpoint.cfg, checkpoint.cfg.compute_dtype, bench.mesh)
        bench.out.mkdir(parents=True, exist_ok=True)
        if {"token-kl", "drift"} & set(bench.config.parts):
            bench.rollouts = sample_base(bench)
        for part in dict.fromkeys(bench.config.parts):
            bench.console.print(_PARTS[part](bench))
    if config.run:
        plots.plot_training(Path(config.run), bench.out)
    bench.console.print(f"wrote    {bench.out} ({', '.join(sorted(p.name for p in bench.out.iterdir()))})")
    return bench.out


def prepare(config: AnalyseConfig) -> Bench:
    """Models, contexts and prompts, checked; nothing is written but the probe that the folder can be."""
    run, models = resolve(config)
    out = Path(config.out or Path(config.run) / "analysis")
    tables.check_writable(out)
    opened = {name: open_checkpoint(dataclasses.replace(run.model, revision="main" if name != "base" else run.model.revision), path)
              for name, path in models.items()}  # fmt: skip
    chat = Chat.load(str(opened["base"].folder), thinking=run.model.thinking)
    for checkpoint in opened.values():
        check_same_tokens(chat, Chat.load(str(checkpoint.folder), thinking=run.model.thinking))
    if "drift" in config.parts:
        check_layer(config.layer, opened["base"].cfg.n_layers)
    plain = is_plain(run.evals.suite) and run.evals.samples == 1
    taught = needs_teacher(run.objective) or run.rollout.writer == "teacher"
    if not plain and "teacher" in config.parts and config.parts != AnalyseConfig.parts:
        raise UserError("--parts teacher: only for the sandbox or one file in its format, with one response per prompt")
    if config.parts == AnalyseConfig.parts and not (plain and taught):
        config = dataclasses.replace(config, parts=tuple(p for p in config.parts if p != "teacher"))
    records = by_kind(suite_records(run), config.prompts_per_kind)
    steering = run.teacher.steering
    steer_LD = load_steering(steering, opened["base"].cfg, run.teacher.steering_coefficient) if steering else None
    return Bench(config, run, out, Console(highlight=False, soft_wrap=True), chat, opened, records, make_mesh(config.mesh), steer_LD)


def resolve(config: AnalyseConfig) -> tuple[RunConfig, dict[str, str]]:
    """The run's config with the flags laid over it, and name -> checkpoint."""
    if config.run:
        run = rundir.saved_config(Path(config.run))
    elif not config.base or not config.models or not config.out:
        raise UserError("analyse needs a run directory, or --base PATH --models NAME=PATH --out FOLDER")
    else:
        run = RunConfig(teacher=TeacherConfig(context_harmful="", context_benign=""))
    teacher = run.teacher
    if config.context_harmful is not None or config.context_benign is not None:
        given = {"context_harmful": config.context_harmful, "context_benign": config.context_benign}
        teacher = dataclasses.replace(teacher, constitution="", **{k: v for k, v in given.items() if v is not None})
    path, suite = config.base or run.model.path, config.suite or run.evals.suite or "sandbox"
    model = dataclasses.replace(run.model, path=path, compute_dtype=config.dtype)
    run = dataclasses.replace(run, model=model, teacher=teacher, evals=dataclasses.replace(run.evals, suite=suite))
    models = {"base": path}
    if config.run:
        exported = Path(config.run) / "hf"
        if not (exported / "config.json").is_file():
            hint = f"python -m opsa_jax.convert export {config.run} --out {exported}"
            raise UserError(f"{config.run} has no trained model in hf/ (unfinished, or an adapter); write it with: {hint}")
        models["trained"] = str(exported)
    for item in config.models:
        name, equals, where = item.partition("=")
        if not equals or not name or not where or name in ("base", "teacher") or name in models:
            raise UserError(f"--models {item!r}: write NAME=PATH, with a name other than {', '.join(['teacher', *models])}")
        models[name] = where
    if teacher.routes:
        raise UserError("the run has several teachers (--teacher.routes); analyse compares with one, so analyse checkpoints by flags")
    if teacher.weights == "checkpoint":
        models["teacher"] = teacher.path
    return run, models


def suite_records(run: RunConfig) -> list[Record]:
    """Records of the run's suite, of any kind."""
    suite = run.evals.suite
    return load_suite(suite) if is_plain(suite) else benchmarks.load(suite, run.evals.data_dir)


def phrases_of(run: RunConfig) -> str:
    """The refusal list; `auto` is the sandbox's own words for the sandbox and English for all else."""
    chosen = run.evals.refusal_phrases
    return chosen if chosen != "auto" else "sandbox-v1" if run.evals.suite == "sandbox" else "english-v1"


def by_kind(records: Sequence[Record], limit: int) -> dict[str, list[Record]]:
    """Prompts without prefill: harmful, benign (harmless look-alikes and open requests) and capability (tasks), evenly spread."""
    found: dict[str, list[Record]] = {kind: [] for kind in KINDS}
    for record in records:
        if not record.extra.get("prefill"):
            request = record.extra["metric"].startswith(("over_refusal", "freeform"))
            found["harmful" if record.label == "harmful" else "benign" if request else "capability"].append(record)
    for kind, rows in found.items():
        if limit and len(rows) > limit:
            found[kind] = [rows[i] for i in np.linspace(0, len(rows) - 1, limit).astype(int)]
    return {kind: rows for kind, rows in found.items() if rows}


def encode(bench: Bench, kind: str, records: Sequence[Record]) -> list[Rollout]:
    """Prompts as student and teacher see them."""
    of, rows = supervision.load_contexts(bench.run).of, []
    for record in records:
        prefill = bench.chat.encode_texts([record.extra.get("prefill", "")])[0].tolist()
        context, placement = of(record), bench.run.teacher.placement
        plain, guided = (bench.chat.encode(record.prompt, c, placement, record.system) + prefill for c in ("", context))
        rows.append(Rollout(kind, record, context, plain, guided))
    return rows


def respond(bench: Bench, name: str, params: Params, rows: Sequence[Rollout], sampling: Sampling, room: int, purpose: str) -> list[Rollout]:
    """The rows with responses of a model."""
    view = bench.view(name, params, rows)
    numbers_N = id_numbers(r.record.id for r in rows)
    keys_N = row_keys(jax.random.key(bench.config.seed), purpose, 0, numbers_N, np.zeros_like(numbers_N))
    engine = Engine(params, view.cfg, sampling, bench.chat.stop_ids, room, bench.config.batch, view.steer_LD)
    drawn = engine.run(view.prompts, keys_N)
    prefills = (bench.chat.encode_texts([r.record.extra.get("prefill", "")])[0].tolist() for r in rows)
    return [
        dataclasses.replace(r, ids=d.ids.tolist(), text=bench.chat.decode_response([*p, *d.ids.tolist()]))
        for r, d, p in zip(rows, drawn, prefills, strict=True)
    ]


def sample_base(bench: Bench) -> dict[str, list[Rollout]]:
    """One response of the base per prompt, with the run's sampling; also written to rollouts.jsonl."""
    rollouts = {}
    for kind, records in bench.records.items():
        given = bench.run.rollout
        drawn = respond(bench, "base", bench.base, encode(bench, kind, records), Sampling.of(given), given.max_new_tokens, "analyse")
        rollouts[kind] = [r for r in drawn if r.ids]
    rows = [
        {"kind": kind, "id": r.record.id, "prompt": r.record.prompt, "response": r.text, "tokens": len(r.ids)}
        for kind, rs in rollouts.items()
        for r in rs
    ]
    write_jsonl(bench.out / "rollouts.jsonl", rows)
    counts = ", ".join(f"{len(rs)} {kind}" for kind, rs in rollouts.items())
    bench.console.print(f"rollouts {counts} responses of the base")
    return rollouts


def run_token_kl(bench: Bench) -> str:
    """token_kl.json, CSVs by position and by type, token_kl_rollouts.jsonl and the plot."""
    values = divergences(bench)
    config, harmful = bench.config, bench.rollouts.get("harmful", [])
    pieces = bench.chat.tokenizer.convert_ids_to_tokens
    positions, types = [], []
    for (kind, pair), arrays in values.items():
        positions.append({"kind": kind, "pair": pair, "unit": "nats", **by_position(arrays, config.room)})
        if kind == "harmful":
            found = by_type(arrays, [r.ids for r in harmful], config.minimum)
            named = [{"token": str(pieces(t["id"])), "text": bench.chat.decode([t["id"]]), **t} for t in found]
            types.append({"pair": pair, "types": named})
    summary = [
        {"kind": kind, "pair": pair, "tokens": int(sum(map(len, arrays))), "mean": float(np.mean(np.concatenate(arrays))),
         "peak": int(np.argmax(by_position(arrays, config.room)["mean"])), "half_in": concentration(arrays)}
        for (kind, pair), arrays in values.items()
    ]  # fmt: skip
    data = {"settings": settings(bench), "summary": summary, "positions": positions, "types": types}
    rundir.write_json(bench.out / "token_kl.json", data)
    columns = [
        {"kind": p["kind"], "pair": p["pair"], "position": i} | {k: p[k][i] for k in ("mean", "low", "high", "n")}
        for p in positions
        for i in range(len(p["mean"]))
    ]
    tables.write_csv(bench.out / "token_kl_by_position.csv", columns)
    tables.write_csv(bench.out / "token_kl_by_type.csv", [{"pair": t["pair"], **row} for t in types for row in t["types"]])
    write_jsonl(bench.out / "token_kl_rollouts.jsonl", chosen(bench, values))
    analysis_plots.plot_token_kl(data, bench.out)
    lines = [f"{s['kind']:10s} {s['pair']:24s} mean {s['mean']:.4f} peak at {s['peak']:3d}, half in {s['half_in']:.1%}" for s in summary]
    return "\n".join(["token KL (nats; the last column: share of tokens that hold half of the sum)", *lines])


def settings(bench: Bench) -> dict[str, Any]:
    """What the numbers depend on, for the reader of the files."""
    keep = ("prompts_per_kind", "room", "minimum", "layer", "drift_at", "samples", "collapse_prompts", "seed", "dtype")
    models = {name: str(c.folder) for name, c in bench.models.items()}
    config = dataclasses.asdict(bench.config)
    return {"models": models, "suite": bench.run.evals.suite, **{k: config[k] for k in keep}}


def divergences(bench: Bench) -> dict[tuple[str, str], list[np.ndarray]]:
    """(kind, pair) -> values by response. Pairs: `teacher vs MODEL`, symmetric, and `MODEL || base`, KL(model, base)."""
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    teacher = bench.load("teacher")
    for name in ["base", *bench.students]:
        params = bench.load(name)
        for kind, rollouts in bench.rollouts.items():
            ids, size = [r.ids for r in rollouts], {"batch": bench.config.batch, "chunk": bench.config.chunk}
            student = bench.view(name, params, rollouts)
            guide = bench.view("teacher", teacher, rollouts)
            found[kind, f"teacher vs {name}"] = token_divergence(guide, student, ids, **size)["symmetric"]
            if name != "base":
                found[kind, f"{name} || base"] = token_divergence(student, bench.view("base", bench.base, rollouts), ids, **size)["forward"]
    return found


def chosen(bench: Bench, values: dict[tuple[str, str], list[np.ndarray]]) -> list[dict[str, Any]]:
    """The first responses of each kind, token by token."""
    rows = []
    for kind, rollouts in bench.rollouts.items():
        for i, r in enumerate(rollouts[: bench.config.shown]):
            pairs = {pair: [round(float(v), 6) for v in x[i]] for (k, pair), x in values.items() if k == kind}
            row = {"kind": kind, "id": r.record.id, "prompt": r.record.prompt, "tokens": token_texts(bench.chat, r.ids), "values": pairs}
            rows.append(row | {"refused": refused(r.text, phrases_of(bench.run))})
    return rows


def token_texts(chat: Chat, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the response; pieces of a split character stand with the token that completes it."""
    texts, done = [], ""
    for n in range(1, len(ids) + 1):
        text = chat.decode(ids[:n])
        whole = text if not text.endswith("\ufffd") or n == len(ids) else done
        texts.append(whole[len(done) :])
        done = whole
    return texts


def run_drift(bench: Bench) -> str:
    """drift.json, drift.csv and the plot; over all prompts that are not harmful."""
    rollouts = [r for kind in ("benign", "capability") for r in bench.rollouts.get(kind, [])]
    if len(rollouts) < 3:
        return "drift    left out: the suite has fewer than 3 prompts that are not harmful"
    responses = [r.ids for r in rollouts] if bench.config.drift_at == "response" else None
    states = {}
    for name in ["base", "teacher", *bench.students]:
        view = bench.view(name, bench.load(name), rollouts)
        states[name] = hidden_states(view, responses, bench.config.layer, bench.config.batch)
    found = drift(states)
    rows = [{"id": r.record.id, "kind": r.kind} for r in rollouts]
    rundir.write_json(bench.out / "drift.json", {"settings": settings(bench), "records": rows, **found})
    points = [
        {"model": name, **row, "component_1": x, "component_2": y}
        for name, m in found["models"].items()
        for row, (x, y) in zip(rows, m["points"], strict=True)
    ]
    tables.write_csv(bench.out / "drift.csv", points)
    analysis_plots.plot_drift(found, bench.out)
    lines = [
        f"{name:10s} distance {m['distance']:.3f} displacement {m['displacement']:.3f} W1 "
        + " ".join(f"{w:.3f}" for w in m["wasserstein"])
        for name, m in found["models"].items()
    ]
    return "\n".join(["drift of hidden states on general prompts (units of the base's spread)", *lines])


def run_collapse(bench: Bench) -> str:
    """collapse.json and collapse.csv; sampled answers to open and look-alike requests."""
    records = (bench.records.get("benign") or bench.records.get("capability", []))[: bench.config.collapse_prompts]
    if not records:
        return "collapse left out: the suite has no prompts that are not harmful"
    contexts = [r.context for r in encode(bench, "benign", records)]
    options = {
        "samples": bench.config.samples, "prompts": bench.config.collapse_prompts, "max_new_tokens": bench.run.rollout.max_new_tokens,
        "batch": bench.config.batch, "placement": bench.run.teacher.placement, "phrases": phrases_of(bench.run),
        "seed": bench.config.seed,
    }  # fmt: skip
    found = {}
    for name in ["base", "teacher", *bench.students]:
        if name == "teacher" and bench.steer_LD is not None:
            bench.console.print("collapse left out for the teacher: it is steered")
            continue
        given = contexts if name == "teacher" else ()
        found[name] = collapse.probe_model(bench.load(name), bench.cfg(name), bench.chat, records, given, **options)
    rundir.write_json(bench.out / "collapse.json", {"settings": settings(bench), "models": found})
    tables.write_csv(bench.out / "collapse.csv", [{"model": m, "probe": p, **v} for m, ps in found.items() for p, v in ps.items()])
    analysis_plots.plot_collapse(found, bench.out)
    lines = [f"{m:10s} " + " ".join(f"{p} {v['rate']:.3f}" for p, v in ps.items()) for m, ps in found.items()]
    return "\n".join(["collapse probes", *lines])


def run_teacher(bench: Bench) -> str:
    """teacher.json and teacher.jsonl: the suite answered by the teacher, each prompt under the context that it would be taught with."""
    records = load_suite(bench.run.evals.suite, limit=bench.run.evals.limit)
    evals = bench.run.evals
    rows = encode(bench, "", records)
    sampling = Sampling(temperature=evals.temperature, top_k=evals.top_k, top_p=evals.top_p)
    drawn = respond(bench, "teacher", bench.load("teacher"), rows, sampling, evals.max_new_tokens or 64, "evaluate")
    outcomes = [judge(r.record, r.text, phrases_of(bench.run)) for r in drawn]
    results = summarise(records, [r.text for r in drawn], outcomes)
    write_jsonl(bench.out / "teacher.jsonl", [
        {"id": r.record.id, "metric": r.record.extra["metric"], "prompt": r.record.prompt, "prefill": r.record.extra.get("prefill", ""),
         "response": r.text, "outcome": o}
        for r, o in zip(drawn, outcomes, strict=True)
    ])  # fmt: skip
    rundir.write_json(bench.out / "teacher.json", results)
    return "teacher  " + " ".join(f"{m} {v['rate']:.3f}" for m, v in results.items() if m.startswith(("asr", "over")) or m == "capability")


_PARTS = {"token-kl": run_token_kl, "drift": run_drift, "collapse": run_collapse, "teacher": run_teacher}
