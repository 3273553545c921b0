"""`opsa attack` from the command line on a tiny model: files, table, redaction, resuming, fine-tuning, one-line mistakes."""

import json

import pytest
from attack_models import tiny

from opsa_jax import attack
from opsa_jax.cli import entry
from opsa_jax.evals.attacks import runner
from opsa_jax.parallel import mesh
from opsa_jax.stages import attack as attack_run
from opsa_jax.training import setup


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    tiny.make_model(folder / "model")
    tiny.make_prompts(folder / "prompts.jsonl")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    (folder / "answered.jsonl").write_text("".join(json.dumps(r | {"response": "here is how you can"}) + "\n" for r in rows))
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    import functools

    import jax

    for module in (attack_run, setup):
        monkeypatch.setattr(module, "make_mesh", functools.partial(mesh.make_mesh, devices=jax.devices()[:1]))


def arguments(folder, out, *more):
    common = ["--model", str(folder / "model"), "--prompts", str(folder / "prompts.jsonl"), "--where", "label=harmful", "--limit", "3"]
    return [*common, "--max-new-tokens", "5", "--batch", "8", "--out", str(out), *more]


GCG = ("--gcg.suffix-tokens", "4", "--gcg.steps", "2", "--gcg.candidates", "4", "--gcg.top-k", "4", "--gcg.target", "here is how")


def test_whole_run_and_resume(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "o"
    more = ("--attacks", "direct,prefill", "gcg", *GCG, "--durability.steps", "1", "2", "--durability.attacks", "direct")
    more += ("--durability.data", str(folder / "answered.jsonl"), "--durability.batch", "4", "--durability.lr", "0.05")
    assert entry(attack.main, arguments(folder, out, *more)) == 0
    shown = capsys.readouterr().out
    assert "mean ASR" in shown and "after 2" in shown and "redacted" in shown
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["direct", "prefill", "gcg", "overall", "direct after 1", "direct after 2"]
    assert results["prefill"]["attempts"] == 6 and results["gcg"]["any"]["n"] == 3
    rows = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    assert len(rows) == 3 + 6 + 3 and {r["attack"] for r in rows} == {"direct", "prefill", "gcg"}
    successes = [r["response"] for r in rows if r["success"] and len(r["response"].split()) > 2]
    assert successes and not any(text in shown for text in successes)
    # Training on it makes the model say it: the probe trained the model that it then asked.
    tuned = [json.loads(line)["response"] for line in (out / "durability" / "after-2" / "transcripts.jsonl").read_text().splitlines()]
    assert tuned != [r["response"] for r in rows if r["attack"] == "direct"]

    assert entry(attack.main, arguments(folder, out, *more)) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    made = []
    start = runner.Runner.__init__
    monkeypatch.setattr(runner.Runner, "__init__", lambda self, *a, **k: (start(self, *a, **k), made.append(self))[0])
    (out / "results.json").unlink()
    assert entry(attack.main, arguments(folder, out, *more, "--resume")) == 0
    assert json.loads((out / "results.json").read_text()) == results
    assert len(made) == 3 and sum(m.engine.stats.prompts + m.judged for m in made) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attacks", "templates"], "no attack named 'templates'; did you mean 'template'?"),
        (["--attacks", "pap"], "pap needs a model that writes: give --attacker.path"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--judge", "phrase:english-v1"], "write phrases:LIST, guard:NAME=PATH or endpoint:KIND"),
        (["--judge", "phrases:english"], "no refusal list named 'english'; did you mean 'english-v1'?"),
        (["--judge", "guard:wildguard"], "write guard:wildguard=PATH"),
        (["--judge", "guard:wildguard=/nowhere/at/all"], "/nowhere/at/all"),
        (["--judge", "endpoint:safety"], "endpoint URL ''"),
        (["--attacks", "template", "--template.file", "missing.txt"], "missing.txt of templates cannot be read"),
        (["--gcg.steps", "0"], "--gcg.steps 0: must be at least 1"),
        (["--durability.steps", "5", "2"], "in rising order"),
        (["--durability.steps", "1"], "name --durability.data FILE"),
        (["--attacks", "pair", "--attacker.endpoint.url", "http://127.0.0.1:9/v1"], "name the model"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(folder, tmp_path, capsys, more, message):
    out = tmp_path / "o"
    assert entry(attack.main, arguments(folder, out, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not out.exists() or not any(out.iterdir())


def test_endpoint_down_keeps_finished_rows(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    endpoint = ("--attacker.endpoint.url", "http://127.0.0.1:9/v1", "--attacker.endpoint.model", "m", "--attacker.endpoint.retries", "0")
    out = tmp_path / "o"
    assert entry(attack.main, arguments(folder, out, "--attacks", "direct", "pap", *endpoint)) == 2
    error = capsys.readouterr().err
    assert "cannot be reached" in error and error.count("\n") == 1
    assert len((out / "direct.verdicts.jsonl").read_text().splitlines()) == 3
