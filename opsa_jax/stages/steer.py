"""SafeSteer's preparation as a whole: prompts, direction, inspection, vote, and the artifacts, written together at the end."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from opsa_jax.config import ModelConfig, SourceConfig
from opsa_jax.data.chat import Chat, left_pad
from opsa_jax.data.loaders import load_source
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals.runner import results_table
from opsa_jax.evals.scorers import refusal_list, wilson
from opsa_jax.evals.suite import judge, load_suite, summarise
from opsa_jax.models import hf
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params
from opsa_jax.parallel.mesh import batch_shards, make_mesh, round_up
from opsa_jax.rollout.engine import Engine
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.sampler import row_keys
from opsa_jax.stages.steer_files import Direction, describe, samples_table, write
from opsa_jax.steer import SteerConfig
from opsa_jax.teachers import safety_tokens, steering
from opsa_jax.teachers.contexts import resolve_context
from opsa_jax.teachers.steering import Place
from opsa_jax.training.setup import open_checkpoint

_ANSWER_ROOM = 128  # tokens of the greedy answer in which answer:TEXT is looked for


@dataclass(frozen=True)
class Prompts:
    """Records split for good: the means never see what the scores are taken on."""

    train: list[Record]
    val: list[Record]


@dataclass(frozen=True)
class Model:
    """What every stage needs."""

    params: Params
    cfg: DecoderConfig
    chat: Chat
    batch: int

    def generate(self, rows: Sequence[Sequence[int]], room: int, seed: int, temperature=0.0, steer_LD=None, slots: int = 64):
        """Answers in the order of the rows."""
        engine = Engine(self.params, self.cfg, Sampling(temperature=temperature), self.chat.stop_ids, room, slots, steer_LD)
        numbers_N = np.arange(len(rows), dtype=np.int32)
        return engine.run(rows, row_keys(jax.random.key(seed), "steer", 0, numbers_N, np.zeros_like(numbers_N)))


def prepare(cfg: SteerConfig) -> Path:
    """Do it; returns the folder with the artifacts.

    Raises:
        UserError: bad input, no direction, no tokens. Nothing is written then.
    """
    console, out = Console(highlight=False, soft_wrap=True), Path(cfg.out)
    if out.exists():
        raise UserError(f"{out} exists; choose another folder with --out")
    places = Place.parse(cfg.position, "--position"), Place.parse(cfg.score_at or cfg.position, "--score-at")
    context = resolve_context(cfg.context)
    refusal_list(cfg.evals.refusal_phrases)
    harmful, harmless = load_prompts(cfg, cfg.harmful, "harmful"), load_prompts(cfg, cfg.harmless, "harmless")
    suite = inspection_records(cfg, harmful, harmless)
    checkpoint = open_checkpoint(ModelConfig(path=cfg.model, revision=cfg.revision, compute_dtype=cfg.dtype), cfg.model)
    chat = Chat.load(str(checkpoint.folder), thinking=cfg.thinking)
    ids = steering.refusal_ids(chat, cfg.refusal_tokens) if cfg.mode == "direction" else ()
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        params = hf.load_params(checkpoint.folder, checkpoint.cfg, checkpoint.cfg.compute_dtype, mesh)
        model = Model(params, checkpoint.cfg, chat, round_up(cfg.batch, batch_shards(mesh)))
        console.print(f"model    {cfg.model}: {model.cfg.n_layers} layers of width {model.cfg.d_model}")
        direction = find_direction(cfg, model, harmful, harmless, context, places, ids) if cfg.mode == "direction" else None
        if direction:
            console.print(describe(direction))
        results, transcripts = inspect(cfg, model, suite, direction, context)
        if results:
            console.print(results_table(results))
            console.print(samples_table(transcripts, cfg.show_harmful))
        tokens = vote(cfg, model, harmful if cfg.vote_prompts == "harmful" or cfg.mode == "prompt" else harmless, direction, context)
    write(cfg, direction, results, transcripts, tokens)
    console.print(f"tokens   {' '.join(t['text'].strip() for t in tokens['tokens'])}")
    console.print(f"wrote    {out} ({', '.join(sorted(p.name for p in out.iterdir()))})")
    return out


def load_prompts(cfg: SteerConfig, source: SourceConfig, name: str) -> Prompts:
    """A random choice of records, training before validation."""
    records, _ = load_source(source)
    wanted = cfg.train_prompts + cfg.val_prompts
    if len(records) < wanted:
        raise UserError(
            f"--{name}.path {source.path} has {len(records)} prompts, {wanted} are needed; lower --train-prompts or --val-prompts"
        )
    chosen = [records[int(i)] for i in np.random.default_rng(cfg.seed).permutation(len(records))[:wanted]]
    return Prompts(chosen[: cfg.train_prompts], chosen[cfg.train_prompts :])


def find_direction(cfg, model: Model, harmful: Prompts, harmless: Prompts, context: str, places, ids) -> Direction:
    """Rows, filter, difference of means, scores, selection."""
    paired = cfg.contrast == "context-none"
    sets = {
        "positive": (harmful, context if paired else ""),
        "negative": (harmful if paired else harmless, ""),
        "harmless": (harmless, ""),
    }
    probe = steering.Probe(model.params, model.cfg, model.batch)
    wanted = {
        (name, split): (getattr(prompts, split), text)
        for name, (prompts, text) in sets.items()
        for split in (("train", "val") if name != "harmless" else ("val",))
    }
    rows = rows_at(cfg, model, wanted, places)
    kept = {}
    for split in ("train", "val"):
        kept |= keep_rows(cfg, probe, rows, split, ids, paired)
    rows["harmless", "val"] = [r for r in rows["harmless", "val"] if r is not None]
    if not rows["harmless", "val"]:
        raise UserError(f"no harmless prompt reaches --position {cfg.position}; choose another place")
    names = column_names(cfg, model, places[0])
    at = {key: [r[0] for r in found] for key, found in rows.items()}
    scored = {key: [r[1] for r in found] for key, found in rows.items()}
    if len(names) > min(len(row) for found in at.values() for row in found):
        raise UserError(f"--positions {cfg.positions}: some prompts have fewer tokens; lower it")
    means = [probe.mean_inputs(at[side, "train"], len(names)) for side in ("positive", "negative")]
    scores = steering.score_candidates(
        probe, means[0] - means[1], scored["positive", "val"], scored["negative", "val"], scored["harmless", "val"], ids
    )
    layer, column, fallback = steering.select(scores, cfg.max_kl, cfg.layer_share, cfg.fallback)
    reasons_LC = steering.discards(scores, cfg.max_kl, cfg.layer_share)
    return Direction(scores, reasons_LC, names, layer, column, fallback, kept)


def rows_at(cfg: SteerConfig, model: Model, sets: dict, places: tuple[Place, Place]) -> dict[tuple[str, str], list]:
    """For each set of (records, context): per record the row that ends where candidates are taken and the row that ends where the score
    is; None where the greedy answer ends before."""
    prompts = {
        key: [model.chat.encode(r.prompt, context, cfg.placement, r.system) for r in records] for key, (records, context) in sets.items()
    }
    everything = [row for found in prompts.values() for row in found]
    answers: list[list[int]] = [[] for _ in everything]
    if any(p.in_answer for p in places):
        room = max(_ANSWER_ROOM if p.text else p.tokens for p in places)
        answers = [r.ids.tolist() for r in model.generate(everything, room, cfg.seed, slots=cfg.evals.batch)]
    forced = model.chat.encode_texts([cfg.score_after])[0].tolist() if cfg.score_after else []
    pairs = []
    for prompt, answer in zip(everything, answers, strict=True):
        at, score = (place.cut(answer, model.chat) for place in places)
        pairs.append(None if at is None or score is None else (prompt + at, prompt + score + forced))
    found = iter(pairs)
    return {key: [next(found) for _ in rows] for key, rows in prompts.items()}


def keep_rows(cfg: SteerConfig, probe: steering.Probe, rows: dict, split: str, ids, paired: bool) -> dict[str, str]:
    """Leave in `rows` what reaches its place and has a score of the expected sign; returns how many those are, in words."""
    good: dict[str, np.ndarray] = {}
    means = {}
    for side, sign in (("positive", 1), ("negative", -1)):
        found = rows[side, split]
        good[side] = np.array([r is not None for r in found])
        reached = [r for r in found if r is not None]
        if reached:
            R_N = steering.refusal_score(probe.logits([r[1] for r in reached]), ids)
            means[side] = f"mean refusal score {R_N.mean():.2f}, highest {R_N.max():.2f}, lowest {R_N.min():.2f}"
            if cfg.sign_filter:
                good[side][good[side]] = sign * R_N > 0
    if paired:
        good["positive"] = good["negative"] = good["positive"] & good["negative"]
    kept = {}
    for side, keep in good.items():
        if not keep.any():
            why = means.get(side, f"none reaches --position {cfg.position}")
            expected = ("above 0" if side == "positive" else "below 0") + (" and its pair the other sign" if paired else "")
            raise UserError(
                f"none of {len(keep)} {side} {split} prompts has a refusal score {expected} ({why}); check --refusal-tokens and --score-at "
                "(the words that a refusal begins with, where it begins), or use --no-sign-filter"
            )
        rows[side, split] = [r for r, k in zip(rows[side, split], keep, strict=True) if k]
        kept[f"{side} {split}"] = f"{keep.sum()} of {len(keep)}" + (f" ({means[side]})" if side in means else "")
    return kept


def column_names(cfg: SteerConfig, model: Model, place: Place) -> list[str]:
    """Candidate columns: the template's own tokens where they are taken there, otherwise numbers counted from the end."""
    chat = model.chat
    if place.in_answer:
        return [str(c) for c in range(-(cfg.positions or 1), 0)]
    # What the prompts of two different texts have in common at their end is the template's.
    a, b = (chat.encode(text)[::-1] for text in ("x", "What is 2 + 3?"))
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    columns = cfg.positions or max(same, 1)
    texts = [repr(chat.decode([i]))[1:-1] for i in a[:columns]][::-1]
    return [f"{c - columns} {text}" if c - columns >= -same else str(c - columns) for c, text in enumerate(texts)]


def inspection_records(cfg: SteerConfig, harmful: Prompts, harmless: Prompts) -> list[Record]:
    """What base and teacher answer: the suite, or the validation prompts as asr_val and over_refusal."""
    if not cfg.inspect:
        return []
    if cfg.evals.suite:
        return [r for r in load_suite(cfg.evals.suite, limit=cfg.inspect) if r.extra["metric"] != "freeform"]
    metrics = (("asr_val", harmful, "harmful"), ("over_refusal", harmless, "benign"))
    return [dataclasses.replace(r, label=label, extra={"metric": m}) for m, p, label in metrics for r in p.val[: cfg.inspect]]


def inspect(cfg: SteerConfig, model: Model, records: list[Record], direction: Direction | None, context: str):
    """Results by model and metric, and one transcript per model and prompt; empty without records."""
    if not records:
        return {}, []
    L, D = model.cfg.n_layers, model.cfg.d_model
    # Steering by zero is the base, in the program that the steered models use.
    models: dict[str, tuple[Any, str]] = {"base": (steering.steering_rows(L, 0, np.zeros(D)) if direction else None, "")}
    if direction is None:
        models["prompted"] = (None, context)
    for c in cfg.coefficients if direction else ():
        models[f"steered x{c:g}"] = (steering.steering_rows(L, direction.layer, direction.vector_D, c), "")
    results, transcripts = {}, []
    for name, (steer_LD, text) in models.items():
        prefills = [model.chat.encode_texts([r.extra.get("prefill", "")])[0].tolist() for r in records]
        prompts = [model.chat.encode(r.prompt, text, cfg.placement, r.system) + p for r, p in zip(records, prefills, strict=True)]
        evals = cfg.evals
        answers = model.generate(prompts, evals.max_new_tokens, cfg.seed, evals.temperature, steer_LD, evals.batch)
        texts = [model.chat.decode_response([*p, *a.ids]) for p, a in zip(prefills, answers, strict=True)]
        outcomes = [judge(r, t, evals.refusal_phrases) for r, t in zip(records, texts, strict=True)]
        results[name] = with_refusals(summarise(records, texts, outcomes))
        transcripts += [
            {"model": name, "id": r.id, "metric": r.extra["metric"], "label": r.label, "prompt": r.prompt, "response": t, "outcome": o}
            for r, t, o in zip(records, texts, outcomes, strict=True)
        ]
    return results, transcripts


def with_refusals(results: dict[str, Any]) -> dict[str, Any]:
    """Results with the share refused after each attack success rate, without the parts of capability."""
    found = {}
    for metric, r in results.items():
        if not metric.startswith("capability_"):
            found[metric] = r
        if metric.startswith("asr_"):
            low, high = wilson(r["refused"], r["n"])
            found[metric.replace("asr_", "refused_")] = {"rate": r["refused"] / r["n"], "n": r["n"], "low": low, "high": high}
    return found


def vote(cfg: SteerConfig, model: Model, prompts: Prompts, direction: Direction | None, context: str) -> dict[str, Any]:
    """The content of tokens.json."""
    chat, samples = model.chat, cfg.samples
    steer_LD = None
    if direction:
        steer_LD = steering.steering_rows(model.cfg.n_layers, direction.layer, direction.vector_D, cfg.coefficients[0])
    base_rows = [chat.encode(r.prompt, "", cfg.placement, r.system) for r in prompts.val]
    teacher_rows = base_rows if direction else [chat.encode(r.prompt, context, cfg.placement, r.system) for r in prompts.val]
    base_rows, teacher_rows = ([row for row in rows for _ in range(samples)] for rows in (base_rows, teacher_rows))
    numbers_N, samples_N = np.divmod(np.arange(len(base_rows), dtype=np.int32), samples)
    keys_N = row_keys(jax.random.key(cfg.seed), "vote", 0, numbers_N, samples_N)
    width, parts = round_up(max(map(len, teacher_rows)), 32), []
    for at in range(0, len(teacher_rows), model.batch):
        some = teacher_rows[at : at + model.batch]
        fill = model.batch - len(some)
        keys_B = keys_N[np.r_[at : at + len(some), np.full(fill, at)]]
        padded = left_pad([*some, *[[]] * fill], width, chat.pad_id)
        drawn = safety_tokens.sample_open(model.params, model.cfg, *padded, keys_B, chat.stop_ids, cfg.horizon - 1, steer_LD)
        parts.append(np.asarray(drawn)[: len(some)])
    pair = safety_tokens.Comparison(
        model.params, model.cfg, teacher_rows, base_rows, np.concatenate(parts), chat.stop_ids, steer_LD, model.batch
    )
    banned_V = safety_tokens.banned_tokens(chat, model.cfg.vocab_size)
    found = safety_tokens.tally(pair.chunks, banned_V, cfg.min_steered_prob, cfg.top_votes)
    ids = safety_tokens.choose(found, cfg.tokens, cfg.ranking)
    tokens = [
        {"id": i, "text": chat.decode([i]), "votes": int(found.votes_V[i]), "mean_delta": float(found.mean_delta_V[i])}
        for i in ids.tolist()
    ]
    return {
        "tokens": tokens, "vocab_size": model.cfg.vocab_size, "mode": cfg.mode, "model": cfg.model, "positions": found.positions,
        "banned": int(found.banned_V.sum()), "ranking": cfg.ranking, "vote_prompts": cfg.vote_prompts, "horizon": cfg.horizon,
        "top_votes": cfg.top_votes, "coefficient": cfg.coefficients[0] if direction else None,
    }  # fmt: skip
