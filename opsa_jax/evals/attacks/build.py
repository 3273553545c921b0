"""From names and settings to attacks on a model; the one place that knows them all."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from opsa_jax.data.chat import Chat
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals.attacks import frames, written
from opsa_jax.evals.attacks.base import Attack, Static
from opsa_jax.evals.attacks.gcg_attack import Gcg
from opsa_jax.evals.attacks.runner import Target
from opsa_jax.evals.attacks.settings import AttackerConfig, AttackSettings, check
from opsa_jax.evals.attacks.texts import Texts, texts
from opsa_jax.evals.attacks.writer import EngineWriter, Writer
from opsa_jax.evals.benchmarks import Transform, wants_attacks
from opsa_jax.evals.endpoint import Endpoint


def own_texts(settings: AttackSettings, sandbox: bool) -> Texts:
    """The set of texts that the settings mean."""
    return texts(("sandbox-v1" if sandbox else "english-v1") if settings.texts == "auto" else settings.texts)


def build(
    names: Sequence[str],
    target: Target,
    settings: AttackSettings,
    sandbox: bool = False,
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    context: dict[str, Any] | None = None,
    writer: Callable[[], Writer] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Attack]:
    """The named attacks (settings.ATTACKS), in that order.

    Args:
        sandbox: the prompts are of the embedded world (for texts=auto).
        out: folder for what optimised attacks keep.
        context: what identifies model and prompts, for resuming.
        writer: makes the model that writes; called only where an attack needs it (`open_writer`).

    Raises:
        UserError: an unknown name, a file that cannot be read, a missing attacker.
    """
    check(tuple(names), settings)
    own, made = own_texts(settings, sandbox), []
    attacker = describe(settings.attacker)
    need = [n for n in names if n in ("rewrite", "pap", "pair")]
    if need and writer is None:
        raise UserError(f"attack {need[0]} needs a model that writes: give --attacker.path or --attacker.endpoint.url")
    pen = writer() if need else None
    for name in names:
        if name == "direct":
            made.append(frames.direct())
        elif name == "prefill":
            made.append(frames.prefill(settings.prefill, own, target.kind))
        elif name == "template":
            made.append(frames.template(settings.template, own))
        elif name == "many-shot":
            made.append(frames.many_shot(settings.many_shot, own, seed))
        elif name == "rewrite":
            made.append(written.rewrite(settings.rewrite, pen, attacker))
        elif name == "pap":
            made.append(written.pap(settings.pap, pen, attacker))
        elif name == "pair":
            # An endpoint can also score; a checkpoint of the size that fits beside the attacked one seldom can.
            scorer = pen if settings.attacker.endpoint.url else None
            made.append(written.Pair(settings.pair, pen, scorer, attacker))
        else:
            universal = name == "gcg-universal"
            made.append(Gcg(target, settings.gcg, own, seed, universal, out, resume, context, say))
    return made


def suite_attacks(spec: str, chat: Chat) -> dict[str, Transform]:
    """What group `attacks` of an evaluation suite applies to a model with this template; nothing where the suite does not name it."""
    return transforms(kind=frames.opening_kind(chat.opening(), "<think>" in chat.tokenizer.get_vocab())) if wants_attacks(spec) else {}


def transforms(settings: AttackSettings | None = None, kind: str = "before", seed: int = 0) -> dict[str, Transform]:
    """The attacks that are only text, for `--suite ...,attacks` of evaluate: record -> attacked records.

    Args:
        kind: where the answers of the model start (`Target.kind`, `frames.opening_kind`).
    """
    settings = settings or AttackSettings()

    def one(name: str) -> Transform:
        made: dict[bool, Static] = {}

        def transform(record: Record) -> list[Record]:
            sandbox = record.source.startswith("sandbox:") or record.extra.get("benchmark") == "sandbox"
            if sandbox not in made:
                own = own_texts(settings, sandbox)
                made[sandbox] = {
                    "prefill": lambda: frames.prefill(settings.prefill, own, kind),
                    "template": lambda: frames.template(settings.template, own),
                    "many_shot": lambda: frames.many_shot(settings.many_shot, own, seed),
                }[name]()
            return [
                replace(record, prompt=a.prompt, system=a.system, extra=dict(record.extra) | {"prefill": a.prefill, "variant": a.variant})
                for a in made[sandbox].variants(record)
            ]

        return transform

    return {name: one(name) for name in ("prefill", "template", "many_shot")}


def describe(attacker: AttackerConfig) -> dict[str, Any]:
    """What determines an attacker's texts, as JSON values."""
    if attacker.path:
        return {"path": attacker.path, "temperature": attacker.temperature, "max_new_tokens": attacker.max_new_tokens}
    keep = ("url", "model", "temperature", "max_tokens")
    return {k: v for k, v in asdict(attacker.endpoint).items() if k in keep} if attacker.endpoint.url else {}


def open_writer(attacker: AttackerConfig, load: Callable[[str], Target], out: Path | None = None, seed: int = 0) -> Writer:
    """The model that writes. Its replies are kept in OUT/attacker.jsonl, so a resumed run does not ask again.

    Args:
        load: a checkpoint's path -> the model (chat, config, weights).
    """
    cache = None if out is None else out / "attacker.jsonl"
    if attacker.endpoint.url:
        return Endpoint(attacker.endpoint, cache)
    t = load(attacker.path)
    return EngineWriter(
        t.params, t.cfg, t.chat, attacker.max_new_tokens, attacker.temperature, seed=seed, cache=cache, name=attacker.path
    )
