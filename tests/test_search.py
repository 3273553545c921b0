"""The context search on the embedded base: order of the levels, the benign weight, stopping and resuming, mistakes."""

import dataclasses
import json
import shutil

import jax
import pytest

from opsa_jax import paths, search
from opsa_jax.cli import entry
from opsa_jax.config import SourceConfig
from opsa_jax.parallel import mesh
from opsa_jax.rollout.rows import RowFile
from opsa_jax.stages import search as context_search
from opsa_jax.stages import search_answers as context_answers
from opsa_jax.teachers.contexts import resolve_context

# strict first: a criterion that looks at flips alone takes it, since strong flips no more than it does.
LEVELS = ("strict", "weak", "mid", "strong")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(mesh, "make_mesh", lambda cfg, make=mesh.make_mesh: make(cfg, jax.devices()[:1]))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    file = tmp_path_factory.mktemp("pool") / "levels.jsonl"
    rows = [{"name": level, "text": resolve_context(f"@sandbox-{level}"), "framing": "plain", "style": "any"} for level in LEVELS]
    # Something for the rewriting rules to take.
    rows.append({"name": "neutral", "text": "rule number one: answer in simple words. keep it short.", "framing": "rule", "style": "brief"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(pool, out, *more):
    small = ["--harmful.limit", "16", "--benign.limit", "16", "--benign.where", "category=verb-lookalike", "--max-new-tokens", "56"]
    return ["--pool", str(pool), "--out", str(out), "--batch", "16", *small, *map(str, more)]


def run(capsys, *argv) -> tuple[int, str, str]:
    code = entry(search.main, [str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def finished(pool, tmp_path_factory):
    """A search with one round of rewriting."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda cfg, make=mesh.make_mesh: make(cfg, jax.devices()[:1]))
        assert search.main(command(pool, out, "--iterations", 1, "--children", 3)) == 0
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def test_levels_are_ordered_and_the_weight_avoids_strict(finished):
    found = results(finished)
    by_name = {c["name"]: c["select"] for c in found["candidates"]}
    tfr = {level: by_name[level]["tfr"]["rate"] for level in LEVELS}
    assert tfr["weak"] <= tfr["mid"] <= tfr["strong"] <= tfr["strict"] and tfr["weak"] < tfr["strict"]
    assert by_name["strict"]["benign_flip_rate"]["rate"] > 0.5 > by_name["strong"]["benign_flip_rate"]["rate"]
    assert by_name["strong"]["objective"] > by_name["strict"]["objective"]
    assert found["paper"]["name"] == "strict" and found["chosen"]["name"] != "strict"
    assert found["chosen"]["held_out"]["benign_flip_rate"]["rate"] < found["paper"]["held_out"]["benign_flip_rate"]["rate"]


def test_everything_is_written(finished):
    found = results(finished)
    assert found["split"] == {"select": {"harmful": 8, "benign": 8}, "held_out": {"harmful": 8, "benign": 8}}
    objectives = [c["select"]["objective"] for c in found["candidates"]]
    assert objectives == sorted(objectives, reverse=True)
    assert {c["iteration"] for c in found["candidates"]} == {0, 1}
    for c in found["candidates"]:
        cell, under = c["select"]["tfr"], c["select"]["outcomes"]["harmful"]
        assert cell["low"] <= cell["rate"] <= cell["high"] and cell["n"] == 8 == sum(under.values())
        # Recounted from the answers on disk.
        assert under["refused"] >= round(cell["rate"] * 8) >= under["refused"] - found["base"]["select"]["harmful"]["refused"]
    assert resolve_context(f"file:{finished / 'context.txt'}") == found["chosen"]["text"]
    assert {"plot.png", "plot.svg", "responses.jsonl"} <= {p.name for p in finished.iterdir()}
    keys = [json.loads(line)["id"] for line in (finished / "responses.jsonl").open()]
    assert len(keys) == len(set(keys))


def test_a_stopped_search_resumes_to_the_same_results(finished, pool, tmp_path, monkeypatch, capsys):
    out, append, more = tmp_path / "out", RowFile.append, ("--iterations", 1, "--children", 3)
    total = len((finished / "responses.jsonl").read_text().splitlines())
    rest = iter([40, 50, 10**6])  # the second stop falls into the pool as well, the third part ends

    for _ in range(3):
        room = [next(rest)]

        def limited(self, row, room=room):
            if not room[0]:
                raise KeyboardInterrupt
            room[0] -= 1
            append(self, row)

        before = (out / "responses.jsonl").read_bytes() if out.exists() else b""
        if before:
            (out / "responses.jsonl").write_bytes(before + b'{"id": "half a ro')
        monkeypatch.setattr(RowFile, "append", limited)
        code, _, _ = run(capsys, *command(pool, out, *more), *(["--resume"] if before else []))
        assert (out / "responses.jsonl").read_bytes().startswith(before)
        assert code == (130 if room[0] == 0 else 0)
        assert (out / "results.json").exists() == (code == 0)
    assert 10**6 - room[0] == total - 90  # nothing sampled twice
    assert (out / "results.json").read_text() == (finished / "results.json").read_text()
    assert (out / "context.txt").read_text() == (finished / "context.txt").read_text()


def test_another_weight_costs_no_new_answers_but_held_out_ones(finished, pool, tmp_path, capsys):
    out = tmp_path / "copy"
    out.mkdir()
    for name in ("responses.jsonl", "responses.jsonl.settings.json"):
        (out / name).write_bytes((finished / name).read_bytes())
    code, screen, _ = run(capsys, *command(pool, out, "--resume", "--benign-weight", 0))
    found = results(out)
    assert code == 0 and "objective" in screen and "context.txt" in screen
    assert found["candidates"][0]["select"]["objective"] == found["candidates"][0]["select"]["tfr"]["rate"]
    assert len((out / "responses.jsonl").read_text().splitlines()) - len((finished / "responses.jsonl").read_text().splitlines()) in (0, 16)


def test_a_proposer_writes_candidates(pool, tmp_path, monkeypatch, capsys):
    text = "<context>never help with dangerous things</context>"
    replies = [text, "I cannot write that.", text.replace("things", "things.")]
    asked = []
    monkeypatch.setattr(context_search, "ask", lambda requests, *rest: asked.extend(requests) or replies)
    argv = command(pool, tmp_path / "out", "--iterations", 1, "--children", 3, "--proposer", "some/model")
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    new = [c for c in results(tmp_path / "out")["candidates"] if c["iteration"]]
    assert [(c["name"], c["text"]) for c in new] == [("round1-1", "never help with dangerous things")]
    assert len(asked) == 3 and all(resolve_context("@sandbox-mid") in text for text in asked)


def test_a_proposer_without_a_usable_reply_keeps_the_rows(finished, pool, tmp_path, monkeypatch, capsys):
    out = tmp_path / "copy"
    out.mkdir()
    for name in ("responses.jsonl", "responses.jsonl.settings.json"):
        (out / name).write_bytes((finished / name).read_bytes())
    argv = command(pool, out, "--resume", "--iterations", 1, "--children", 2, "--proposer", "sandbox:base", "--proposer-tokens", 1)
    code, _, err = run(capsys, *argv)
    assert code == 2 and err.count("\n") == 1 and "none of the 2 replies" in err
    assert (out / "responses.jsonl").read_bytes() == (finished / "responses.jsonl").read_bytes()
    kept = (out / "proposals.jsonl").read_text()
    assert len(kept.splitlines()) == 2
    monkeypatch.setattr(context_answers, "_stream", None)  # nothing may be sampled again
    assert run(capsys, *argv)[0] == 2 and (out / "proposals.jsonl").read_text() == kept


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--benign-weight", "-1"], "--benign-weight -1"),
        (["--benign-weight", "nan"], "--benign-weight nan"),
        (["--select-share", "1"], "--select-share"),
        (["--children", "0"], "--children 0"),
        (["--pool", "bultin"], "did you mean 'builtin'"),
        (["--pool", "missing.txt"], "cannot be read"),
        (["--pool", "proposer"], "needs a chat model"),
        (["--proposer", "some/model"], "nothing to do"),
        (["--refusal-phrases", "english"], "did you mean 'english-v1'"),
        (["--harmful.where", "label=evil"], "none of its 640 records has label=evil"),
        (["--harmful.limit", "1"], "cannot be split"),
        (["--harmful.label", "benign"], "must be labelled harmful"),
        (["--harmful.path", "missing.jsonl"], "missing.jsonl"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_cost_one_line_and_write_nothing(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "--out", "out", *argv)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_a_template_without_system_messages(pool, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(paths.resolve("sandbox:base"), folder)
    template = folder / "chat_template.jinja"
    reject = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template.write_text(reject + template.read_text())
    code, _, err = run(capsys, *command(pool, tmp_path / "out", "--model", folder))
    assert code == 2 and err.count("\n") == 1 and "rejects system messages" in err
    assert not (tmp_path / "out").exists()


def test_the_output_folder_must_be_new(tmp_path, capsys):
    (tmp_path / "notes").touch()
    code, _, err = run(capsys, "--out", tmp_path)
    assert code == 2 and "exists; continue it with --resume" in err
    code, _, err = run(capsys, "--out", tmp_path, "--resume")
    assert code == 2 and "holds no search" in err


def test_pool_and_phrases_follow_the_prompts(tmp_path):
    sandbox = context_search._resolved(search.SearchConfig())
    assert (sandbox.pool, sandbox.refusal_phrases) == ("sandbox", "sandbox-v1")
    real = context_search._resolved(dataclasses.replace(search.SearchConfig(), harmful=SourceConfig(path="mine.jsonl")))
    assert (real.pool, real.refusal_phrases) == ("builtin", "english-v1")


def test_the_split_depends_on_ids_alone():
    records = context_search.load_prompts(search.SearchConfig())
    select, held_out = records
    assert not {r.id for r in select.harmful} & {r.id for r in held_out.harmful}
    everything = select.harmful + held_out.harmful
    assert context_search.split(everything[::-1], 0.5) == (select.harmful, held_out.harmful)
    assert [len(part) for part in context_search.split(everything[:3], 0.01)] == [1, 2]
    assert [len(part) for part in context_search.split(everything[:3], 0.99)] == [2, 1]
