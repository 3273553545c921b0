"""Sample responses to a file of prompts.

    python -m opsa_jax.generate --model Qwen/Qwen3-0.6B --prompts prompts.jsonl --out responses.jsonl --max-new-tokens 1024 --temperature 0
    python -m opsa_jax.generate --prompts sandbox:eval.jsonl --out o.jsonl --temperature 1 --samples-per-prompt 4 --context @sandbox-strong
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from opsa_jax.cli import entry, parse
from opsa_jax.config import MeshConfig, RolloutConfig, SourceConfig
from opsa_jax.errors import UserError

if TYPE_CHECKING:
    from opsa_jax.data.chat import Chat
    from opsa_jax.rollout.engine import Engine
    from opsa_jax.rollout.rows import RowFile

DESCRIPTION = """\
Sample responses to a file of prompts. One JSON line per response: id, sample, prompt, response, finished (ended by a stop token,
not by the room) and tokens. Lines are written as responses end, so in no particular order; --resume continues a stopped file.
A response depends on model, prompt, settings, seed, id and sample number only, not on --batch or the mesh."""


@dataclass(frozen=True)
class GenerateConfig:
    prompts: str
    """A .jsonl, .csv, .parquet or .arrayrecord file, hf:NAME, tfds:NAME, or sandbox:FILE; records need no label."""
    out: str
    """File to write (.jsonl)."""
    model: str = "sandbox:base"
    """Checkpoint: a local folder in Hugging Face format, a hub name (org/name), or sandbox:base."""
    revision: str = "main"
    """Branch, tag or commit of a hub checkpoint."""
    rollout: Annotated[RolloutConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: RolloutConfig(max_new_tokens=512))
    seed: int = 0
    """Seed of the sampling."""
    batch: int = 64
    """Responses decoded at the same time."""
    context: str = ""
    """Context before every prompt: a text, @name of a shipped context, file:PATH, or empty for none."""
    placement: Literal["system", "user"] = "system"
    """Where the context goes: a system message, or the start of the user turn."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Reasoning switch of the chat template (enable_thinking); auto leaves it to the template."""
    steering: str = ""
    """A .safetensors file with one tensor [layers, width], added to the input of each block at every position."""
    steering_coefficient: float = 1.0
    """Factor of the steering vectors."""
    prompt_field: str = "prompt"
    """Field with the user's text."""
    id_field: str = "id"
    """Field with the record's id; the record's number where the field is absent."""
    split: str = "train"
    """Split of an hf: or tfds: set."""
    limit: int = 0
    """Use only the first this many records; 0 is all."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and matrix products: auto is bfloat16 on TPU and GPU and float32 on CPU."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices."""
    resume: bool = False
    """Continue the file at --out: rows in it are kept and not sampled again."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cfg = parse(GenerateConfig, None, argv, "python -m opsa_jax.generate", DESCRIPTION)
    for name, value in {
        "max-new-tokens": cfg.rollout.max_new_tokens,
        "samples-per-prompt": cfg.rollout.samples_per_prompt,
        "batch": cfg.batch,
    }.items():
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if cfg.seed < 0:
        raise UserError(f"--seed {cfg.seed}: must be 0 or above")
    print(generate(cfg))
    return 0


def generate(cfg: GenerateConfig) -> str:
    """Do it; returns a one-line summary.

    Raises:
        UserError: bad input, before anything is written.
    """
    # jax and the model code are imported only here: --help and mistakes in flags answer at once.
    import jax

    from opsa_jax.data.chat import Chat
    from opsa_jax.data.loaders import load_source
    from opsa_jax.models import hf
    from opsa_jax.parallel.mesh import make_mesh
    from opsa_jax.rollout.engine import Engine
    from opsa_jax.rollout.filters import Sampling
    from opsa_jax.rollout.rows import RowFile
    from opsa_jax.teachers.contexts import resolve_context
    from opsa_jax.teachers.steering import load_steering

    sampling, mesh, context = Sampling.of(cfg.rollout), make_mesh(cfg.mesh), resolve_context(cfg.context)
    # The label chooses nothing here, so any will do.
    source = SourceConfig(
        path=cfg.prompts, split=cfg.split, label="benign", prompt_field=cfg.prompt_field, id_field=cfg.id_field, limit=cfg.limit
    )
    records, _ = load_source(source)
    _check_ids_differ(cfg, [r.id for r in records])
    folder = hf.fetch(cfg.model, cfg.revision)
    decoder, _ = hf.load_config(cfg.model, cfg.revision)
    dtype = cfg.dtype if cfg.dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
    decoder = dataclasses.replace(decoder, compute_dtype=dtype)
    chat = Chat.load(str(folder), thinking=cfg.thinking)
    texts = [chat.render(r.prompt, context, cfg.placement, r.system) for r in records]
    prompts = [ids.tolist() for ids in chat.encode_texts(texts)]
    if (largest := max(map(max, prompts))) >= decoder.vocab_size:
        raise UserError(f"the tokenizer of {cfg.model} gives id {largest}, but the model has only {decoder.vocab_size} embedding rows")
    steer_LD = load_steering(cfg.steering, decoder, cfg.steering_coefficient) if cfg.steering else None
    rows = RowFile(Path(cfg.out), _settings(cfg, context), cfg.resume)
    samples = range(cfg.rollout.samples_per_prompt)
    wanted = [(r, i, ids) for r, ids in zip(records, prompts, strict=True) for i in samples if (r.id, i) not in rows.done]
    with jax.set_mesh(mesh):
        params = hf.load_params(folder, decoder, dtype, mesh)
        engine = Engine(params, decoder, sampling, chat.stop_ids, cfg.rollout.max_new_tokens, cfg.batch, steer_LD)
        try:
            _write(engine, wanted, rows, chat, cfg.seed)
        finally:
            rows.close()
    s = engine.stats
    kept = f" ({len(rows.done) - s.prompts} were there)" if len(rows.done) > s.prompts else ""
    speed = f"{s.tokens_per_second:.0f} tokens/s with compilation, {s.wasted:.0%} of slot steps idle"
    return f"{cfg.out}: {s.prompts} responses{kept}, {s.finished} finished, {s.tokens} tokens, {speed}"


def _write(engine: "Engine", wanted: list[tuple[Any, int, list[int]]], rows: "RowFile", chat: "Chat", seed: int) -> None:
    import jax
    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from opsa_jax.rollout.sampler import id_numbers, row_keys

    if not wanted:
        return
    numbers_N = id_numbers(r.id for r, _, _ in wanted)
    keys_N = row_keys(jax.random.key(seed), "generate", 0, numbers_N, np.array([i for _, i, _ in wanted], np.int32))
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("responses", total=len(wanted))
        for n, response in engine.stream([ids for _, _, ids in wanted], keys_N):
            record, sample, _ = wanted[n]
            text = chat.decode_response(response.ids.tolist())
            row = {"id": record.id, "sample": sample, "prompt": record.prompt, "response": text}
            rows.append(row | {"finished": response.finished, "tokens": len(response.ids)})
            progress.update(task, advance=1, description=f"{engine.stats.tokens_per_second:.0f} tokens/s")


def _check_ids_differ(cfg: GenerateConfig, ids: list[str]) -> None:
    seen: set[str] = set()
    for i in ids:
        if i in seen:
            raise UserError(f"{cfg.prompts}: id {i!r} occurs twice; make ids unique, or name another --id-field (none: ids are numbers)")
        seen.add(i)


def _settings(cfg: GenerateConfig, context: str) -> dict[str, Any]:
    """What determines the rows. --limit and --samples-per-prompt only say how many of them."""
    flat = dataclasses.asdict(cfg) | dataclasses.asdict(cfg.rollout) | {"context": context}
    return {k: v for k, v in flat.items() if k not in ("out", "resume", "batch", "mesh", "limit", "samples_per_prompt", "rollout")}


if __name__ == "__main__":
    raise SystemExit(entry(main))
