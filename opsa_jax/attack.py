"""Attack a checkpoint, to see how robust its refusals are: `python -m opsa_jax.attack --attacks prefill template gcg --out DIR`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from opsa_jax.cli import entry, parse
from opsa_jax.config import MeshConfig
from opsa_jax.errors import UserError
from opsa_jax.evals.attacks.settings import ATTACKS, AttackSettings, DurabilityConfig, check
from opsa_jax.evals.endpoint import EndpointConfig

DESCRIPTION = """\
Attack a checkpoint, to see how robust its refusals are. Writes results.json, transcripts.jsonl and, per attack, every answer and
verdict as they come, so --resume continues a stopped run. Mean ASR is the share of attempts that succeed, any of N the share of prompts
on which one of them does; intervals are 95 % Wilson intervals over prompts. Attacks:

""" + "\n".join(f"  {name:14s} {text}" for name, text in ATTACKS.items())


@dataclass(frozen=True)
class AttackConfig:
    out: str
    """Folder for results, transcripts and unfinished work."""
    attacks: tuple[str, ...] = ("direct", "prefill", "template")
    """Names from the list above, separated by spaces or commas."""
    model: str = "sandbox:base"
    """Checkpoint: a local folder in Hugging Face format, a hub name (org/name), or sandbox:base."""
    revision: str = "main"
    """Branch, tag or commit of a hub checkpoint."""
    prompts: str = "sandbox:eval.jsonl"
    """Harmful prompts: a .jsonl, .csv, .parquet or .arrayrecord file, hf:NAME, tfds:NAME, or sandbox:FILE; records need no label."""
    where: str = "auto"
    """Keep only records whose field has this value, written FIELD=VALUE; auto is metric=asr_seen for sandbox:eval.jsonl and else all."""
    prompt_field: str = "prompt"
    """Field with the user's text."""
    split: str = "train"
    """Split of an hf: or tfds: set."""
    limit: int = 0
    """Use only the first this many records; 0 is all."""
    judge: str = "auto"
    """Who says what succeeded: phrases:LIST, guard:NAME=PATH (llama-guard-3, wildguard, harmbench, qwen3guard; PATH a folder or
    hub name), endpoint:safety, endpoint:strongreject; auto is the refusal phrases of the embedded world or of English."""
    judge_endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Where an endpoint judge is."""
    max_new_tokens: int = 64
    """Room for the answers."""
    temperature: float = 0.0
    """Sampling temperature of the attacked model; 0 is greedy."""
    batch: int = 64
    """Answers decoded at the same time."""
    seed: int = 0
    """Seed of sampling, of the proposals of GCG, and of the choice of dialogues."""
    settings: Annotated[AttackSettings, tyro.conf.arg(name="")] = field(default_factory=AttackSettings)
    durability: DurabilityConfig = field(default_factory=DurabilityConfig)
    """Fine-tune for some updates, and attack again."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Reasoning switch of the chat template."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and matrix products: auto is bfloat16 on TPU and GPU and float32 on CPU."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices."""
    resume: bool = False
    """Continue the run in --out: finished answers, verdicts and suffixes are kept."""
    show_harmful: bool = False
    """Print an example of a successful attempt in full instead of redacting it."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    config = parse(AttackConfig, None, _split(argv), "python -m opsa_jax.attack", DESCRIPTION)
    run(config)
    return 0


def _split(argv: list[str]) -> list[str]:
    """Names after --attacks may also be separated by commas.

    >>> _split(["--attacks", "direct,gcg", "pap", "--out", "a,b"])
    ['--attacks', 'direct', 'gcg', 'pap', '--out', 'a,b']
    """
    made, inside = [], False
    for word in argv:
        name, equals, value = word.partition("=")
        flag = word.startswith("--")
        inside = (name in ("--attacks", "--durability.attacks")) if flag else inside
        if inside and flag:
            made += [name, *(v for v in value.split(",") if v)] if equals else [name]
        else:
            made += [v for v in word.split(",") if v] if inside else [word]
    return made


def run(config: AttackConfig) -> dict[str, Any]:
    """Attack and show; returns the results by attack.

    Raises:
        UserError: bad input; an attacker that does not answer. Finished rows are kept.
    """
    check(config.attacks, config.settings)
    for name, value, least in (("limit", config.limit, 0), ("seed", config.seed, 0), ("batch", config.batch, 1)):
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if config.max_new_tokens < 1 or config.temperature < 0:
        raise UserError("--max-new-tokens must be at least 1, and --temperature at least 0")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not config.resume:
        raise UserError(f"output folder {out} exists; continue it with --resume, or choose another with --out")
    # jax and the model code are imported only now: --help and mistakes in flags answer at once.
    from opsa_jax.evals.attacks import durability
    from opsa_jax.stages.attack import attack

    durability.check(config.durability)
    return attack(config)


if __name__ == "__main__":
    raise SystemExit(entry(main))
