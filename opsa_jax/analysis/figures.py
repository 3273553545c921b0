"""The figures of a report: each a chart with its caption, key and data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from opsa_jax.analysis.charts import Dot, Mark, Series, dot_chart, line_chart, marginal_scatter, scatter
from opsa_jax.analysis.report_data import Folder, RunData, place
from opsa_jax.analysis.tables import csv_text
from opsa_jax.analysis.tradeoff import Choice, summarise
from opsa_jax.teachers.flip_rate import pareto_front

_FIXED = {"base": "var(--base)", "teacher": "var(--teacher)", "trained": "var(--trained)"}
KINDS = {"harmful": ("var(--c3)", ""), "benign": ("var(--c5)", "6 3"), "capability": ("var(--third)", "2 3")}
LABELS = {
    "asr_seen": "attack success, seen categories",
    "asr_heldout": "attack success, held-out categories",
    "asr_jailbreak": "attack success, jailbreak wrappers",
    "asr_novel": "attack success, never refused group",
    "asr_prefill": "attack success, prefill attack",
    "over_refusal": "over-refusal, harmless look-alikes",
    "capability": "capability",
    "freeform_words": "open requests: words",
    "freeform_diversity": "open requests: diversity",
}
_NAMED = 8  # more points than this are named below the chart, not in it
# Curves that are shown where the run has their numbers: title, unit, lowest and highest value, metrics.
CURVES = (
    ("Distillation", "nats per token", (0.0, None), {"kl_forward": "KL(teacher, student)", "kl_reverse": "KL(student, teacher)"}),
    ("Loss", "loss", (None, None), {"loss": "loss"}),
    ("Rollouts that refuse", "share", (0.0, 1.0), {"refused_harmful": "harmful prompts", "refused_benign": "benign prompts"}),
    ("Length of responses", "tokens", (0.0, None), {"response_tokens": "tokens"}),
    ("Token entropy", "nats", (0.0, None), {"entropy_student": "student", "entropy_teacher": "teacher"}),
    ("Gradient norm", "norm before clipping", (0.0, None), {"grad_norm": "gradient"}),
    ("Preference", "share", (0.0, 1.0), {"chosen_wins": "chosen response more likely"}),
)


@dataclass(frozen=True)
class Figure:
    """A chart on the page."""

    title: str
    svg: Markup
    keys: Sequence[tuple[str, str]] = ()
    """Label and CSS colour of each series."""
    note: str = ""
    file: str = ""
    rows: Sequence[Mapping[str, Any]] = ()
    """Data, offered for download under the name `file`."""

    @property
    def link(self) -> str:
        """The data as a data: URL."""
        return "data:text/csv;charset=utf-8," + quote(csv_text(self.rows), safe="")


def colour_of(model: str, names: Sequence[str]) -> str:
    others = [n for n in names if n not in _FIXED]
    return _FIXED.get(model) or f"var(--c{(others.index(model) + 2) % 8})"


def label_of(metric: str) -> str:
    """What people call a metric.

    >>> label_of("asr_seen"), label_of("asr_my_set"), label_of("capability_sum2")
    ('attack success, seen categories', 'attack success, my set', 'capability, sum2')
    """
    if metric in LABELS:
        return LABELS[metric]
    if metric.startswith("asr_"):
        return "attack success, " + metric.removeprefix("asr_").replace("_", " ")
    return metric.replace("capability_", "capability, ").replace("_", " ")


def before_after(run: RunData) -> Figure | None:
    """Attack success, over-refusal and capability of every model with intervals."""
    names = list(run.results)
    metrics = [m for m in dict.fromkeys(m for r in run.results.values() for m in r) if not m.startswith(("freeform", "capability_"))]
    rows, data = [], []
    for m in metrics:
        cells = {name: r[m] for name, r in run.results.items() if m in r}
        rows.append((_axis_name(m), [Dot(name, colour_of(name, names), c["rate"], c["low"], c["high"]) for name, c in cells.items()]))
        data += [{"metric": m, "model": name, **{k: c[k] for k in ("rate", "low", "high", "n")}} for name, c in cells.items()]
    if not rows:
        return None
    svg = dot_chart(rows, "rate, with 95 % interval", (0.0, 1.0))
    return Figure("Before and after", svg, [(n, colour_of(n, names)) for n in names], "", "results.csv", data)


def _axis_name(metric: str) -> str:
    return metric.replace("asr_", "attack: ").replace("_", " ")


def curves(run: RunData) -> list[Figure]:
    """Training curves, those that the run has numbers for."""
    found = []
    for title, unit, least, names in CURVES:
        series = []
        for (name, label), colour in zip(names.items(), ("var(--trained)", "var(--teacher)")):
            points = [(r["step"], r[name]) for r in run.metrics if name in r]
            if points:
                x, y = zip(*points, strict=True)
                series.append(Series(label, colour, x, y))
        if series:
            rows = [{"step": r["step"], **{n: r.get(n) for n in names}} for r in run.metrics]
            keys = [(s.label, s.colour) for s in series] if len(series) > 1 else []
            found.append(Figure(title, line_chart(series, "update", unit, least), keys, "", f"{_file(title)}.csv", rows))
    return found


def _file(title: str) -> str:
    return title.lower().replace(" ", "-")


def tradeoff(runs: Sequence[RunData], comparisons: Sequence[Folder], safety: Sequence[str]) -> list[Figure]:
    """Safety against capability and against over-refusal: one point per model of each run, and per arm of each comparison."""
    rows = places(runs, comparisons, safety)
    found = []
    for axis, title in (("capability", "Safety and capability"), ("over_refusal", "Safety and over-refusal")):
        here = [r for r in rows if r.get("safety") and r.get(axis)]
        if here:
            marks = [_mark(r, axis) for r in here]
            # Never so close that a difference of a prompt or two fills the picture.
            least = (min([0.9] + [m.y_range[0] if m.y_range else m.y for m in marks]), 1.0) if axis == "capability" else (0.0, 0.15)
            svg = scatter(marks, "safety (1 - mean attack success)", axis.replace("_", "-"), (None, 1.0), least, named=len(here) <= _NAMED)
            keys = [(m.label, m.colour) for m in marks] if len(here) > _NAMED else []
            data = [{"name": r["name"], "model": r["model"], **_flat("safety", r["safety"]), **_flat(axis, r[axis])} for r in here]
            found.append(Figure(title, svg, keys, "", f"tradeoff-{axis.replace('_', '-')}.csv", data))
    return found


def _mark(r: Mapping[str, Any], axis: str) -> Mark:
    x, y = r["safety"], r[axis]
    return Mark(r["name"], r["colour"], x["rate"], y["rate"], _bounds(x), _bounds(y), hollow=r["model"] in ("base", "teacher"))


def places(runs: Sequence[RunData], comparisons: Sequence[Folder], safety: Sequence[str]) -> list[dict[str, Any]]:
    """name, model, colour and the axes of every point; a base or teacher that several runs share is listed once."""
    found: list[dict[str, Any]] = []
    for i, run in enumerate(runs):
        for model, metrics in run.results.items():
            spot = place(metrics, safety)
            same = [r for r in found if r["model"] == model != "trained" and all(r.get(k) == v for k, v in spot.items())]
            if same:
                same[0] |= {"name": model, "colour": _FIXED[model]}
                continue
            name = model if len(runs) == 1 else run.name if model == "trained" else f"{model}, {run.name}"
            colour = _FIXED[model] if len(runs) == 1 or model == "base" else f"var(--c{i % 8})"
            found.append({"name": name, "model": model, "colour": colour, **spot})
    for folder in comparisons:
        metrics = {m for r in folder.data for m in r["metrics"]}
        chosen = tuple(m for m in safety if m in metrics) or tuple(sorted(m for m in metrics if m.startswith("asr_")))
        if not chosen or not {"capability", "over_refusal"} <= metrics:
            continue
        for base, row in {r["base"]: r for r in folder.data}.items():
            name = "base" if len({r["base"] for r in folder.data}) == 1 else f"base {base}"
            found.append({"name": name, "model": "base", "colour": _FIXED["base"], **place(row["base_metrics"], safety)})
        for s in summarise(folder.data, Choice(safety=chosen)):
            name = f"{s['arm']}, {s['steps']} updates" if s["steps"] else s["arm"]
            axes = ("safety", "capability", "over_refusal")
            spot = {axis: {"rate": s[axis]["mean"], "low": s[axis]["low"], "high": s[axis]["high"]} for axis in axes}
            found.append({"name": name, "model": "arm", "colour": f"var(--c{len(found) % 8})", **spot})
    return found


def _bounds(cell: Mapping[str, Any]) -> tuple[float, float] | None:
    return None if cell.get("low") is None else (cell["low"], cell["high"])


def _flat(name: str, cell: Mapping[str, Any]) -> dict[str, Any]:
    return {name: cell["rate"], f"{name}_low": cell["low"], f"{name}_high": cell["high"]}


def token_kl(run: RunData, inset: int = 30) -> list[Figure]:
    """By position (whole, and the first ones where the whole is much longer), by token type, and where the update is."""
    data = run.token_kl
    names = list(data["settings"]["models"])
    guided = [p for p in data["positions"] if p["kind"] == "harmful" and p["pair"].startswith("teacher vs ")]
    found, longest = [], max((len(p["mean"]) for p in guided), default=0)
    keys = [(p["pair"].removeprefix("teacher vs "), colour_of(p["pair"].removeprefix("teacher vs "), names)) for p in guided]
    for title, room in ((f"Teacher and model, first {inset} positions", inset), ("Teacher and model, harmful prompts", longest)):
        if guided and (room == longest or longest > 2 * inset):
            lines = [_positions(p, key, room) for p, key in zip(guided, keys, strict=True)]
            svg = line_chart(lines, "response position", "symmetric KL, nats")
            found.append(Figure(title, svg, keys, "on responses of the base", "token-kl-by-position.csv", _position_rows(guided, room)))
    updates = [p for p in data["positions"] if p["pair"].endswith(" || base") and p["kind"] in KINDS]
    for model in dict.fromkeys(p["pair"].removesuffix(" || base") for p in updates):
        own = [p for p in updates if p["pair"] == f"{model} || base"]
        lines = [_positions(p, (p["kind"], KINDS[p["kind"]][0]), len(p["mean"]), KINDS[p["kind"]][1]) for p in own]
        means = [f"{s['kind']} {s['mean']:.2g}" for s in data["summary"] if s["pair"] == f"{model} || base"]
        svg = line_chart(lines, "response position", f"KL({model}, base), nats")
        keys = [(p["kind"], KINDS[p["kind"]][0]) for p in own]
        note = f"where {model} differs from the base; mean nats per token: {', '.join(means)}"
        found.append(Figure("Where the update is", svg, keys, note, f"update-{model}.csv", _position_rows(own, 10**9)))
    return found + _types(data, names)


def _positions(p: Mapping[str, Any], key: tuple[str, str], room: int, dash: str = "") -> Series:
    x = list(range(len(p["mean"])))[:room]
    return Series(*key, x, p["mean"][:room], p["low"][:room], p["high"][:room], dash)


def _position_rows(series: Sequence[Mapping[str, Any]], room: int) -> list[dict[str, Any]]:
    columns = ("mean", "low", "high", "n")
    return [{"kind": p["kind"], "pair": p["pair"], "position": i, **{c: p[c][i] for c in columns}}
            for p in series for i in range(min(room, len(p["mean"])))]  # fmt: skip


def _types(data: Mapping[str, Any], names: Sequence[str], most: int = 12) -> list[Figure]:
    found = {t["pair"].removeprefix("teacher vs "): t["types"] for t in data["types"] if t["pair"].startswith("teacher vs ")}
    top = found.get("base", [])[:most]
    if not top:
        return []
    rows = []
    for t in top:
        same = [(name, row) for name, types in found.items() for row in types if row["id"] == t["id"]]
        dots = [Dot(name, colour_of(name, names), row["mean"]) for name, row in same]
        dots += [Dot(name, colour_of(name, names), row["residual"], hollow=True) for name, row in same]
        rows.append((t["text"].strip() or repr(t["text"]), dots))
    flat = [{"model": name, **row} for name, types in found.items() for row in types]
    note = f"at least {data['settings']['minimum']} occurrences; hollow: residual after the mean of each position is taken off"
    svg = dot_chart(rows, "symmetric KL to the teacher, nats", (0.0, None), names=86)
    return [Figure("Token types", svg, [(n, colour_of(n, names)) for n in found], note, "token-kl-by-type.csv", flat)]


def drift(run: RunData) -> Figure:
    """The base's two principal components with marginals."""
    data, names = run.drift, list(run.drift["models"])
    groups = [(n, colour_of(n, names), m["points"], n not in ("base", "teacher")) for n, m in data["models"].items()]
    shares = data["explained"]
    svg = marginal_scatter(groups, f"component 1 of the base ({shares[0]:.0%}), its SD", f"component 2 ({shares[1]:.0%})")
    rows = [
        {"model": n, **record, "component_1": x, "component_2": y}
        for n, m in data["models"].items()
        for record, (x, y) in zip(data["records"], m["points"], strict=True)
    ]
    return Figure("Hidden states on general prompts", svg, [(n, colour_of(n, names)) for n in names], "", "drift.csv", rows)


def search(folder: Folder) -> Figure:
    """Flip rate against benign flip rate of every candidate context."""
    data = folder.data
    cells = [c["select"] for c in data["candidates"]]
    front = pareto_front([c["tfr"]["rate"] for c in cells], [c["benign_flip_rate"]["rate"] for c in cells])
    marks = [
        Mark(str(c.get("name", "candidate")), "var(--trained)" if best else "var(--base)",
             c["select"]["benign_flip_rate"]["rate"], c["select"]["tfr"]["rate"], size=4)
        for c, best in zip(data["candidates"], front, strict=True)
    ]  # fmt: skip
    for which, colour in (("paper", "var(--teacher)"), ("chosen", "var(--third)")):
        c = data[which]["select"]
        x, y = c["benign_flip_rate"], c["tfr"]
        marks.append(Mark(f"{which}: {data[which]['name']}", colour, x["rate"], y["rate"], _bounds(x), _bounds(y), 7))
    svg = scatter(marks, "benign flip rate", "teacher flip rate", (0.0, 1.0), (0.0, 1.0), named=False)
    keys = [("candidate", "var(--base)"), ("Pareto front", "var(--trained)")]
    keys += [("argmax of flips", "var(--teacher)"), ("chosen", "var(--third)")]
    rows = [{"name": m.label, "benign_flip_rate": m.x, "teacher_flip_rate": m.y} for m in marks]
    return Figure(f"Context search {folder.name}", svg, keys, "on the selection prompts", "context-search.csv", rows)
