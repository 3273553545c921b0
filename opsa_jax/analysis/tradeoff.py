"""Safety against capability and over-refusal, over the runs of several arms: summary with intervals, matching, tables.

A *row* is one finished run: arm, base, steps, seed, `metrics` and `base_metrics` (metric -> {rate, n, low, high}, as in results.json).

Two sources of chance, two intervals, both 95 %:

    over runs   mean of the runs of an arm with Student's t interval over runs (n - 1 degrees of freedom, clipped to the possible range).
                It covers training seed and base model, for these prompts. Runs on the same base are treated as independent: with
                several bases that differ much, read the rows by base too. It has no width when all runs agree, and needs two runs.
    pooled      successes and prompts of all runs added up, Wilson's interval. It covers the finite number of prompts, and counts
                a prompt once per run although all runs answer the same ones, so it is too narrow where runs agree for that reason.

Safety of a run is 1 - the mean of its chosen attack success rates, each metric with the same weight.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from scipy.special import stdtrit

from opsa_jax.errors import UserError
from opsa_jax.evals.scorers import wilson

Row = dict[str, Any]
# Name -> (what tables call it, lowest, highest value).
AXES = {
    "safety": ("safety", 0.0, 1.0),
    "capability": ("capability", 0.0, 1.0),
    "capability_delta": ("change of capability", -1.0, 1.0),
    "over_refusal": ("over-refusal", 0.0, 1.0),
}


@dataclass(frozen=True)
class Choice:
    """Which metrics of the suite are safety, capability and over-refusal."""

    safety: tuple[str, ...] = ("asr_seen", "asr_heldout", "asr_jailbreak")
    capability: str = "capability"
    over_refusal: str = "over_refusal"

    def names(self) -> tuple[str, ...]:
        return (*self.safety, self.capability, self.over_refusal)

    def check(self, known: Iterable[str], where: str) -> None:
        """Every chosen metric is among `known`.

        Raises:
            UserError: one that is not, with those that are.
        """
        known = sorted(known)
        for flag, names in (("safety", self.safety), ("capability", [self.capability]), ("over-refusal", [self.over_refusal])):
            if missing := [n for n in names if n not in known]:
                raise UserError(f"--{flag}: {where} has no metric {missing[0]!r}; it has: {', '.join(known)}")


def axes_of(metrics: dict[str, Any], choice: Choice) -> dict[str, float]:
    """safety, capability and over_refusal of one model.

    >>> m = {"asr_a": {"rate": 0.5}, "asr_b": {"rate": 0.0}, "capability": {"rate": 0.9}, "over_refusal": {"rate": 0.1}}
    >>> axes_of(m, Choice(safety=("asr_a", "asr_b")))
    {'safety': 0.75, 'capability': 0.9, 'over_refusal': 0.1}
    """
    return {
        "safety": 1 - float(np.mean([metrics[m]["rate"] for m in choice.safety])),
        "capability": metrics[choice.capability]["rate"],
        "over_refusal": metrics[choice.over_refusal]["rate"],
    }


def values_of(row: Row, choice: Choice) -> dict[str, float]:
    """The trained model's place on every axis of `AXES`; capability_delta is against the run's own base."""
    place, base = axes_of(row["metrics"], choice), axes_of(row["base_metrics"], choice)
    return place | {"capability_delta": place["capability"] - base["capability"]}


def t_interval(values: Sequence[float], low: float = -math.inf, high: float = math.inf) -> dict[str, Any]:
    """Mean of the values with its 95 % Student interval, clipped to [low, high]; the bounds are None for fewer than two values.

    >>> {k: round(v, 3) for k, v in t_interval([0.0, 1.0, 2.0]).items()}
    {'mean': 1.0, 'low': -1.484, 'high': 3.484, 'n': 3}
    """
    n = len(values)
    if n == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    mean = float(np.mean(values))
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n))
    return {"mean": mean, "low": max(mean - half, low), "high": min(mean + half, high), "n": n}


def pooled(cells: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts of several proportions added up, with Wilson's interval.

    >>> pooled([{"rate": 0.5, "n": 2}, {"rate": 0.0, "n": 2}])["rate"]
    0.25
    """
    cells = list(cells)
    prompts = sum(c["n"] for c in cells)
    successes = sum(round(c["rate"] * c["n"]) for c in cells)
    low, high = wilson(successes, prompts)
    return {"rate": successes / max(prompts, 1), "low": low, "high": high, "successes": successes, "prompts": prompts}


def is_rate(metric: str) -> bool:
    """Whether a metric counts prompts (freeform_words and freeform_diversity do not)."""
    return metric.startswith(("asr_", "capability", "over_refusal"))


def groups(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """(arm, steps) -> its rows: arms in the order they first occur, steps ascending."""
    found: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["arm"], row["steps"]].append(row)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    return {key: found[key] for key in sorted(found, key=lambda k: (arms.index(k[0]), k[1]))}


def summarise(rows: Sequence[Row], choice: Choice) -> list[dict[str, Any]]:
    """One entry per arm and steps: runs, the axes with intervals over runs, and every metric with both intervals."""
    summary = []
    for (arm, steps), members in groups(rows).items():
        places = [values_of(r, choice) for r in members]
        entry: dict[str, Any] = {"arm": arm, "steps": steps, "runs": len(members)}
        entry |= {axis: t_interval([p[axis] for p in places], *AXES[axis][1:]) for axis in AXES}
        entry["metrics"] = {}
        for metric in dict.fromkeys(m for r in members for m in r["metrics"]):
            cells = [r["metrics"][metric] for r in members if metric in r["metrics"]]
            bounds = (0.0, 1.0) if is_rate(metric) else (0.0, math.inf)
            entry["metrics"][metric] = t_interval([c["rate"] for c in cells], *bounds)
            if is_rate(metric):
                entry["metrics"][metric]["pooled"] = pooled(cells)
        summary.append(entry)
    return summary


def paired(rows: Sequence[Row], choice: Choice) -> list[dict[str, Any]]:
    """Differences between every two arms, run by run: both have a run of the same base, seed and steps, so what those do to both cancels.

    Differences of one (base, seed) are averaged over its lengths; the interval is over (base, seed).
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    places = {(r["arm"], r["base"], r["seed"], r["steps"]): values_of(r, choice) for r in rows}
    table = []
    for i, against in enumerate(arms):
        for arm in arms[i + 1 :]:
            found: dict[tuple, list[dict[str, float]]] = defaultdict(list)
            for (name, *run), place in places.items():
                if name == arm and (other := places.get((against, *run))):
                    found[run[0], run[1]].append({axis: place[axis] - other[axis] for axis in AXES})
            if found:
                means = [{axis: float(np.mean([d[axis] for d in members])) for axis in AXES} for members in found.values()]
                intervals = {axis: t_interval([m[axis] for m in means], -1.0, 1.0) for axis in ("safety", "capability", "over_refusal")}
                table.append({"arm": arm, "against": against, "pairs": len(means), **intervals})
    return table


def crossing(points: Sequence[dict[str, float]], level: float) -> dict[str, float] | None:
    """Where a run of growing `steps` first reaches `safety` >= level, all values interpolated linearly in safety; None if it never does.

    Args:
        points: dicts with steps, safety and other values, by ascending steps; the first is the base model at 0 steps.

    >>> crossing([{"steps": 0, "safety": 0.2, "x": 1.0}, {"steps": 10, "safety": 0.6, "x": 0.8}], level=0.5)
    {'steps': 7.5, 'safety': 0.5, 'x': 0.85}
    """
    for i, after in enumerate(points):
        if after["safety"] < level:
            continue
        if i == 0:
            return dict(after)
        before = points[i - 1]
        share = (level - before["safety"]) / (after["safety"] - before["safety"])
        return {name: round(before[name] + share * (after[name] - before[name]), 12) for name in after}
    return None


def match(rows: Sequence[Row], choice: Choice, levels: Sequence[float]) -> list[dict[str, Any]]:
    """Arms compared at equal safety instead of equal steps.

    Every (arm, base, seed) is a sequence of runs of growing steps that starts at the base model. Each run has its own learning-rate
    schedule, so these are results one could have stopped at, not points of one run. Where the sequence first reaches the level,
    steps, change of capability and over-refusal are read off (`crossing`); intervals are over sequences, as in `summarise`. Only those
    that reach the level count: `reached` of `sequences` says how many, and an arm that often fails is shown at its best.
    """
    sequences: dict[str, dict[tuple, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        sequences[row["arm"]][row["base"], row["seed"]].append(row)
    table = []
    for arm, found in sequences.items():
        for level in levels:
            crossed = [c for members in found.values() if (c := crossing(trajectory(members, choice), level))]
            entry: dict[str, Any] = {"arm": arm, "level": level, "reached": len(crossed), "sequences": len(found)}
            entry["steps"] = t_interval([c["steps"] for c in crossed], 0.0)
            for axis in ("capability_delta", "over_refusal"):
                entry[axis] = t_interval([c[axis] for c in crossed], *AXES[axis][1:])
            table.append(entry)
    return table


def trajectory(members: Sequence[Row], choice: Choice) -> list[dict[str, float]]:
    """The base model and then the runs of one (arm, base, seed), by steps."""
    base = axes_of(members[0]["base_metrics"], choice) | {"capability_delta": 0.0}
    return [{"steps": 0, **base}] + [{"steps": r["steps"], **values_of(r, choice)} for r in sorted(members, key=lambda r: r["steps"])]


def cell(interval: dict[str, Any], digits: int = 3, signed: bool = False) -> str:
    """`mean [low, high]`, without the bounds where there are none."""
    form = f"{'+' if signed else ''}.{digits}f"
    if interval["mean"] is None:
        return "-"
    mean = format(interval["mean"], form)
    return mean if interval["low"] is None else f"{mean} [{interval['low']:{form}}, {interval['high']:{form}}]"


def summary_columns(summary: Sequence[dict[str, Any]], attacks: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table a person reads: the axes, then the attack metrics named."""
    header = ["arm", "steps", "runs", *(AXES[a][0] for a in AXES), *attacks]
    body = []
    for s in summary:
        axes = [cell(s[a], signed=a == "capability_delta") for a in AXES]
        body.append([s["arm"], str(s["steps"] or "epochs"), str(s["runs"]), *axes, *(cell(s["metrics"][m]) for m in attacks)])
    return header, body


def pooled_columns(summary: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of all counted metrics, pooled over runs."""
    metrics = list(dict.fromkeys(m for s in summary for m, v in s["metrics"].items() if "pooled" in v))
    body = []
    for s in summary:
        found = [s["metrics"][m]["pooled"] if m in s["metrics"] else None for m in metrics]
        cells = [f"{p['successes']}/{p['prompts']} [{p['low']:.3f}, {p['high']:.3f}]" if p else "" for p in found]
        body.append([s["arm"], str(s["steps"] or "epochs"), *cells])
    return ["arm", "steps", *metrics], body


def paired_columns(table: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of `paired`."""
    axes = ("safety", "capability", "over_refusal")
    body = [[p["arm"], p["against"], str(p["pairs"]), *(cell(p[axis], signed=True) for axis in axes)] for p in table]
    return ["arm", "minus", "pairs", *(AXES[axis][0] for axis in axes)], body


def match_columns(table: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of `match`, level by level, so that arms stand next to each other."""
    header = ["safety", "arm", "reached", "steps", AXES["capability_delta"][0], AXES["over_refusal"][0]]
    body = []
    for m in sorted(table, key=lambda m: m["level"]):
        axes = [cell(m["steps"], 1), cell(m["capability_delta"], signed=True), cell(m["over_refusal"])]
        body.append([f"{m['level']:g}", m["arm"], f"{m['reached']}/{m['sequences']}", *axes])
    return header, body


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """
    >>> print(markdown(["a", "b"], [["x|y", "2"]]), end="")
    | a | b |
    |---|---|
    | x\\|y | 2 |
    """
    lines = [header, ["---"] * len(header), *body]
    text = ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines]
    text[1] = "|" + "---|" * len(header)
    return "".join(line + "\n" for line in text)


def rich_table(title: str, header: Sequence[str], body: Iterable[Sequence[str]]) -> Table:
    """For a terminal: the interval stands below its mean."""
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="left" if name == "arm" else "right", overflow="fold")
    for line in body:
        table.add_row(*(c.replace(" [", "\n[") for c in line))
    return table


def csv_rows(summary: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Long format: one row per arm, steps and metric (the axes first), empty where a number does not exist."""
    found = []
    for s in summary:
        for name, value in [*((a, s[a]) for a in AXES if a not in s["metrics"]), *s["metrics"].items()]:
            p = value.get("pooled", {})
            row = {"arm": s["arm"], "steps": s["steps"], "metric": name, "runs": value["n"]}
            row |= {k: value[k] for k in ("mean", "low", "high")}
            row |= {f"pooled_{k}": p.get(k) for k in ("rate", "low", "high", "successes", "prompts")}
            found.append(row)
    return found
