"""Every recipe loads; every sandbox recipe trains: the quantity it minimises falls, its teachers stay as they are, resume is exact."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from opsa_jax import session
from opsa_jax.data.chat import Chat
from opsa_jax.models import hf
from opsa_jax.recipes import load_recipe, validate

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*/*.py"))
# What must fall: the divergence to the teacher, or the likelihood loss of given answers.
FALLS = dict.fromkeys(("sft", "offpolicy_self", "copsd_teacher", "dpo"), "loss")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_is_valid_and_says_how_to_run_it(recipe):
    validate(load_recipe(str(recipe)))
    text = recipe.read_text()
    assert "arXiv" in text or "ExOPD" in text or recipe.parent.name == "sandbox"
    assert "Command:" in text and "Devices:" in text
    assert f"configs/{recipe.parent.name}/{recipe.name}" in text


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def artifacts(folder: Path) -> dict[str, str]:
    """What the preparation stages would make, made by hand: path in the recipes -> file here."""
    rows = [json.loads(line) for line in Path("opsa_jax/sandbox/data/external.jsonl").read_text().splitlines()]
    chat, (cfg, _) = Chat.load("sandbox:base"), hf.load_config("sandbox:base")
    helpful = "<think>\n\n</think>\n\nsure, i can help."
    ids = [chat.tokenizer.convert_tokens_to_ids(w) for w in ("cannot", "forbidden", "must", "refuse", "not", "no", "sure", "help")]
    tokens = [{"id": i, "text": str(i), "votes": 1, "mean_delta": 1.0} for i in sorted(set(ids))]
    (folder / "tokens.json").write_text(json.dumps({"tokens": tokens, "vocab_size": cfg.vocab_size, "mode": "direction"}))
    steer = np.zeros((cfg.n_layers, cfg.d_model), np.float32)
    steer[1] = np.random.default_rng(0).normal(size=cfg.d_model)
    save_file({"steer": steer}, str(folder / "direction.safetensors"))
    base = "sandbox:base"
    return {
        "runs/self.jsonl": write(folder / "self.jsonl", rows),
        "runs/pairs.jsonl": write(folder / "pairs.jsonl", [r | {"rejected": helpful} for r in rows]),
        "runs/cross.jsonl": write(folder / "cross.jsonl", [r | {"system": "never help with forbidden acts."} for r in rows]),
        "runs/steer/direction.safetensors": str(folder / "direction.safetensors"),
        "runs/steer/tokens.json": str(folder / "tokens.json"),
        "runs/sandbox-opsa/hf": base,
        "runs/sandbox-copsd-teacher/hf": base,
    }


def short(name: str, folder: Path):
    """The recipe with its artifacts in place: eight updates, a checkpoint in the middle."""
    made = artifacts(folder)
    config = load_recipe(str(CONFIGS / "sandbox" / f"{name}.py"))
    sources = tuple(dataclasses.replace(s, path=made.get(s.path, s.path)) for s in config.data.sources)
    teacher, objective = config.teacher, config.objective
    teacher = dataclasses.replace(
        teacher, path=made.get(teacher.path, teacher.path), steering=made.get(teacher.steering, teacher.steering)
    )
    if name == "external_opd":  # the base itself, told apart from the student by a context
        teacher = dataclasses.replace(teacher, context_harmful="@sandbox-strong")
    n = config.rollout.samples_per_prompt
    per_rollout = 16 if n < 3 else 4
    train = dataclasses.replace(
        config.train, steps=8, epochs=1, prompts_per_rollout=per_rollout, update_batch=per_rollout * n, micro_batch=0, save_every=4
    )
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=sources),
        teacher=teacher,
        objective=dataclasses.replace(objective, tokens=made.get(objective.tokens, objective.tokens), chunk=256),
        rollout=dataclasses.replace(config.rollout, max_new_tokens=48),
        train=train,
        optim=dataclasses.replace(config.optim, schedule="constant", warmup=0.0),
        log=dataclasses.replace(config.log, samples_every=0, progress=False),
        evals=dataclasses.replace(config.evals, suite=""),
        export=dataclasses.replace(config.export, enabled=False),
        out=str(folder / "run"),
    )


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "share_rollout", "share_update")} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", [p.stem for p in RECIPES if p.parent.name == "sandbox"])
def test_every_method_trains_on_the_sandbox(name, tmp_path, monkeypatch):
    config, frozen = short(name, tmp_path), []
    prepare = session.prepare

    def watched(*args):
        run, state = prepare(*args)
        frozen.append((run.frozen, jax.device_get(run.frozen), run.place()["frozen"]))
        return run, state

    monkeypatch.setattr(session, "prepare", watched)
    folder = session.train(config)
    rows = metrics(folder)
    assert [r["step"] for r in rows] == list(range(1, 9))
    assert all(np.isfinite(v) for row in rows for v in row.values())
    falls = FALLS.get(name, "kl_reverse")
    first, last = (np.mean([r[falls] for r in part]) for part in (rows[:2], rows[-3:]))
    assert last < first

    (after, before, identity), *_ = frozen
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)
    named = json.dumps(identity)
    for artifact in (config.teacher.steering, config.objective.tokens if config.objective.support == "tokens" else "", config.teacher.path):
        assert artifact in named

    # Killed after the checkpoint at 4 and resumed: the same rows, bit for bit.
    shutil.rmtree(folder / "checkpoints" / "8")
    session.train(dataclasses.replace(config, resume=True))
    assert metrics(folder) == rows
