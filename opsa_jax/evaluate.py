"""Score a checkpoint: `python -m opsa_jax.evaluate --model DIR --suite sandbox`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from opsa_jax.cli import entry, parse
from opsa_jax.config import EvalConfig, MeshConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a checkpoint on a suite: attack success, over-refusal, capability, length and diversity, with 95 % intervals.

    Example: python -m opsa_jax.evaluate --model runs/sandbox-opsa/hf --out results
    """

    model: str = "sandbox:base"
    """Checkpoint: a local folder in Hugging Face format, a hub name, or sandbox:base."""
    revision: str = "main"
    """Branch, tag or commit of a hub checkpoint."""
    out: str = ""
    """Folder for results.json and transcripts.jsonl; empty prints the table only."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and matrix products: auto is bfloat16 on TPU and GPU and float32 on CPU."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Reasoning switch of the chat template."""
    context: str = ""
    """Context put before every prompt, to score a teacher: a text, @name, file:PATH."""
    placement: Literal["system", "user"] = "system"
    """Where the context goes."""
    seed: int = 0
    """Seed of sampling."""
    evals: tyro.conf.OmitArgPrefixes[EvalConfig] = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def main(argv: list[str] | None = None) -> int:
    config = parse(EvaluateConfig, None, sys.argv[1:] if argv is None else argv, "python -m opsa_jax.evaluate", EvaluateConfig.__doc__)
    run(config)
    return 0


def run(config: EvaluateConfig) -> dict:
    """Evaluate and show; returns the results by metric.

    Raises:
        UserError: no such checkpoint, suite or context; an output folder that holds results already.
    """
    import jax
    from rich.console import Console

    from opsa_jax.config import ModelConfig
    from opsa_jax.data.chat import Chat
    from opsa_jax.data.loaders import write_jsonl
    from opsa_jax.errors import UserError
    from opsa_jax.evals.runner import evaluate, results_table
    from opsa_jax.evals.scorers import refusal_list
    from opsa_jax.evals.suite import load_suite
    from opsa_jax.models import hf
    from opsa_jax.parallel.mesh import make_mesh
    from opsa_jax.teachers.contexts import resolve_context
    from opsa_jax.training.rundir import write_json
    from opsa_jax.training.setup import open_checkpoint

    out = Path(config.out)
    if config.out and (out / "results.json").exists():
        raise UserError(f"{out / 'results.json'} exists; choose another folder with --out")
    refusal_list(config.evals.refusal_phrases)
    load_suite(config.evals.suite)
    context = resolve_context(config.context)
    mesh = make_mesh(config.mesh)
    model = open_checkpoint(ModelConfig(path=config.model, revision=config.revision, compute_dtype=config.dtype), config.model)
    chat = Chat.load(str(model.folder), thinking=config.thinking)
    console = Console(highlight=False)
    with jax.set_mesh(mesh):
        params = hf.load_params(model.folder, model.cfg, model.cfg.compute_dtype, mesh)
        results, transcripts = evaluate(params, model.cfg, chat, config.evals, config.seed, context, config.placement)
    if config.out:
        out.mkdir(parents=True, exist_ok=True)
        write_jsonl(out / "transcripts.jsonl", transcripts)
        write_json(out / "results.json", results)
    console.print(results_table({config.model: results}))
    return results


if __name__ == "__main__":
    raise SystemExit(entry(main))
