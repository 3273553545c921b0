"""What `opsa steer` shows and writes."""

import dataclasses
import io
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opsa_jax.analysis.steer_plot import plot_scores
from opsa_jax.data.loaders import write_jsonl
from opsa_jax.evals.runner import results_table
from opsa_jax.steer import SteerConfig
from opsa_jax.teachers.steering import Scores, steering_rows
from opsa_jax.training.display import Sample, redact
from opsa_jax.training.rundir import write_json

SCORES = ("ablation", "induce", "kl")


@dataclass(frozen=True)
class Direction:
    """The chosen direction and what was considered."""

    scores: Scores
    reasons_LC: np.ndarray
    names: list[str]
    """Of the columns."""
    layer: int
    column: int
    fallback: bool
    kept: dict[str, str]
    """Rows used of each set, in words."""

    @property
    def vector_D(self) -> np.ndarray:
        return self.scores.direction_LCD[self.layer, self.column]


def describe(d: Direction) -> str:
    """The choice in a few lines."""
    s = d.scores
    numbers = ", ".join(f"{name} {getattr(s, name + '_LC')[d.layer, d.column]:.3f}" for name in SCORES)
    left = int((d.reasons_LC == "").sum())
    lines = [f"rows     {name}: {kept}" for name, kept in d.kept.items()]
    chosen = f"layer {d.layer}, column {d.column - len(d.names)}, length {np.linalg.norm(d.vector_D):.3f}: {numbers}"
    note = " (by the fallback: highest induce score)" if d.fallback else f" ({left} of {d.reasons_LC.size} candidates were left)"
    return "\n".join([*lines, f"chosen   {chosen}{note}"])


def samples_table(transcripts: list[dict], show_harmful: bool) -> Table:
    """The first answers of base and teacher, one of each kind of prompt; compliance with harmful prompts is redacted."""
    table = Table(title="first answers", title_justify="left")
    for name in ("prompt", "model", "response"):
        table.add_column(name, overflow="fold")
    first: dict[str, dict[str, dict]] = {}
    for t in transcripts:
        first.setdefault(t["metric"].split("_")[0], {}).setdefault(t["model"], t)
    for found in first.values():
        for name, t in list(found.items())[:2]:
            shown = redact(Sample(t["label"], t["prompt"], t["response"], t["outcome"] == "refused"), show_harmful)
            shown = shown.replace("--log.show-harmful", "--show-harmful")
            table.add_row(Text(" ".join(t["prompt"].split())[:80]), name, Text(" ".join(shown.split())[:200]))
    return table


def write(cfg: SteerConfig, direction: Direction | None, results: dict, transcripts: list[dict], tokens: dict[str, Any]) -> None:
    """All artifacts, in a folder beside --out that takes its name when it is complete."""
    out = Path(cfg.out)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    part.mkdir(parents=True)
    try:
        write_json(part / "settings.json", dataclasses.asdict(cfg))
        write_json(part / "tokens.json", tokens)
        if transcripts:
            write_jsonl(part / "inspect.jsonl", transcripts)
            write_json(part / "inspect.json", results)
        if direction:
            write_direction(part / "direction.safetensors", cfg, direction)
            write_json(part / "scores.json", scores_json(direction))
            plot_scores(part)
        (part / "report.txt").write_text(report(cfg, direction, results, tokens), encoding="utf-8")
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_direction(path: Path, cfg: SteerConfig, d: Direction) -> None:
    """One tensor `steer` [layers, width] float32: the direction as it is in the row of its layer, zeros elsewhere."""
    from safetensors.numpy import save_file

    steer_LD = np.asarray(steering_rows(d.scores.layers, d.layer, d.vector_D))
    metadata = {"layer": d.layer, "position": d.names[d.column], "coefficient": cfg.coefficients[0], "model": cfg.model}
    save_file({"steer": steer_LD}, path, {name: str(value) for name, value in metadata.items()})


def scores_json(d: Direction) -> dict[str, Any]:
    """Every candidate's scores (null where they are not finite), [layers][positions], and the choice."""

    def plain(x_LC: np.ndarray) -> list[list[float | None]]:
        return [[float(v) if np.isfinite(v) else None for v in row] for row in x_LC]

    chosen = {"layer": d.layer, "column": d.column - len(d.names), "position": d.names[d.column], "fallback": d.fallback}
    return {
        "layers": d.scores.layers,
        "positions": d.names,
        "chosen": chosen | {name: float(getattr(d.scores, f"{name}_LC")[d.layer, d.column]) for name in SCORES},
        "rows": d.kept,
        **{name: plain(getattr(d.scores, f"{name}_LC")) for name in SCORES},
        "length": plain(np.linalg.norm(d.scores.direction_LCD, axis=-1)),
        "discarded": d.reasons_LC.tolist(),
    }


def report(cfg: SteerConfig, direction: Direction | None, results: Mapping[str, Any], tokens: dict[str, Any]) -> str:
    """report.txt: what was asked, what was chosen, what the teacher does, and the tokens."""
    console = Console(file=io.StringIO(), width=120, highlight=False, color_system=None)
    console.print(f"{cfg.model}, mode {cfg.mode}, contrast {cfg.contrast}, position {cfg.position}, coefficients {cfg.coefficients}")
    if direction:
        console.print(describe(direction), soft_wrap=True)
        console.print(candidates_table(direction))
    if results:
        console.print(results_table(results))
    table = Table(title=f"safety tokens: {tokens['positions']} positions voted", title_justify="left")
    for name in ("", "id", "token", "votes", "mean delta"):
        table.add_column(name, justify="left" if name == "token" else "right")
    for n, t in enumerate(tokens["tokens"], 1):
        table.add_row(str(n), str(t["id"]), Text(repr(t["text"])), str(t["votes"]), f"{t['mean_delta']:.3f}")
    console.print(table)
    return console.file.getvalue()


def candidates_table(d: Direction) -> Table:
    """The candidates that were left, then the others, the lowest ablation score first; at most twelve."""
    table = Table(title="candidates", title_justify="left")
    for name in ("layer", "position", *SCORES, "discarded for"):
        table.add_column(name, justify="right")
    order = np.lexsort((d.scores.ablation_LC.ravel(), (d.reasons_LC != "").ravel()))[:12]
    for layer, c in zip(*np.unravel_index(order, d.reasons_LC.shape), strict=True):
        numbers = (f"{getattr(d.scores, name + '_LC')[layer, c]:.3f}" for name in SCORES)
        table.add_row(str(layer), Text(d.names[c]), *numbers, d.reasons_LC[layer, c])
    return table
