"""SIGTERM at any point of a run: it ends saved, with exit code 75, and resumed it is the uninterrupted run bit for bit."""

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
from jobs import Job, recipe, succeeded
from safetensors.numpy import load_file
from tiny import make_model, run_config

from opsa_jax import config as c
from opsa_jax import session
from opsa_jax.errors import Preempted, UserError
from opsa_jax.session import train
from opsa_jax.training import loop, setup
from opsa_jax.training.checkpoint import Checkpoints

TIMES = ("tokens_per_second", "share_rollout", "share_update")


def notice():
    os.kill(os.getpid(), signal.SIGTERM)


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def same(folder, straight):
    expected = load_file(straight / "hf" / "model.safetensors")
    for name, tensor in load_file(folder / "hf" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, expected[name])
    assert rows(folder) == rows(straight)
    return True


_made = {}


@pytest.fixture
def straight(tmp_path_factory):
    """An uninterrupted run, made once (on the one device that a test has): two updates per rollout batch."""
    if "run" not in _made:
        _made["run"] = train(config_of(tmp_path_factory.mktemp("straight")))
    return _made["run"]


def config_of(folder, out=None):
    train = c.TrainConfig(steps=6, prompts_per_rollout=8, update_batch=4)
    return run_config(folder, train=train, out=str(out or folder / "run"))


def in_rollout(monkeypatch):
    real, calls = setup.Run.rollout, []

    def rollout(self, *args, **kwargs):
        calls.append(1)
        found = real(self, *args, **kwargs)
        if len(calls) == 2:  # launched, and not yet finished
            notice()
        return found

    monkeypatch.setattr(setup.Run, "rollout", rollout)


def in_update(monkeypatch):
    real, calls = session.prepare, []

    def prepare(*args):
        run, state = real(*args)

        def update(*inputs):
            calls.append(1)
            found = run.update(*inputs)
            if len(calls) == 3:  # the first of the second rollout batch
                notice()
            return found

        return dataclasses.replace(run, update=update), state

    monkeypatch.setattr(session, "prepare", prepare)


def in_save(monkeypatch):
    real = Checkpoints.save

    def save(self, step, *args):
        real(self, step, *args)
        if step == 2:  # under way in the background
            notice()

    monkeypatch.setattr(Checkpoints, "save", save)


@pytest.mark.parametrize(("when", "stops"), [(in_rollout, 4), (in_update, 4), (in_save, 4)])
def test_preempted_and_resumed_is_the_uninterrupted_run(tmp_path, straight, monkeypatch, when, stops):
    config = config_of(straight.parent, tmp_path / "run")
    if when is in_save:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, save_every=1))
    with monkeypatch.context() as m:
        when(m)
        with pytest.raises(Preempted, match=f"update {stops} of 6 is saved; .*--resume"):
            train(config)
    assert [r["step"] for r in rows(tmp_path / "run")] == list(range(1, stops + 1))
    assert not (tmp_path / "run" / "hf").exists()
    assert same(train(dataclasses.replace(config, resume=True)), straight)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("when", ["base", "trained"])
def test_preempted_while_evaluated(tmp_path, straight, monkeypatch, when):
    suite = tmp_path / "suite.jsonl"
    row = {"id": "e", "metric": "capability", "split": "test", "label": "benign", "prompt": "help", "expect": "x"}
    suite.write_text(json.dumps(row) + "\n")
    config = dataclasses.replace(config_of(straight.parent, tmp_path / "run"), evals=c.EvalConfig(suite=str(suite)))
    with monkeypatch.context() as m:
        m.setattr(session, "evaluate", lambda *args, progress, **kwargs: (notice(), progress(1, 3)))
        if when == "trained":
            (tmp_path / "run" / "evals").mkdir(parents=True)
            m.setattr(session.rundir, "check", lambda config: False)
            (tmp_path / "run" / "evals" / "base.json").write_text("{}")
        with pytest.raises(Preempted, match=f"while the {when} model was evaluated"):
            train(config)
    assert not (tmp_path / "run" / "results.json").exists()
    assert same(train(dataclasses.replace(config, resume=True, evals=c.EvalConfig(suite=""))), straight)


def test_a_notice_in_the_last_updates_changes_nothing(tmp_path, straight, monkeypatch):
    real = loop._save_due
    monkeypatch.setattr(loop, "_save_due", lambda every, done, *rest: (done == 6 and notice()) or real(every, done, *rest))
    assert same(train(config_of(straight.parent, tmp_path / "run")), straight)


@pytest.mark.slow
def test_the_command_ends_with_75_and_resumes(tmp_path):
    """A real process, sent SIGTERM from outside at some point of its updates."""
    settings = "c.TrainConfig(steps=80, prompts_per_rollout=8, update_batch=4)"
    run_config(tmp_path)  # model and prompts
    file = recipe(tmp_path, train=settings)
    with Job(tmp_path, file) as job:
        job.until((tmp_path / "run" / "metrics.jsonl").is_file)
        job.until(lambda: len(rows(tmp_path / "run")) > 4)
        job.signal()
        assert job.wait() == [75], job.log()
    assert job.log().splitlines()[-1].startswith("opsa train: preempted: update")
    with Job(tmp_path, file, 1, 1, "--resume") as job:
        succeeded(job)
    with Job(tmp_path, recipe(tmp_path, train=settings), 1, 1, "--out", "straight") as job:
        succeeded(job)
    assert same(tmp_path / "run", tmp_path / "straight")


# --- checkpoints --------------------------------------------------------------------------------------------------------------------


def test_checkpoints_elsewhere(tmp_path):
    config = config_of(tmp_path)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, checkpoints=str(tmp_path / "elsewhere" / "a")))
    folder = train(config)
    assert not (folder / "checkpoints").exists() and (tmp_path / "elsewhere" / "a" / "6").is_dir()
    with pytest.raises(UserError, match="holds the checkpoints of another run"):
        train(dataclasses.replace(config, out=str(tmp_path / "second")))
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("{}/file/x", "cannot be written: NotADirectoryError"),
        ("ftp://host/x", "must be a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"),
        ("gs://", "must be a folder"),
    ],
)
def test_a_place_that_cannot_be_written(tmp_path, place, says):
    (tmp_path / "file").write_text("")
    config = run_config(tmp_path, train=c.TrainConfig(steps=2, prompts_per_rollout=8, update_batch=8, checkpoints=place.format(tmp_path)))
    with pytest.raises(UserError, match=says) as e:
        train(config)
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("place", "package"), [("gs://bucket/run", "gcsfs"), ("s3://bucket/run", "s3fs")])
def test_object_stores_name_their_package(tmp_path, monkeypatch, place, package):
    from etils import epath

    def missing(self, *args, **kwargs):
        raise ImportError(f"Please install {package} to access this")

    monkeypatch.setattr(type(epath.Path(place)), "mkdir", missing)
    config = run_config(tmp_path, train=c.TrainConfig(steps=2, prompts_per_rollout=8, update_batch=8, checkpoints=place))
    with pytest.raises(UserError, match=f"needs the package {package}; install it with: pip install {package}"):
        train(config)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A stand-in for S3: s3:// addresses are files below a folder, through the same interface of files (fsspec)."""
    import fsspec
    from etils import epath
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    class Store(DirFileSystem):
        def _join(self, path):
            strip = lambda p: p.removeprefix("s3://").strip("/")  # noqa: E731
            return super()._join([strip(p) for p in path] if isinstance(path, list) else strip(path))

    root = tmp_path / "s3"
    root.mkdir()
    store = Store(str(root), LocalFileSystem(auto_mkdir=True))
    real = fsspec.filesystem
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **kwargs: store if name == "s3" else real(name, **kwargs))
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    yield root / "bucket" / "run"
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


def test_checkpoints_on_s3(tmp_path, straight, bucket, monkeypatch):
    """Preempted on one machine, resumed on another that has the run directory without its checkpoints."""
    config = config_of(straight.parent, tmp_path / "run")
    settings = dataclasses.replace(config.train, checkpoints="s3://bucket/run", save_every=2, keep=1)
    config = dataclasses.replace(config, train=settings)
    with monkeypatch.context() as m:
        in_update(m)
        with pytest.raises(Preempted, match="update 4 of 6 is saved"):
            train(config)
    assert [p.name for p in bucket.iterdir()] == ["4"] and (bucket / "4" / "COMPLETE").is_file()
    (bucket / "5").mkdir()  # cut short: it does not count
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert same(train(dataclasses.replace(config, resume=True)), straight)
    assert sorted(p.name for p in bucket.iterdir() if (p / "COMPLETE").exists()) == ["6"]
    with pytest.raises(UserError, match="holds the checkpoints of another run"):
        train(dataclasses.replace(config, out=str(tmp_path / "second")))


def test_no_permission_is_one_line(tmp_path, monkeypatch):
    from etils import epath

    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Forbidden:\n does not have storage.objects.create access")

    monkeypatch.setattr(type(epath.Path("gs://bucket")), "mkdir", refused)
    config = run_config(tmp_path, train=c.TrainConfig(steps=2, prompts_per_rollout=8, update_batch=8, checkpoints="gs://bucket/run"))
    with pytest.raises(UserError, match=r"gs://bucket/run cannot be written: PermissionError: Forbidden: does not.*check permission") as e:
        train(config)
    assert "\n" not in str(e.value)


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    config = config_of(tmp_path)
    train(config)
    shutil.rmtree(config.model.path)
    make_model(tmp_path / "model", vocab_extra=8)
    with pytest.raises(UserError, match=r"checkpoint 6 in .* does not fit this run") as e:
        train(dataclasses.replace(config, resume=True))
    assert "\n" not in str(e.value)
