"""Whole runs of a tiny model: files, resume, one compilation, and every kind of bad input."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import make_model, make_prompts, run_config

from opsa_jax import config as c
from opsa_jax import session
from opsa_jax.errors import UserError
from opsa_jax.session import train
from opsa_jax.training import setup
from opsa_jax.training.checkpoint import Checkpoints


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict:
    return load_file(folder / "hf" / "model.safetensors")


MEASURED = ("tokens_per_second", "share_rollout", "share_update")


def without_times(metrics: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in metrics]


def test_a_run_leaves_its_files(tmp_path):
    folder = train(run_config(tmp_path, optim=c.OptimConfig(lr=3e-2), train=c.TrainConfig(steps=24, prompts_per_rollout=8, update_batch=8)))
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "checkpoints", "hf", "plot.png", "plot.svg"}
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["optim"]["lr"] == 3e-2 and saved["config_hash"] and saved["versions"]["jax"] and saved["command"]
    metrics = rows(folder)
    assert [r["step"] for r in metrics] == list(range(1, 25))
    shown = {"loss", "kl_forward", "kl_reverse", "grad_norm", "lr", "response_tokens", "finished", "share_rollout", "share_update"}
    assert shown <= set(metrics[0])
    losses = [r["loss"] for r in metrics]
    assert sum(losses[-6:]) / 6 < 0.85 * sum(losses[:3]) / 3


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stop_and_resume_is_the_uninterrupted_run(tmp_path, stop, monkeypatch):
    """Bit for bit: weights, losses, and the responses that were sampled. The run is killed right after the checkpoint at `stop`.

    The checkpoint is waited for: a kill before it is complete would only go on from the one before.
    """
    long = dataclasses.replace(run_config(tmp_path).train, steps=4, save_every=1)
    straight = train(run_config(tmp_path, out=str(tmp_path / "straight"), train=long))

    class Killed(Exception):
        pass

    real = setup.Run.next_draws
    taken, kept = [], []
    monkeypatch.setattr(session, "Checkpoints", lambda *args: kept.append(Checkpoints(*args)) or kept[-1])

    def dying(self):
        if len(taken) == stop:
            kept[0]._manager.wait_until_finished()
            raise Killed
        taken.append(1)
        return real(self)

    config = run_config(tmp_path, out=str(tmp_path / "stopped"), train=long)
    monkeypatch.setattr(setup.Run, "next_draws", dying)
    with pytest.raises(Killed):
        train(config)
    monkeypatch.setattr(setup.Run, "next_draws", real)
    folder = train(dataclasses.replace(config, resume=True))

    expected = weights(straight)
    for name, tensor in weights(folder).items():
        np.testing.assert_array_equal(tensor, expected[name])
    assert without_times(rows(folder)) == without_times(rows(straight))


def test_resume_across_updates_of_one_rollout_batch(tmp_path):
    """Two updates per rollout batch; steps that end in the middle of a batch are refused by rounding saves up to whole batches."""
    settings = c.TrainConfig(steps=6, prompts_per_rollout=8, update_batch=4, save_every=1)
    folder = train(run_config(tmp_path, train=settings))
    kept = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [4, 6]


def test_everything_compiles_once(tmp_path, monkeypatch):
    """Over a whole run with several rollout batches and updates, rollout and update have one compiled program each."""
    kept = []

    def keeping(*args):
        kept.append(setup.prepare(*args))
        return kept[0]

    monkeypatch.setattr(session, "prepare", keeping)
    session.train(run_config(tmp_path, train=c.TrainConfig(steps=6, prompts_per_rollout=8, update_batch=4)))
    run = kept[0][0]
    assert (run.sample._cache_size(), run.update._cache_size()) == (1, 1)


def test_lora_run_exports_merged_and_adapter(tmp_path):
    model = dataclasses.replace(run_config(tmp_path).model, lora=c.LoraConfig(rank=2))
    merged = train(run_config(tmp_path, model=model, out=str(tmp_path / "merged")))
    assert (merged / "hf" / "model.safetensors").is_file()
    config = run_config(tmp_path, model=model, out=str(tmp_path / "adapter"), export=c.ExportConfig(merge_lora=False))
    adapter = train(config)
    assert (adapter / "hf" / "adapter_model.safetensors").is_file()


def test_tensorboard_files(tmp_path):
    folder = train(run_config(tmp_path, log=c.LogConfig(tensorboard=True, samples_every=0, progress=False)))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]


def bad_model(tmp_path, change):
    folder = make_model(tmp_path / "bad")
    change(folder)
    return c.ModelConfig(path=str(folder))


def edit_config(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BAD_INPUT = {
    "missing checkpoint": (lambda t: {"model": c.ModelConfig(path=str(t / "nowhere"))}, "nowhere"),
    "missing weights file": (lambda t: {"model": bad_model(t, lambda f: (f / "model.safetensors").unlink())}, "model.safetensors"),
    "truncated safetensors": (lambda t: {"model": bad_model(t, truncate)}, "model.safetensors.*copy or download"),
    "wrong shape": (lambda t: {"model": bad_model(t, edit_config(intermediate_size=48))}, "shape"),
    "unknown architecture": (lambda t: {"model": bad_model(t, edit_config(model_type="gpt9"))}, "architecture 'gpt9'"),
    "unknown config field": (lambda t: {"model": bad_model(t, edit_config(logit_softcap=30))}, "logit_softcap"),
    "unsupported rope": (
        lambda t: {"model": bad_model(t, edit_config(rope_scaling={"rope_type": "yarn", "factor": 2.0}))},
        "rope type 'yarn'.*allowed",
    ),
    "malformed jsonl": (lambda t: {"data": prompts(t, '{"prompt": "a", "label": "harmful"}\n{"prompt": ')}, "bad.jsonl.*line 2"),
    "bad label": (lambda t: {"data": prompts(t, '{"prompt": "a", "label": "evil"}\n')}, "evil.*harmful, benign"),
    "empty dataset": (lambda t: {"data": prompts(t, "")}, "no records"),
    "missing data": (lambda t: {"data": c.DataConfig(sources=(c.SourceConfig(path=str(t / "no.jsonl")),))}, "no.jsonl"),
    "unknown context": (lambda t: {"teacher": c.TeacherConfig(context_harmful="@strictt")}, "did you mean 'strict'"),
    "empty context file": (lambda t: {"teacher": c.TeacherConfig(context_harmful=f"file:{empty(t)}")}, "empty"),
    "teacher of another tokenizer": (
        lambda t: {"teacher": c.TeacherConfig(weights="checkpoint", path=other_tokenizer(t))},
        "one tokenizer",
    ),
    "vocabulary of teacher and student": (
        lambda t: {"teacher": c.TeacherConfig(weights="checkpoint", path=more_tokens(t))},
        "token 'glue' has id none for the student",
    ),
    "prompt too long": (lambda t: {"data": too_long(t)}, "max-prompt-tokens 3"),
    "mesh that does not fit": (lambda t: {"mesh": c.MeshConfig(data=3, fsdp=1)}, "does not fit"),
}


def prompts(tmp_path, text):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    return c.DataConfig(sources=(c.SourceConfig(path=str(file)),))


def empty(tmp_path):
    file = tmp_path / "empty.txt"
    file.write_text(" \n")
    return file


def other_tokenizer(tmp_path):
    folder = make_model(tmp_path / "other")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"paint"', '"glue"'))
    return str(folder)


def more_tokens(tmp_path):
    """The student's tokenizer with a token on top."""
    folder = make_model(tmp_path / "other", vocab_extra=1)
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text())
    tokens["model"]["vocab"]["glue"] = len(tokens["model"]["vocab"])
    path.write_text(json.dumps(tokens))
    return str(folder)


def too_long(tmp_path):
    return c.DataConfig(sources=(c.SourceConfig(path=str(make_prompts(tmp_path / "long.jsonl"))),), max_prompt_tokens=3)


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, name):
    make, says = BAD_INPUT[name]
    config = run_config(tmp_path, **make(tmp_path))
    with pytest.raises(UserError, match=says) as e:
        train(config)
    assert "\n" not in str(e.value)
    assert not Path(config.out).exists()


def test_run_directory_is_protected(tmp_path):
    config = run_config(tmp_path)
    train(config)
    before = {p: p.stat().st_mtime_ns for p in Path(config.out).rglob("*")}
    with pytest.raises(UserError, match="exists; continue it with --resume"):
        train(config)
    other = dataclasses.replace(config, resume=True, optim=dataclasses.replace(config.optim, lr=5e-3))
    with pytest.raises(UserError, match=r"optim\.lr=0.01, now 0.005"):
        train(other)
    assert before == {p: p.stat().st_mtime_ns for p in Path(config.out).rglob("*")}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train(run_config(tmp_path, out=str(tmp_path / "file" / "run")))


def test_entry_point_exits_with_2(tmp_path):
    """The same through the command line: one line on stderr."""
    argv = ["--model.path", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "opsa_jax.train", *argv], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
    assert not (tmp_path / "run").exists()


def test_export_of_the_last_checkpoint(tmp_path):
    """`convert export RUN` writes what the run itself exported; a folder that holds no run is told."""
    from opsa_jax.session import export_run

    folder = train(run_config(tmp_path))
    export_run(folder, tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, weights(folder)[name])
    with pytest.raises(UserError, match="not a run directory"):
        export_run(tmp_path, tmp_path / "third")
