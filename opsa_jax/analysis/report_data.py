"""What a report reads from folders: runs, comparisons and context searches. Only files; nothing is computed on a model here."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsa_jax.analysis.differences import difference, mean_rate, success
from opsa_jax.errors import UserError

MODELS = ("base", "teacher", "trained")


@dataclass(frozen=True)
class RunData:
    """A run directory. What it does not have is empty."""

    folder: Path
    name: str
    """Unique on the page."""
    provenance: dict[str, Any]
    """config.json: config, config_hash, versions, command."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Model -> metric -> {rate, n, low, high}, models of `MODELS`."""
    transcripts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Model -> id -> transcript."""
    token_kl: dict[str, Any] = field(default_factory=dict)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    """Responses token by token."""
    drift: dict[str, Any] = field(default_factory=dict)
    collapse: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Folder:
    """A comparison (rows of finished runs) or a context search (results)."""

    folder: Path
    name: str
    data: Any


@dataclass(frozen=True)
class Inputs:
    runs: list[RunData]
    comparisons: list[Folder]
    searches: list[Folder]


def load(folders: Sequence[str]) -> Inputs:
    """All folders, each by what it holds.

    Raises:
        UserError: no folder given; one that is none of the three, or has nothing finished; a damaged file.
    """
    if not folders:
        raise UserError("report needs at least one run directory: python -m opsa_jax.report runs/sandbox-opsa")
    found = Inputs([], [], [])
    names = _names([Path(f) for f in folders])
    for folder, name in zip(map(Path, folders), names, strict=True):
        if not folder.is_dir():
            raise UserError(f"there is no run directory {folder}; train writes one (--out), compare and search too")
        if (folder / "config.json").is_file() and "config" in read_json(folder / "config.json"):
            found.runs.append(load_run(folder, name))
        elif (folder / "results.jsonl").is_file():
            rows = [r for r in read_jsonl(folder / "results.jsonl") if r.get("status", "done") == "done" and "base_metrics" in r]
            if not rows:
                raise UserError(f"comparison {folder} has no finished run yet")
            found.comparisons.append(Folder(folder, name, rows))
        elif (folder / "results.json").is_file() and "candidates" in (data := read_json(folder / "results.json")):
            found.searches.append(Folder(folder, name, data))
        else:
            raise UserError(f"{folder} is no run directory: it has neither a run's config.json nor results of compare or search")
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """Of each path the shortest end that no other has.

    >>> _names([Path("runs/a"), Path("runs/b")]), _names([Path("a/run"), Path("b/run"), Path("c")])
    (['a', 'b'], ['a/run', 'b/run', 'c'])
    """
    paths = [(f.resolve() if f.name in ("", ".", "..") else f).parts for f in folders]
    names = []
    for i, own in enumerate(paths):
        others = paths[:i] + paths[i + 1 :]
        depth = next((d for d in range(1, len(own) + 1) if all(o[-d:] != own[-d:] for o in others)), None)
        names.append("/".join(own[-depth:]) if depth else f"{'/'.join(own)} ({i + 1})")
    return names


def load_run(folder: Path, name: str) -> RunData:
    """
    Raises:
        UserError: neither updates nor results yet; a damaged file.
    """
    metrics, results = read_jsonl(folder / "metrics.jsonl"), read_json(folder / "results.json")
    for model in ("base", "trained"):
        if model not in results and (folder / "evals" / f"{model}.json").is_file():
            results[model] = read_json(folder / "evals" / f"{model}.json")
    if not metrics and not results:
        raise UserError(f"run {folder} has nothing finished: no metrics.jsonl and no results.json; let it make its first updates")
    analysis = folder / "analysis"
    if teacher := read_json(analysis / "teacher.json"):
        results["teacher"] = teacher
    files = {"base": folder / "evals/base.jsonl", "teacher": analysis / "teacher.jsonl", "trained": folder / "evals/trained.jsonl"}
    return RunData(
        folder=folder, name=name, provenance=read_json(folder / "config.json"), metrics=metrics,
        results={m: results[m] for m in MODELS if m in results},
        transcripts={m: rows for m, f in files.items() if (rows := {_key(r): r for r in read_jsonl(f)})},
        token_kl=read_json(analysis / "token_kl.json"), rollouts=read_jsonl(analysis / "token_kl_rollouts.jsonl"),
        drift=read_json(analysis / "drift.json"), collapse=read_json(analysis / "collapse.json"),
    )  # fmt: skip


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['id']}, sample {row['sample'] + 1}" if row.get("sample") else str(row["id"])


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file.

    Raises:
        UserError: it holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); make it again, or move it away to leave its part out") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object; make it again, or move it away to leave its part out")
    return data


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows; none where there is no such file. A last line that a kill cut short is left out.

    Raises:
        UserError: a damaged line before the last.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); move it away to leave its part out") from None
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if i < len(lines) - 1:
                raise UserError(f"{path}, line {i + 1} is damaged; make it again, or move it away to leave its part out") from None
    return rows


def pairs(run: RunData, metric: str, before: str = "base", after: str = "trained") -> list[tuple[bool, bool]]:
    """Successes of two models on the records of a metric; none for a part of a metric (capability_sum2), which transcripts do not name."""
    first, second = run.transcripts.get(before, {}), run.transcripts.get(after, {})
    rows = [(row, second[key]) for key, row in first.items() if row["metric"] == metric and key in second]
    return [(success(metric, a["outcome"]), success(metric, b["outcome"])) for a, b in rows]


def headline(run: RunData) -> list[dict[str, Any]]:
    """One row per metric: values of each model, and the difference between trained and base."""
    rows = []
    for metric in dict.fromkeys(m for r in run.results.values() for m in r):
        row: dict[str, Any] = {"metric": metric, "cells": {m: r[metric] for m, r in run.results.items() if metric in r}}
        row["n"] = max(c["n"] for c in row["cells"].values())
        if {"base", "trained"} <= row["cells"].keys():
            row["delta"] = difference(metric, row["cells"]["base"], row["cells"]["trained"], pairs(run, metric))
        rows.append(row)
    return rows


def _plain(metrics: Mapping[str, Any]) -> list[str]:
    """Metrics by the sets' own rules: without those of judges (asr_x@judge) and of any of several responses (asr_x_any@4)."""
    return [m for m in metrics if "@" not in m]


def safety_metrics(metrics: Mapping[str, Any], wanted: Sequence[str]) -> list[str]:
    """The attack metrics of the safety axis: those wanted that the suite has, otherwise all."""
    return [m for m in wanted if m in metrics] or [m for m in _plain(metrics) if m.startswith("asr_")]


def task_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics of the capability axis: `capability` of the sandbox, or all tasks of other suites.

    >>> task_metrics({"capability": 1, "capability_fact": 1}), task_metrics({"asr_x": 1, "gsm8k": 1, "gsm8k_pass@4": 1})
    (['capability'], ['gsm8k'])
    """
    others = ("asr_", "over_refusal", "freeform", "safety_score")
    return ["capability"] if "capability" in metrics else [m for m in _plain(metrics) if not m.startswith(others)]


def place(metrics: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, dict[str, float]]:
    """safety (1 - mean attack success rate), capability and over_refusal, each {rate, low, high}; those that were measured."""
    found = {}
    if chosen := safety_metrics(metrics, wanted):
        mean = mean_rate([metrics[m] for m in chosen])
        found["safety"] = {"rate": 1 - mean["rate"], "low": 1 - mean["high"], "high": 1 - mean["low"]}
    if chosen := task_metrics(metrics):
        found["capability"] = mean_rate([metrics[m] for m in chosen])
    if chosen := [m for m in _plain(metrics) if m.startswith("over_refusal")]:
        found["over_refusal"] = mean_rate([metrics[m] for m in chosen])
    return found


def sample_transcripts(run: RunData, per_metric: int) -> list[dict[str, Any]]:
    """Per metric some records with every model's answer: half of them (rounded up) where base and trained differ in outcome, if there are.

    Random, and the same on every call.
    """
    before, after = run.transcripts.get("base", {}), run.transcripts.get("trained", {})
    shown = []
    for metric in dict.fromkeys(r["metric"] for r in {**after, **before}.values()):
        keys = [k for k, r in {**after, **before}.items() if r["metric"] == metric]
        changed = [k for k in keys if k in before and k in after and before[k]["outcome"] != after[k]["outcome"]]
        rng = random.Random(metric)
        first = rng.sample(changed, min(len(changed), (per_metric + 1) // 2))
        rest = [k for k in keys if k not in first]
        chosen = first + rng.sample(rest, min(len(rest), per_metric - len(first)))
        rows = [{"id": k, "answers": {m: t[k] for m, t in run.transcripts.items() if k in t}} for k in chosen]
        shown.append({"metric": metric, "total": len(keys), "changed": len(changed), "rows": rows})
    return shown


def harmful_completion(transcript: Mapping[str, Any]) -> bool:
    """Whether a transcript is blurred: an answer to an attack that is neither a refusal nor empty."""
    return transcript["metric"].startswith("asr_") and transcript["outcome"] not in ("refused", "empty")
