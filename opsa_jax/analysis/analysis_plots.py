"""Plots of `opsa analyse`: token KL by position and by token type, drift with marginals, collapse probes. From their data alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opsa_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE, plt, save
from opsa_jax.analysis.tables import check_writable, write_csv
from opsa_jax.training.rundir import write_json

_COLOURS = (BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#5B2A86")
INSET = 30
PROBES = {
    "words": "words",
    "diversity": "diversity\n(1 - self-BLEU)",
    "entropy": "token entropy\n(nats)",
    "refused": "refused",
    "empty": "empty",
}


def colour_of(model: str, names: list[str]) -> str:
    """Base grey, teacher orange, the others in order."""
    return {"base": GREY, "teacher": ORANGE}.get(model) or _COLOURS[[n for n in names if n not in ("base", "teacher")].index(model) % 6]


def plot_token_kl(data: Mapping[str, Any], folder: Path) -> None:
    """`token_kl.png` and `.svg`: (a) teacher against each model by position; (b) token types; (c) each model against base."""
    names = list(data["settings"]["models"])
    fig, axes = plt.subplots(1, 3, figsize=(15.5, 4.2), layout="constrained")
    series = [p for p in data["positions"] if p["kind"] == "harmful" and p["pair"].startswith("teacher vs ")]
    for p in series:
        model = p["pair"].removeprefix("teacher vs ")
        _line(axes[0], p, model, colour_of(model, names))
    length = max((len(p["mean"]) for p in series), default=0)
    if length > 2 * INSET:
        inset = axes[0].inset_axes((0.42, 0.38, 0.56, 0.58))
        for p in series:
            _line(inset, {k: p[k][:INSET] for k in ("mean", "low", "high")}, None, colour_of(p["pair"].removeprefix("teacher vs "), names))
        inset.set_title(f"first {INSET}", fontsize=8)
        inset.tick_params(labelsize=7)
    axes[0].set(title="Harmful prompts: teacher and model", ylabel="symmetric KL, nats")
    _types(axes[1], data, names)
    kinds = list(dict.fromkeys(p["kind"] for p in data["positions"]))
    styles = dict(zip(kinds, ("-", "--", ":")))
    for p in data["positions"]:
        if p["pair"].endswith(" || base"):
            model = p["pair"].removesuffix(" || base")
            label = p["kind"] if len(names) <= 2 + ("teacher" in names) else f"{model}, {p['kind']}"
            colour = dict(zip(kinds, (ORANGE, BLUE, GREEN)))[p["kind"]] if label == p["kind"] else colour_of(model, names)
            _line(axes[2], p, label, colour, styles[p["kind"]])
    axes[2].set(title="Where the update is: KL(model, base)", ylabel="nats")
    for ax in (axes[0], axes[2]):
        ax.set(xlabel="response position", ylim=(0, None))
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8, loc="lower right" if ax is axes[0] and length > 2 * INSET else "upper right")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    save(fig, folder, "token_kl")


def _line(ax, p: Mapping[str, Any], label: str | None, colour: str, style: str = "-") -> None:
    x = range(len(p["mean"]))
    ax.plot(x, p["mean"], style, color=colour, label=label, linewidth=1.5)
    ax.fill_between(x, p["low"], p["high"], color=colour, alpha=0.15, linewidth=0)


def _types(ax, data: Mapping[str, Any], names: list[str], most: int = 14) -> None:
    """Token types by mean at the base; the residual is a hollow mark."""
    found = {t["pair"].removeprefix("teacher vs "): t["types"] for t in data["types"] if t["pair"].startswith("teacher vs ")}
    top = found.get("base", [])[:most][::-1]
    ax.set(title=f"Token types (at least {data['settings']['minimum']} occurrences)", xlabel="symmetric KL, nats (hollow: residual)")
    for name, types in found.items():
        at = {t["id"]: t for t in types}
        y = [i for i, t in enumerate(top) if t["id"] in at]
        rows = [at[top[i]["id"]] for i in y]
        colour = colour_of(name, names)
        ax.plot([t["mean"] for t in rows], y, "o", color=colour, markersize=5, label=name)
        ax.plot([t["residual"] for t in rows], y, "o", color=colour, markersize=5, markerfacecolor="none")
    # Text of tokens is not markup.
    ax.set_yticks(range(len(top)), [(t["text"].strip() or repr(t["text"])).replace("$", r"\$") for t in top], fontsize=8)
    if top:
        ax.legend(frameon=False, fontsize=8, loc="lower right")


def plot_drift(data: Mapping[str, Any], folder: Path) -> None:
    """`drift.png` and `.svg`: projections on the base's first two components, with a histogram of each."""
    fig, axes = plt.subplots(
        2, 2, figsize=(6.4, 5.6), width_ratios=[4, 1], height_ratios=[1, 4], sharex="col", sharey="row", layout="constrained"
    )
    ax, names = axes[1, 0], list(data["models"])
    axes[0, 1].axis("off")
    points = {name: np.array(m["points"]) for name, m in data["models"].items()}
    everything = np.concatenate(list(points.values()))
    for name, x in points.items():
        colour, m = colour_of(name, names), data["models"][name]
        front = name not in ("base", "teacher")
        look = {"facecolors": "none", "edgecolors": colour} if front else {"color": colour, "alpha": 0.55}
        ax.scatter(*x.T, s=16, linewidths=0.9, zorder=3 + front, label=f"{name} (distance {m['distance']:.2f})", **look)
        for k, side in ((0, axes[0, 0]), (1, axes[1, 1])):
            bins = np.linspace(everything[:, k].min(), everything[:, k].max(), 25)
            side.hist(x[:, k], bins, histtype="step", color=colour, linewidth=1.4, orientation=("vertical", "horizontal")[k], density=True)
            side.spines[["top", "right"]].set_visible(False)
            side.tick_params(labelleft=False, labelbottom=False, length=0)
    shares = data["explained"]
    ax.set(xlabel=f"component 1 of the base ({shares[0]:.0%}), its SD", ylabel=f"component 2 ({shares[1]:.0%}), its SD")
    ax.tick_params(labelleft=True, labelbottom=True)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(names), 3), frameon=False, fontsize=8)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    save(fig, folder, "drift")


def plot_collapse(models: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """`collapse.png` and `.svg`: one small panel per probe, models side by side with 95 % intervals."""
    probes = [p for p in PROBES if any(p in found for found in models.values())]
    fig, axes = plt.subplots(1, len(probes), figsize=(2.1 * len(probes), 3.0), layout="constrained", squeeze=False)
    names = list(models)
    for ax, probe in zip(axes[0], probes):
        for i, (name, found) in enumerate(models.items()):
            if probe in found:
                v = found[probe]
                error = [[max(v["rate"] - v["low"], 0)], [max(v["high"] - v["rate"], 0)]]
                ax.bar(i, v["rate"], color=colour_of(name, names), width=0.7)
                ax.errorbar(i, v["rate"], yerr=error, ecolor="#222222", elinewidth=1, capsize=2)
        ax.set_title(PROBES[probe], fontsize=9)
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        if probe in ("refused", "empty"):
            ax.set_ylim(0, 1)
        ax.spines[["top", "right"]].set_visible(False)
    save(fig, folder, "collapse")


def plot_places(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """`tradeoff.png`, `.svg`, `.csv` and `.json` of a report's runs: safety against capability and over-refusal, with 95 % intervals."""
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    names = list(dict.fromkeys(r["name"] for r in rows))
    for ax, axis in zip(axes, ("capability", "over_refusal")):
        for r in rows:
            if r.get("safety") and r.get(axis):
                cells = [r["safety"], r[axis]]
                bars = [[[c["rate"] - c["low"]], [c["high"] - c["rate"]]] if c["low"] is not None else None for c in cells]
                colour = GREY if r["model"] == "base" else (BLUE, ORANGE, GREEN, *_COLOURS[2:])[names.index(r["name"]) % 7]
                ax.errorbar(
                    cells[0]["rate"], cells[1]["rate"], xerr=bars[0], yerr=bars[1], fmt="o", color=colour, capsize=2.5, label=r["name"]
                )
        ax.set(xlabel="safety (1 - mean attack success rate)", ylabel=axis.replace("_", "-"))
        # Never so close that a difference of a prompt or two fills the picture.
        low, high = ax.get_ylim()
        ax.set_ylim((min(low, 0.9), max(high, 1.005)) if axis == "capability" else (min(low, -0.005), max(high, 0.15)))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    if rows:
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    save(fig, folder, "tradeoff")
    axes_names = ("safety", "capability", "over_refusal")
    flat = [
        {"name": r["name"], "model": r["model"]}
        | {f"{a}{end}": r[a][k] for a in axes_names if r.get(a) for end, k in (("", "rate"), ("_low", "low"), ("_high", "high"))}
        for r in rows
    ]
    write_csv(folder / "tradeoff.csv", flat)
    write_json(folder / "tradeoff.json", {"rows": flat})
