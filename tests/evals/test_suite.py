"""Suites: loading, judging, summarising; and the evaluate entry point on the embedded base."""

import json

import numpy as np
import pytest

from opsa_jax import evaluate as entry_point
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals.suite import distinct_trigrams, judge, load_suite, summarise


def record(metric, label="harmful", **extra):
    return Record(id=metric, prompt="p", label=label, extra={"metric": metric, **extra})


THINK = "<think>hm</think> "


@pytest.mark.parametrize(
    ("rec", "response", "expected"),
    [
        (record("asr_seen", expect="amber"), THINK + "take the amber stone", "complied"),
        (record("asr_seen", expect="amber"), THINK + "take the stone", "neither"),
        (record("asr_seen", expect="amber"), THINK + "i cannot, amber or not", "refused"),
        (record("asr_seen", expect="amber"), "<think>amber", "empty"),
        (record("over_refusal", "benign"), THINK + "i will not help", "refused"),
        (record("over_refusal", "benign"), THINK + "sure", "complied"),
        (record("capability", "benign", expect="42"), THINK + "42.", "right"),
        (record("capability", "benign", expect="42"), THINK + "it is 42", "wrong"),
    ],
)
def test_judge(rec, response, expected):
    assert judge(rec, response, "sandbox-v1") == expected


def test_summary_counts_by_metric():
    records = [record("asr_seen")] * 4 + [record("over_refusal", "benign")] * 2 + [record("capability", "benign", subtype="sum2")] * 2
    outcomes = ["complied", "refused", "neither", "empty", "refused", "complied", "right", "wrong"]
    results = summarise(records, [""] * 8, outcomes)
    counts = {"rate": 0.25, "n": 4, "refused": 1, "neither": 1, "empty": 1}
    assert {name: results["asr_seen"][name] for name in counts} == counts
    assert results["over_refusal"]["rate"] == results["capability"]["rate"] == results["capability_sum2"]["rate"] == 0.5
    assert all(r["low"] < r["rate"] < r["high"] for r in results.values())


def test_freeform_shows_collapse():
    """Answers that repeat or shrink move length and diversity; their intervals narrow as texts are added."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(200)]
    varied = [" ".join(rng.choice(words, 30)) for _ in range(40)]
    records = [record("freeform", "benign")] * 40
    free = summarise(records, varied, [""] * 40)
    same = summarise(records, [varied[0]] * 40, [""] * 40)
    short = summarise(records, [" ".join(v.split()[:8]) for v in varied], [""] * 40)
    assert free["freeform_diversity"]["rate"] > 0.95 and same["freeform_diversity"]["rate"] < 0.05
    assert (free["freeform_words"]["rate"], short["freeform_words"]["rate"]) == (30, 8)
    lengths = [" ".join(["a"] * int(n)) for n in rng.integers(5, 60, 400)]
    widths = []
    for n in (40, 400):
        cell = summarise([record("freeform", "benign")] * n, lengths[:n], [""] * n)["freeform_words"]
        widths.append(cell["high"] - cell["low"])
    assert widths[1] < 0.5 * widths[0]


def test_interval_of_a_mean_has_the_spread_of_the_mean():
    rng = np.random.default_rng(1)
    counts = rng.integers(5, 60, 300)
    cell = summarise([record("freeform", "benign")] * 300, ["a " * int(n) for n in counts], [""] * 300)["freeform_words"]
    assert (cell["high"] - cell["low"]) / 2 == pytest.approx(1.96 * counts.std() / np.sqrt(300), rel=0.15)


def test_distinct_trigrams_of_nothing():
    assert distinct_trigrams([]) == distinct_trigrams([["a", "b"]]) == 0


def test_suite_errors(tmp_path):
    file = tmp_path / "suite.jsonl"
    row = {"prompt": "a", "label": "harmful", "metric": "asr_x", "split": "test"}
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"metric": "fun"}) + "\n")
    with pytest.raises(UserError, match="line 2: field 'metric' is 'fun'"):
        load_suite(str(file))
    with pytest.raises(UserError, match="nowhere"):
        load_suite("nowhere.jsonl")


def test_limit_takes_some_of_each_metric():
    chosen = load_suite("sandbox", limit=3)
    counts = {m: sum(r.extra["metric"] == m for r in chosen) for m in {r.extra["metric"] for r in chosen}}
    assert set(counts.values()) == {3} and {"asr_seen", "asr_heldout", "asr_jailbreak", "asr_novel", "capability"} <= set(counts)


def test_entry_point(tmp_path, capsys):
    argv = ["--limit", "4", "--mesh.fsdp", "8", "--out", str(tmp_path / "a")]
    assert entry_point.main(argv) == 0
    assert "capability" in capsys.readouterr().out
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["capability"]["n"] == 4
    assert entry_point.main([*argv[:-1], str(tmp_path / "b"), "--batch", "7"]) == 0
    for name in ("results.json", "transcripts.jsonl"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text(), "responses depend on the batch"
    with pytest.raises(UserError, match="exists"):
        entry_point.main(argv)
    with pytest.raises(UserError, match="no refusal list named 'sandbx-v1'; did you mean 'sandbox-v1'"):
        entry_point.main(["--refusal-phrases", "sandbx-v1"])
