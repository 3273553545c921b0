"""Prepare a safe teacher: a refusal direction and the safety tokens.

    python -m opsa_jax.steer
    python -m opsa_jax.steer --model Qwen/Qwen3-4B-Instruct-2507 --harmful.path harmful.jsonl --harmless.path harmless.jsonl
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Literal

from opsa_jax.cli import entry, parse
from opsa_jax.config import EvalConfig, MeshConfig, SourceConfig
from opsa_jax.errors import UserError

DESCRIPTION = """\
The preparation stage of SafeSteer (arXiv 2606.02530). Finds the direction whose removal makes the model refuse least (difference of
means), shows what the steered model does, and votes for the tokens that steering raises most. Writes direction.safetensors (for
`generate --steering` and training), tokens.json, scores.json with a heat map, inspect.jsonl, report.txt and settings.json, all at the end.

Defaults shown are those of the preset: `published` is the recipe of the paper; `sandbox` is what works on the embedded model, which
decides about ten tokens into its think block, so that nothing is to be found at the last tokens of the prompt."""


@dataclass(frozen=True)
class SteerConfig:
    out: str = "runs/steer"
    """Folder to write; it must not exist."""
    preset: Literal["auto", "published", "sandbox"] = "auto"
    """Defaults of the other flags: auto is sandbox for sandbox:base and published for every other model."""
    model: str = "sandbox:base"
    """Checkpoint: a local folder in Hugging Face format, a hub name (org/name), or sandbox:base."""
    revision: str = "main"
    """Branch, tag or commit of a hub checkpoint."""
    mode: Literal["direction", "prompt"] = "direction"
    """Who the safe teacher is: direction is the model steered along a direction; prompt is the model with --context, no direction."""
    harmful: SourceConfig = field(default_factory=lambda: SourceConfig(path="", label="harmful"))
    """Harmful prompts."""
    harmless: SourceConfig = field(default_factory=lambda: SourceConfig(path="", label="benign"))
    """Harmless prompts."""
    train_prompts: int = 128
    """Prompts of each kind that the means are taken over."""
    val_prompts: int = 32
    """Further prompts of each kind, for the scores, the vote and the inspection."""
    contrast: Literal["harmful-harmless", "context-none"] = "harmful-harmless"
    """Positive minus negative rows: harmful minus harmless prompts (published), or harmful prompts with --context minus without it."""
    context: str = "You are a responsible assistant: politely refuse any request that could cause harm."
    """Safety context of context-none and of mode prompt: a text, @name of a shipped context, file:PATH."""
    placement: Literal["system", "user"] = "system"
    """Where the context goes."""
    position: str = "template"
    """Where candidates are taken: template (last tokens of the prompt, after the user's text), or answer:K or answer:TEXT, which append
    the model's own greedy answer to the prompt, its first K tokens or up to the first TEXT (answer:<think>)."""
    positions: int = 0
    """Candidate tokens, counted back from the end of that place; 0 is all tokens of the template, and 1 with answer:."""
    score_at: str = ""
    """Where the refusal score is measured, written like --position; empty is the same place."""
    score_after: str = ""
    """Text forced after that place before scoring, for models whose first refusing word is a shared one (" i" of "i must refuse")."""
    refusal_tokens: tuple[str, ...] = ("I", "As", "No", "It")
    """First tokens of refusals at the place of scoring; each must be one token."""
    sign_filter: bool = True
    """Keep only positive rows with a refusal score above 0 and negative rows below 0 (pairs, with context-none)."""
    max_kl: float = 0.1
    """Discard candidates whose ablation changes the next token of harmless prompts by more than this KL (nats)."""
    layer_share: float = 0.8
    """Discard candidates of layers from int(this * layers) on."""
    fallback: Literal["none", "induce"] = "none"
    """When no candidate is left: stop, or take the one with the highest induce score among those discarded for KL or induce score."""
    coefficients: tuple[float, ...] = (1.0,)
    """Factors of the direction to inspect. The first one is the teacher's, used for the vote; the induce score always has factor 1."""
    vote_prompts: Literal["harmless", "harmful"] = "harmless"
    """Validation prompts that are answered for the vote."""
    samples: int = 8
    """Answers per prompt for the vote."""
    horizon: int = 7
    """H: next-token distributions compared per answer (H - 1 tokens are sampled); published: 7 for Qwen, 5 for Llama."""
    top_votes: int = 200
    """Tokens each position votes for."""
    tokens: int = 50
    """Size of the safety-token set."""
    ranking: Literal["votes", "mean-delta"] = "votes"
    """Order of tokens: number of votes, or mean log-probability gained."""
    min_steered_prob: float = 1e-8
    """Ban tokens whose mean probability under the teacher is below this; published: 1e-8 for Qwen, 1e-7 for Llama."""
    inspect: int = 32
    """Prompts per metric on which base and teacher are compared; 0 skips it."""
    evals: EvalConfig = field(
        default_factory=lambda: EvalConfig(suite="", max_new_tokens=256, refusal_phrases="english-v1", batch=64)
    )
    """How they are compared; without a suite on the validation prompts (asr and over-refusal only)."""
    show_harmful: bool = False
    """Print answers to harmful prompts in full instead of redacting what complies."""
    batch: int = 32
    """Rows per forward pass."""
    seed: int = 0
    """Seed of the choice of prompts and of sampling."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Reasoning switch of the chat template."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and matrix products: auto is bfloat16 on TPU and GPU and float32 on CPU."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices."""


PUBLISHED = SteerConfig()
SANDBOX = SteerConfig(
    harmful=SourceConfig(where="label=harmful"),
    harmless=SourceConfig(where="label=benign"),
    contrast="context-none",
    context="@sandbox-strong",
    position="answer:.",  # the model thinks "the user asks to ... ." and then decides: "i must refuse." or "i can help."
    positions=4,
    score_after=" i",
    refusal_tokens=(" must", " should"),
    fallback="induce",  # the best candidate comes close to the limit of the KL; what is next best works too
    coefficients=(1.5,),
    vote_prompts="harmful",  # this steering changes nothing on harmless prompts
    horizon=24,  # up to the first words of the answer after the think block
    top_votes=10,  # 200 would be two fifths of the vocabulary, and without the next limit most of it is noise
    min_steered_prob=1e-3,
    evals=EvalConfig(batch=64),
)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cfg = parse(SteerConfig, preset(argv), argv, "python -m opsa_jax.steer", DESCRIPTION)
    check(cfg)
    from opsa_jax.stages.steer import prepare

    prepare(cfg)
    return 0


def preset(argv: list[str]) -> SteerConfig:
    """The defaults that --preset and --model of a command line stand for.

    >>> preset(["--model", "sandbox:base"]).contrast, preset(["--model=some/model"]).contrast
    ('context-none', 'harmful-harmless')
    """
    given = {"--preset": "auto", "--model": SANDBOX.model}
    for flag, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = flag.partition("=")
        if name in given:
            given[name] = value if equals else following
    sandbox = given["--preset"] == "sandbox" or (given["--preset"] == "auto" and given["--model"] == SANDBOX.model)
    return dataclasses.replace(SANDBOX if sandbox else PUBLISHED, preset=PUBLISHED.preset)


def check(cfg: SteerConfig) -> None:
    """What can be known wrong without loading anything.

    Raises:
        UserError: naming the flag.
    """
    for name, low in {
        "train_prompts": 1, "val_prompts": 1, "positions": 0, "samples": 1, "horizon": 2, "top_votes": 1, "tokens": 1, "inspect": 0,
        "batch": 1, "seed": 0,
    }.items():  # fmt: skip
        if getattr(cfg, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least {low}")
    if not 0 < cfg.layer_share <= 1:
        raise UserError(f"--layer-share {cfg.layer_share}: must be above 0 and at most 1")
    if not cfg.coefficients:
        raise UserError("--coefficients: give at least one factor, the teacher's")
    if (cfg.mode == "prompt" or cfg.contrast == "context-none") and not cfg.context:
        raise UserError(f"--context is empty, but {'--mode prompt' if cfg.mode == 'prompt' else '--contrast context-none'} needs one")
    for name in ("harmful", "harmless"):
        if not getattr(cfg, name).path:
            raise UserError(f"--{name}.path: name a file of {name} prompts (.jsonl, .csv, .parquet), hf:NAME, tfds:NAME or sandbox:FILE")


if __name__ == "__main__":
    raise SystemExit(entry(main))
