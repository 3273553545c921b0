"""Score a checkpoint: `python -m opsa_jax.evaluate --model DIR --suite sandbox`."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from opsa_jax.cli import entry, parse
from opsa_jax.config import EvalConfig, MeshConfig
from opsa_jax.evals.endpoint import EndpointConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a checkpoint: attack success, over-refusal, capability, length and diversity, with 95 % intervals.

    Examples:
      python -m opsa_jax.evaluate --model runs/sandbox-opsa/hf --out results
      python -m opsa_jax.evaluate --model Qwen/Qwen3-0.6B --suite safety,overrefusal,gsm8k --data-dir sets --missing skip --out results
      python -m opsa_jax.evaluate --model DIR --suite harmbench --judge guard:wildguard=allenai/wildguard --out results
    """

    model: str = "sandbox:base"
    """Checkpoint: a local folder in Hugging Face format, a hub name, or sandbox:base."""
    revision: str = "main"
    """Branch, tag or commit of a hub checkpoint."""
    out: str = ""
    """Folder for transcripts.jsonl (grows row by row), results.json and evaluation.json; empty prints the table only."""
    resume: bool = False
    """Continue the evaluation in the folder at --out: finished rows are kept and not made again."""
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
    missing: Literal["error", "skip"] = "error"
    """What a set of the suite that cannot be had does: stop with how to get it, or be left out with a line."""
    choice: Literal["auto", "likelihood", "generate"] = "auto"
    """Multiple choice: the likeliest letter, or the letter that a written answer names; auto is the benchmark's own."""
    maths: Literal["auto", "math-verify", "plain"] = "auto"
    """Comparison of mathematical answers: the package math-verify (extra: eval), or text and value; auto takes what is installed."""
    judge: tuple[str, ...] = ()
    """Judges of requests besides the refusal phrases: phrases:LIST, guard:NAME=PATH (llama-guard-3, wildguard, harmbench,
    qwen3guard; llama-guard-4 is understood, but no llama4 checkpoint loads; PATH a folder or hub name), endpoint:safety,
    endpoint:strongreject."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Where the endpoint judges are."""
    allow_code_execution: bool = False
    """Run code that the model wrote (humaneval, mbpp) in a process with limits; see opsa_jax/evals/execution.py."""
    code_seconds: float = 10.0
    """Seconds a program may take."""
    code_megabytes: int = 1024
    """Memory a program may take."""
    lm_eval: str = ""
    """Tasks of lm-eval to run as well (extra: eval), separated by commas: names such as ifeval, or .yaml files."""
    leakage: tuple[str, ...] = ()
    """Do not evaluate: look for prompts of the suite in these training files (as in --data.sources of training)."""
    leakage_field: str = "prompt"
    """Field of the training files with the user's text."""
    show_list: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Do not evaluate: print the benchmarks with source, license, size and metric."""
    evals: tyro.conf.OmitArgPrefixes[EvalConfig] = field(
        default_factory=lambda: EvalConfig(max_new_tokens=0, refusal_phrases="auto")
    )
    mesh: MeshConfig = field(default_factory=MeshConfig)


def main(argv: list[str] | None = None) -> int:
    config = parse(EvaluateConfig, None, sys.argv[1:] if argv is None else argv, "python -m opsa_jax.evaluate", EvaluateConfig.__doc__)
    run(config)
    return 0


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate and show; returns the results by metric (nothing with --list, counts with --leakage).

    Raises:
        UserError: no such checkpoint, suite, judge or context; an output folder that holds results already; an endpoint that is down.
    """
    from opsa_jax.stages import evaluate as stage

    if config.show_list:
        stage.show_benchmarks()
        return {}
    if config.leakage:
        return stage.check_leakage(config)
    return stage.evaluate(config)


if __name__ == "__main__":
    raise SystemExit(entry(main))
