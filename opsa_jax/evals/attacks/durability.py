"""Fine-tuning durability: a few updates of SFT on somebody's data, by the project's own training code, and the attacks once more.

Even harmless data can undo safety training (Qi et al. 2023, arXiv 2310.03693); a model whose refusals are shallow loses them first.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from opsa_jax import config as c
from opsa_jax.data.loaders import load_source, write_jsonl
from opsa_jax.errors import UserError, did_you_mean
from opsa_jax.evals.attacks.base import Attempt, Static
from opsa_jax.evals.attacks.runner import Asking, Runner, Target
from opsa_jax.evals.attacks.settings import ATTACKS, DurabilityConfig
from opsa_jax.evals.judges import PhraseJudge
from opsa_jax.training.setup import prepare
from opsa_jax.training.state import student_params


def check(cfg: DurabilityConfig) -> None:
    """Mistakes that show without loading anything.

    Raises:
        UserError: the first of them.
    """
    if any(k < 1 for k in cfg.steps) or list(cfg.steps) != sorted(set(cfg.steps)):
        raise UserError(f"--durability.steps {' '.join(map(str, cfg.steps))}: give numbers of updates from 1 up, in rising order")
    if cfg.steps and not cfg.attacks:
        raise UserError("--durability.attacks: name at least one")
    for name in cfg.attacks:
        if name not in ATTACKS:
            raise UserError(f"--durability.attacks: no attack named {name!r}{did_you_mean(name, ATTACKS)}")
    if cfg.lora_rank < 0 or cfg.batch < 1 or cfg.max_new_tokens < 1 or cfg.limit < 0 or not cfg.lr > 0:
        raise UserError("--durability: batch, max-new-tokens and lr must be above 0, lora-rank and limit 0 or above")
    if cfg.steps and cfg.data == "self" and not cfg.prompts:
        raise UserError("--durability.data self needs --durability.prompts FILE: prompts whose answers the model is trained on")


def source(cfg: DurabilityConfig, sandbox: bool, own: Callable[[], Path]) -> c.SourceConfig:
    """The data that `cfg.data` means; `own()` writes the model's own answers and gives their file."""
    if cfg.data == "auto" and sandbox:
        return c.SourceConfig(path="sandbox:external.jsonl", where=cfg.where or "label=benign", limit=cfg.limit)
    if cfg.data in ("auto", "self"):
        if not cfg.prompts:
            raise UserError("--durability.steps: name --durability.data FILE to fine-tune on, or --durability.prompts FILE for self")
        return c.SourceConfig(path=str(own()), limit=cfg.limit)
    return c.SourceConfig(path=cfg.data, where=cfg.where, limit=cfg.limit)


def own_answers(target: Target, cfg: DurabilityConfig, asking: Asking, file: Path) -> Path:
    """The model's own answers to the prompts, as a file of prompt, label and response. An existing file is kept."""
    if not file.exists():
        records, _ = load_source(c.SourceConfig(path=cfg.prompts, where=cfg.where, limit=cfg.limit, label="benign"))
        asked = Static("own", lambda r: [Attempt(r.id, 0, r.prompt, r.system)], {})
        runner = Runner(target, PhraseJudge(), replace(asking, max_new_tokens=cfg.max_new_tokens), {})
        results = runner.run(asked, records)
        rows = [{"id": r.attempt.id, "prompt": r.attempt.prompt, "label": "benign", "response": r.response} for r in results]
        write_jsonl(file, [row for row in rows if row["response"].strip()])
    return file


def run_config(model: c.ModelConfig, data: c.SourceConfig, cfg: DurabilityConfig, seed: int, mesh: c.MeshConfig) -> c.RunConfig:
    """SFT with a constant rate, so that k updates are the first k of any longer run. Nothing of it is written."""
    return c.RunConfig(
        seed=seed,
        model=replace(model, lora=c.LoraConfig(rank=cfg.lora_rank)),
        teacher=c.TeacherConfig(context_harmful="", context_benign=""),
        data=c.DataConfig(sources=(data,), long_prompts="skip"),
        rollout=c.RolloutConfig(writer="file", max_new_tokens=cfg.max_new_tokens),
        objective=c.ObjectiveConfig(loss="nll"),
        optim=c.OptimConfig(lr=cfg.lr, schedule="constant", warmup=0.0),
        train=c.TrainConfig(steps=cfg.steps[-1], prompts_per_rollout=cfg.batch, update_batch=cfg.batch),
        mesh=mesh,
        log=c.LogConfig(samples_every=0, progress=False),
        evals=c.EvalConfig(suite=""),
    )


def finetuned(config: c.RunConfig, steps: tuple[int, ...], say: Callable[[str], None] = lambda line: None) -> Iterator[tuple[int, Target]]:
    """(k, the model after k updates) for each k of `steps`. A model is to be used before the next is asked for: updates donate it.

    Raises:
        UserError: whatever training finds wrong with the data.
    """
    run, state = prepare(config, say)
    with jax.set_mesh(run.mesh):
        for k in range(1, steps[-1] + 1):
            _, batch = run.rollout(state, run.next_draws(), round_number=k - 1)
            state, _ = run.update(state, run.frozen, batch, np.int32(0))
            if k in steps:
                yield k, Target(student_params(state, run.frozen), run.student.cfg, run.chat)
