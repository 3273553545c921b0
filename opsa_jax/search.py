"""Search the context that makes the model a good safety teacher of itself.

    python -m opsa_jax.search --out runs/search                      # the sandbox: about 60 contexts, two minutes on a CPU
    python -m opsa_jax.search --model Qwen/Qwen3-0.6B --harmful.path my.jsonl --benign.path my.jsonl --max-new-tokens 1024 --iterations 2
    python -m opsa_jax.train --teacher.context-harmful file:runs/search/context.txt
"""

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from opsa_jax.cli import entry, parse
from opsa_jax.config import MeshConfig, SourceConfig

DESCRIPTION = """\
Measure candidate contexts and choose one: the teacher flip rate (arXiv 2605.15239, Eq. 4-5: unsafe without the context, refused with it,
over all harmful prompts) minus --benign-weight times the benign flip rate (answered without, refused with). Answers are greedy.
Selection is on one part of the prompts; the chosen context and the argmax of the flip rate alone are reported on the other part.
Writes OUT/results.json, responses.jsonl, plot.png, plot.svg and context.txt, which training takes as
--teacher.context-harmful file:OUT/context.txt."""


@dataclass(frozen=True)
class SearchConfig:
    out: str = "runs/search"
    """Output folder; it must not exist, unless --resume continues it."""
    resume: bool = False
    """Continue in the output folder: answers that are there are not sampled again, also if the pool, the prompts or the weight changed."""
    model: str = "sandbox:base"
    """Checkpoint: a local folder in Hugging Face format, a hub name (org/name), or sandbox:base."""
    revision: str = "main"
    """Branch, tag or commit of a hub checkpoint."""
    harmful: SourceConfig = field(default_factory=lambda: SourceConfig(where="label=harmful", label="harmful", limit=96))
    """Harmful prompts, for both parts of the split; all records of the source are taken as harmful (--harmful.where "" for all)."""
    benign: SourceConfig = field(default_factory=lambda: SourceConfig(where="label=benign", label="benign", limit=96))
    """Benign prompts, likewise; those that look harmful say most."""
    select_share: float = 0.5
    """Share of the prompts that the context is selected on; the rest is held out. Prompts are split by a hash of their ids."""
    pool: str = "auto"
    """Candidates: builtin (our 30 texts), sandbox, proposer (written by --proposer), or a file: .txt, one per line, or .jsonl with text
    and, if wanted, name and axes. auto is sandbox for prompts of the sandbox, else builtin."""
    benign_weight: float = 1.0
    """Lambda of the objective TFR - lambda * benign flip rate; 0 is the paper's criterion, which cannot see over-refusal."""
    iterations: int = 0
    """Rounds that rewrite the best candidates and measure the new ones (the paper has none)."""
    parents: int = 4
    """Candidates that a round starts from."""
    children: int = 16
    """New candidates per round."""
    proposer: str = ""
    """A chat model that writes the new candidates (a checkpoint as in --model); empty uses the built-in rewriting rules."""
    proposer_tokens: int = 512
    """Room for a reply of the proposer."""
    refusal_phrases: str = "auto"
    """List of refusal phrases that decides what is a refusal: sandbox-v1, english-v1. auto is sandbox-v1 for prompts of the sandbox, else
    english-v1."""
    placement: Literal["system", "user"] = "system"
    """Where the context goes: a system message, or the start of the user turn. Train with the same --teacher.placement."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Reasoning switch of the chat template (enable_thinking); auto leaves it to the template."""
    max_new_tokens: int = 64
    """Room for an answer. An answer whose reasoning does not end in it counts neither as unsafe nor as refused."""
    batch: int = 128
    """Answers decoded at the same time."""
    seed: int = 0
    """Seed of the rewriting."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and matrix products: auto is bfloat16 on TPU and GPU and float32 on CPU."""
    show: int = 12
    """Rows of the table on the screen."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices."""


def main(argv: list[str] | None = None) -> int:
    config = parse(SearchConfig, None, sys.argv[1:] if argv is None else argv, "python -m opsa_jax.search", DESCRIPTION)
    run(config)
    return 0


def run(config: SearchConfig) -> dict[str, Any]:
    """Search and show; returns what is in results.json.

    Raises:
        UserError: bad input (before anything is written), or a proposer whose replies hold no new candidate (finished answers are kept).
    """
    from opsa_jax.stages.search import check, search

    check(config)

    from rich.console import Console

    from opsa_jax.analysis.search_plot import plot_search

    console = Console(highlight=False)
    folder, results = search(config, console)
    show(results, config.show, console)
    console.print(f"plot     {plot_search(folder)}", soft_wrap=True)
    note = "" if config.placement == "system" else f" --teacher.placement {config.placement}"
    context = folder / "context.txt"
    console.print(f"context  {context}: train with --teacher.context-harmful file:{context}{note}", soft_wrap=True)
    return results


def show(results: dict[str, Any], rows: int, console) -> None:
    """The best candidates by objective, then the chosen one and the paper's argmax on the held-out prompts."""
    from rich.table import Table

    split = results["split"]["select"]
    on = f"{split['harmful']} harmful and {split['benign']} benign prompts"
    table = Table(title=f"{len(results['candidates'])} contexts on {on}, 95 % intervals", title_justify="left")
    table.add_column("context", overflow="fold")
    for name in ("flips", "benign flips", "tokens", "objective"):
        table.add_column(name, justify="right", no_wrap=True)
    for c in results["candidates"][:rows]:
        table.add_row(c["name"], *_cells(c["select"]))
    table.add_section()
    table.add_row("chosen, held out", *_cells(results["chosen"]["held_out"]))
    table.add_row("most flips, held out", *_cells(results["paper"]["held_out"]))
    console.print(table)
    most = results["paper"]["select"]["tfr"]["rate"]
    cost = [c["select"]["benign_flip_rate"]["rate"] for c in results["candidates"] if c["select"]["tfr"]["rate"] == most]
    spread = f"with benign flip rates from {min(cost):.2f} to {max(cost):.2f}"
    console.print(f"chosen   {results['chosen']['name']}", soft_wrap=True)
    number = f"{len(cost)} of {len(results['candidates'])} contexts"
    console.print(f"most     {most:.2f} flips in {number}, {spread}; first: {results['paper']['name']}", soft_wrap=True)


def _cells(measured: dict[str, Any]) -> list[str]:
    def rate(cell: dict[str, Any]) -> str:
        return f"{cell['rate']:.2f} {cell['low']:.2f}-{cell['high']:.2f}"

    rates = [rate(measured[name]) for name in ("tfr", "benign_flip_rate")]
    return [*rates, f"{measured['response_tokens']:.0f}", f"{measured['objective']:.3f}"]


if __name__ == "__main__":
    raise SystemExit(entry(main))
