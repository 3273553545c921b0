"""One HTML page from the files of runs. What comes from files is escaped by the template engine; nothing is loaded from anywhere.

A content security policy names the hash of the page's own script, so a browser would not run any other even if one got in.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from opsa_jax import __version__
from opsa_jax.analysis import figures, report_data
from opsa_jax.analysis.report_data import Inputs, RunData, harmful_completion
from opsa_jax.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
_DARK = """{ --bg: #12161b; --panel: #1a2027; --fg: #e5e9ee; --soft: #9aa5b1; --line: #303841; --grid: #262d35;
  --base: #98a2ae; --teacher: #f28a3d; --trained: #58b0ea; --third: #3fc19a; --good: #4ac79f; --bad: #ff8a80; --heat: 240 110 50;
  --c0: #58b0ea; --c1: #f28a3d; --c2: #3fc19a; --c3: #dd8fba; --c4: #e0a526; --c5: #8fcbf3; --c6: #b08be0; --c7: #bf9472; }"""
_MOST_PAIRS = 12


def write_report(
    runs: Sequence[str], out: Path, title: str, transcripts: int, safety: Sequence[str], figures_to: Path | None = None
) -> str:
    """Write the page; returns a line that says where it is.

    Args:
        runs: folders of runs, comparisons and context searches.
        transcripts: shown per metric and run.
        safety: attack metrics of the safety axis.
        figures_to: folder for the trade-off as PNG, SVG, CSV and JSON; None for none.

    Raises:
        UserError: bad input, before anything is written.
    """
    if transcripts < 0:
        raise UserError(f"--transcripts {transcripts}: must be 0 or above")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the file to write, for example {out / 'report.html'}")
    inputs = report_data.load(runs)
    page = render(inputs, title, transcripts, safety)
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as e:
        raise UserError(f"{out} cannot be written: {e.strerror}; choose another file with --out") from None
    if figures_to:
        from opsa_jax.analysis.analysis_plots import plot_places

        plot_places(figures.places(inputs.runs, inputs.comparisons, safety), figures_to)
    return f"report   {out} ({len(page.encode()) / 1024:.0f} KiB, {len(inputs.runs)} runs)"


def render(inputs: Inputs, title: str, transcripts: int, safety: Sequence[str]) -> str:
    """The page as text.

    Raises:
        UserError: a file that lacks what the page needs of it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    css = css.replace("/* DARK */", f'@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {_DARK} }}\n'
                                    f':root[data-theme="dark"] {_DARK}')  # fmt: skip
    css = css.replace("/* PAIRS */", "\n".join(f'.heat[data-pair="{i}"] .tokens span {{ --v: var(--s{i}); }}' for i in range(_MOST_PAIRS)))
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    sections = []
    for run in inputs.runs:
        try:
            sections.append(section(run, transcripts, safety))
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise UserError(f"a file of {run.folder} lacks what the report needs ({e!r}); was it made by another version?") from None
    overview = None
    rows = figures.places(inputs.runs, inputs.comparisons, safety)
    pictures = figures.tradeoff(inputs.runs, inputs.comparisons, safety) + [figures.search(s) for s in inputs.searches]
    if len(inputs.runs) == 1 and not inputs.comparisons and not inputs.searches:
        sections[0]["figures"][1:1] = pictures
    elif pictures or len(inputs.runs) + len(inputs.comparisons) > 1:
        overview = {"rows": [{"safety": None, "capability": None, "over_refusal": None} | r for r in rows], "figures": pictures}
    results = [m for run in inputs.runs for m in run.results.values()]
    results += [row["metrics"] for folder in inputs.comparisons for row in folder.data]
    used = dict.fromkeys(m for r in results for m in report_data.safety_metrics(r, safety))
    return environment.get_template("report.html").render(
        title=title, css=Markup(css), script=Markup(script), version=__version__, sections=sections, overview=overview, safety=list(used),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def section(run: RunData, transcripts: int, safety: Sequence[str]) -> dict[str, Any]:
    """Everything the template needs of one run."""
    p, found = run.provenance, {}
    config = p["config"]
    table = [_row(r) for r in report_data.headline(run)]
    found |= {
        "name": run.name,
        "summary": f"{config['model']['path']}, {_method(config)}, {int(run.metrics[-1]['step']) if run.metrics else 0} updates",
        "hash": p.get("config_hash", "unknown"), "command": p.get("command", "unknown"), "config": json.dumps(config, indent=2),
        "versions": ", ".join(f"{k} {v}" for k, v in p.get("versions", {}).items()),
        "tiles": tiles(run, safety), "table": table, "models": list(run.results), "deltas": any(r["delta"] for r in table),
        "table_note": _table_note(run), "notes": notes(run),
    }  # fmt: skip
    bars = figures.before_after(run) if run.results else None
    found["figures"] = [*([bars] if bars else []), *figures.curves(run)]
    found |= {"token_kl": figures.token_kl(run) if run.token_kl else [], "token_note": _token_note(run)}
    found |= heat(run)
    found["drift"] = figures.drift(run) if run.drift else None
    if run.drift:
        where = "mean over the tokens of the base's response" if run.drift["settings"]["drift_at"] == "response" else "last prompt token"
        layer = run.drift["settings"]["layer"]
        found["drift_models"] = list(run.drift["models"].items())
        found["drift_note"] = f"State: {'after the last norm' if layer < 0 else f'input of block {layer}'}, {where}."
    models = run.collapse.get("models", {})
    found["probes"] = list(dict.fromkeys(name for probes in models.values() for name in probes))
    found["collapse"] = [(name, [probes.get(p) for p in found["probes"]]) for name, probes in models.items()]
    found["transcripts"] = [_group(g) for g in report_data.sample_transcripts(run, transcripts)] if transcripts else []
    return found


def _method(config: dict[str, Any]) -> str:
    o = config["objective"]
    kind = o["loss"] if o["loss"] != "divergence" else f"{o['divergence']} divergence on {o['support']}"
    return f"{kind}, responses by {config['rollout']['writer']}"


def tiles(run: RunData, safety: Sequence[str]) -> list[dict[str, str]]:
    """The four numbers to see first."""
    if not {"base", "trained"} <= run.results.keys():
        return []
    found = []
    before, after = (report_data.place(run.results[m], safety) for m in ("base", "trained"))
    for name, label in (("safety", "safety"), ("over_refusal", "over-refusal"), ("capability", "capability")):
        if name in before and name in after:
            found.append({"label": label, "before": f"{before[name]['rate']:.3f}", "after": f"{after[name]['rate']:.3f}"})
    if run.metrics:
        last = next((n for n in ("kl_forward", "loss") if n in run.metrics[0] and n in run.metrics[-1]), None)
        if last:
            label = "KL(teacher, student)" if last == "kl_forward" else "loss"
            found.append({"label": label, "before": f"{run.metrics[0][last]:.2g}", "after": f"{run.metrics[-1][last]:.2g}"})
    return found


def _row(r: dict[str, Any]) -> dict[str, Any]:
    digits = 1 if r["metric"].endswith("_words") else 3
    cells: dict[str, Any] = dict.fromkeys(report_data.MODELS)
    for model, c in r["cells"].items():
        cells[model] = {"rate": f"{c['rate']:.{digits}f}", "interval": f"{c['low']:.{digits}f} to {c['high']:.{digits}f}"}
    delta = None
    if d := r.get("delta"):
        better = d["difference"] * (-1 if r["metric"].startswith(("asr_", "over_refusal")) else 1)
        certain = (d["low"] > 0 or d["high"] < 0) and not r["metric"].startswith("freeform")
        delta = {
            "rate": f"{d['difference']:+.{digits}f}",
            "interval": f"{d['low']:+.{digits}f} to {d['high']:+.{digits}f}",
            "verdict": ("better" if better > 0 else "worse") if certain else "",
            "mark": {"independent": " *", "mean": " †"}.get(d["method"], ""),
        }
    return {"metric": r["metric"], "label": figures.label_of(r["metric"]), "n": r["n"], "cells": cells, "delta": delta}


def _table_note(run: RunData) -> str:
    text = "Rates: Wilson's 95 % interval. Differences: Newcombe's interval for pairs (method 10), as both models answer the same prompts; "
    text += "* as independent (Newcombe 1998); † half-widths added in squares. Coloured where the interval leaves out 0."
    if "teacher" in run.results:
        text += " Teacher: each prompt under the context it is taught with."
    return text


def notes(run: RunData) -> list[dict[str, str]]:
    """What is left out, and how to make it."""
    command = f"python -m opsa_jax.analyse {run.folder}"
    found = []
    if "trained" not in run.results:
        found.append({"text": "No results of the trained model yet: the run is unfinished, or has no suite", "command": ""})
    # Runs on given responses alone have no teacher.
    teacher = run.results.get("teacher") or run.provenance["config"]["objective"]["loss"] in ("nll", "dpo")
    parts = [("token-kl", run.token_kl, "token-level KL"), ("drift", run.drift, "drift of representations"),
             ("collapse", run.collapse, "collapse probes"), ("teacher", teacher, "the teacher's results")]  # fmt: skip
    if missing := [(part, name) for part, data, name in parts if not data]:
        flag = "" if len(missing) == len(parts) else " --parts " + " ".join(part for part, _ in missing)
        found.append({"text": f"Left out: {', '.join(name for _, name in missing)}. To add them", "command": command + flag})
    return found


def _token_note(run: RunData) -> str:
    if not run.token_kl:
        return ""
    rows = {(s["kind"], s["pair"]): s for s in run.token_kl["summary"]}
    base = rows.get(("harmful", "teacher vs base"))
    if not base:
        return "Symmetric KL between the teacher and each model, at every token of responses that the base writes."
    return (
        "Symmetric KL between the teacher (with its context) and each model at every token of responses that the base writes; position 0 "
        f"is the first response token. Harmful prompts, base: mean {base['mean']:.3g} nats, peak at position {base['peak']}; "
        f"{base['half_in']:.1%} of the tokens hold half of the sum."
    )


def heat(run: RunData) -> dict[str, Any]:
    """Responses with a shade per token and pair of models."""
    pairs = list(dict.fromkeys(p for r in run.rollouts for p in r["values"]))[:_MOST_PAIRS]
    everything = sorted(v for r in run.rollouts for p in pairs for v in r["values"].get(p, []))
    # The largest value but for a few of the tokens, so that one outlier does not bleach the rest.
    top = max(everything[min(int(0.998 * len(everything)), len(everything) - 1)], 1e-6) if everything else 1.0
    shown = []
    for r in run.rollouts:
        tokens = []
        for i, text in enumerate(r["tokens"]):
            values = {p: r["values"][p][i] for p in pairs if p in r["values"]}
            shades = [f"--s{k}:{0.85 * math.sqrt(min(max(values.get(p, 0.0) / top, 0.0), 1.0)):.3f}" for k, p in enumerate(pairs)]
            title = f"position {i}, {text.strip() or repr(text)}: " + "; ".join(f"{p} {v:.4g}" for p, v in values.items())
            tokens.append({"text": text.replace("\n", "↵\n") if text else "·", "style": ";".join(shades), "title": title})
        veiled = r["kind"] == "harmful" and not r["refused"]
        shown.append({"kind": r["kind"], "id": r["id"], "prompt": r["prompt"], "tokens": tokens, "veiled": veiled})
    kinds = dict.fromkeys(h["kind"] for h in shown)
    groups = [(kind, [h for h in shown if h["kind"] == kind]) for kind in kinds]
    return {"heat": groups, "pairs": pairs, "heat_top": f"{top:.2g}"}


def _group(g: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for r in g["rows"]:
        first = next(iter(r["answers"].values()))
        answers = [
            {"model": m, "outcome": t["outcome"], "response": t["response"].strip() or "(nothing)", "veiled": harmful_completion(t)}
            for m in report_data.MODELS
            if (t := r["answers"].get(m))
        ]
        rows.append({"id": r["id"], "prompt": first["prompt"], "prefill": first.get("prefill", ""), "answers": answers})
    return {"label": figures.label_of(g["metric"]), "changed": g["changed"], "total": g["total"], "rows": rows}
