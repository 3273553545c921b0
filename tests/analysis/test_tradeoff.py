"""Statistics of a comparison against NumPy and hand-made cases; the picture with many arms."""

import numpy as np
import pytest
from scipy import stats

from opsa_jax.analysis import tradeoff as t
from opsa_jax.analysis.tradeoff_plot import plot_tradeoff
from opsa_jax.errors import UserError

CHOICE = t.Choice(safety=("asr_a", "asr_b"))


def rate(value: float, n: int = 20) -> dict:
    return {"rate": value, "n": n, "low": 0.0, "high": 1.0}


def row(arm="x", steps=10, seed=0, base="b", a=0.0, b=0.0, capability=1.0, over=0.0, base_a=1.0, base_b=1.0) -> dict:
    metrics = {"asr_a": rate(a), "asr_b": rate(b, 40), "capability": rate(capability), "over_refusal": rate(over)}
    metrics["freeform_words"] = rate(22.5)
    before = {"asr_a": rate(base_a), "asr_b": rate(base_b, 40), "capability": rate(0.9), "over_refusal": rate(0.0)}
    return {"arm": arm, "base": base, "steps": steps, "seed": seed, "run": "r", "metrics": metrics, "base_metrics": before}


def test_t_interval_is_scipys_and_is_clipped():
    x = np.random.default_rng(0).uniform(0.3, 0.6, 7)
    found = t.t_interval(list(x))
    low, high = stats.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
    np.testing.assert_allclose([found["mean"], found["low"], found["high"]], [x.mean(), low, high], rtol=1e-9)
    clipped = t.t_interval([0.0, 1.0], 0.0, 1.0)
    assert (clipped["low"], clipped["high"]) == (0.0, 1.0)
    assert t.t_interval([0.25]) == {"mean": 0.25, "low": None, "high": None, "n": 1}
    assert t.t_interval([])["mean"] is None


def test_pooled_adds_counts_not_rates():
    found = t.pooled([rate(0.1, 10), rate(0.5, 90)])
    assert (found["successes"], found["prompts"], found["rate"]) == (46, 100, 0.46)
    # Wilson's interval from its defining equation: (p - b)^2 = z^2 b (1 - b) / n at both bounds b.
    for bound in (found["low"], found["high"]):
        np.testing.assert_allclose((0.46 - bound) ** 2, 1.959964**2 * bound * (1 - bound) / 100, rtol=1e-6)


def test_summary_by_arm_and_steps():
    rows = [row("y", 10, s, a=0.1 * s, capability=0.8) for s in range(3)] + [row("x", 20), row("x", 5, capability=0.7)]
    summary = t.summarise(rows, CHOICE)
    assert [(s["arm"], s["steps"], s["runs"]) for s in summary] == [("y", 10, 3), ("x", 5, 1), ("x", 20, 1)]
    y = summary[0]
    # Both attack metrics weigh the same although one has twice the prompts.
    expected = t.t_interval([1.0, 0.95, 0.9], 0, 1)
    assert y["safety"] == pytest.approx(expected)
    assert y["capability_delta"]["mean"] == pytest.approx(-0.1)
    assert y["metrics"]["asr_a"]["pooled"]["successes"] == 6 and y["metrics"]["asr_a"]["pooled"]["prompts"] == 60
    assert "pooled" not in y["metrics"]["freeform_words"] and y["metrics"]["freeform_words"]["mean"] == 22.5
    assert summary[1]["safety"]["low"] is None


def test_csv_has_each_metric_once():
    lines = t.csv_rows(t.summarise([row("x", 5), row("y", 5)], CHOICE))
    keys = [(r["arm"], r["metric"]) for r in lines]
    names = {"safety", "capability_delta", "asr_a", "asr_b", "capability", "over_refusal", "freeform_words"}
    assert len(keys) == len(set(keys)) == 2 * len(names) and {m for _, m in keys} == names


def test_crossing_interpolates_the_first_time():
    points = [{"steps": s, "safety": v, "x": x} for s, v, x in [(0, 0.1, 0.0), (5, 0.5, 1.0), (10, 0.3, 5.0), (20, 0.9, 3.0)]]
    assert t.crossing(points, 0.3) == pytest.approx({"steps": 2.5, "safety": 0.3, "x": 0.5})
    assert t.crossing(points, 0.5) == pytest.approx(points[1])
    # Past the dip: between the runs of 10 and 20 steps.
    assert t.crossing(points, 0.6) == pytest.approx({"steps": 15, "safety": 0.6, "x": 4.0})
    assert t.crossing(points, 0.95) is None
    assert t.crossing(points, 0.05) == points[0]


def test_pairs_share_base_seed_and_steps():
    """y is 0.1 safer than x in each run although the bases differ by more; z has one run that nobody shares."""
    hard = {("b", 0): 0.5, ("b", 1): 0.6, ("c", 0): 0.1, ("c", 1): 0.2}
    rows = [row("x", steps, seed, base, a=asr, b=asr) for (base, seed), asr in hard.items() for steps in (5, 10)]
    rows += [row("y", 5, seed, base, a=asr, b=asr, over=0.2) for (base, seed), asr in hard.items()]  # as safe after 5 steps
    rows += [row("y", 10, seed, base, a=asr - 0.2, b=asr - 0.2, over=0.4) for (base, seed), asr in hard.items() if asr >= 0.2]
    rows += [row("z", 99, 0, "b")]
    found = t.paired(rows, CHOICE)
    assert [(p["arm"], p["against"], p["pairs"]) for p in found] == [("y", "x", 4)]
    # A sequence counts once: three of them gain (0 + 0.2) / 2, the one without a longer run 0.
    assert found[0]["safety"] == pytest.approx(t.t_interval([0.1, 0.1, 0.0, 0.1], -1, 1))
    assert found[0]["over_refusal"]["mean"] == pytest.approx((0.3 * 3 + 0.2) / 4)
    header, body = t.paired_columns(found)
    assert len(header) == len(body[0]) and body[0][3].startswith("+0.075 [")


def test_match_takes_each_seed_by_itself():
    runs = [(seed, steps, asr, cap) for seed, cap in ((0, 0.9), (1, 0.7)) for steps, asr in ((10, 0.4), (20, 0.0))]
    rows = [row("x", steps, seed, a=asr, b=asr, capability=cap) for seed, steps, asr, cap in runs]
    rows += [row("y", steps, 0, a=0.5, b=0.5) for steps in (10, 20)]
    found = {(m["arm"], m["level"]): m for m in t.match(list(reversed(rows)), CHOICE, [0.3, 0.8])}
    half, full = found["x", 0.3], found["x", 0.8]
    # Safety 0 at the base and 0.6 after 10 steps: 0.3 half way, with half the change of capability.
    assert half["steps"]["mean"] == pytest.approx(5) and half["capability_delta"]["mean"] == pytest.approx((0.0 - 0.1) / 2)
    assert full["steps"]["mean"] == pytest.approx(15) and full["capability_delta"]["mean"] == pytest.approx((0.0 - 0.2) / 2)
    assert (full["reached"], full["sequences"]) == (2, 2)
    assert (found["y", 0.8]["reached"], found["y", 0.8]["sequences"], found["y", 0.8]["steps"]["mean"]) == (0, 1, None)
    header, body = t.match_columns(list(found.values()))
    assert [line[:3] for line in body if line[0] == "0.8"] == [["0.8", "y", "0/1"], ["0.8", "x", "2/2"]]
    assert len(header) == len(body[0])


def test_a_missing_metric_is_named():
    with pytest.raises(UserError, match=r"--safety: suite s has no metric 'asr_b'; it has: asr_a, capability, over_refusal"):
        CHOICE.check(["asr_a", "capability", "over_refusal"], "suite s")


def test_plot_of_ten_arms(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        row(f"arm-{k}", steps, seed, a=a, b=a / 2, capability=0.95 - 0.02 * k * rng.random(), over=0.05 * k * rng.random())
        for k in range(10)
        for seed in range(3)
        for steps in (5, 20)
        for a in [np.clip(0.6 - 0.02 * steps + 0.05 * rng.normal() + 0.02 * k, 0, 1)]
    ]
    png = plot_tradeoff(rows, CHOICE, tmp_path)
    assert png.stat().st_size > 10_000
    svg = (tmp_path / "tradeoff.svg").read_text()
    assert "</svg>" in svg
