"""The picture of a comparison: safety against capability and against over-refusal, one colour and marker per arm."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from opsa_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE
from opsa_jax.analysis.tradeoff import Choice, Row, axes_of, summarise, values_of

# Okabe and Ito without the yellow that white paper swallows, then four that differ from them in lightness. Markers tell arms apart in grey.
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#5B2A86", "#6B4A2B", "#000000", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
PANELS = {
    "capability_delta": ("change of capability against the base", "Safety and capability"),
    "over_refusal": ("over-refusal, harmless look-alikes", "Safety and over-refusal"),
}


def plot_tradeoff(rows: Sequence[Row], choice: Choice, folder: Path) -> Path:
    """`tradeoff.png` and `tradeoff.svg`: a small point per run, a large one per arm with 95 % intervals over runs.

    The large points of an arm with several steps are joined in the order of steps and grow with it. The base models are grey stars.
    """
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    summary = summarise(rows, choice)
    fig, axes = plt.subplots(1, 2, figsize=(11.5, max(4.4, 0.27 * len(arms) + 1.6)), layout="constrained")
    for ax, (axis, (label, title)) in zip(axes, PANELS.items(), strict=True):
        _base(ax, rows, choice, axis)
        for k, arm in enumerate(arms):
            look = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
            _points(ax, [r for r in rows if r["arm"] == arm], choice, axis, look)
            _means(ax, [s for s in summary if s["arm"] == arm], axis, look, arm)
        if axis == "capability_delta":
            ax.axhline(0, color=GREY, linewidth=0.8, zorder=0)
        ax.set(title=title, xlabel="safety (1 - mean attack success rate)", ylabel=label)
        _limits(ax, axis)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    handles = [getattr(h, "lines", [h])[0] for h in handles]  # the markers, without their error bars
    fig.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    attacks = ", ".join(m.removeprefix("asr_") for m in choice.safety)
    note = f"ASR over {attacks}; small: runs, large: means with 95 % intervals over runs"
    steps = sorted({r["steps"] for r in rows})
    if len(steps) > 1:
        note += f"; lines join {', '.join(map(str, steps))} steps, larger is longer"
    fig.supxlabel(note, fontsize=8, color="#555555")
    for name in ("tradeoff.png", "tradeoff.svg"):
        fig.savefig(folder / name, dpi=150)
    plt.close(fig)
    return folder / "tradeoff.png"


def _limits(ax, axis: str) -> None:
    """Room around the points, and never so little that differences of a prompt or two fill the picture."""
    ax.margins(0.06)
    low, high = ax.get_ylim()
    if axis == "over_refusal":
        high = max(high, 0.15)
        ax.set_ylim(-0.06 * high, high)
    else:
        ax.set_ylim(min(low, -0.1), max(high, 0.05))
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, high - 0.2), max(high, 1.02) if high > 0.9 else high)


def _base(ax, rows: Sequence[Row], choice: Choice, axis: str) -> None:
    places = {r["base"]: axes_of(r["base_metrics"], choice) | {"capability_delta": 0.0} for r in rows}
    x, y = [p["safety"] for p in places.values()], [p[axis] for p in places.values()]
    ax.plot(x, y, "*", color=GREY, markersize=13, markeredgecolor="white", linestyle="none", label="base", zorder=2)


def _points(ax, rows: Sequence[Row], choice: Choice, axis: str, look: dict) -> None:
    places = [values_of(r, choice) for r in rows]
    ax.plot([p["safety"] for p in places], [p[axis] for p in places], linestyle="none", markersize=3.5, alpha=0.45, zorder=2, **look)


def _means(ax, entries: Sequence[dict], axis: str, look: dict, label: str) -> None:
    """Joined means with bars in both directions; an arm with one run has no bars."""
    x, y = ([s[a]["mean"] for s in entries] for a in ("safety", axis))
    if len(entries) > 1:
        ax.plot(x, y, color=look["color"], linewidth=1.2, alpha=0.7, zorder=3)
    for i, s in enumerate(entries):
        size = 9 if len(entries) == 1 else float(np.interp(i, [0, len(entries) - 1], [5.5, 11]))
        last = i == len(entries) - 1
        ax.errorbar(
            x[i], y[i], xerr=_bars(s["safety"]), yerr=_bars(s[axis]), markersize=size, markeredgecolor="white", markeredgewidth=0.8,
            elinewidth=1.1, capsize=2.5, linestyle="none", zorder=4, label=label if last else None, **look,
        )  # fmt: skip


def _bars(interval: dict) -> list[list[float]] | None:
    if interval["low"] is None:
        return None
    return [[interval["mean"] - interval["low"]], [interval["high"] - interval["mean"]]]
