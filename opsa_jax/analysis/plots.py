"""Plots of a run, from its files: every figure is drawn from metrics.jsonl and results.json alone, as PNG and SVG."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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


def plot_run(folder: Path) -> Path:
    """`plot.png` and `plot.svg` in the run directory: training curves, and the results before and after with their intervals.

    The right panel is left out where results.json is missing.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = folder / "results.json"
    panels = 3 if results.is_file() else 2
    widths = [3.6, 3.6, 7.0][:panels]
    fig, axes = plt.subplots(1, panels, figsize=(sum(widths), 3.6), width_ratios=widths, layout="constrained")
    _curves(axes[0], rows, {"kl_forward": ("KL(teacher, student)", BLUE), "kl_reverse": ("KL(student, teacher)", ORANGE)})
    axes[0].set(title="Distillation", xlabel="update", ylabel="nats per token")
    _curves(axes[1], rows, {"refused_harmful": ("harmful prompts", BLUE), "refused_benign": ("benign prompts", ORANGE)})
    axes[1].set(title="Rollouts that refuse", xlabel="update", ylabel="share", ylim=(-0.03, 1.03))
    if panels == 3:
        _bars(axes[2], json.loads(results.read_text()))
    for name in ("plot.png", "plot.svg"):
        fig.savefig(folder / name, dpi=150)
    plt.close(fig)
    return folder / "plot.png"


def _curves(ax, rows: list[dict[str, float]], names: dict[str, tuple[str, str]]) -> None:
    for name, (label, colour) in names.items():
        points = [(r["step"], r[name]) for r in rows if name in r]
        if points:
            ax.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.8)
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
