"""Plots of a run, from its files: every figure is drawn from metrics.jsonl and results.json alone, as PNG and SVG."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from opsa_jax.analysis.tables import write_csv

# Colours that colour-blind readers tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
# Results in the order a reader asks for them, and which way is better.
METRICS = {
    "asr_seen": "ASR, seen\ncategories",
    "asr_heldout": "ASR, held-out\ncategories",
    "asr_jailbreak": "ASR, jailbreak\nwrappers",
    "asr_novel": "ASR, never\nrefused group",
    "asr_prefill": "ASR, prefill\nattack",
    "over_refusal": "over-refusal,\nlook-alikes",
    "capability": "capability",
}


# Curves of a run, the first group that has data on the left and on the right: title, unit, metric -> (label, colour).
_LEFT = (
    ("Distillation", "nats per token", {"kl_forward": ("KL(teacher, student)", BLUE), "kl_reverse": ("KL(student, teacher)", ORANGE)}),
    ("Loss", "loss", {"loss": ("loss", BLUE)}),
)
_RIGHT = (
    ("Preference", "share", {"chosen_wins": ("chosen response more likely", BLUE)}),
    ("Rollouts that refuse", "share", {"refused_harmful": ("harmful prompts", BLUE), "refused_benign": ("benign prompts", ORANGE)}),
    ("Length of responses", "tokens", {"response_tokens": ("tokens", BLUE)}),
)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot_run(folder: Path) -> Path:
    """`plot.png` and `plot.svg` in the run directory: training curves, and the results before and after with their intervals.

    Runs without a teacher (SFT, DPO) show their loss. The right panel is left out where results.json is missing.
    """
    rows = read_metrics(folder)
    results = folder / "results.json"
    panels = 3 if results.is_file() else 2
    widths = [3.6, 3.6, 7.0][:panels]
    fig, axes = plt.subplots(1, panels, figsize=(sum(widths), 3.6), width_ratios=widths, layout="constrained")
    _training(axes, rows)
    if panels == 3:
        _bars(axes[2], json.loads(results.read_text()))
    save(fig, folder, "plot")
    return folder / "plot.png"


def plot_training(folder: Path, out: Path) -> Path:
    """`training.png`, `.svg` and `.csv` in `out`: the curves of a run, and all its metrics as a table."""
    rows = read_metrics(folder)
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    _training(axes, rows)
    save(fig, out, "training")
    write_csv(out / "training.csv", rows)
    return out / "training.png"


def save(fig, folder: Path, name: str) -> None:
    """The figure as PNG and SVG; closes it."""
    for suffix in (".png", ".svg"):
        fig.savefig(folder / (name + suffix), dpi=150)
    plt.close(fig)


def _training(axes, rows: list[dict[str, float]]) -> None:
    """The first group of each side that the run has numbers for."""
    for ax, groups in zip(axes, (_LEFT, _RIGHT)):
        title, unit, names = next((g for g in groups if any(n in r for r in rows for n in g[2])), groups[-1])
        _curves(ax, rows, names)
        ax.set(title=title, xlabel="update", ylabel=unit)
        if unit == "share":
            ax.set_ylim(-0.03, 1.03)


def _curves(ax, rows: list[dict[str, float]], names: dict[str, tuple[str, str]]) -> None:
    for name, (label, colour) in names.items():
        points = [(r["step"], r[name]) for r in rows if name in r]
        if points:
            ax.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.8)
    if ax.lines:
        ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)


def _bars(ax, results: dict[str, Any]) -> None:
    """Base beside trained, with confidence intervals."""
    names = [m for m in METRICS if m in results["base"] and m in results["trained"]]
    for k, (which, colour) in enumerate((("base", GREY), ("trained", GREEN))):
        cells = [results[which][m] for m in names]
        x = [i + (k - 0.5) * 0.38 for i in range(len(names))]
        rate = [c["rate"] for c in cells]
        error = [[c["rate"] - c["low"] for c in cells], [c["high"] - c["rate"] for c in cells]]
        ax.bar(x, rate, width=0.36, color=colour, label=which)
        ax.errorbar(x, rate, yerr=error, fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
    ax.set_xticks(range(len(names)), [METRICS[m] for m in names], fontsize=7)
    ax.set(title="Before and after (95 % intervals)", ylabel="rate", ylim=(0, 1.22), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25)
