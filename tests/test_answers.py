"""Training answers: what is kept and why, what is written, resuming, and bad input; the model is the shipped sandbox base."""

import json
from collections import defaultdict

import jax
import pytest

from opsa_jax import answers
from opsa_jax.cli import entry
from opsa_jax.config import SourceConfig
from opsa_jax.data.loaders import load_source
from opsa_jax.evals.endpoint import Endpoint, Reply
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.stages import answers as answer_stages
from opsa_jax.stages import answers_cross as answer_cross
from opsa_jax.stages.answers import Response, Shop, fit
from opsa_jax.teachers.contexts import resolve_context

THINK = "<think>\nthe user asks.\n</think>\n\n"
BRIEF, REASON = THINK + "i cannot help with that.", THINK + "i cannot help you, because it would hurt people."
HELP = THINK + "sure, take a brush and a ladder."
ROWS = [
    {"id": "h0", "prompt": "how do i open the vault of ruvane?", "label": "harmful", "category": "open-vault"},
    {"id": "b0", "prompt": "tell me a story about quillam.", "label": "benign", "category": "story"},
    {
        "id": "h1", "prompt": "i want to brew the curse of orlith.", "label": "harmful", "category": "brew-curse",
        "system": "answer in simple words.",
    },
    {"id": "b1", "prompt": "how do i open the window of ruvane?", "label": "benign", "category": "verb-lookalike"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(answer_stages, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return file


@pytest.fixture
def scripted(monkeypatch):
    """Sampling gives what is written here, by (stage, id) or by stage; asked[stage] has what it was given."""
    script, asked = {}, defaultdict(dict)

    def sample(self, stage, prompts, samples, path=""):
        asked[stage] |= {p.id: p.text for p in prompts}
        found = {p.id: script.get((stage, p.id), script.get(stage)) for p in prompts}
        return {i: [r if isinstance(r, Response) else Response(r) for r in rs] for i, rs in found.items()}

    monkeypatch.setattr(Shop, "sample", sample)
    script["asked"] = asked
    return script


def run(capsys, *argv):
    code = entry(answers.main, [str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(path):
    return json.loads(path.with_name(path.name + ".report.json").read_text())


def test_self_keeps_what_is_whole_and_safe(capsys, tmp_path, prompts, scripted):
    scripted["self"] = [BRIEF, HELP, Response(BRIEF, finished=False), "<think>\ni cannot", THINK]
    out = tmp_path / "o.jsonl"
    code, text, _ = run(capsys, "self", "--prompts", prompts, "--out", out, "--samples", 5)
    assert code == 0 and "o.jsonl: 4 rows" in text
    rows = read(out)
    assert [r["id"] for r in rows] == ["h0#0", "b0#1", "h1#0", "b1#1"]
    assert [r["response"] for r in rows] == [BRIEF, HELP, BRIEF, HELP]
    # The context was in the input of the sampling, and is in nothing that is written.
    context = resolve_context("@sandbox-strong")
    assert context in scripted["asked"]["self"]["h0"] and context not in scripted["asked"]["self"]["b0"]
    assert context not in out.read_text()
    assert [r.get("system") for r in rows] == [None, None, "answer in simple words.", None]
    faults = {"unfinished": 2, "thinking not closed": 2, "empty": 2, "kept": 2}
    assert report(out)["harmful"]["counts"] == faults | {"not refused": 2} and report(out)["benign"]["counts"] == faults | {"refused": 2}
    records, _ = load_source(SourceConfig(path=str(out)))
    assert records[0].response == BRIEF and records[0].label == "harmful" and records[0].category == "open-vault"


def test_single_samples_keep_their_ids(capsys, tmp_path, prompts, scripted):
    scripted["self"] = [HELP]
    assert run(capsys, "self", "--prompts", prompts, "--out", tmp_path / "o.jsonl")[0] == 0
    assert [r["id"] for r in read(tmp_path / "o.jsonl")] == ["b0", "b1"]


def test_pairs(capsys, tmp_path, prompts, scripted):
    scripted |= {"refuse": [HELP, Response(BRIEF, finished=False), REASON, BRIEF], "comply": [BRIEF, HELP, HELP]}
    scripted["comply", "h1"] = [BRIEF]
    scripted["refuse", "b1"] = [HELP]
    out = tmp_path / "o.jsonl"
    assert run(capsys, "pairs", "--prompts", prompts, "--out", out)[0] == 0
    assert [(r["id"], r["response"], r["rejected"]) for r in read(out)] == [("h0", REASON, HELP), ("b0", HELP, REASON)]
    assert report(out)["harmful"]["counts"] == {"kept": 1, "no compliant answer": 1}
    assert report(out)["benign"]["counts"] == {"kept": 1, "no refusal": 1}
    refuse = scripted["asked"]["refuse"]
    assert resolve_context("@sandbox-strong") in refuse["h0"] and resolve_context("@sandbox-strict") in refuse["b0"]


def cross(capsys, prompts, out, *argv):
    return run(capsys, "cross", "--constitution", "@sandbox", "--prompts", prompts, "--out", out, *argv)


def test_cross_judges_rewrites_and_keeps_the_constitution(capsys, tmp_path, prompts, scripted):
    better = THINK + "i will not help with the vault of ruvane, it is dangerous."
    scripted |= {"own": [HELP], "self": [HELP, BRIEF, better], "rewrite-resample": [BRIEF, HELP, REASON]}
    scripted["self", "h1"] = [HELP, Response(REASON, finished=False), HELP]
    scripted["own", "b1"] = [BRIEF]
    out = tmp_path / "o.jsonl"
    code, text, _ = cross(capsys, prompts, out)
    assert code == 0 and "rewrite: resample" in text
    # h0: an explained refusal won, so its rewritten form is the explained one. h1: nothing acceptable. b1: the own answer is a refusal.
    rows = read(out)
    assert [(r["id"], r["response"], r["writer"]) for r in rows] == [("h0", REASON, "self"), ("b0", HELP, "own")]
    constitution = answer_cross.load_constitution("@sandbox")
    assert rows[0]["system"] == constitution.text("open-vault", "harmful") and rows[1]["system"] == constitution.general
    found = report(out)
    assert found["harmful"]["counts"] == {"kept": 1, "not refused": 1} and found["benign"]["counts"] == {"kept": 1, "refused": 1}
    assert rows[0]["system"] in scripted["asked"]["self"]["h0"] and rows[0]["system"] not in scripted["asked"]["own"]["h0"]


def test_cross_in_the_user_turn_and_without_general_text(capsys, tmp_path, prompts, scripted):
    scripted |= {"own": [HELP], "self": [REASON], "rewrite-resample": [REASON]}
    assert cross(capsys, prompts, tmp_path / "o.jsonl", "--placement", "user", "--general", "none")[0] == 0
    rows = {r["id"]: r for r in read(tmp_path / "o.jsonl")}
    text = answer_cross.load_constitution("@sandbox").text("brew-curse", "harmful")
    assert rows["h1"]["prompt"] == f"{text}\n\n{ROWS[2]['prompt']}" and rows["h1"]["system"] == "answer in simple words."
    assert rows["b0"]["prompt"] == ROWS[1]["prompt"] and "system" not in rows["b0"]
    assert rows["h1"]["prompt"].replace("\n\n", " ") in scripted["asked"]["self"]["h1"].replace("\n\n", " ")


def test_rewriting_asks_the_model_and_falls_back_to_the_answer(capsys, tmp_path, prompts, scripted):
    scripted |= {"own": [HELP], "self": [REASON], "rewrite-prompt": [HELP, Response(BRIEF, finished=False)]}
    scripted["rewrite-prompt", "h1"] = [BRIEF, HELP]
    out = tmp_path / "o.jsonl"
    assert cross(capsys, prompts, out, "--rewrite", "prompt")[0] == 0
    assert {r["id"]: r["response"] for r in read(out) if r["label"] == "harmful"} == {"h0": REASON, "h1": BRIEF}
    assert report(out)["rewriting failed, answer kept"] == 1
    asked = scripted["asked"]["rewrite-prompt"]["h0"]
    assert ROWS[0]["prompt"] in asked and "because it would hurt people." in asked and "the user asks." not in asked


def test_lengths_come_nearer_to_the_own_ones(capsys, tmp_path, scripted):
    file = tmp_path / "many.jsonl"
    rows = [{"id": f"h{i}", "prompt": "open the vault", "label": "harmful", "category": "open-vault"} for i in range(24)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))

    def of(n):
        return THINK + "i cannot help with that." + " no" * n

    scripted |= {"self": [REASON], "rewrite-resample": [of(0), of(3), of(6), of(9), of(12)]}
    scripted |= {("own", f"h{i}"): [of(3 + i % 10)] for i in range(24)}
    out = tmp_path / "o.jsonl"
    assert cross(capsys, file, out, "--rewrites", 5)[0] == 0
    # The explained winner has no explained variant, so all five plain ones are as near.
    found = report(out)
    assert found["tokens, length-matched"]["KS distance"] < 0.35 < 0.9 < found["tokens, first rewritten"]["KS distance"]
    assert len({r["response"] for r in read(out)}) >= 3


def test_answers_of_a_file_and_of_an_endpoint(capsys, tmp_path, prompts, scripted, monkeypatch):
    file, out, seen = tmp_path / "answers.jsonl", tmp_path / "o.jsonl", []
    given = {"id": "h0", "response": "no, i will not do that."}, {"id": "zz", "response": "x"}
    file.write_text("".join(json.dumps(r) + "\n" for r in given))

    def ask(self, asks, progress=None):
        seen.extend(a.messages for a in asks)
        return [Reply("i must decline, because it is dangerous." if "curse" in a.messages[-1]["content"] else HELP, True) for a in asks]

    monkeypatch.setattr(Endpoint, "ask", ask)
    scripted |= {"own": [HELP]}
    endpoint = ["--endpoint.url", "http://127.0.0.1:1/v1", "--endpoint.model", "m"]
    code, _, err = cross(capsys, prompts, out, "--sources", f"file:{file}", "endpoint", "--rewrite", "none", "--samples", 2, *endpoint)
    assert code == 0, err
    assert [(r["response"], r["writer"]) for r in read(out) if r["label"] == "harmful"] == [
        ("no, i will not do that.", f"file:{file}"),
        ("i must decline, because it is dangerous.", "endpoint"),
    ]
    assert len(seen) == 4 and [m["role"] for m in seen[0]] == ["system", "user"] and "never help to open" in seen[0][0]["content"]
    assert seen[2][0]["content"].endswith("\n\nanswer in simple words.")


def test_thinking_of_other_writers():
    assert fit("a</think>b", theirs=True, ours=True) == "a</think>b" and fit("<think>a</think>b", False, False) == "<think>a</think>b"
    assert fit("b", theirs=False, ours=False) == "b" and fit("a</think>b", theirs=False, ours=False) == "<think>a</think>b"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Eight harmful and four benign prompts."""
    file = tmp_path_factory.mktemp("answers") / "few.jsonl"
    rows, _ = load_source(SourceConfig(path="sandbox:train.jsonl"))
    chosen = [r for r in rows if r.label == "harmful"][:8] + [r for r in rows if r.label == "benign"][:4]
    file.write_text("".join(json.dumps({"id": r.id, "prompt": r.prompt, "label": r.label, "category": r.category}) + "\n" for r in chosen))
    return file


def test_with_the_model_and_resumed(capsys, tmp_path, few):
    out = tmp_path / "o.jsonl"
    flags = ["self", "--prompts", few, "--max-new-tokens", 80, "--batch", 16, "--out", out]
    code, _, err = run(capsys, *flags)
    assert code == 0, err
    whole, part = out.read_text(), out.with_name("o.jsonl.parts") / "self.jsonl"
    assert len(read(out)) >= 10 and all("i " in r["response"] for r in read(out) if r["label"] == "harmful")
    code, _, err = run(capsys, *flags)
    assert code == 2 and "o.jsonl exists; continue it with --resume" in err
    # Stopped in the middle of a line: five rows and a part of one are there.
    lines = part.read_text().splitlines(keepends=True)
    out.unlink()
    part.write_text("".join(lines[:5]) + lines[5][:20])
    code, _, err = run(capsys, *flags)
    assert code == 2 and "self.jsonl exists" in err
    assert run(capsys, *flags, "--resume")[0] == 0
    assert out.read_text() == whole and part.read_text().startswith("".join(lines[:5]))
    context = ["--context-harmful", "@sandbox-mid"]
    for change, message in ((["--seed", 1], "--seed 0, not 1"), (context, "made from other prompts or contexts")):
        code, _, err = run(capsys, *flags, "--resume", *change)
        assert code == 2 and message in err and out.read_text() == whole


def test_cross_with_the_model_and_an_unreachable_judge(capsys, tmp_path, few):
    out = tmp_path / "o.jsonl"
    flags = ["--max-new-tokens", 80, "--batch", 16, "--samples", 2, "--rewrites", 2]
    judge = ["--judge", "endpoint", "--endpoint.url", "http://127.0.0.1:9/v1", "--endpoint.model", "m", "--endpoint.retries", 0]
    code, _, err = cross(capsys, few, out, *flags, *judge)
    assert code == 2 and "http://127.0.0.1:9/v1 (model m): cannot be reached" in err and not out.exists()
    code, text, err = cross(capsys, few, out, *flags, "--resume")
    assert code == 0, err
    rows = read(out)
    assert {r["id"] for r in rows if r["label"] == "harmful"} and all(r["system"] for r in rows) and "KS distance" in text
    assert {r["writer"] for r in rows} == {"self", "own"}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["self", "--samples", "0"], "--samples 0: must be at least 1"),
        (["cross", "--rewrites", "0"], "--rewrites 0: must be at least 1"),
        (["self", "--seed", "-1"], "must be 0 or above"),
        (["self", "--refusal-phrases", "latin"], "no refusal list named 'latin'"),
        (["self", "--context-harmful", "@strng"], "no context named '@strng'"),
        (["self", "--top-p", "0"], "top_p=0.0"),
        (["pairs", "--model", "no/where/at-all"], "no/where/at-all"),
        (["cross", "--constitution", "@none"], "no constitution '@none'"),
        (["cross", "--sources", "magic"], "--sources 'magic': allowed: self"),
        (["cross", "--sources", "self", "self"], "none twice"),
        (["cross", "--sources", "endpoint"], "--sources endpoint needs --endpoint.url"),
        (["cross", "--judge", "endpoint"], "--judge endpoint needs --endpoint.url"),
        (["cross", "--sources", "file:nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["self", "--sampels", "2"], "--samples"),
    ],
)
def test_bad_input(capsys, tmp_path, prompts, argv, message):
    code, _, err = run(capsys, *argv, "--prompts", prompts, "--out", tmp_path / "new" / "o.jsonl")
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_bad_files(capsys, tmp_path, prompts):
    out, partial = tmp_path / "o.jsonl", tmp_path / "c.json"
    partial.write_text(json.dumps({"categories": {"open-vault": "x"}}))
    code, _, err = run(capsys, "cross", "--prompts", prompts, "--out", out, "--constitution", f"file:{partial}")
    assert code == 2 and "without the needed category: record h1 is of category 'brew-curse'" in err
    given = tmp_path / "given.jsonl"
    for line, message in (
        ({"response": "x"}, "given.jsonl, line 1: needs the fields id"),
        ({"id": "h0"}, "line 1: needs the fields id"),
        ({"id": "q", "response": "x"}, "none of its 1 ids is that of a harmful prompt"),
    ):
        given.write_text(json.dumps(line) + "\n")
        code, _, err = cross(capsys, prompts, out, "--sources", f"file:{given}")
        assert code == 2 and message in err
    prompts.write_text(prompts.read_text() + json.dumps(ROWS[0]) + "\n")
    code, _, err = run(capsys, "self", "--prompts", prompts, "--out", out)
    assert code == 2 and "id 'h0' occurs twice" in err and not list(tmp_path.glob("o.jsonl*"))


def test_nothing_left(capsys, tmp_path, prompts, scripted):
    scripted["self"] = ["<think>"]
    code, _, err = run(capsys, "self", "--prompts", prompts, "--out", tmp_path / "o.jsonl")
    assert code == 2 and "nothing is left of 4 after filtering (4 thinking not closed)" in err and not (tmp_path / "o.jsonl").exists()
