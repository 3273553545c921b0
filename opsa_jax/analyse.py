"""Look inside a trained model: `python -m opsa_jax.analyse RUN`."""

import sys
from dataclasses import dataclass, field
from typing import Literal

import tyro

from opsa_jax.cli import entry, parse
from opsa_jax.config import MeshConfig

DESCRIPTION = """\
Analyse a finished run, or any checkpoints, beside their base:

  python -m opsa_jax.analyse runs/sandbox-opsa
  python -m opsa_jax.analyse runs/opsa --models sft=runs/sft/hf --prompts-per-kind 128
  python -m opsa_jax.analyse --base Qwen/Qwen3-0.6B --models trained=DIR --context-harmful @strict --context-benign @helpful \\
      --suite prompts.jsonl --out analysis

token-kl   KL between the teacher (the base with its context) and each model, and between each model and the base, at every token of
           responses that the base writes: by position, by token type, and for some responses token by token (OPSA, App. C)
drift      hidden states on general prompts against those of the base: two principal components, distances (SafeSteer)
collapse   length, diversity, token entropy and shares of refusals of sampled answers to general prompts (COPSD)
teacher    the run's suite answered by the teacher, for the report's table

Writes into RUN/analysis (or --out): JSON and CSV of every analysis, and its plot as PNG and SVG; `python -m opsa_jax.report` picks
them up. What an earlier call wrote there is replaced, analysis by analysis."""

Part = Literal["token-kl", "drift", "collapse", "teacher"]


@dataclass(frozen=True)
class AnalyseConfig:
    run: tyro.conf.Positional[str] = ""
    """Run directory: gives base, trained model (RUN/hf), contexts, sampling and suite. Empty takes them from the flags."""
    parts: tuple[Part, ...] = ("token-kl", "drift", "collapse", "teacher")
    """What to compute."""
    base: str = ""
    """Checkpoint that everything is compared with; empty takes the run's --model.path."""
    models: tuple[str, ...] = ()
    """Checkpoints to analyse besides the run's trained model, written NAME=PATH."""
    out: str = ""
    """Output folder; empty is RUN/analysis."""
    suite: str = ""
    """Suite (or JSONL file of its form) that the prompts come from; empty takes the run's."""
    context_harmful: str | None = None
    """Context of the teacher for harmful prompts: a text, @name, file:PATH, or '' for none. Not given: the run's."""
    context_benign: str | None = None
    """Context of the teacher for all other prompts, likewise."""
    prompts_per_kind: int = 100
    """Prompts of each kind: harmful, benign (harmless look-alikes) and capability; 0 is all (the paper takes 500 harmful ones)."""
    room: int = 512
    """Positions in the curves."""
    minimum: int = 15
    """Occurrences from which a token type is listed."""
    shown: int = 4
    """Responses of each kind that are kept token by token for the report's heat map."""
    layer: int = -1
    """drift: input of this block; -1 is the state after the last norm."""
    drift_at: Literal["prompt", "response"] = "response"
    """drift: state at the last prompt token, or the mean over the tokens of the base's response."""
    samples: int = 4
    """collapse: samples per prompt (the paper takes 16)."""
    collapse_prompts: int = 50
    """collapse: prompts."""
    batch: int = 32
    """Rows per forward pass."""
    chunk: int = 1024
    """Tokens whose logits exist at the same time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and matrix products: auto is bfloat16 on TPU and GPU and float32 on CPU."""
    seed: int = 0
    """Seed of sampling."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    config = parse(AnalyseConfig, None, argv, "python -m opsa_jax.analyse", DESCRIPTION)
    from opsa_jax.stages.analyse import analyse

    analyse(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(entry(main))
