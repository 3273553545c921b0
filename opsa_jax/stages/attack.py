"""The work behind `attack.py`: load, attack, write, fine-tune and attack again."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console

from opsa_jax.config import ModelConfig, SourceConfig
from opsa_jax.data.chat import Chat
from opsa_jax.data.loaders import load_source, write_jsonl
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals.attacks import durability
from opsa_jax.evals.attacks.build import build, open_writer
from opsa_jax.evals.attacks.runner import Asking, Runner, Target, run_all, table
from opsa_jax.evals.endpoint import Endpoint
from opsa_jax.evals.guards import load_guard
from opsa_jax.evals.judges import Judge, PhraseJudge
from opsa_jax.evals.rubric import EndpointJudge
from opsa_jax.evals.verdicts import parse_judge, phrases_for
from opsa_jax.models import hf
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.training.rundir import write_json
from opsa_jax.training.setup import open_checkpoint

if TYPE_CHECKING:
    from opsa_jax.attack import AttackConfig


def attack(config: "AttackConfig") -> dict[str, Any]:
    """All of it; returns the results by attack (after fine-tuning as `NAME after K`).

    Raises:
        UserError: bad input, before anything is written; an attacker that does not answer (finished rows are kept).
    """
    work = _Work(config, Console(highlight=False, soft_wrap=True))
    out = work.out
    with jax.set_mesh(work.mesh):
        target = work.load(config.model, config.revision)
        # Whatever the fine-tuning lacks is said before hours of attacks.
        data = work.finetuning_data(target) if config.durability.steps else None
        results, rows = work.run(target, config.attacks, out, {"model": config.model})
    del target  # room for the fine-tuning
    write_jsonl(out / "transcripts.jsonl", rows)
    write_json(out / "results.json", results)
    work.console.print(table(results, f"attacks on {config.model} (95 % intervals over prompts)"))
    work.show(rows)
    if data is not None:
        results |= work.durable(data)
        write_json(out / "results.json", results)
        kept = {n: r for name in config.durability.attacks for n, r in results.items() if n == name or n.startswith(f"{name} after")}
        work.console.print(table(kept, f"before and after updates of SFT on {data.path}"))
    work.console.print(f"results  {out / 'results.json'}")
    return results


class _Work:
    """What all parts of a run share; made before any weight is read."""

    def __init__(self, config: "AttackConfig", console: Console):
        self.config, self.console, self.out = config, console, Path(config.out)
        self.sandbox = config.prompts.startswith("sandbox:")
        auto = f"phrases:{phrases_for('sandbox' if self.sandbox else '', 'auto')}"
        self.spec = parse_judge(auto if config.judge == "auto" else config.judge)
        if self.spec.kind == "endpoint":
            Endpoint(config.judge_endpoint)  # says what its settings lack
        if self.spec.kind == "guard":
            hf.fetch(self.spec.path, "main")
        if config.settings.attacker.endpoint.url:
            Endpoint(config.settings.attacker.endpoint)
        self.records = _records(config)
        self._judge: Judge | None = None
        self.mesh = make_mesh(config.mesh)
        self.asking = Asking(config.max_new_tokens, config.temperature, config.batch, config.seed)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def load(self, path: str, revision: str = "main") -> Target:
        model = ModelConfig(path=path, revision=revision, compute_dtype=self.config.dtype)
        found = open_checkpoint(model, path)
        chat = Chat.load(str(found.folder), thinking=self.config.thinking)
        return Target(hf.load_params(found.folder, found.cfg, found.cfg.compute_dtype, self.mesh), found.cfg, chat)

    def run(self, target: Target, names: Sequence[str], out: Path, what: dict[str, Any]) -> tuple[dict[str, Any], list[dict]]:
        """Results by attack and transcripts of the named attacks; `what` identifies the model."""
        config = self.config
        names_of = ("revision", "prompts", "where", "thinking", "dtype")
        context = what | {name: getattr(config, name) for name in names_of}

        def writer():
            return open_writer(config.settings.attacker, self.load, self.out, config.seed)

        attacks = build(
            names, target, config.settings, self.sandbox, config.seed, out, config.resume, context, writer, self.say
        )
        runner = Runner(target, self.judge(target), self.asking, context, self.judge_name, out, config.resume, self.say)
        results, rows = run_all(runner, attacks, self.records)
        for a in attacks:
            if any((report := getattr(a, "report", {})).get(k) for k in ("unusable", "unrated")):
                self.say(f"{a.name:10s} " + ", ".join(f"{v} {k}" for k, v in report.items()))
                results[a.name]["attacker"] = report
        return results, rows

    @property
    def judge_name(self) -> str:
        """What determines verdicts."""
        e, spec = self.config.judge_endpoint, self.spec
        where = f"{e.url} {e.model}" if spec.kind == "endpoint" else spec.path
        return f"{spec.kind}:{spec.name} {where}".strip()

    def judge(self, target: Target) -> Judge:
        """The judge, loaded once."""
        if self._judge is None:
            if self.spec.kind == "phrases":
                self._judge = PhraseJudge(self.spec.name, target.opened)
            elif self.spec.kind == "endpoint":
                endpoint = Endpoint(self.config.judge_endpoint, self.out / "judge-cache.jsonl")
                self._judge = EndpointJudge(endpoint, self.spec.name, target.opened)
            else:
                dtype = target.cfg.compute_dtype
                self._judge = load_guard(self.spec.name, self.spec.path, self.mesh, dtype, opened=target.opened)
        return self._judge

    def finetuning_data(self, target: Target) -> SourceConfig:
        cfg, file = self.config.durability, self.out / "durability" / "own.jsonl"
        data = durability.source(cfg, self.sandbox, lambda: durability.own_answers(target, cfg, self.asking, file))
        load_source(data)
        return data

    def durable(self, data: SourceConfig) -> dict[str, Any]:
        """Results of the attacks after each number of updates. Resuming trains again, and asks nothing twice."""
        config, found = self.config, {}
        model = ModelConfig(path=config.model, revision=config.revision, compute_dtype=config.dtype, thinking=config.thinking)
        run = durability.run_config(model, data, config.durability, config.seed, config.mesh)
        for k, target in durability.finetuned(run, config.durability.steps, self.say):
            folder, d = self.out / "durability" / f"after-{k}", config.durability
            what = {"model": config.model, "finetuned": [k, d.data, d.where, d.prompts, d.limit, d.lora_rank, d.lr, d.batch]}
            results, rows = self.run(target, d.attacks, folder, what)
            write_jsonl(folder / "transcripts.jsonl", rows)
            found |= {f"{name} after {k}": r for name, r in results.items()}
        return found

    def show(self, rows: list[dict]) -> None:
        """The first success of each attack, redacted unless asked for."""
        for name in dict.fromkeys(row["attack"] for row in rows):
            row = next((r for r in rows if r["attack"] == name and r["success"]), None)
            if row is not None:
                text = " ".join(row["response"].split())
                hidden = f"[redacted: {len(text.split())} words; --show-harmful prints it]"
                which = f"{row['id']}, {row['variant']}" if row["variant"] else row["id"]
                self.say(f"{name:10s} {which}: {text if self.config.show_harmful else hidden}")


def _records(config: "AttackConfig") -> list[Record]:
    where = ("metric=asr_seen" if config.prompts == "sandbox:eval.jsonl" else "") if config.where == "auto" else config.where
    source = SourceConfig(
        path=config.prompts, where=where, label="harmful", prompt_field=config.prompt_field, split=config.split, limit=config.limit
    )
    records = list(load_source(source)[0])
    seen: set[str] = set()
    for r in records:
        if r.id in seen:
            raise UserError(f"{config.prompts}: id {r.id!r} occurs twice; make ids unique")
        seen.add(r.id)
    return records
