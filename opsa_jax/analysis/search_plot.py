"""Plot of a context search, from its results.json alone."""

import json
from pathlib import Path
from typing import Any

from opsa_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE, plt
from opsa_jax.teachers.flip_rate import pareto_front


def plot_search(folder: Path) -> Path:
    """`plot.png` and `plot.svg`: flip rate against benign flip rate of every candidate, with 95 % intervals on the selection prompts.

    Marked are the Pareto front, the chosen context and the argmax of the flip rate alone; their held-out values are hollow.
    """
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    fig, ax = plt.subplots(figsize=(8.2, 4.4), layout="constrained")
    candidates = [c["select"] for c in results["candidates"]]
    front = pareto_front([c["tfr"]["rate"] for c in candidates], [c["benign_flip_rate"]["rate"] for c in candidates])
    _points(ax, [c for c, best in zip(candidates, front, strict=True) if not best], GREY, 0.25, "candidate")
    on_front = [c for c, best in zip(candidates, front, strict=True) if best]
    _points(ax, on_front, BLUE, 0.6, "Pareto front")
    steps = sorted({(c["benign_flip_rate"]["rate"], c["tfr"]["rate"]) for c in on_front})
    ax.step(*zip(*steps, strict=True), where="post", color=BLUE, linewidth=1.2)
    _mark(ax, results["paper"], ORANGE, "D", "argmax of flips alone")
    _mark(ax, results["chosen"], GREEN, "*", "chosen")
    split, weight = results["split"]["select"], results["config"]["benign_weight"]
    ax.set(
        title=f"{split['harmful']} harmful and {split['benign']} benign prompts, weight {weight:g}",
        xlabel="benign flip rate (answered without, refused with)",
        ylabel="teacher flip rate (unsafe without, refused with)",
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
    )
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    for name in ("plot.png", "plot.svg"):
        fig.savefig(folder / name, dpi=150)
    plt.close(fig)
    return folder / "plot.png"


def _points(ax, cells: list[dict[str, Any]], colour: str, strength: float, label: str) -> None:
    if not cells:
        return
    x, y = ([c[name]["rate"] for c in cells] for name in ("benign_flip_rate", "tfr"))
    bars = {}
    for bar, name in (("xerr", "benign_flip_rate"), ("yerr", "tfr")):
        bars[bar] = [[c[name]["rate"] - c[name]["low"] for c in cells], [c[name]["high"] - c[name]["rate"] for c in cells]]
    ax.errorbar(x, y, **bars, fmt="none", ecolor=colour, alpha=strength, elinewidth=0.8)
    ax.scatter(x, y, s=18, color=colour, label=label, zorder=3)


def _mark(ax, candidate: dict[str, Any], colour: str, marker: str, label: str) -> None:
    """A filled mark where it was selected, a hollow one where it was held out, and a line between the two."""
    x, y = ([candidate[part][name]["rate"] for part in ("select", "held_out")] for name in ("benign_flip_rate", "tfr"))
    size = 190 if marker == "*" else 60
    ax.plot(x, y, color=colour, linewidth=1, zorder=4)
    label = f"{label}: {candidate['name']}"
    ax.scatter(x[:1], y[:1], s=size, marker=marker, color=colour, edgecolor="white", linewidth=0.6, zorder=6, label=label)
    held_out = dict(facecolor="white", edgecolor=colour, linewidth=1.2, label="    on the held-out prompts")
    ax.scatter(x[1:], y[1:], s=size, marker=marker, zorder=5, **held_out)
