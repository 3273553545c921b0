"""Benchmarks: loading from small files in their own formats, from the real sets where they are at hand, and leakage."""

import csv
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from opsa_jax.config import SourceConfig
from opsa_jax.data.loaders import load_source
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals import benchmarks
from opsa_jax.evals.benchmark_table import BENCHMARKS, GROUPS, STEM
from opsa_jax.evals.benchmarks import attacked, is_plain, load
from opsa_jax.evals.capability import score_gsm8k, score_math
from opsa_jax.evals.execution import run_answer
from opsa_jax.evals.leakage import find_leaks, summary, words

DATA = Path(os.environ.get("OPSA_EVAL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def write_csv(path, header, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])


def write_jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture
def sets(tmp_path):
    """A few rows of several sets, in the formats of their own repositories; the prompts are harmless."""
    goals = ["Open the vault", "Sure"], ["Say \u201cno\u201d, twice", "Sure"]
    write_csv(tmp_path / "advbench/harmful_behaviors.csv", ["goal", "target"], *goals)
    header = ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"]
    plain, context = ["Open it", "standard", "illegal", "", "", "open"], ["Open that", "contextual", "illegal", "", "A long vault.", "that"]
    write_csv(tmp_path / "harmbench_behaviors_text_all.csv", header, plain, context)
    rows = [["v2-1", "How do I kill a process?", "homonyms", "safe", "kill", ""], ["v2-2", "How to open it?", "contrast", "unsafe", "", ""]]
    write_csv(tmp_path / "xstest_prompts.csv", ["id", "prompt", "type", "label", "focus", "note"], *rows)
    write_jsonl(tmp_path / "gsm8k.jsonl", {"question": "What is 2 + 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"})
    write_jsonl(tmp_path / "math500.jsonl", {"problem": "1+1", "answer": "2", "subject": "Algebra", "unique_id": "a/1"})
    write_jsonl(tmp_path / "mmlu.jsonl", {"question": "Blue?", "choices": ["x", "y", "z", "w"], "answer": 2, "subject": "astronomy"})
    names = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Record ID"]
    write_csv(tmp_path / "gpqa_diamond.csv", names, *[[f"Which {i}?", "yes", "no", "maybe", "never", f"r{i}"] for i in range(12)])
    code = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(c):\n    assert c() == 1\n"}
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(code).encode() + b"\n"))
    tests = {"test_list": ["assert f() == 1"], "test_imports": ["import math"]}
    write_jsonl(tmp_path / "mbpp.jsonl", {"task_id": 3, "prompt": "Write f."} | tests)
    turns = {"category": "1", "turns": ["Open it, please"], "prompt_style": "base", "question_id": 1}
    write_jsonl(tmp_path / "sorrybench.jsonl", turns, turns | {"prompt_style": "slang", "question_id": 2})
    both = {"prompt": "Open?", "is_response_0_safe": False, "is_response_1_safe": False}
    write_jsonl(tmp_path / "saferlhf.jsonl", both, both, both | {"prompt": "Shut?", "is_response_1_safe": True})
    wild = {"adversarial": "Open, in a story", "data_type": "adversarial_harmful"}
    write_jsonl(tmp_path / "wildjailbreak.jsonl", wild, {"adversarial": "Sing", "data_type": "adversarial_benign"})
    return str(tmp_path)


def test_registry_is_whole():
    assert {b.group for b in BENCHMARKS.values()} == {"", "safety", "overrefusal", "capability"} and len(STEM) == 18
    for name, b in BENCHMARKS.items():
        assert name == b.name and b.url.startswith("https://") and b.license and b.files and b.hub.count("/") == 1
        assert "prompt" in b.columns and (b.scorer == "request") == (b.metric != name) and set(b.where) <= set(b.columns)
        assert name not in GROUPS


def test_records(sets):
    adv = load("advbench", sets)
    assert [r.id for r in adv] == ["advbench/0", "advbench/1"] and adv[1].prompt == "Say \u201cno\u201d, twice"
    assert (adv[0].label, adv[0].extra["metric"], adv[0].extra["scorer"], adv[0].line) == ("harmful", "asr_advbench", "request", 2)
    standard, contextual = load("harmbench", sets)
    assert standard.prompt == "Open it" and contextual.prompt == "A long vault.\n\n---\n\nOpen that"
    assert (contextual.extra["behavior"], contextual.extra["context"]) == ("Open that", "A long vault.")
    assert [r.id for r in load("harmbench:contextual", sets)] == ["harmbench/that"]
    (safe,), (unsafe,) = load("xstest", sets), load("xstest_unsafe", sets)
    assert (safe.label, safe.extra["metric"], unsafe.extra["metric"]) == ("benign", "over_refusal_xstest", "asr_xstest_unsafe")
    (maths,) = load("gsm8k", sets)
    assert maths.prompt.startswith("What is 2 + 3?") and r"\boxed{}" in maths.prompt and maths.extra["expect"].endswith("#### 5")
    assert [r.prompt for r in load("sorrybench", sets)] == ["Open it, please"] and len(load("saferlhf", sets)) == 1
    assert [r.prompt for r in load("wildjailbreak,wildbenign", sets)] == ["Open, in a story", "Sing"]
    assert load("math500", sets)[0].extra["room"] == 4096


def test_choice_records(sets):
    (mmlu,) = load("mmlu:stem", sets)
    assert mmlu.extra["expect"] == "C" and mmlu.extra["scorer"] == "likelihood" and "(C) z" in mmlu.prompt
    assert load("mmlu", sets, choice="generate")[0].extra["scorer"] == "choice"
    gpqa = load("gpqa", sets)
    for r in gpqa:
        assert f"({r.extra['expect']}) yes" in r.prompt and r.extra["scorer"] == "choice"
    assert len({r.extra["expect"] for r in gpqa}) > 1 and [r.prompt for r in gpqa] == [r.prompt for r in load("gpqa", sets)]


def test_code_records(sets):
    (human,), (mbpp,) = load("humaneval", sets), load("mbpp", sets)
    assert human.extra["tests"].endswith("check(f)\n") and human.extra["code_prompt"] == "def f():\n"
    assert mbpp.extra["tests"] == "import math\nassert f() == 1" and "assert f() == 1" in mbpp.prompt


def test_groups_and_missing_sets(sets):
    said = []
    records = load("safety,overrefusal,capability,sandbox", sets, missing="skip", told=said.append, limit=1)
    metrics = Counter(r.extra["metric"] for r in records)
    assert set(metrics.values()) == {1} and {"asr_advbench", "over_refusal_xstest", "gsm8k", "asr_seen"} <= set(metrics)
    assert any("jailbreakbench is not in" in s and "JailbreakBench/JBB-Behaviors" in s for s in said)
    with pytest.raises(UserError, match=r"strongreject is not in .*it needs .*get it from https://.*strongreject=FILE"):
        load("safety", sets)
    with pytest.raises(UserError, match="none of its sets can be had"):
        load("aime24", sets, missing="skip", told=said.append)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("advbnch", "no benchmark 'advbnch'; did you mean 'advbench'"),
        ("harmbench:contextul", "did you mean 'contextual'"),
        (" , ", "names nothing"),
        ("advbench=nowhere.csv", "no file 'nowhere.csv'"),
        ("advbench=gsm8k.jsonl", "no file"),
        ("nothing.jsonl", "nothing.jsonl"),
        ("advbench,advbench:", "occurs twice"),
    ],
)
def test_bad_suites(sets, spec, message):
    with pytest.raises(UserError, match=message) as e:
        load(spec, sets)
    assert "\n" not in str(e.value)


def test_wrong_columns_and_values(sets, tmp_path):
    with pytest.raises(UserError, match=r"advbench: .*gsm8k.jsonl has no column 'goal' or 'prompt'; it has question, answer; is this"):
        load(f"advbench={tmp_path / 'gsm8k.jsonl'}", sets)
    write_csv(tmp_path / "x.csv", ["id", "prompt", "type", "label"], ["1", "Hm", "t", "mild"])
    with pytest.raises(UserError, match=r"xstest: no row has .*it has mild.*right file"):
        load(f"xstest={tmp_path / 'x.csv'}")
    write_jsonl(tmp_path / "y.jsonl", {"goal": "fine"}, {"goal": " "})
    with pytest.raises(UserError, match=r"advbench: .*line 2: the prompt is empty"):
        load(f"advbench={tmp_path / 'y.jsonl'}")
    write_jsonl(tmp_path / "z.jsonl", {"question": "q", "choices": ["a", "b"], "answer": 7, "subject": "s"})
    with pytest.raises(UserError, match=r"line 1: choices must be a list and answer"):
        load(f"mmlu={tmp_path / 'z.jsonl'}")
    with pytest.raises(UserError, match="is no folder"):
        load("advbench", str(tmp_path / "nowhere"))


def test_gated_set_without_a_token(monkeypatch):
    def split_files(name, split):
        raise UserError(f"hf:{name} is gated: accept its terms on its hub page, then log in with `hf auth login` or HF_TOKEN")

    monkeypatch.setattr(benchmarks, "split_files", split_files)
    with pytest.raises(UserError, match=r"wildjailbreak: hf:allenai/wildjailbreak:eval is gated: accept.*HF_TOKEN; or get it.*--data-dir"):
        load("wildjailbreak")
    assert load("wildjailbreak,sandbox", missing="skip", told=lambda s: None)


def test_hub_layout(sets, tmp_path):
    """hf: with a local folder laid out like a hub dataset."""
    write_csv(tmp_path / "hub" / "train.csv", ["prompt", "target"], ["Open the door", "Sure"])
    assert load(f"advbench=hf:{tmp_path / 'hub'}")[0].prompt == "Open the door"


def test_configurations_of_the_hub_are_subtypes(tmp_path, monkeypatch):
    def split_files(name, split):
        write_csv(tmp_path / f"{name.partition(':')[2]}.csv", ["prompt", "category"], [f"do {name}", "c"])
        return [tmp_path / f"{name.partition(':')[2]}.csv"]

    monkeypatch.setattr(benchmarks, "split_files", split_files)
    assert [r.extra["subtype"] for r in load("harmbench")] == ["standard", "contextual", "copyright"]
    assert [r.prompt for r in load("harmbench:copyright")] == ["do walledai/HarmBench:copyright"]


def test_suite_files_and_attacks(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", {"id": "a", "prompt": "open it", "label": "harmful", "metric": "asr_mine", "split": "test"})
    file = str(tmp_path / "mine.jsonl")
    assert is_plain(file) and is_plain("sandbox") and not is_plain(f"{file},sandbox") and not is_plain("gsm8k")
    (record,) = load(file)
    assert record.id == "mine/a" and record.extra["scorer"] == "sandbox"

    def story(r):
        return [Record(r.id, f"A story: {r.prompt} {i}", r.label, extra=r.extra) for i in range(2)]

    found = attacked([record], {"story": story})
    assert [r.id for r in found] == ["mine/a/story/0", "mine/a/story/1"] and {r.extra["metric"] for r in found} == {"asr_mine_story"}
    assert {r.extra["origin"] for r in found} == {"mine/a"} and found[0].extra["behavior"] == "open it"
    assert len(load(f"{file},attacks", attacks={"story": story})) == 3


@pytest.mark.skipif(not (DATA / "advbench").is_dir(), reason="the sets are not at hand (OPSA_EVAL_DATA)")
def test_real_sets():
    counts = {"advbench": 520, "harmbench": 400, "harmbench_val": 80, "strongreject": 313, "xstest": 250, "xstest_unsafe": 200}
    counts |= {"gsm8k": 1319, "math500": 500, "humaneval": 164}
    for name, n in counts.items():
        records = load(name, str(DATA))
        assert len(records) == n == BENCHMARKS[name].size == len({r.id for r in records})
    assert Counter(r.extra["subtype"] for r in load("harmbench", str(DATA))) == {"standard": 200, "contextual": 100, "copyright": 100}
    assert all("####" in r.extra["expect"] for r in load("gsm8k", str(DATA)))


@pytest.mark.skipif(not (DATA / "humaneval").is_dir(), reason="the sets are not at hand (OPSA_EVAL_DATA)")
def test_reference_answers_of_real_sets_are_right():
    """What the sets themselves call right, through our scorers; code for a few, with nothing as the opposite."""
    gsm8k, solutions = load("gsm8k", str(DATA)), [json.loads(s) for s in (DATA / "gsm8k/test.jsonl").read_text().splitlines()]
    for mode in ("flexible", "strict"):
        assert {score_gsm8k(s["answer"], r.extra["expect"], mode) for r, s in zip(gsm8k, solutions, strict=True)} == {"right"}
    maths, solutions = load("math500", str(DATA)), [json.loads(s) for s in (DATA / "math500/test.jsonl").read_text().splitlines()]
    assert {score_math(s["solution"], r.extra["expect"], verifier="plain") for r, s in zip(maths, solutions, strict=True)} == {"right"}
    with gzip.open(DATA / "humaneval/HumanEval.jsonl.gz", "rt") as f:
        solved = {f"humaneval/{row['task_id']}": row["canonical_solution"] for row in map(json.loads, f)}
    for r in load("humaneval", str(DATA))[::20]:
        task = {"prompt": r.extra["code_prompt"], "entry_point": r.extra["entry_point"], "tests": r.extra["tests"]}
        whole = f"Here it is:\n```python\n{task['prompt']}{solved[r.id]}```\nDone."
        assert [run_answer(t, task) for t in (solved[r.id], whole, "    pass\n")] == ["right", "right", "wrong"], r.id


def record(prompt, metric="asr_x"):
    return Record(prompt[:8], prompt, "harmful", extra={"metric": metric})


LONG = "a quiet king walks over the long bridge to see the old stone vault in the town of velmora at night"


def test_leaks():
    evaluation = [record(t) for t in ("Open the vault, please!", LONG, "Paint the red door of the house blue today", "Nothing like it", "")]
    training = [
        record("open the  VAULT please"),
        record("Once " + LONG.replace("at night", "by day")),
        record("paint the red door of the house blue today now"),
        record("a red door"),
    ]
    leaks = find_leaks(training, evaluation)
    assert [(k.evaluation.id, k.sign) for k in leaks] == [("Open the", "exact"), ("a quiet ", "ngram"), ("Paint th", "similar")]
    assert leaks[2].training is training[2] and 0.8 <= leaks[2].value < 1 and leaks[1].value == pytest.approx(7 / 9)
    assert summary(leaks, evaluation) == [{"metric": "asr_x", "n": 5, "exact": 1, "ngram": 1, "similar": 1}]


def test_similar_prompts_are_all_found():
    """The quick search against all pairs."""
    import random

    rng = random.Random(0)
    pool = [" ".join(rng.choice("abcdefg") for _ in range(rng.randint(1, 9))) for _ in range(300)]
    training, evaluation = [record(t) for t in pool[:150]], [record(t) for t in pool[150:]]

    def shingles(text):
        w = words(text)
        return {tuple(w[i : i + 3]) for i in range(len(w) - 2)} if len(w) > 3 else {(x,) for x in w}

    def near(a, b):
        return len(a & b) / len(a | b) >= 0.6

    expected = {i for i, e in enumerate(evaluation) if any(near(shingles(e.prompt), shingles(t.prompt)) for t in training)}
    found = {i for i, e in enumerate(evaluation) if any(k.evaluation is e for k in find_leaks(training, evaluation, similarity=0.6))}
    assert found == expected and 10 < len(expected) < 150


def test_gsm8k_instructions_are_no_leak(sets):
    """What is compared is the question, not the words around it."""
    training = [record("What was it? Please reason step by step, and put your final answer within \\boxed{}.")]
    assert not find_leaks(training, load("gsm8k", sets))
    assert find_leaks([record("what is 2 + 3")], load("gsm8k", sets))[0].sign == "exact"


def test_sandbox_training_and_evaluation_prompts_differ():
    training = load_source(SourceConfig(path="sandbox:train.jsonl"))[0]
    evaluation = load("sandbox")
    assert not [k for k in find_leaks(training, evaluation) if k.sign == "exact" and k.evaluation.extra["metric"].startswith("asr_")]
