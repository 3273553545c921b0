"""Make training answers with a model: for SFT, for preference pairs, and for the calibrated teacher of COPSD.

    python -m opsa_jax.answers self --out answers.jsonl      sampled under a context and filtered; the context is not kept (ThinkSafe)
    python -m opsa_jax.answers pairs --out pairs.jsonl       chosen and rejected, sampled under two contexts (DPO)
    python -m opsa_jax.answers cross --constitution @sandbox --out cross.jsonl       with the constitution in the input (COPSD stage 1)

Every sampled response is kept in OUT.parts, so --resume continues a stopped command. OUT is written at the end, OUT.report.json with it.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from opsa_jax.cli import entry, parse
from opsa_jax.config import MeshConfig
from opsa_jax.errors import UserError
from opsa_jax.evals.endpoint import EndpointConfig

if TYPE_CHECKING:
    from opsa_jax.data.records import Record


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the three commands share."""

    out: str
    """File to write (.jsonl)."""
    prompts: str = "sandbox:train.jsonl"
    """A .jsonl, .csv, .parquet or .arrayrecord file, hf:NAME, tfds:NAME, or sandbox:FILE."""
    split: str = "train"
    """Split of an hf: or tfds: set."""
    where: str = ""
    """Keep only records whose field has this value, written FIELD=VALUE."""
    label: str = ""
    """Label given to every record (harmful or benign), for sets that have no label column."""
    prompt_field: str = "prompt"
    """Field with the user's text."""
    label_field: str = "label"
    """Field with harmful or benign."""
    category_field: str = "category"
    """Field with the category."""
    id_field: str = "id"
    """Field with the record's id; the record's number where the field is absent."""
    limit: int = 0
    """Use only the first this many records; 0 is all."""
    model: str = "sandbox:base"
    """Checkpoint: a local folder in Hugging Face format, a hub name (org/name), or sandbox:base."""
    revision: str = "main"
    """Branch, tag or commit of a hub checkpoint."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Reasoning switch of the chat template (enable_thinking); auto leaves it to the template."""
    placement: Literal["system", "user"] = "system"
    """Where contexts go: a system message, or the start of the user turn."""
    samples: int = 1
    """Responses sampled per prompt."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    max_new_tokens: int = 512
    """Room for a response."""
    refusal_phrases: str = "sandbox-v1"
    """List of refusal phrases that decides what is a refusal: sandbox-v1, english-v1."""
    seed: int = 0
    """Seed of the sampling."""
    batch: int = 64
    """Responses decoded at the same time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and matrix products: auto is bfloat16 on TPU and GPU and float32 on CPU."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices."""
    resume: bool = False
    """Continue a stopped command: what is in OUT.parts is kept and not sampled again."""


@dataclass(frozen=True, kw_only=True)
class Self(Command):
    """Answers of a model to prompts under a context by label, filtered; the context is not in the input of what is written.

    The defaults are those of ThinkSafe (arXiv 2601.23143). Kept are finished responses whose thinking ends: to harmful prompts refusals,
    to benign prompts what is no refusal. Rows: id, prompt, label, category, response; system where the record has one. With several
    samples per prompt every one that passes is a row, with #NUMBER after the id.
    """

    context_harmful: str = "@sandbox-strong"
    """Context for prompts labelled harmful: a text, @name of a shipped context, file:PATH, or empty for none."""
    context_benign: str = ""
    """Context for prompts labelled benign, likewise."""
    temperature: float = 0.6
    """Sampling temperature; 0 is greedy."""
    top_p: float = 0.95
    """Keep the smallest set of tokens with this much probability."""
    top_k: int = 20
    """Keep the k most likely tokens; 0 keeps all."""


@dataclass(frozen=True, kw_only=True)
class Pairs(Command):
    """Preference pairs, sampled under two contexts: a refusal above a compliant answer for harmful prompts, the reverse for benign ones.

    Prompts for which one of the two is not found among the samples are left out. Rows: id, prompt, label, category, response (chosen),
    rejected; system where the record has one.
    """

    harmful_refuse: str = "@sandbox-strong"
    """Context under which harmful prompts are refused: a text, @name, file:PATH, or empty for none."""
    harmful_comply: str = "@sandbox-helpful"
    """Context under which harmful prompts are answered, likewise."""
    benign_comply: str = "@sandbox-helpful"
    """Context under which benign prompts are answered, likewise."""
    benign_refuse: str = "@sandbox-strict"
    """Context under which benign prompts are refused, likewise."""
    samples: int = 4
    """Responses sampled per prompt and context; the first of the wanted kind is taken."""


@dataclass(frozen=True, kw_only=True)
class Cross(Command):
    """Training data of a calibrated teacher (COPSD stage 1, arXiv 2606.03089): answers with the constitution always in the input.

    Benign prompts get the model's own answer, sampled without a constitution. Harmful prompts get the best of several answers written
    under it (--sources), as a pairwise judge finds; the model rewrites that answer, and of several rewritten ones the one is taken that
    brings the lengths to those of the model's own answers. Rows: id, prompt, label, category, system (the constitution), response, writer.
    With --placement user the constitution stands at the start of prompt instead.
    """

    constitution: str = "@default"
    """One text per category: @default, @sandbox, or file:PATH of a JSON file."""
    general: Literal["default", "none"] = "default"
    """What benign prompts get from the constitution: its general text, or nothing."""
    sources: tuple[str, ...] = ("self",)
    """Writers of the answers to harmful prompts, any of: self (the model under the constitution), checkpoint:PATH (another one under it),
    endpoint (the one of --endpoint.url), file:PATH (JSON lines with id and response)."""
    samples: int = 4
    """Answers per harmful prompt and source, from which the judge chooses (a file gives those it has)."""
    judge: Literal["rule", "endpoint"] = "rule"
    """Who compares two answers: the phrase lists (explained refusals win), or the model of --judge-endpoint."""
    rewrite: Literal["auto", "prompt", "resample", "none"] = "auto"
    """prompt: the model is asked to rewrite the answer, without a constitution; resample: its own samples under the constitution that deal
    with the request in the same manner, for models too small to follow such an instruction; none: answers stay as they are; auto is
    resample where the tokenizer does not know the words of the instruction (the sandbox), else prompt."""
    rewrites: int = 4
    """Rewritten answers per prompt, from which the one of the wanted length is taken."""
    lengths: Literal["harmful", "all"] = "harmful"
    """Whose lengths are matched: the model's own answers, without a constitution, to the harmful prompts or to all."""
    endpoint: EndpointConfig = field(default_factory=lambda: EndpointConfig(temperature=1.0))
    """The endpoint that writes answers."""
    judge_endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """The endpoint that judges; an empty url is that of --endpoint."""


Commands = (
    Annotated[Self, tyro.conf.subcommand("self")]
    | Annotated[Pairs, tyro.conf.subcommand("pairs")]
    | Annotated[Cross, tyro.conf.subcommand("cross")]
)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m opsa_jax.answers`."""
    cfg = parse(Commands, None, sys.argv[1:] if argv is None else argv, "python -m opsa_jax.answers", __doc__)
    print(run(cfg))
    return 0


def run(cfg: Command) -> str:
    """Do it; returns a one-line summary.

    Raises:
        UserError: bad input, before anything is sampled; an endpoint that does not answer; nothing left after filtering.
    """
    for name in ("samples", "max_new_tokens", "batch", *(("rewrites",) if isinstance(cfg, Cross) else ())):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least 1")
    if cfg.seed < 0 or cfg.limit < 0:
        raise UserError(f"--seed {cfg.seed} and --limit {cfg.limit}: must be 0 or above")
    if Path(cfg.out).exists() and not cfg.resume:
        raise UserError(f"{cfg.out} exists; continue it with --resume, remove it, or choose another --out")
    if isinstance(cfg, Cross):
        from opsa_jax.stages.answers_cross import cross

        return cross(cfg)
    return own(cfg) if isinstance(cfg, Self) else pairs(cfg)


def own(cfg: Self) -> str:
    """`self`: sample, filter, write."""
    from opsa_jax.stages.answers import Shop
    from opsa_jax.teachers.contexts import resolve_context

    contexts = {"harmful": resolve_context(cfg.context_harmful), "benign": resolve_context(cfg.context_benign)}
    shop = Shop(cfg)
    found = shop.sample("self", shop.prompts(shop.records, [contexts[r.label] for r in shop.records]), cfg.samples)
    counts = {label: Counter() for label in contexts}
    rows = []
    for record in shop.records:
        for number, response in enumerate(found[record.id]):
            fault = shop.fault(record, response)
            counts[record.label][fault or "kept"] += 1
            if not fault:
                rows.append(row(record, response.text, f"{record.id}#{number}" if cfg.samples > 1 else record.id))
    return shop.finish(rows, counts)


def pairs(cfg: Pairs) -> str:
    """`pairs`: sample under both contexts, take the first response of the wanted kind of each, write."""
    from opsa_jax.evals.judges import manner
    from opsa_jax.stages.answers import Shop
    from opsa_jax.teachers.contexts import resolve_context

    refuse = {"harmful": resolve_context(cfg.harmful_refuse), "benign": resolve_context(cfg.benign_refuse)}
    comply = {"harmful": resolve_context(cfg.harmful_comply), "benign": resolve_context(cfg.benign_comply)}
    shop = Shop(cfg)

    def first(stage: str, contexts: dict[str, str], wanted: tuple[str, ...]) -> dict[str, str]:
        """The first whole response of the wanted manner by id."""
        found = shop.sample(stage, shop.prompts(shop.records, [contexts[r.label] for r in shop.records]), cfg.samples)
        whole = {i: [r.text for r in rs if shop.whole(r)] for i, rs in found.items()}
        good = {i: [t for t in ts if manner(t, cfg.refusal_phrases, shop.opened) in wanted] for i, ts in whole.items()}
        return {i: ts[0] for i, ts in good.items() if ts}

    refused, complied = first("refuse", refuse, ("refused", "explained")), first("comply", comply, ("complied",))
    counts = {label: Counter() for label in refuse}
    rows = []
    for record in shop.records:
        missing = [name for name, found in (("refusal", refused), ("compliant answer", complied)) if record.id not in found]
        counts[record.label][f"no {' and no '.join(missing)}" if missing else "kept"] += 1
        if not missing:
            chosen, rejected = (refused, complied) if record.label == "harmful" else (complied, refused)
            rows.append(row(record, chosen[record.id]) | {"rejected": rejected[record.id]})
    return shop.finish(rows, counts)


def row(record: "Record", response: str, id: str = "") -> dict[str, Any]:
    """A line of the output; the record's own system message stays with it."""
    line = {"id": id or record.id, "prompt": record.prompt, "label": record.label, "category": record.category}
    return line | ({"system": record.system} if record.system else {}) | {"response": response}


if __name__ == "__main__":
    raise SystemExit(entry(main))
