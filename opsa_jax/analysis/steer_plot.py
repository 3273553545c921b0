"""Heat map of the scores of candidate directions, drawn from the scores.json of `opsa steer` alone, as PNG and SVG."""

import json
from pathlib import Path

import numpy as np

from opsa_jax.analysis.plots import ORANGE, plt

PANELS = {
    "ablation": ("Refusal score with the\ndirection ablated", "viridis_r"),
    "induce": ("Refusal score with the\ndirection added", "viridis"),
    "kl": ("KL of ablation on\nharmless prompts", "viridis_r"),
}


def plot_scores(folder: Path) -> Path:
    """`scores.png` and `scores.svg`: layers by token positions; discarded candidates crossed out, the chosen one framed."""
    found = json.loads((folder / "scores.json").read_text())
    layers, names = found["layers"], found["positions"]
    size = max(3.0, 0.34 * len(names) + 1.7), min(max(3.1, 0.22 * layers + 1.5), 9.0)
    fig, axes = plt.subplots(1, 3, figsize=(3 * size[0], size[1]), layout="constrained", sharey=True)
    for ax, (key, (title, colours)) in zip(axes, PANELS.items(), strict=True):
        values = np.array([[np.nan if v is None else v for v in row] for row in found[key]], float)
        image = ax.imshow(values, cmap=colours, aspect="auto", origin="lower")
        fig.colorbar(image, ax=ax, shrink=0.9)
        for layer, column in np.ndindex(*values.shape):
            if found["discarded"][layer][column]:
                ax.plot(column, layer, "x", color="#FFFFFF", markersize=6, markeredgewidth=2.6)
                ax.plot(column, layer, "x", color="#222222", markersize=5, markeredgewidth=1.0)
        if found["chosen"]:
            at = found["chosen"]["column"] + len(names), found["chosen"]["layer"]
            corner = at[0] - 0.5, at[1] - 0.5
            ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.5, clip_on=False, zorder=5))
        ax.set_xticks(range(len(names)), names, fontsize=7, rotation=45 if max(map(len, names)) > 4 else 0)
        ax.set_yticks(range(0, layers, max(1, layers // 12)))
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("token position", fontsize=8)
    axes[0].set_ylabel("layer (block input)", fontsize=8)
    fig.suptitle("Candidate directions. Yellow is better; x: discarded; frame: chosen", fontsize=9)
    for name in ("scores.png", "scores.svg"):
        fig.savefig(folder / name, dpi=150)
    plt.close(fig)
    return folder / "scores.png"
