"""Recipes, flags and validation: every mistake is one line that says what to do."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from opsa_jax import recipes
from opsa_jax.config import RunConfig
from opsa_jax.errors import UserError, did_you_mean


def run(*argv: str) -> RunConfig:
    return recipes.parse_run(list(argv), "train", "")[0]


def test_flags_set_nested_fields():
    config = run("--optim.lr", "2e-6", "--model.lora.targets", "q", "v", "--data.sources.1.weight", "3")
    assert (config.optim.lr, config.model.lora.targets, config.data.sources[1].weight) == (2e-6, ("q", "v"), 3.0)
    assert run() == RunConfig()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--optim.lrr", "1"], "--optim.lrr.*did you mean --optim.lr"),
        (["--optim.lr", "fast"], "--optim.lr.*'fast'"),
        (["--objective.divergence", "revers"], "revers.*forward"),
        (["--optim.lr"], "Missing value.*--optim.lr"),
        (["--train.update-batch", "7"], "update-batch 7.*32"),
        (["--train.micro-batch", "5"], "micro-batch 5.*32"),
        (["--rollout.micro-batch", "5"], "rollout.micro-batch 5: must divide the sequences of a rollout batch, .* = 32"),
        (["--objective.mix", "1.5"], "objective.mix 1.5.*between 0 and 1"),
        (["--objective.divergence", "jsd", "--objective.beta", "1"], "objective.beta 1.0.*strictly"),
        (["--rollout.top-p", "0"], "top-p 0.0"),
        (["--teacher.weights", "checkpoint"], "needs --teacher.path"),
        (["--data.sources.0.label", "bad"], "sources.0.label bad.*harmful, benign"),
        (["--data.sources.0.where", "label"], "FIELD=VALUE"),
        (["--model.lora.targets", "q", "x"], "targets x.*allowed"),
        (["--train.steps", "-1"], "train.steps -1"),
        (["no_such_recipe.py"], "no recipe file"),
    ],
)
def test_mistakes_are_one_line(argv, says):
    with pytest.raises(UserError, match=says) as e:
        run(*argv)
    assert "\n" not in str(e.value)


def test_recipe_file(tmp_path):
    recipe = tmp_path / "r.py"
    recipe.write_text("from opsa_jax.config import *\ndef get_config():\n    return RunConfig(seed=5, optim=OptimConfig(lr=1e-5))\n")
    config = run(str(recipe), "--seed", "7")
    assert (config.seed, config.optim.lr) == (7, 1e-5)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "from opsa_jax.config import *\ndef get_config():\n    return RunConfig(optim=OptimConfig(lrr=1))",
            "OptimConfig has no field 'lrr'.*'lr'",
        ),
        ("def get_config():\n    return 3", "must return a RunConfig, got int"),
        ("x = 1", "get_config"),
        ("def get_config(:", "SyntaxError"),
    ],
)
def test_recipe_mistakes(tmp_path, body, says):
    recipe = tmp_path / "r.py"
    recipe.write_text(body)
    with pytest.raises(UserError, match=says):
        run(str(recipe))


def test_every_field_is_documented():
    """tyro shows the string below a field; `--help` must have one for each."""
    shown = subprocess.run([sys.executable, "-m", "opsa_jax.train", "--help"], capture_output=True, text=True, check=True).stdout
    text = " ".join(shown.replace("│", " ").split())

    def flags(kind, prefix=""):
        for f in dataclasses.fields(kind):
            value = getattr(kind, f.name)
            if dataclasses.is_dataclass(value):
                yield from flags(value, f"{prefix}{f.name}.")
            elif f.name != "sources":
                yield prefix + f.name.replace("_", "-")

    for flag in flags(RunConfig()):
        entry = re.search(rf"--{re.escape(flag)}(?:, --\S+| [A-Z{{\[]\S*) (.*?)\(default", text)
        assert entry and len(entry.group(1).split()) >= 2, f"--{flag} has no documentation"


def test_print_config_and_exit_codes():
    command = [sys.executable, "-m", "opsa_jax.train"]
    shown = subprocess.run([*command, "--seed", "3", "--print-config"], capture_output=True, text=True)
    assert shown.returncode == 0 and json.loads(shown.stdout)["seed"] == 3
    wrong = subprocess.run([*command, "--optim.lrr", "1"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1


def test_hash_ignores_what_does_not_change_the_result():
    base = RunConfig()
    assert recipes.config_hash(base) == recipes.config_hash(dataclasses.replace(base, out="elsewhere", resume=True))
    assert recipes.config_hash(base) != recipes.config_hash(dataclasses.replace(base, seed=1))


def test_did_you_mean():
    assert did_you_mean("forwrd", ["forward", "reverse"]) == "; did you mean 'forward'?"
    assert did_you_mean("zzz", ["b", "a"]) == "; allowed: a, b"


def test_a_saved_config_reads_back():
    config = run("--seed", "4", "--model.lora.targets", "q", "--data.sources.0.weight", "2")
    assert recipes.from_dict(json.loads(json.dumps(recipes.to_dict(config)))) == config
    with pytest.raises(UserError, match="OptimConfig has no field 'lrr'"):
        recipes.from_dict({"optim": {"lrr": 1}})


def test_console_script(monkeypatch, capsys):
    from opsa_jax import cli

    monkeypatch.setattr(sys, "argv", ["opsa", "trian"])
    assert cli.main() == 2 and "did you mean 'train'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["opsa", "train", "--seed", "-1"])
    assert cli.main() == 2 and capsys.readouterr().err.startswith("opsa train: error: --seed -1")
